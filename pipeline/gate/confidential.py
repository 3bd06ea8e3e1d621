"""Secrets and personal data in a text, told without being repeated.

    secrets(text)    # ["an AWS access key (AKIA…) in line 3"]
    personal(text)   # ["an e-mail address (…@firm.de) in line 1"]

Secrets are found by those detectors of detect-secrets whose form leaves little doubt (its keyword and entropy detectors
take most code for a secret), by the forms of some newer keys, and as a value that looks random and is given to a name
such as `password` or to a user (curl's `-u`): from 8 characters on where it mixes both cases and digits, else from 16.
Numbers are judged by phonenumbers and python-stdnum.

What a manual would write is no finding: placeholders, the values of documentation, addresses at example.com, a URL's
password at a host without a domain. NOT found are passwords made of words, those of fewer than 16 characters without
both cases and a digit (and about one in seven with them, whose letters fall into runs), names of people, postal
addresses, phone numbers without a country's code, and what stands behind the first `MOST` of a kind or behind thousands
of numbers that are none: the time for a text grows with its length alone.
"""

import base64
import functools
import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

from pipeline.gate.text import lines_of

LONG = 16  # characters from which on the letters of a value tell whether it is random
LINE, OVERLAP = 2_000, 400  # characters of a line looked at together: the time of some patterns grows with the square
MOST = 20  # findings of a kind that are told
MOST_JUDGED = 5_000  # of a kind that are judged, which takes up to a tenth of a millisecond each

# ── Secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# what: the words without which there is none, and detect-secrets' module and class or a pattern of our own
_KEYS: dict[str, tuple[tuple[str, ...], str]] = {
    "an AWS access key": (("AKIA", "ASIA", "ABIA", "ACCA"), "aws.AWSKeyDetector"),
    "an Azure storage key": (("AccountKey=",), "azure_storage_key.AzureStorageKeyDetector"),
    "a GitHub token": (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), "github_token.GitHubTokenDetector"),
    "a fine-grained GitHub token": (("github_pat_",), r"github_pat_\w{22,}"),
    "a GitLab token": (("glpat-", "gldt-", "glrt-", "glcbt-", "glptt-", "gloas-"), "gitlab_token.GitLabTokenDetector"),
    "a PyPI token": (("pypi-Ag",), "pypi_token.PypiTokenDetector"),
    "an npm token": (("npm_",), r"\bnpm_[A-Za-z0-9]{36}"),
    "a SendGrid key": (("SG.",), "sendgrid.SendGridDetector"),
    "a Slack token": (("xox", "hooks.slack.com"), "slack.SlackDetector"),
    "a Square secret": (("sq0csp-",), "square_oauth.SquareOAuthDetector"),
    "a Stripe key": (("k_live_",), "stripe.StripeDetector"),
    "an OpenAI key": (("T3BlbkFJ",), r"(?<![\w-])sk-[\w-]{0,160}[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}"),
    "an Anthropic key": (("sk-ant-",), r"\bsk-ant-[\w-]{30,}"),
    "a Hugging Face token": (("hf_",), r"\bhf_[A-Za-z0-9]{30,}"),
    "a Google key": (("AIza",), r"\bAIza[\w-]{35}"),
    "a DigitalOcean token": (("dop_v1_",), r"\bdop_v1_[0-9a-f]{64}"),
}
_PREFIX = re.compile(r"[A-Za-z]{2,10}(?:[_.-](?:pat|ant|live|proj|v\d|secret)?[_-]?|(?<=AKIA|ASIA))")
_PLACEHOLDER = re.compile(
    r"""example|sample|dummy|fake|placeholder|change[_-]?(?:me|this|it)|redacted|removed|your|x{4}|\*\*\*|\.\.\.|…|<|\$|[{}]|%\(
    |todo|replace|insert|secret|passw|s3cr|p[a@4][s5$]{2}|hunter2|letmein|qwerty|test|demo|abcdef|01234|12345|98765|deadbeef
    |(.)\1{4}""",
    re.IGNORECASE | re.VERBOSE,
)
_SIGNATURE = re.compile(r"[\w-]{20,}", re.ASCII)
_PEM_BODY = re.compile(r"[A-Z -]{0,20}(?:\s|\\[rn]|[A-Z][\w-]+: [^\n]*\n)*([A-Za-z0-9+/=]{40,})")
_URL_HOST = re.compile(r"[\w.-]+")
_NOBODYS = re.compile(r"^(?:localhost|127\..*|0\.0\.0\.0)$|(?:^|\.)example(?:\.\w+)?$|\.(?:test|invalid|localhost)$")
_VALUE = re.compile(r"""[=:](?<=[A-Za-z"'\]\s:].)>? ?(["']?)([A-Za-z0-9+/_.~!@#%^&*=-]{8,2048}+)(?=["'`\\\s,;)}]|\Z)""")
_USER = re.compile(r"""(?<![\w-])(?:-u ?|--user[ =])["']?[^\s:"'$<]{1,64}:([^\s"'`]{8,2048})""")  # curl's
_NAMED_SECRET = re.compile(
    r"""(?:passw(?:or)?d|passphrase|pwd|secret|token|(?:api|access|auth|private|service|account|client|signing|encryption)[_-]?key)
    (?:[_-]?(?:key|access[_-]key|base|id))?["']?\]?\s*:?$""",
    re.IGNORECASE | re.VERBOSE,
)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_WORDS = re.compile(  # a name, a path, a date
    r"[/~._-]*(?:[A-Za-z]+\d{0,4}|\d+)(?:[/_.:#@=~+-]+(?:[A-Za-z]+\d{0,4}|\d+))*[/._-]*"
)
_WORD = re.compile(  # five letters of one case with a vowel are taken for one
    r"(?=[A-Z]?[a-z]*[aeiouy])(?:[A-Z][a-z]|[a-z]{2})[a-z]{3}"
)
_USUAL = re.compile(
    r"troub|admin|welcome|strong|super|complex|secure|login|guest|hello|master|monkey|dragon|mysql|postgres|abc|xyz|i2e"
)
_LEET = str.maketrans("013457@$!", "oieastasi")
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_HARMLESS_NAME = re.compile(
    r"(?:page|next|continuation|continue|sync|resume|delta|cursor|fencing|idempotency|cancellation|public|cache|partition)[_-]?"
    r"(?:page[_-]?|sync[_-]?)?(?:token|key)[^\n]{0,6}$",
    re.IGNORECASE,
)


