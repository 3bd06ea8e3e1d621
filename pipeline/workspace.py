"""Where things are: `ALETHEIA_ROOT` (default: the checkout) and the four folders under it."""

import os
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
LOCK_FILE = CHECKOUT / "requirements.lock"
INSTALLED = ".installed"  # written last into an environment of its own, such as `.venv-vllm`: all of it is there


@dataclass(frozen=True)
class Workspace:
    root: Path

    @classmethod
    def find(cls) -> "Workspace":
        return cls(Path(os.environ.get("ALETHEIA_ROOT") or CHECKOUT).expanduser().resolve())

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @property
    def experiments(self) -> Path:
        return self.root / "experiments"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def path(self, name: str) -> Path:
        """A path named in a profile or record: absolute, `~`, or relative to the root."""
        return self.root / Path(name).expanduser()

    def shown(self, path: Path) -> str:
        """The shortest name that works in both records and messages: relative to the root where it is inside."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
