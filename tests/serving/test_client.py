"""The key and the address, as people give them."""

import pytest

from pipeline.errors import UserError
from serving.client import address_of, api_key


@pytest.mark.parametrize(
    "key", [" secret", "secret ", "secret\n", "\t", "sch\u00fcssel", "\u65e5\u672c", "a\x7fb", "\udcff"]
)
def test_a_key_that_no_request_can_hold_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("ALETHEIA_API_KEY", key)
    with pytest.raises(UserError, match=r"^ALETHEIA_API_KEY: .* no request can send; try .*openssl rand") as refusal:
        api_key()
    assert not key.strip() or key.strip() not in str(refusal.value)


def test_any_other_key_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("secret-123", "a b", "~!@#$%^&*()"):
        monkeypatch.setenv("ALETHEIA_API_KEY", key)
        assert api_key() == key
    monkeypatch.setenv("ALETHEIA_API_KEY", "")
    assert api_key() is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("127.0.0.1:8401", "http://127.0.0.1:8401/v1"),
        ("127.0.0.1:8401/v1", "http://127.0.0.1:8401/v1"),
        ("localhost", "http://localhost/v1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
        ("http://127.0.0.1:8401", "http://127.0.0.1:8401/v1"),
        ("http://127.0.0.1:8401/", "http://127.0.0.1:8401/v1"),
        ("https://example.org/v1/", "https://example.org/v1"),
        ("https://example.org/api/v2", "https://example.org/api/v2"),
    ],
)
def test_an_address_is_made_whole(written: str, meant: str) -> None:
    assert address_of(written) == meant


@pytest.mark.parametrize("written", ["", "http://", "ftp://a/v1", "127.0.0.1:99999", "[::1", "http://a:b/v1", "a b"])
def test_what_is_none_is_one_line(written: str) -> None:
    with pytest.raises(UserError, match=r"is no address of a server; try http://127\.0\.0\.1:8000/v1$"):
        address_of(written)
