"""The running jail, as the sidecar holds it: its sockets, its end, its signals and its place on the terminal.

The agent has a process group of its own. It must: a process may signal its whole group whatever namespace the other
members live in, and the sidecar would be one of them. So creto does what a job-control shell does: it gives the
terminal to the agent's group, stops when the agent stops, and takes the terminal back at the end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from creto_proxy.jail.network import Listeners


class Terminal:
    """The controlling terminal, if there is one, seen from the sidecar's process group."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        try:
            self._fd: int | None = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            self._fd = None

    @property
    def ours(self) -> bool:
        """True while the terminal listens to the sidecar's group: creto is in the foreground and has not lent it."""
        if self._fd is None:
            return False
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return False

    @property
    def interactive(self) -> bool:
        """True when the agent should have the terminal from the start. In a pipeline the others would lose it."""
        return self.ours and os.isatty(0) and os.isatty(1)

    def take_back(self) -> None:
        if self._fd is None:
            return
        with _without(signal.SIGTTOU):
            try:
                os.tcsetpgrp(self._fd, os.getpgrp())
            except OSError:
                pass  # the terminal hung up

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextmanager
def _without(*numbers: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Jail:
    """An agent in its namespaces, waiting for ``start`` so that its network can be served first.

    listeners: sockets inside its network, to be served by the sidecar. pid: of the jail's first process (its death
    ends everything inside). pidfd: readable once that process has ended.
    """

    def __init__(self, pid: int, control: socket.socket, listeners: Listeners, terminal: Terminal, lent: bool) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.listeners = listeners
        self._control = control
        self._terminal = terminal
        self._lent = lent
        self._received = b""
        self._on_output: Any = None
        self._status: int | None = None
        control.setblocking(False)

    def start(self) -> None:
        """Lets the agent execute. Call from the main thread."""
        # The agent may turn on TOSTOP, and our next line on the shared terminal would stop us.
        self._on_output = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        self._say(b"G")

    def poll(self) -> int | None:
        """The agent's exit status as a shell gives it (128 + n for signal n), None while it runs."""
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._status = 128 + signal.SIGKILL  # somebody else reaped it; its status is lost
            else:
                if pid:
                    code = os.waitstatus_to_exitcode(status)
                    self._status = code if code >= 0 else 128 - code
            if self._status is not None and self._lent:
                self._terminal.take_back()
                self._lent = False
        return self._status

    async def wait(self) -> int:
        """Follows the agent to its end; its exit status. Serves its job control meanwhile, so keep it running."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self.pidfd, ended.set)
        loop.add_reader(self._control, self._heard, loop)
        try:
            while (status := self.poll()) is None:
                await ended.wait()
                ended.clear()
            return status
        finally:
            loop.remove_reader(self.pidfd)
            loop.remove_reader(self._control)

    def signal(self, number: int) -> None:
        """Sends a signal to the agent's process group. Does nothing once it has ended.

        The terminal's own signals reach the agent without this while it has the terminal; what the sidecar receives,
        it is right to pass on.
        """
        if number == signal.SIGCONT:
            self._resume()
        else:
            self._say(b"S%d" % number)

    def close(self) -> None:
        """Kills what is left, closes every socket. Idempotent."""
        if self.pidfd < 0:
            return
        if self.poll() is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
            self.poll()
        self.listeners.close()
        self._control.close()
        self._terminal.close()
        os.close(self.pidfd)
        self.pidfd = -1
        if self._on_output is not None:
            signal.signal(signal.SIGTTOU, self._on_output)

    def _say(self, message: bytes) -> None:
        try:
            self._control.send(message + b"\n")
        except OSError:
            pass  # init has ended, wait() is about to say so

    def _heard(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            data = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            loop.remove_reader(self._control)
            return
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            if line.startswith(b"T"):
                self._stopped(int(line[1:]))

    def _stopped(self, number: int) -> None:
        if number in (signal.SIGTTIN, signal.SIGTTOU) and self._terminal.ours:
            # It wants the terminal we have not lent it yet (creto is part of a pipeline).
            self._resume()
        elif number != signal.SIGSTOP or self._lent:
            # Stop the whole job, so that the user's shell takes over; this returns when the shell has continued us, or
            # at once where nobody could (an orphaned group is not stopped), and then the agent must not stay stopped.
            os.kill(0, signal.SIGTSTP)
            self._resume()

    def _resume(self) -> None:
        if self._terminal.ours:
            self._lent = True
            self._say(b"F")
        else:
            self._say(b"C")
