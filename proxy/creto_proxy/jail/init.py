"""The first process of the jail: starts the agent in the inner namespaces, reaps, forwards signals, ends with it.

Run as a program of its own by a fresh interpreter (standard library only, no site), so that its memory holds nothing
of the sidecar's. It has one descriptor besides the standard three: a socket to the sidecar, which speaks

    sidecar -> init   the instructions (JSON), "G" (go), "S<signal>", "F" (foreground and continue), "C" (continue)
    init -> sidecar   "R" (the agent is ready to go), "E<text>" (it cannot be), "T<signal>" (it has stopped)

and whose end means that the sidecar is gone: the agent, which has no network from that moment on, is asked to end
after a grace period and then killed. The exit status is the agent's, 128 + n for a signal, 127 and 126 as in a shell.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

CONTROL_FD = 3
INSTRUCTIONS_BYTES = 4 << 20  # arguments and environment are at most 2 MiB (ARG_MAX), JSON escapes some of them

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 4, 15, 38, 22
_SECCOMP_MODE_FILTER = 2
_KEYCTL = {"x86_64": 250, "aarch64": 219}
_KEYCTL_JOIN_SESSION_KEYRING = 1
_TERM_TO_KILL_S = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


class Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _prctl(option: int, value: int | ctypes.Array[ctypes.c_char], third: Any = 0) -> None:
    first = ctypes.c_ulong(value) if isinstance(value, int) else value
    _check(_libc.prctl(option, first, third, 0, 0), f"prctl {option}")


def main() -> int:
    """Serves until the agent has ended; its exit status."""
    _prctl(_PR_SET_NAME, ctypes.create_string_buffer(b"creto-init"))
    control = socket.socket(fileno=CONTROL_FD)
    control.set_inheritable(False)
    instructions = json.loads(_receive_all(control))
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        signal.signal(number, signal.SIG_IGN)
    wakeup, waker = socket.socketpair()
    wakeup.setblocking(False)
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        agent, gate = _prepare(instructions)
    except OSError as error:
        _tell(control, b"E" + str(error).encode())
        return 1
    _tell(control, b"R")
    return _Supervisor(control, wakeup, agent, gate, instructions["grace_s"]).run()


def _receive_all(control: socket.socket) -> bytes:
    """The instructions: their length as 8 bytes, then themselves."""
    size = int.from_bytes(_exactly(control, 8), "big")
    if size > INSTRUCTIONS_BYTES:
        raise ValueError("instructions too large")
    return _exactly(control, size)


def _exactly(control: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = control.recv(size - len(data))
        if not chunk:
            raise SystemExit(1)
        data += chunk
    return bytes(data)


def _tell(control: socket.socket, message: bytes) -> None:
    """Messages are lines; a sidecar that is gone is noticed by the poll, not here."""
    try:
        control.sendall(message.replace(b"\n", b" ") + b"\n")
    except OSError:
        pass


class _Supervisor:
    """gate: closed with a "go" on it when the agent may execute; closed without one, it never does."""

    def __init__(
        self, control: socket.socket, wakeup: socket.socket, agent: int, gate: socket.socket, grace_s: float
    ) -> None:
        self._control: socket.socket | None = control
        self._wakeup = wakeup
        self._agent = agent
        self._gate = gate
        self._grace_s = grace_s
        self._deadline: float | None = None
        self._asked = False
        self._line = b""

    def run(self) -> int:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        poll.register(CONTROL_FD, select.POLLIN)
        while True:
            status = self._reap()
            if status is not None:
                return status
            for fd, _ in poll.poll(self._wait_ms()):
                if fd == self._wakeup.fileno():
                    self._wakeup.recv(4096)
                elif not self._listen():
                    poll.unregister(CONTROL_FD)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                if self._asked:
                    return 128 + signal.SIGKILL  # the kernel kills whatever is left of the namespace with us
                self._asked = True
                self._deadline = time.monotonic() + _TERM_TO_KILL_S
                self._send(signal.SIGTERM)
                self._send(signal.SIGCONT)

    def _wait_ms(self) -> int | None:
        if self._deadline is None:
            return None
        return max(0, int((self._deadline - time.monotonic()) * 1000) + 1)

    def _reap(self) -> int | None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid != self._agent:
                continue
            if os.WIFSTOPPED(status):
                if self._control is not None:
                    _tell(self._control, b"T%d" % os.WSTOPSIG(status))
            elif os.WIFSIGNALED(status):
                return 128 + os.WTERMSIG(status)
            else:
                return os.WEXITSTATUS(status)

    def _listen(self) -> bool:
        assert self._control is not None
        data = self._control.recv(4096)
        if not data:
            self._control.close()
            self._control = None
            self._gate.close()
            self._deadline = time.monotonic() + self._grace_s
            return False
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line == b"G":
                with self._gate:
                    _tell(self._gate, b"go")
            elif line.startswith(b"S"):
                self._send(int(line[1:]))
            elif line in (b"F", b"C"):
                if line == b"F":
                    foreground(self._agent)
                self._send(signal.SIGCONT)
        return True

    def _send(self, number: int) -> None:
        try:
            os.killpg(self._agent, number)
        except ProcessLookupError:
            pass  # just ended; the next reap says so


def foreground(group: int) -> None:
    """Makes ``group`` the one the terminal listens to; nothing when there is no terminal (any more)."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return
    try:
        os.tcsetpgrp(terminal, group)
    except OSError:
        pass
    finally:
        os.close(terminal)


