"""A hub of datasets on this machine, as far as `datasets` asks it: what is served is a mapping of files."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@contextmanager
def hub(repository: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length") or 0))
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            status, headers, body = _reply(path, sent)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = _answer

        def log_message(self, *_: object) -> None:
            pass

    def _reply(path: str, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        api, plain = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"
        if path.startswith(plain):
            name = path.removeprefix(plain).partition("/")[2]
            if name not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            return 200, {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": COMMIT}, files[name]
        if path.startswith(f"{api}/paths-info/"):
            wanted = json.loads(sent)["paths"]
            return _json([_entry(name) for name in wanted if name in files])
        if path.startswith(f"{api}/tree/"):
            folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
            return _json([_entry(name) for name in files if name.rpartition("/")[0] == folder])
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return _json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _entry(name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
