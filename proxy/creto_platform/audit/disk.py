"""The few file operations the log is made of, in one place, so that tests can kill the process at each of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


class Disk:
    """Plain POSIX. Every method raises OSError; none of them leaves a descriptor open."""

    def make_directory(self, path: Path) -> None:
        """Creates ``path`` and its parents, each made durable in the one above it."""
        if path.is_dir():
            return
        self.make_directory(path.parent)
        try:
            self.create_directory(path)
        except FileExistsError:
            return
        self.sync([path.parent])

    def create_directory(self, path: Path) -> None:
        os.mkdir(path, 0o700)

    def write(self, path: Path, data: bytes) -> None:
        """Writes the whole file; it is durable only after ``sync`` of the file and of its directory."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, data)
        finally:
            os.close(fd)

    def append(self, fd: int, data: bytes) -> None:
        """Writes at the end of an open file."""
        _write_all(fd, data)

    def sync_data(self, fd: int) -> None:
        """fdatasync."""
        os.fdatasync(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, paths: Iterable[Path]) -> None:
        """fsync of files or directories."""
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def replace(self, path: Path, data: bytes) -> None:
        """Puts ``data`` in place of whatever ``path`` is, durably and as a whole."""
        temporary = path.with_name(path.name + ".new")
        self.write(temporary, data)
        self.sync([temporary])
        self.rename(temporary, path)
        self.sync([path.parent])

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        """Removes a file; one that is gone already is fine."""
        path.unlink(missing_ok=True)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
