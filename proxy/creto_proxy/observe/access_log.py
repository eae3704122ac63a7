"""The access log: one JSON object per line for each record of the journal, refusals included.

What a line holds is what a record holds; there is no query, header field or body in either.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from creto_proxy.model import Outcome
from creto_proxy.observe.tracecontext import uuid_text

# The names under which files are known that cannot be opened by name everywhere (a socket is not, under systemd).
_STDOUT: Final = (Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/1"))

_encoder = msgspec.json.Encoder()


def line_of(outcome: Outcome) -> dict[str, Any]:
    """The object of one line, every key always there. Times are whole nanoseconds, money whole nano-dollars."""
    usage = outcome.usage
    seconds, ns = divmod(outcome.at_unix_ns, 10**9)
    return {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{ns // 1000:06d}Z",
        "id": uuid_text(outcome.id),
        "run": outcome.run,
        "agent": outcome.agent,
        "owner": outcome.chain[0] if outcome.chain else "",
        "link": outcome.link,
        "way": outcome.way,
        "kind": outcome.kind,
        "action": outcome.action,
        "resource": outcome.resource,
        "method": outcome.method,
        "scheme": outcome.scheme,
        "host": outcome.host,
        "port": outcome.port,
        "path": outcome.target,
        "status": outcome.status,
        "decision": outcome.decision,
        "reason": outcome.reason,
        "error": outcome.error,
        "policies": outcome.policies,
        "approval_id": outcome.approval_id,
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "total_ns": outcome.total_ns,
        "creto_ns": outcome.creto_ns,
        "held_ns": outcome.held_ns,
        "upstream_ns": outcome.upstream_ns,
        "usage": usage.certainty,
        "provider": usage.provider,
        "model": usage.model,
        "tokens": usage.tokens,
        "cost_nano_usd": usage.cost_nano_usd,
        "trace_id": outcome.trace[3:35],
    }


class AccessLog:
    """Appends lines to a file, and starts a new one when somebody moved it away or it is large enough.

    Several processes may write the same file: a batch is one write to its end.
    """

    def __init__(self, path: Path, *, max_bytes: int, keep: int, count: Callable[[int], None]) -> None:
        """max_bytes: PATH becomes PATH.1 from there on, PATH.1 PATH.2, up to ``keep`` of them; 0: never. count: is told
        of lines written. Raises OSError."""
        self._path = path
        self._stdout = path in _STDOUT
        self._max_bytes = 0 if self._stdout else max_bytes
        self._keep = keep
        self._count = count
        self._torn = False
        self._fd = self._open()

    def write(self, records: Sequence[Outcome]) -> None:
        """Raises OSError; some of the records may be written then, and are written again."""
        self._follow()
        data = _encoder.encode_lines([line_of(outcome) for outcome in records])
        if self._torn:
            data = b"\n" + data
        self._torn = True
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._torn = False
        self._count(len(records))
        if self._max_bytes and os.fstat(self._fd).st_size >= self._max_bytes:
            self._rotate()

    def reopen(self) -> None:
        """Opens the file anew; it is also noticed by itself when it was moved."""
        fd = self._open()
        os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)

    def _open(self) -> int:
        if self._stdout:
            return os.dup(sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
        # A fifo without a reader must not stop everything; a file of agents' doings is nobody else's to read.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self._path, flags, 0o600)
        os.set_blocking(fd, True)
        return fd

    def _follow(self) -> None:
        if not self._stdout and not self._is_ours():
            self.reopen()

    def _is_ours(self) -> bool:
        try:
            there, here = os.stat(self._path), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def _rotate(self) -> None:
        """One process at a time moves the files up; whoever comes second finds that it was done."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            if not self._is_ours():
                return
            for number in range(self._keep - 1, 0, -1):
                older = self._numbered(number)
                if older.exists():
                    older.replace(self._numbered(number + 1))
            if self._keep:
                self._path.replace(self._numbered(1))
            else:
                self._path.unlink()
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.reopen()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
