import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.config import Cost
from pipeline.records import capture
from pipeline.records.capture import redact
from pipeline.records.energy import WATTS_PER_BUSY_CORE
from pipeline.workspace import LOCK_FILE

KEY = "hf_" + "Ab1" * 8  # put together here, or this file's own patch would be redacted


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one commit, taken for the project's."""
    root = tmp_path / "checkout"
    (root / "experiments").mkdir(parents=True)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("code.py", "experiments/EXP.yaml"):
        (root / name).write_text("a = 1\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    monkeypatch.setattr(capture, "CHECKOUT", root)
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"use {KEY} here", "use [redacted] here"),
        ("sk-" + "proj-abcDEF0123456789xyz", "[redacted]"),
        ("gh" + "p_abcdefghijklmnopqrst", "[redacted]"),
        ("github" + "_pat_11ABCDEFG0abcdefghij_klm", "[redacted]"),
        ("AKIA" + "ABCDEFGHIJKLMNOP", "[redacted]"),
        ("https://me:" + "hunter22@host/path", "https://[redacted]@host/path"),
        ("--set api_key" + "=abcdefg8 --port 1", "--set api_key=[redacted] --port 1"),
        ('{"password"' + ': "hunter22", "a": 1}', '{"password": "[redacted]", "a": 1}'),
        ("HF_TOKEN" + "=abcdefg8", "HF_TOKEN=[redacted]"),
        ("SECRET_KEY" + " = 'abcdefgh'", "SECRET_KEY = '[redacted]'"),
        ("aws_secret_access_key" + " = abc/def+gh8", "aws_secret_access_key = [redacted]"),
        ("Authorization" + ": Bearer abcdefgh", "Authorization: Bearer [redacted]"),
        ("authorization" + ": Basic YWJjZGVmZ2g=", "authorization: Basic [redacted]"),
        ("Authorization" + ": Token abcdefgh", "Authorization: Token [redacted]"),
        ('{"Authorization"' + ': "Bearer abcdefgh"}', '{"Authorization": "Bearer [redacted]"}'),
        ("password" + ' = "ab,cdefgh123xyz"  # old', 'password = "[redacted]"  # old'),
        ("password" + " = 'a \"quoted\" word'", "password = '[redacted]'"),
        ("password" + ' = "p&ssw0rdlong", 1', 'password = "[redacted]", 1'),
        ("password" + ' = "escaped\\"quote1"', 'password = "[redacted]"'),
        ("os.environ['API_KEY'" + "] = 'abcdefgh'", "os.environ['API_KEY'] = '[redacted]'"),
        ("serve --api-key" + " abcdefg8 --port 1", "serve --api-key [redacted] --port 1"),
        ("serve --password" + " 'ab cdefg'", "serve --password '[redacted]'"),
        ("serve --token" + " abcdefgh12345678", "serve --token [redacted]"),
        ("token" + "=abcdefgh12345678", "token=[redacted]"),
        ("AIza" + "SyA-1234567890abcdefghijklmnopqrstu", "[redacted]"),
        ("gl" + "pat-abcdefGHIJ0123456789", "[redacted]"),
        ("sk_" + "live_abcdefGHIJ0123456789", "[redacted]"),
        ("npm" + "_abcdefghijABCDEFGHIJ0123456789abcdef", "[redacted]"),
        ("x: eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln-bmF0dXJl", "x: [redacted]"),
        ("postgres" + "://u:p/w@host/db", "postgres://[redacted]@host/db"),
        ("redis" + "://:hunter22@host", "redis://[redacted]@host"),
        (
            "+-----BEGIN RSA " + "PRIVATE KEY-----\n" + "+MIIEow\n" * 9 + "+-----END RSA PRIVATE KEY-----\n",
            "+-----BEGIN RSA PRIVATE KEY-----[redacted]-----END RSA PRIVATE KEY-----\n",
        ),
    ],
)
def test_secrets_are_redacted_and_what_stands_around_them_is_not(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "sft_config.max_tokens=800",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        "trained_tokens_an_epoch: 24332",
        "https://host:8000/v1/models",
        "1234567e8a0b1c2d3e4f5a6b7c8d9e0f1a2b3c4d",
        "me@example.com",
        "token = tokenizer.eos_token",
        "token: TokenIds",
        "token = next_token_ids_of_layer_2",
        "token: float32",
        "token = '<|endoftext|>'",
        "api_key=settings.openai_key",
        "f(api_key=settings.keys2.openai)",
        'password=os.environ["X12345"]',
        'secret = read_secret2("name")',
        'parser.add_argument("--api-key", help="the key")',
        "--password PASSWORD --api-key KEY",
        'headers = {"Authorization": "Bearer " + key}',
        "Authorization: Bearer <your-token>",
        'api_key: "${OPENAI_KEY_2}"',
        "git+https://host:8443/group/project@v1",
        'if "-----BEGIN PRIVATE KEY-----" in text:',
    ],
)
def test_what_is_no_secret_is_left(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "part",
    [
        "password" + "=", "password" + '="', "password" + "='\\", "--secret ", "token" + ":", "token" + "=a.", "://a:",
        "eyJ", "-eyJ", "eyJ.eyJ", "sk-", "-----BEGIN PRIVATE KEY-----", "-----BEGIN ", "password" + '="{', "a.", "=:",
        "authorization" + ":", "authorization" + ": basic ", "\\",
    ],
)  # fmt: skip
def test_a_long_run_of_anything_is_read_through(part: str) -> None:
    """A quarter of a megabyte takes less than a second; in quadratic time it would be minutes."""
    began = time.process_time()
    assert redact("password" + "=" + part * (250_000 // len(part)))
    assert time.process_time() - began < 15


def test_a_patch_of_code_that_only_names_keys_is_kept_whole(checkout: Path, tmp_path: Path) -> None:
    (checkout / "code.py").write_text("token = tokenizer.eos_token\nclient = Client(api_key=settings.openai_key)\n")
    assert "redacted" not in capture.code(tmp_path)["patch"]


def test_the_command_is_recorded_without_its_secrets(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/aletheia", "sft", "--set", "a=b c", "--set", f"x={KEY}"])
    assert capture.code(tmp_path)["command"] == "aletheia sft --set 'a=b c' --set x=[redacted]"


def test_a_clean_checkout_is_said_to_be_clean(checkout: Path, tmp_path: Path) -> None:
    facts = capture.code(tmp_path)
    assert len(facts["commit"]) == 40
    assert facts["dirty"] is False
    assert not (tmp_path / "code.patch").exists()


def test_the_patch_brings_the_commit_to_what_ran(checkout: Path, tmp_path: Path) -> None:
    (checkout / "code.py").write_bytes(b"a = 2  # caf\xe9, no utf-8\n")
    (checkout / "experiments" / "EXP.yaml").write_text("a note\n")
    (checkout / "new.py").write_text("b = 1\n")
    facts = capture.code(tmp_path)
    assert facts["dirty"] is True
    assert facts["untracked"] == ["new.py"]
    assert facts["patch"] == {
        "path": f"{tmp_path.name}/code.patch",
        "sha256": capture.hashlib.sha256((tmp_path / "code.patch").read_bytes()).hexdigest(),
    }
    changed = (checkout / "code.py").read_bytes()
    subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "--", "."], check=True)
    subprocess.run(["git", "-C", str(checkout), "apply", str(tmp_path / "code.patch")], check=True)
    assert (checkout / "code.py").read_bytes() == changed
    assert (checkout / "experiments" / "EXP.yaml").read_text() == "a = 1\n"


def test_a_new_file_of_the_code_is_in_the_patch_and_other_new_files_are_named(checkout: Path, tmp_path: Path) -> None:
    new = {"pipeline/new.py": "c = 3\n", "eval/é.py": "", "pipeline/table.csv": "1\n", "docs/new.py": "d = 4\n"}
    for name, text in new.items():
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text(text)
    facts = capture.code(tmp_path)
    assert facts["dirty"] is True
    assert facts["untracked"] == ["docs/new.py", "pipeline/table.csv"]
    for name in new:
        (checkout / name).unlink()
    subprocess.run(["git", "-C", str(checkout), "apply", str(tmp_path / "code.patch")], check=True)
    assert {name: (checkout / name).read_text() for name in new if name.endswith(".py") and "docs" not in name} == {
        "pipeline/new.py": "c = 3\n",
        "eval/é.py": "",
    }


def test_more_new_files_than_the_record_names_are_counted(checkout: Path, tmp_path: Path) -> None:
    for number in range(capture.MOST_UNTRACKED + 3):
        (checkout / f"note-{number}.txt").write_text("")
    facts = capture.code(tmp_path)
    assert len(facts["untracked"]) == capture.MOST_UNTRACKED
    assert facts["untracked_more"] == 3


@pytest.mark.parametrize("setting", ["diff.noprefix=true", "color.ui=always", "diff.external=false"])
def test_the_patch_applies_whatever_the_persons_git_is_set_to(checkout: Path, tmp_path: Path, setting: str) -> None:
    git = ["git", "-C", str(checkout)]
    subprocess.run([*git, "config", *setting.split("=")], check=True)
    (checkout / "code.py").write_text("a = 2\n")
    capture.code(tmp_path)
    subprocess.run([*git, "checkout", "-q", "--", "."], check=True)
    subprocess.run([*git, "apply", str(tmp_path / "code.patch")], check=True)
    assert (checkout / "code.py").read_text() == "a = 2\n"


def test_a_resume_with_other_code_keeps_the_patch_of_the_first_part(checkout: Path, tmp_path: Path) -> None:
    parts = []
    for line in ("a = 2\n", "a = 3\n"):
        (checkout / "code.py").write_text(line)
        parts.append(capture.code(tmp_path)["patch"])
    assert parts[0]["path"] != parts[1]["path"]
    for part in parts:
        kept = (tmp_path / Path(part["path"]).name).read_bytes()
        assert capture.hashlib.sha256(kept).hexdigest() == part["sha256"]


def test_a_git_that_cannot_tell_the_changes_is_not_taken_for_clean(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".git" / "index").write_bytes(b"torn")
    facts = capture.code(tmp_path)
    assert facts["dirty"] is None
    assert "could not tell" in facts["reason"]


def test_the_patch_is_kept_without_secrets_and_says_so(checkout: Path, tmp_path: Path) -> None:
    (checkout / "code.py").write_text(f'a = "{KEY}"\n')
    facts = capture.code(tmp_path)
    patch = (tmp_path / "code.patch").read_text()
    assert '+a = "[redacted]"' in patch
    assert KEY not in patch
    assert facts["patch"]["redacted"] is True


def test_notes_and_records_do_not_make_the_code_dirty(checkout: Path, tmp_path: Path) -> None:
    (checkout / "experiments" / "EXP.yaml").write_text("edited\n")
    (checkout / "experiments" / "EXP-new.yaml").write_text("new\n")
    assert capture.code(tmp_path)["dirty"] is False


def test_code_outside_git_says_why_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(capture, "CHECKOUT", tmp_path)
    facts = capture.code(tmp_path)
    assert facts["commit"] is None
    assert "not in a git checkout" in facts["reason"]


def test_libraries_that_differ_from_the_lock_file_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = version("pydantic")
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"# made by hand\npydantic=={installed}\npyyaml==0.1\nno-such-package==1.0\n")
    monkeypatch.setattr(capture, "LOCK_FILE", lock)
    facts = capture.environment()["lock"]
    assert facts["sha256"] == capture.hashlib.sha256(lock.read_bytes()).hexdigest()
    assert facts["differing"] == {
        "pyyaml": f"{version('pyyaml')} installed, 0.1 locked",
        "no-such-package": "None installed, 1.0 locked",
    }


def test_versions_are_those_that_the_packages_themselves_tell() -> None:
    pins = [
        line.split("==")[0] for line in LOCK_FILE.read_text("utf-8").splitlines() if "==" in line and line[0] != "#"
    ]
    there = capture.installed()
    assert len(pins) > 50
    for name in pins:
        assert there[capture._normal(name)] == version(name), name


def test_the_cost_is_energy_times_price_and_says_how_it_was_measured() -> None:
    meter = capture.Meter(Cost(kwh=1000.0, co2_per_kwh=0.5, currency="EUR"))
    sum(range(3_000_000))  # some processor time
    facts = meter.read()
    assert facts["gpu_hours"] == 0.0
    assert facts["peak_memory_gb"] > 0
    energy = facts["energy"]
    assert energy["kwh"] > 0
    assert energy["kwh"] == pytest.approx(facts["cpu_seconds"] * WATTS_PER_BUSY_CORE / 3.6e6, rel=0.2)
    assert energy["co2_kg"] == pytest.approx(energy["kwh"] * 0.5, rel=0.01)
    assert facts["cost"] == {"amount": pytest.approx(energy["kwh"] * 1000, rel=0.01), "currency": "EUR"}
    assert energy["how"] == "estimated: 10 W a busy core"