def secrets(text: str) -> list[str]:
    """What keys, tokens and passwords stand in a text, and in which line (from 1); `MOST` of a kind, and that there are more."""
    line = lines_of(text)
    known: set[int] = set()  # lines with a key of a known form, which may be given to a name as well
    found: list[str] = []

    def tell(what: str, places: Iterator[tuple[int, str]]) -> None:
        shown = ((f"{what}{value}", line(at)) for at, value in places)
        found.extend(_told(shown, known))

    for what, (marks, source) in _KEYS.items():
        for mark in marks:
            if mark in text:
                tell(what, _keys(text, mark, source))
    if "eyJ" in text:
        tell("a JSON web token (eyJ…)", _tokens(text))
    if "PRIVATE KEY" in text:
        tell("a private key", _private_keys(text))
    if "://" in text and "@" in text:
        tell("a password in a URL", _url_passwords(text))
    given = ((what, line(at)) for what, at in _given(text))
    return [*found, *_told((one for one in given if one[1] not in known), set())]


def _told(findings: Iterator[tuple[str, int]], lines: set[int]) -> list[str]:
    """Each kind once a line; the lines are added to those given."""
    found: dict[str, None] = {}
    for what, line in islice(findings, MOST_JUDGED):
        told = f"{what} in line {line}"
        if told not in found and len(found) == MOST:
            return [*found, f"more, such as {told}"]
        found[told] = None
        lines.add(line)
    return list(found)


def _keys(text: str, mark: str, source: str) -> Iterator[tuple[int, str]]:
    for offset, piece in _pieces(text, mark):
        for pattern in _patterns(source):
            for match in pattern.finditer(piece):
                rest = _PREFIX.sub("", match[0], count=1)
                if not _PLACEHOLDER.search(match[0]) and len(set(rest)) >= 8:
                    yield offset + match.start(), f" ({match[0][:4]}…)"


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    for offset, piece in _pieces(text, "eyJ"):
        for pattern in _patterns("jwt.JwtTokenDetector"):
            for match in pattern.finditer(piece):
                signature = _SIGNATURE.match(piece, match.end())
                if signature and not _PLACEHOLDER.search(signature[0]) and _is_someones_token(match[0].rstrip(".")):
                    yield offset + match.start(), ""


