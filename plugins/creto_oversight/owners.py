"""Which process spent a grant, and whether it still lives.

A living process holds an advisory lock on a file of its own; the kernel lets go of it however the process ends, so a
lock that can be taken means that the process is gone. Pids would lie across namespaces and after reuse.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

OWNERS = "oversight-owners"


class Owner:
    """This process, as the record names it. The files live in ``directory`` (0700)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = -1
        self.id = ""

    def take(self) -> None:
        """Makes this process an owner. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.id = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._fd = os.open(self._path(self.id), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Gives the name up: from now on this owner counts as dead."""
        if self._fd >= 0:
            self._path(self.id).unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def alive(self, owner: str) -> bool:
        """Whether the process with that name still runs. What cannot be found out counts as alive, so that nobody
        declares the outcome of a running send unknown."""
        if owner == self.id and self._fd >= 0:
            return True
        path = self._path(owner)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            path.unlink(missing_ok=True)
            return False
        finally:
            os.close(fd)

    def _path(self, owner: str) -> Path:
        return self._directory / f"{owner}.lock"
