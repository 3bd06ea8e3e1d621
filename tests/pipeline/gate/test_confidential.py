"""Secrets and personal data: each kind is found with its line and never repeated; what a manual would write is let be.

The secrets are put together here, so that no scanner takes this file for a leak.
"""

import base64
import json
import random
import string

import pytest

from pipeline.gate.confidential import MOST, personal, secrets
from pipeline.workspace import CHECKOUT

_random = random.Random(4)
MIXED = "vV" + "qE1SkH" + "bn88"
UPPER, HEX = string.ascii_uppercase + string.digits, string.digits + "abcdef"


def some(count: int, of: str = string.ascii_letters + string.digits) -> str:
    return "".join(_random.choices(of, k=count))


def part(values: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


SECRETS = {
    "AK" + "IA" + some(16, UPPER): "an AWS access key (AKIA…)",
    "gh" + "p_" + some(36): "a GitHub token (ghp_…)",
    "github" + "_pat_" + some(82): "a fine-grained GitHub token (gith…)",
    "gl" + "pat-" + some(20): "a GitLab token (glpa…)",
    "py" + "pi-AgEIcHlwaS5vcmc" + some(90): "a PyPI token (pypi…)",
    "np" + "m_" + some(36): "an npm token (npm_…)",
    "S" + "G." + some(22) + "." + some(43): "a SendGrid key (SG.",
    "xo" + f"xb-{some(12, '246809')}-{some(12, '135790')}-{some(24)}": "a Slack token (xoxb…)",
    "https://hooks." + f"slack.com/services/T0{some(8)}/B0{some(8)}/{some(24)}": "a Slack token (http…)",
    "sk" + "_live_" + some(24): "a Stripe key (sk_l…)",
    "sk" + "-proj-" + some(40) + "T3Blbk" + "FJ" + some(40): "an OpenAI key (sk-p…)",
    "sk" + "-ant-api03-" + some(90): "an Anthropic key (sk-a…)",
    "h" + "f_" + some(34): "a Hugging Face token (hf_",
    "AI" + "za" + some(35): "a Google key (AIza…)",
    "dop" + "_v1_" + some(64, HEX): "a DigitalOcean token (dop_…)",
    "Account" + f"Key={some(86)}==": "an Azure storage key (Acco…)",
    "sq0" + "csp-" + some(43): "a Square secret (sq0c…)",
    part({"alg": "HS256"}) + "." + part({"sub": "u81"}) + "." + some(43): "a JSON web token (eyJ…)",
    "-----BEGIN RSA " + f"PRIVATE KEY-----\n{some(64)}\n{some(64)}": "a private key",
    "-----BEGIN " + f"PRIVATE KEY-----\\n{some(64)}\\n": "a private key",
    f"postgres://app:a1{some(12)}@db.firm.de:5432/x": "a password in a URL",
    f'password = "a1{some(20)}"': "a secret given to a name",
    f"export AWS_SECRET_ACCESS_KEY=a1{some(38)}": "a secret given to a name",
    f"api_key: a1{some(30)}": "a secret given to a name",
    f'"client_secret": "a1{some(30)}"': "a secret given to a name",
    f"SECRET_KEY = '{some(40, HEX)}'": "a secret given to a name",
    f'password = "{MIXED}Hx"': "a secret given to a name",
    f"export PGPASSWORD={MIXED}": "a secret given to a name",
    f"Set `DB_PASSWORD={MIXED[:8]}` first": "a secret given to a name",
    f"Server=db;User Id=sa;Password={MIXED};": "a secret given to a name",
    f"Uid=sa;Pwd={MIXED};": "a secret given to a name",
    f'"CLIENT_SECRET": "{MIXED}"': "a secret given to a name",
    f"BOT_TOKEN: {MIXED}": "a secret given to a name",
    f"password: {base64.b64encode(MIXED.encode()).decode()}": "a secret given to a name",
    f"curl -u admin:{MIXED} https://api.firm.de/": "a user's password",
    f"curl --user 'admin:{MIXED}' https://api.firm.de/": "a user's password",
    f"curl -s -u admin:a1{some(20)} https://api.firm.de/": "a user's password",
}
NO_SECRETS = """\
AKIAIOSFODNN7EXAMPLE
ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
ghp_1234567890abcdef1234567890abcdef1234
export ANTHROPIC_API_KEY=sk-ant-api03-...
sk-proj-<your key>
password = os.environ["DB_PASSWORD"]
password: ${DB_PASSWORD_2026_PRODUCTION}
password: {{ .Values.database.password1 }}
SECRET=$(openssl rand -hex 32)
API_KEY=changeme_1234567890
postgres://user:password@localhost:5432/db
postgres://app:k8sPa55word42@db:5432/app
amqp://guest:guest@rabbit.firm.de
aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY
eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c
Authorization: Bearer eyJhbGciOi...
-----BEGIN RSA PRIVATE KEY-----
token: 8e03978e-40d5-43dd-bc93-6894a57f9324
secret = get_secret_value_v2(name)
private_key: /etc/ssl/private/server2.key.pem
access_token = oauth2_client.fetch_v2
secretName: web-tls-2026-production
api_key_id = 'production-api-key-1'
"next_page_token": "c3RhcnQ9MjAyNi0wMS0wMQ"
token=hashlib.sha256(b'x').hexdigest()
password = "aBcD1234"
password = "Tr0ub4dor&3"
Password=Welc0me1;
Password=W3lc0m3!Adm1n;
export PGPASSWORD=Str0ngPwd2026
MYSQL_PWD=changeMe1A2b
password: cGFzc3dvcmQxMjM=
password: "YWRtaW4xMjM="
"api_token": "<TOKEN>"
secret = HmacSHA256
token = "OAuth2Bearer"
f(token=Tok3nX9Fld, password=PwdV2Fld3)
hash = "vVqE1SkHbn88"
curl -u admin:secret123 http://localhost:9200
curl -u "$USER:$PASSWORD" https://api.firm.de/
curl -u user:Passw0rd1X https://api.firm.de/
docker run -u 1000:1000 --user node:node2Group image
image: app@sha256:9b2f0c2d7c1e44aa9b2f0c2d7c1e44aa""".splitlines()
PERSONAL = {
    "jane.smith@firm.de": "an e-mail address (…@firm.de)",
    "jane.doe@siemens.com": "an e-mail address (…@siemens.com)",
    "john@firm.de": "an e-mail address (…@firm.de)",
    "Mail Jane <j.smith+x@mail.firm.co.uk>.": "an e-mail address (…@mail.firm.co.uk)",
    "call +49 30 901820": "a phone number (+49…)",
    "(+44 20 7183 8750)": "a phone number (+44…)",
    "+1 (415) 200-7986": "a phone number (+1…)",
    "4539 5787 6362 1486": "a payment card's number (45…)",
    "card=4485275742308327": "a payment card's number (44…)",
    "DE44 5001 0517 5407 3249 31": "an IBAN (DE…)",
    "GB94BARC10201530093459": "an IBAN (GB…)",
}
NOT_PERSONAL = """\
a@example.com, b@mail.example.org, c@x.test, d@y.invalid, e@localhost, f@host.local
jane.doe@example.com, john.doe@company.com, bob@acme.com
user@company.com alice@corp.com noreply@firm.de security@firm.de 1+x@users.noreply.github.com
git clone git@github.com:a/b.git
ssh jane.smith@web1.firm.de uptime
scp x jane@web1.firm.de:/tmp
https://jane:pw@firm.de/ and https://jane@firm.de/
react@18.2.0 icon@2x.png getty@tty1.service a@b.to(device) x = W@x.mT
@app.get
sa@project.iam.gserviceaccount.com
+1 202-555-0123 +1 415 555 2671 +1234567890 +15551234567 +447700900123
2026-01-01T00:00:00+0200 x+49301234567 1e+4930901820 + 4930901820
4242 4242 4242 4242, 4111111111111111, 378282246310005, 4000 0000 0000 0002
4539578763621487 1700000000000000 0.4539578763621486 4611686018427387904
550e8400-e29b-41d4-a716-446655440000
DE89 3704 0044 0532 0130 00, GB82WEST12345698765432, DE44500105175407324932""".splitlines()


@pytest.mark.parametrize(("text", "named"), SECRETS.items(), ids=lambda v: v[:12])
def test_a_secret_is_named_once_with_its_line_and_not_repeated(text: str, named: str) -> None:
    (found,) = secrets(f"one\ntwo\n{text}\nfour")
    assert found.startswith(named) and found.endswith("in line 3")
    assert not any(text[i : i + 8] in found for i in range(8, len(text) - 8))


def test_most_short_random_passwords_are_found() -> None:
    drawn = [some(12) for _ in range(600)]
    mixed = [p for p in drawn if not (p.isdigit() or p.lower() == p or p.upper() == p) and any(map(str.isdigit, p))]
    assert sum(bool(secrets(f"password={p}")) for p in mixed) > 0.8 * len(mixed)


@pytest.mark.parametrize("text", NO_SECRETS)
def test_placeholders_references_and_documentation_are_no_secrets(text: str) -> None:
    assert secrets(text) == []


def test_a_secret_is_found_anywhere_in_a_long_line() -> None:
    token = next(iter(SECRETS))
    for before in (0, 1_590, 1_990, 5_000):
        assert len(secrets("x" * before + " " + token + " " + "y" * 5_000)) == 1


@pytest.mark.parametrize(("text", "named"), PERSONAL.items())
def test_personal_data_is_named_with_its_line(text: str, named: str) -> None:
    assert personal(f"one\n{text}") == [f"{named} in line 2"]


@pytest.mark.parametrize("text", NOT_PERSONAL)
def test_what_is_nobodys_is_not_personal(text: str) -> None:
    assert personal(text) == []


@pytest.mark.parametrize(
    "text",
    ["eyJ" * 20_000, "eyJ" + part({})[3:] + "." * 5_000, "://a:b" * 20_000, "@" * 50_000, "a@b." * 20_000,
     "xoxb-" + "1-" * 50_000, "=a1" * 30_000, "=a1" * 30_000 + "(", "-u a:" * 20_000,
     "token=" + "aB3" * 30_000, "BEGIN PRIVATE KEY" * 5_000, "+1 " * 20_000, "4" * 50_000, "DE44" * 20_000,
     part({"a": 1}) + "." + base64.urlsafe_b64encode(b"[" * 1_200).decode() + "." + some(43), "\ud800@\ud800.de"],
    ids=lambda text: ascii(text[:9]),
)  # fmt: skip
def test_hostile_text_raises_nothing(text: str) -> None:
    assert isinstance(secrets(text) + personal(text), list)


@pytest.mark.parametrize(
    "text",
    ["=" * 40_000 + "|", ("=" + "a" * 9) * 20_000, (" +1" + "2" * 45 + "a") * 1_000, " +1 (1) 2-3/4.(5)6 7 8 9 1 a" * 5_000,
     "AKIA hf_ ghp_ npm_ eyJ SG. xox @ ://" + "\n" * 100_000, "sk-" + ("a" * 21 + "T3Blbk" + "FJ") * 5_000, "a@b.de " * 20_000,
     "+49 151 2345 6789\n" * 9_000, "BEGIN PRIVATE KEY" + " " * 200_000, ("hf_" + "aB3dE9fGh1" * 4 + " ") * 5_000],
    ids=lambda text: ascii(text[:9]),
)  # fmt: skip
def test_a_long_hostile_text_is_done_with(text: str) -> None:
    assert len(secrets(text)) + len(personal(text)) < 100


def test_of_many_findings_the_first_are_told() -> None:
    told = personal("\n".join(f"jane.smith{i}@firm.de" for i in range(500)))
    assert len(told) == MOST + 1 and told[0].endswith("line 1") and told[-2].endswith(f"line {MOST}")
    assert told[-1] == f"more, such as an e-mail address (…@firm.de) in line {MOST + 1}"
    assert len(secrets("\n".join(f"password='a1{some(20)}'" for _ in range(500)))) == MOST + 1
    assert len(personal("\n".join(f"jane.smith{i}@firm.de" for i in range(MOST)))) == MOST


def test_the_shipped_rows_hold_neither() -> None:
    lines = [line for path in (CHECKOUT / "data").rglob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    rows = [json.dumps(json.loads(line), ensure_ascii=False, indent=0).replace("\\n", "\n") for line in lines]
    assert lines and [(row[:40], found) for row in rows if (found := secrets(row) + personal(row))] == []