def _prepare(instructions: dict[str, Any]) -> tuple[int, socket.socket]:
    """Forks the agent and brings it to the point of exec: its pid, and the socket on which it waits for "go".

    Raises OSError naming the step that failed.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become_agent(instructions, theirs)
    theirs.close()
    # From here on nobody in the jail may look into this process, though it runs as the same user.
    _prctl(_PR_SET_DUMPABLE, 0)
    _expect(ours, b"unshared")
    base = Path(f"/proc/{pid}")
    if instructions["deny_groups"]:
        (base / "setgroups").write_text("deny")
    (base / "gid_map").write_text(instructions["gids"])
    (base / "uid_map").write_text(instructions["uids"])
    if instructions["foreground"]:
        foreground(pid)
    ours.sendall(b"mapped")
    _expect(ours, b"ready")
    return pid, ours


def _expect(channel: socket.socket, word: bytes) -> None:
    message = channel.recv(4096)
    if message != word:
        raise OSError(errno.EPERM, message.decode(errors="replace") or "the agent's process ended before it started")


def _become_agent(instructions: dict[str, Any], channel: socket.socket) -> NoReturn:
    try:
        _enter(instructions, channel)
        channel.sendall(b"ready")
    except OSError as error:
        channel.sendall((error.strerror or str(error)).encode())
        os._exit(1)
    if not channel.recv(2):
        os._exit(1)
    channel.close()
    os._exit(_execute(instructions["argv"], instructions["env"]))


def _enter(instructions: dict[str, Any], channel: socket.socket) -> None:
    signal.set_wakeup_fd(-1)
    os.setpgid(0, 0)
    keyctl = _KEYCTL[os.uname().machine]
    # The session keyring is inherited whatever the namespace; without kernel keyrings (ENOSYS) there is none.
    _libc.syscall(ctypes.c_long(keyctl), _KEYCTL_JOIN_SESSION_KEYRING, None)
    _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare the agent's own user and mount namespaces")
    channel.sendall(b"unshared")
    _expect(channel, b"mapped")
    # By path, after the mounts: the inherited directory could be one that is covered now.
    os.chdir("/")
    _change_directory(instructions["cwd"])
    ignored = set(instructions["ignored"])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, 1 << 16)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    code = bytes.fromhex(instructions["filter"])
    program = Program(len(code) // 8, code)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def _change_directory(path: str) -> None:
    try:
        os.chdir(path)
    except OSError as error:
        raise OSError(error.errno, f"the working directory {path} cannot be entered: {error.strerror}") from error


def _execute(argv: list[str], env: dict[str, str]) -> int:
    """Replaces the process; returns the shell's exit status for what went wrong when it cannot."""
    name = argv[0]
    if not name:
        return _complain("", errno.ENOENT)
    if "/" in name:
        candidates = [name]
    else:
        candidates = [f"{directory or '.'}/{name}" for directory in env.get("PATH", os.defpath).split(":")]
    worst = errno.ENOENT
    for candidate in candidates:
        code = _try(candidate, argv, env)
        if code not in (errno.ENOENT, errno.ENOTDIR):
            worst = code
            if code != errno.EACCES:
                break
    return _complain(name, worst)


def _try(path: str, argv: list[str], env: dict[str, str]) -> int:
    try:
        try:
            os.execve(path, argv, env)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            # A script without "#!" is the shell's, as execvp(3) has it.
            os.execve("/bin/sh", ["sh", path, *argv[1:]], env)
    except OSError as error:
        return error.errno or errno.EACCES


def _complain(name: str, code: int) -> int:
    missing = code == errno.ENOENT
    reason = "command not found" if missing and "/" not in name else os.strerror(code)
    os.write(2, f"creto: {name}: {reason}\n".encode(errors="surrogateescape"))
    return 127 if missing else 126


if __name__ == "__main__":
    sys.exit(main())
