"""A folder of this user's alone for as long as its process lives, under the system's temporary one.

    folder = PrivateFolder()     # /tmp/aletheia-llama-x2v9…: a Unix socket has a path of 107 characters at most
    folder.remove()

A process that is killed outright leaves its folder. The kernel drops its lock on it, by which the next one knows it.
"""

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "aletheia-llama-"  # all that begins so is ours to remove
YOUNG = 60.0  # seconds in which one that is being made may not have its lock yet


class PrivateFolder:
    def __init__(self) -> None:
        _remove_left()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY)  # no child inherits it
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_left() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                told = os.fstat(folder)
                if told.st_uid == os.getuid() and time.time() - told.st_mtime > YOUNG:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(folder)