def _is_someones_token(token: str) -> bool:
    """Whether head and payload are JSON, and the payload is not jwt.io's John Doe's."""
    from detect_secrets.plugins.jwt import JwtTokenDetector

    try:
        if not JwtTokenDetector.is_formally_valid(token):
            return False
        payload = token.split(".")[1]
        values = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, RecursionError):
        return False
    return not isinstance(values, dict) or (str(values.get("sub")) != "1234567890" and values.get("name") != "John Doe")


def _private_keys(text: str) -> Iterator[tuple[int, str]]:
    for pattern in _patterns("private_key.PrivateKeyDetector"):
        for match in pattern.finditer(text):
            body = _PEM_BODY.match(text, match.end(), match.end() + LINE)
            if body and len(set(body[1])) >= 16:
                yield match.start(), ""


def _url_passwords(text: str) -> Iterator[tuple[int, str]]:
    for offset, piece in _pieces(text, "@"):
        for pattern in _patterns("basic_auth.BasicAuthDetector"):
            for match in pattern.finditer(piece):
                host = _URL_HOST.match(piece, match.end())
                password = match[1]
                mixed = re.search(r"\d", password) and re.search(r"[A-Za-z]", password)
                known = _PLACEHOLDER.search(password) or not host or _NOBODYS.search(host[0].lower())
                if len(password) >= 8 and mixed and not known:
                    yield offset + match.start(), ""


def _given(text: str) -> Iterator[tuple[str, int]]:
    """Values that look random, given to a name that says secret or to a user."""
    for given in _VALUE.finditer(text):
        value, after = given[2], text[given.end() : given.end() + 1]
        if len(value) < LONG and not given[1] and after in (",", ")", "}"):  # an argument: a name, not a text
            continue
        if _random(value) and _names_a_secret(text[max(0, given.start() - 60) : given.start()]):
            yield "a secret given to a name", given.start(2)
    if "-u" in text:
        for given in _USER.finditer(text):
            if _random(given[1]):
                yield "a user's password", given.start(1)


def _names_a_secret(before: str) -> bool:
    return bool(_NAMED_SECRET.search(before)) and not _HARMLESS_NAME.search(before)


def _random(value: str) -> bool:
    """Whether a value looks made by a machine to be kept, as far as its length lets it be told.

    Of 16 characters or more: digits and letters in no order, at least 3.3 bits a character. Of fewer: both cases and
    digits that change about as often as in what is drawn (five times in eight), and no word. What is text in base64 is
    judged by the text.
    """
    if not re.search(r"\d", value) or not re.search(r"[A-Za-z]", value) or _PLACEHOLDER.search(value):
        return False
    if _UUID.fullmatch(value) or (_WORDS.fullmatch(value) and len(value) >= LONG) or _ATTRIBUTE.fullmatch(value):
        return False
    encoded = _encoded_text(value)
    if encoded:
        return len(encoded) >= 8 and _random(encoded)
    if len(value) < LONG:
        return _mixed(value)
    counts = Counter(value)
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values()) >= 3.3


def _mixed(value: str) -> bool:
    kinds = ["A" if c.isupper() else "a" if c.islower() else "1" if c.isdigit() else "-" for c in value]
    changes = sum(one != other for one, other in pairwise(kinds))
    drawn = {"A", "a", "1"} <= set(kinds) and changes >= 0.4 * len(value)
    plain = value.lower().translate(_LEET)
    return drawn and not _WORD.search(value) and not _USUAL.search(plain) and not _PLACEHOLDER.search(plain)


def _encoded_text(value: str) -> str | None:
    """Of `cGFzc3dvcmQxMjM=`: `password123`; nothing of what is no base64 or no text."""
    try:
        text = base64.b64decode(value.encode() + b"=" * (-len(value) % 4), validate=True).decode("ascii")
    except ValueError:
        return None
    return text.strip() if text.strip().isprintable() else None


@functools.cache
def _patterns(source: str) -> tuple[re.Pattern[str], ...]:
    """A detector's own. Its `analyze_line` would give a part of the match, and may ask the key's owner over the network."""
    module, _, name = source.partition(".")
    if not name.endswith("Detector"):
        return (re.compile(source),)
    return tuple(getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name).denylist)


