"""What a run was made of: command, code, environment, and what it used. Secrets are taken out on the way."""

import hashlib
import os
import platform
import re
import resource
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from pipeline.config import Cost
from pipeline.records.energy import Energy
from pipeline.workspace import CHECKOUT, LOCK_FILE

PACKAGES = ("aletheia", "eval", "pipeline", "serving")  # what runs: a new .py file here belongs to the patch
LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "lm-eval")
MOST_UNTRACKED = 50  # names in a record; how many more there are is said
# whatever the person's git is set to, a patch that `git apply` takes
_DIFF = ("diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
# Each repetition is bounded or possessive: a patch may be large, and hostile.
_KEY = r"""(?i:(?:api|access|secret|private)[_-]?key | (?:api|access|auth|hf|hub|bearer)[_-]?token
    | secret | password | passwd | passphrase)"""
_IS = r"""["']?\]?[ \t]*[=:]{1,2}[ \t]*"""  # key = value, key: value, "key": value, x["key"] = value
_GIVEN = rf"(?:{_KEY}{_IS} | (?<=-){_KEY}[ \t]+)"  # the latter: --key value
_NAME = r"[A-Za-z_]\w*+"
_NO_PLACEHOLDER = r"""(?!(?:\$?\{[^"'\n]{0,200}\} | <[^"'\n]{0,200}>)(?:[\s"']|\Z))"""  # {name}, ${name}, <name>
_NO_CODE = rf"""{_NO_PLACEHOLDER}  # nor a.name, a call, an item
    (?!{_NAME}(?:\.{_NAME})++(?=[\s"',&)\]}}:;]|\Z) | {_NAME}(?:\.{_NAME})*+[\[(])"""
_HAS_DIGIT = r"""(?=[^\s"',&\d]{0,200}\d)"""
_SECRETS = {  # what stands before the secret, and stays, is the group `keep`
    name: re.compile(pattern, re.VERBOSE)
    for name, pattern in {
        "private key": r"(?P<keep>-----BEGIN\ [A-Z ]{0,40}PRIVATE\ KEY-----) (?s:(?!-----).){40,}+ (?=-----END)",
        "address": r"""(?P<keep>://) [^/\s:@]{0,200}+ : (?!\d{1,5}/) [^\s@"<>]{1,1000}+ (?=@)""",  # user:password@host
        "JSON web token": r"(?P<keep>(?<![\w-])) eyJ[\w-]++ \.eyJ[\w-]++ \.[\w-]*+",
        "prefix": r"""(?P<keep>\b) (?:
            hf_[A-Za-z0-9]{16,}                                 # Hugging Face
            | sk-[A-Za-z0-9_-]{16,}                             # OpenAI, Anthropic
            | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,}   # GitHub
            | glpat-[\w-]{16,}                                  # GitLab
            | A[KS]IA[A-Z0-9]{12,}                              # Amazon
            | AIza[\w-]{30,}                                    # Google
            | [rs]k_(?:live|test)_[A-Za-z0-9]{16,}              # Stripe
            | xox[abeprs]-[A-Za-z0-9-]{10,}                     # Slack
            | npm_[A-Za-z0-9]{16,}
        )""",
        "authorization": rf"""(?P<keep>(?i:authorization){_IS} ["']? (?i:bearer|basic|token|digest)[ \t]+)
            [^\s"',&<{{$][^\s"',&]{{5,}}""",
        "quoted": rf"""(?P<keep>{_GIVEN} [bru]? (?P<quote>["'])) {_NO_PLACEHOLDER}
            (?:\\. | (?!(?P=quote))[^\\\n]){{6,}}+ (?=(?P=quote))""",
        "unquoted": rf"""(?P<keep>{_GIVEN} ["']?) {_NO_CODE}{_HAS_DIGIT} [^\s"',&]{{6,}}""",
        # the words that have other meanings, too: what follows must look like a key
        "token": rf"""(?P<keep>(?i:\btoken|\bauthorization) (?:{_IS} | (?<=-token)[ \t]+) ["']?)
            {_NO_CODE}{_HAS_DIGIT} (?=[^\s"',&A-Za-z]{{0,200}}[A-Za-z]) (?![a-z]+_\w*+(?![^\s"',&)]))
            [^\s"',&]{{16,}}""",
    }.items()
}


def redact(text: str) -> str:
    """API keys, tokens and passwords become `[redacted]`. Code that only names them stays as it is."""
    for pattern in _SECRETS.values():
        text = pattern.sub(r"\g<keep>[redacted]", text)
    return text


def code(folder: Path) -> dict[str, Any]:
    """Commit and what differs from it. The patch goes into `folder`, with new .py files of the packages and without
    `experiments/`; other files that git does not know are only named."""
    facts: dict[str, Any] = {"command": redact(shlex.join(["aletheia", *sys.argv[1:]])), "cwd": os.getcwd()}
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return facts | {"commit": None, "reason": "the code is not in a git checkout with a commit"}
    facts["commit"] = commit.decode().strip()
    where = ("--", ".", ":(exclude)experiments")
    patch, listed = _git(*_DIFF, "HEAD", *where), _git("ls-files", "-z", "--others", "--exclude-standard", *where)
    if patch is None or listed is None:
        return facts | {"dirty": None, "reason": "git could not tell what differs from the commit"}
    untracked = [name for name in listed.decode("utf-8", "replace").split("\0") if name]
    facts["dirty"] = bool(patch or untracked)
    for name in [name for name in untracked if name.endswith(".py") and name.split("/")[0] in PACKAGES]:
        added = _git(*_DIFF, "--no-index", "--", os.devnull, name, ends_with=1)  # 1: they differ
        if added:
            patch += added
            untracked.remove(name)
    if patch:
        facts["patch"] = _keep(patch, folder)
    if untracked:
        facts["untracked"] = [redact(name) for name in untracked[:MOST_UNTRACKED]]
    if len(untracked) > MOST_UNTRACKED:
        facts["untracked_more"] = len(untracked) - MOST_UNTRACKED
    return facts


def environment() -> dict[str, Any]:
    """Python, machine and libraries; whether they are the ones the lock file names."""
    versions = installed()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "libraries": {name: versions.get(name) for name in LIBRARIES},
        "lock": _lock(),
    }
    torch = sys.modules.get("torch")  # a stage that has no use for it does not pay for importing it
    if torch is not None:
        facts["threads"] = torch.get_num_threads()  # another number sums in another order: other last digits
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["cuda"] = torch.version.cuda
    return facts


