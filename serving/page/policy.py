"""A page with its style sheet and script inside, and the headers that allow these two and nothing else.

Of a folder with page.html, page.css and page.js. Standard library alone, since vLLM's environment loads it.
"""

import base64
import hashlib
from pathlib import Path


def page(folder: Path) -> tuple[bytes, dict[str, str]]:
    """One script and one style sheet, named by their hashes; no other address; no text ever parsed as markup."""
    style, script = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    text = (folder / "page.html").read_text("utf-8").replace("/*style*/", style).replace("/*script*/", script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    return text.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
