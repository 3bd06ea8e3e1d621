"""What both ends of a server agree on: the API key, and an address as people write it. Nothing but the standard library."""

import os
from urllib.parse import urlsplit

from pipeline.errors import UserError

VARIABLE = "ALETHEIA_API_KEY"


def api_key() -> str | None:
    """From the environment, so that it stands in no command line, record or log. None where there is none.

    Raises `UserError` for one that no request could hold: a header is ASCII, and spaces around its value are lost.
    """
    key = os.environ.get(VARIABLE, "")
    if key != key.strip() or not (key.isascii() and key.isprintable()):
        what = "holds a space at an end, a control character or one beyond ASCII, which no request can send"
        raise UserError(what, where=VARIABLE, remedy="the output of `openssl rand -hex 16`")
    return key or None


def address_of(endpoint: str) -> str:
    """`127.0.0.1:8000` is `http://127.0.0.1:8000/v1`; a path of its own is kept. Raises `UserError` where it is none."""
    url = (endpoint if "://" in endpoint else f"http://{endpoint}").strip().rstrip("/")
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and len(url.split()) == 1
    except ValueError:
        whole = False
    if not whole:
        raise UserError("is no address of a server", where=endpoint, remedy="http://127.0.0.1:8000/v1")
    return url if parts.path else f"{url}/v1"