class Meter:
    """Wall clock, processor time, peak memory, energy and cost from now until `read()`."""

    def __init__(self, cost: Cost, ranks: int = 1) -> None:
        """`ranks`: processes that do the same work; this one's figures stand for each."""
        self.cost, self.ranks, self.wall, self.energy = cost, ranks, time.monotonic(), Energy()
        self.peak_is_own = _reset_peak_memory()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, Any]:
        wall, energy = time.monotonic() - self.wall, self.ranks * self.energy.kwh()
        facts: dict[str, Any] = {
            "wall_seconds": round(wall, 2),
            "cpu_seconds": round(self.ranks * self.energy.cpu_seconds(), 2),
            "peak_memory_gb": round(_peak_memory() / 1e9, 3),
        }
        if self.ranks > 1:
            facts["ranks_note"] = f"time and energy are the first rank's × {self.ranks}; memory is the first rank's"
        if not self.peak_is_own:
            facts["peak_memory_note"] = "of the process since it started, earlier stages included"
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            facts["gpu_hours"] = round(wall / 3600 * torch.cuda.device_count() * self.ranks, 4)
            facts["gpu_peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        else:
            facts["gpu_hours"] = 0.0
        money = facts["gpu_hours"] * self.cost.gpu_hour + energy * self.cost.kwh
        facts["energy"] = {
            "kwh": float(f"{energy:.3g}"),
            "co2_kg": float(f"{energy * self.cost.co2_per_kwh:.3g}"),
            "how": self.energy.how(),
        }
        facts["cost"] = {"amount": float(f"{money:.3g}"), "currency": self.cost.currency}
        return facts


def differing(lock: str) -> dict[str, str]:
    """The packages that are installed otherwise than a lock file's text says, and how."""
    pins = (line.split("==") for line in lock.splitlines() if "==" in line and not line.startswith("#"))
    versions = installed()
    there = {name: (versions.get(_normal(name)), pin.strip()) for name, pin in pins}
    return {
        name: f"{version} installed, {pin} locked"
        for name, (version, pin) in there.items()
        if (version or "").split("+")[0] != pin
    }


def installed() -> dict[str, str]:
    """The version of every package on the path, from its folder's name, NAME-VERSION.dist-info (PEP 427).

    `importlib.metadata` parses each one's whole description for it: half a second for those of the lock file.
    """
    found: dict[str, str] = {}
    for place in sys.path:
        for folder in Path(place).glob("*.dist-info"):
            name, _, version = folder.stem.partition("-")
            found.setdefault(_normal(name), version)  # what comes first on the path is what is imported
    return found


def _keep(patch: bytes, folder: Path) -> dict[str, Any]:
    """Writes it without its secrets. The patch of a part of the run before a resume is not written over."""
    kept = redact(patch.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(kept).hexdigest()
    path = folder / "code.patch"
    if path.exists() and path.read_bytes() != kept:
        path = folder / f"code-{digest[:8]}.patch"
    path.write_bytes(kept)
    facts: dict[str, Any] = {"path": f"{folder.name}/{path.name}", "sha256": digest}
    if kept != patch:
        facts["redacted"] = True  # it may not apply any more
    return facts


def _git(*arguments: str, ends_with: int = 0) -> bytes | None:
    """What git says; None when it ends otherwise."""
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == ends_with else None


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _lock() -> dict[str, Any]:
    if not LOCK_FILE.exists():
        return {"sha256": None}
    text = LOCK_FILE.read_text("utf-8")
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "differing": differing(text)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _reset_peak_memory() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from the present size
    except OSError:
        return False
    return True


def _peak_memory() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