def _pieces(text: str, mark: str) -> Iterator[tuple[int, str]]:
    """What stands around each mark in its line, a long one in overlapping parts, each with its place in the text."""
    at = text.find(mark)
    while at >= 0:
        first, last = max(0, at - OVERLAP), at + LINE - OVERLAP
        start, end = max(first, text.rfind("\n", first, at) + 1), text.find("\n", at, last)
        yield start, text[start : end if end >= 0 else last]
        at = text.find(mark, end if end >= 0 else last - OVERLAP)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ── Personal data ────────────────────────────────────────────────────────────────────────────────────────────────────

_LOCAL_PART = re.compile(r"[A-Za-z0-9][\w.+%-]{0,63}\Z", re.ASCII)
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![\w-])", re.ASCII)
_LARGE_DOMAINS = _words(  # beside those of countries, which have two letters
    """com org net edu gov mil int info biz name pro mobi aero coop museum jobs travel cat asia post tel xxx app dev page cloud
    online site website tech xyz shop store email mail agency company group team work world network digital software
    solutions systems services consulting engineering finance bank health care legal law school university academy blog
    news media design studio live life today global international berlin london paris nyc tokyo gmbh ltd llc inc swiss
    google microsoft apple amazon"""
)
_RESERVED_NAMES = _words("example test invalid localhost local internal lan intranet corp home arpa onion")
_STAND_INS = _words(  # domains that texts use for anybody's
    """acme company yourcompany mycompany your-company my-company somecompany corp mycorp domain yourdomain mydomain
    your-domain my-domain somedomain yoursite mysite site website email foo bar baz contoso fabrikam northwind globex
    initech test tests testing placeholder host hostname server yourserver yourorg myorg org customer client tenant
    noreply users.noreply"""
)
_ROLES = _words(
    """noreply no-reply do-not-reply donotreply no_reply postmaster hostmaster webmaster abuse security support help info
    contact sales admin administrator root git hg svn daemon mailer-daemon nobody notifications notification alerts alert
    monitoring ops oncall on-call devops sre dev team billing accounts legal privacy press jobs careers hr hello hi office
    user username users you me name email mail your-email youremail your.name your.email my-email someone somebody anyone
    foo bar test tester testing demo example placeholder customer client service services bot ci
    deploy deployer ubuntu ec2-user centos debian pi vagrant www-data nginx postgres mysql oracle jenkins gitlab github
    first.last firstname.lastname newsletter marketing feedback
    enquiries inquiries editor maintainers dmarc dmarc-reports reports caa letsencrypt certs tls ssl dns dns-admin"""
)
_SHELLS = re.compile(r"\b(?:ssh|scp|sftp|rsync|mosh|sshfs|ssh-copy-id|autossh|git clone|git remote)\b")
_PHONE = re.compile(r"\+(?<![\w.+/=-]\+)[1-9]\d*+(?:[ .\-/]?\(?\d++\)?){0,7}(?![\w-])", re.ASCII)
_CARD = re.compile(r"[2-6](?<![\w.+-].)\d{3}([ -]?)(?:\d{4}\1\d{4}\1\d{4}|\d{6}\1\d{5})(?![\w-]|\.\d)", re.ASCII)
_CARD_PREFIX = re.compile(
    r"(?:4\d{15}|5[1-5]\d{14}|(?:222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|6011\d{12}|6(?:4[4-9]|5\d)\d{13}"
    r"|35(?:2[89]|[3-8]\d)\d{12})"
)
_TEST_CARDS = _words(  # of the payment services' documentation; those of few different digits need no list
    """4012888888881881 4242424242424242 4111111111111111 5105105105105100 5555555555554444 5200828282828210 371449635398431
    378282246310005 378734493671000 6011111111111117 6011000990139424 6011981111111113 3530111333300000 3566002020360505
    2223003122003222 2223000048400011 4917610000000000 4000056655665556 5431111111111111 5425233430109903
    2222420000001113 4263982640269299 4917484589897107 374245455400126"""
)
_IBAN = re.compile(r"[A-Z](?<!\w.)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", re.ASCII)
_TEST_IBANS = _words(  # of ISO 13616's registry and other documentation
    """DE89370400440532013000 DE75512108001245126199 DE91100000000123456789 GB29NWBK60161331926819 GB82WEST12345698765432
    GB33BUKB20201555555555 FR1420041010050500013M02606 FR7630006000011234567890189 NL91ABNA0417164300 NL39RABO0300065264
    CH9300762011623852957 CH5604835012345678009 AT611904300234573201 ES9121000418450200051332 ES7921000813610123456789
    IT60X0542811101000000123456 BE68539007547034 BE71096123456769 SE4550000000058398257466 NO9386011117947
    DK5000400440116243 FI2112345600000785 PL61109010140000071219812874 PT50000201231234567890154 IE29AIBK93115212345678
    IE64IRCE92050112345678 LU280019400644750000 CZ6508000000192000145399 HU42117730161111101800000000"""
)


def personal(text: str) -> list[str]:
    """What addresses and numbers of people stand in a text, and in which line (from 1); as many as of secrets."""
    line = lines_of(text)
    kinds: tuple[tuple[str, Callable[[str], Iterator[tuple[int, str]]]], ...] = (
        ("an e-mail address", _emails),
        ("a phone number", _phones),
        ("a payment card's number", _cards),
        ("an IBAN", _ibans),
    )
    found: list[str] = []
    for what, find in kinds:
        found += _told(((f"{what} ({shown})", line(at)) for at, shown in find(text)), set())
    return found


def _emails(text: str) -> Iterator[tuple[int, str]]:
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        local = _LOCAL_PART.search(text[max(0, at - 64) : at]) if domain else None
        if domain and local and _is_someones(text, at, local[0], domain):
            yield at, f"…@{domain[0]}"
        at = text.find("@", at + 1)


def _is_someones(text: str, at: int, local: str, domain: re.Match[str]) -> bool:
    name, top = domain[0].lower(), domain[1]
    if not (top.islower() or top.isupper()) or (len(top) > 2 and top.lower() not in _LARGE_DOMAINS):
        return False  # `W@x.mT`
    if _reserved(name) or local.lower() in _ROLES or name.endswith((".gserviceaccount.com", "noreply.github.com")):
        return False
    before, after = text[max(0, at - 200) : at - len(local)], text[domain.end() : domain.end() + 2]
    if after[:1] == "(" or (after[:1] == ":" and after[1:2].strip()):  # a@b.to(device); host:path
        return False
    word = before[-100:].split()[-1] if before[-1:].strip() else ""
    return "://" not in word and not _SHELLS.search(before.rpartition("\n")[2])


def _reserved(host: str) -> bool:
    """Whether a host can be nobody's (RFC 2606, RFC 6761), is this machine's, or stands in texts for anybody's."""
    labels = host.lower().strip(".").split(".")
    if len(labels) < 2 or labels[-1] in _RESERVED_NAMES or labels[0] == "127" or host == "0.0.0.0":
        return True
    owner = labels[-3] if len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in ("co", "com") else labels[-2]
    return owner in _STAND_INS or owner.startswith("example")


def _phones(text: str) -> Iterator[tuple[int, str]]:
    if "+" not in text:
        return
    for match in islice(_PHONE.finditer(text), MOST_JUDGED):
        digits = re.sub(r"\D", "", match[0])
        if not 9 <= len(digits) <= 15 or re.search(r"(\d)\1{5}|1234567|2345678|9876543|^1\d{3}555|^447700900", digits):
            continue
        import phonenumbers

        try:
            number = phonenumbers.parse(match[0], None)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number):
            yield match.start(), f"+{number.country_code}…"


def _cards(text: str) -> Iterator[tuple[int, str]]:
    for match in islice(_CARD.finditer(text), MOST_JUDGED):
        digits = re.sub(r"\D", "", match[0])
        if not _CARD_PREFIX.fullmatch(digits) or digits in _TEST_CARDS or "00000" in digits or len(set(digits)) < 5:
            continue
        from stdnum import luhn

        if luhn.is_valid(digits):
            yield match.start(), f"{digits[:2]}…"


def _ibans(text: str) -> Iterator[tuple[int, str]]:
    for match in islice(_IBAN.finditer(text), MOST_JUDGED):
        compact = match[0].replace(" ", "")
        if compact in _TEST_IBANS:
            continue
        from stdnum import iban

        if iban.is_valid(compact):
            yield match.start(), f"{compact[:2]}…"
