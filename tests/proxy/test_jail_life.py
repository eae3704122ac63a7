"""How agents start, are signalled, and end; and what is left when the sidecar goes first."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .jail_lab import Lab, lab, users

DEADLINE_S = 90


@pytest.fixture(scope="module", params=list(users()))
def place(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        yield lab(users()[request.param], Path(top))


def until(path: Path) -> str:
    """The text of a file as soon as it is there and ends in a newline."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return text
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
        (["creto-no-such-program"], 127),
        (["/nowhere/program"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_exit_status_is_the_shells(place: Lab, argv: list[str], status: int) -> None:
    report, _, errors = place.run(argv)
    assert (report.get("status"), report.get("again")) == (status, status), (report, errors)
    if status in (126, 127):
        assert errors.startswith(f"creto: {argv[0]}: ")


def test_script_without_an_interpreter_line_is_the_shells(place: Lab) -> None:
    script = place.write("script", "echo from $1\n")
    script.chmod(0o755)
    assert place.run([str(script), "shell"])[1] == "from shell\n"


def test_standard_streams_pass_through(place: Lab) -> None:
    report, out, errors = place.run(["sh", "-c", "cat; echo careful >&2"], stdin=b"through")
    assert (report["status"], out, errors) == (0, "through", "careful\n")


def test_signals_are_forwarded(place: Lab) -> None:
    program = (
        "import signal, socket, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        f"socket.create_connection(('1.2.3.4', {10000 + signal.SIGTERM})).recv(10)\n"
        "sys.exit(42 if signal.sigwait([signal.SIGTERM]) == signal.SIGTERM else 1)\n"
    )
    report, _, errors = place.run([place.python, "-I", "-S", "-c", program])
    assert report["status"] == 42, errors


def test_works_on_uvloop(place: Lab) -> None:
    report, out, errors = place.run(
        [place.python, "-I", "-S", "-c", "import socket; print(socket.create_connection(('1.2.3.4', 5)).recv(99))"],
        uvloop=True,
    )
    assert report.get("status") == 0, errors
    assert "1.2.3.4" in out


def test_what_the_agent_leaves_behind_ends_with_it(place: Lab) -> None:
    lock = place.write("lock", "")
    program = f"exec 9<{lock}; flock -s 9; echo ready > {place.home}/held; exec sleep 1000"
    wait = f"while [ ! -s {place.home}/held ]; do sleep 0.01; done"
    report, _, errors = place.run(["sh", "-c", f"(setsid sh -c '{program}') & {wait}"])
    assert report["status"] == 0, errors
    with lock.open() as file:
        # The kernel has killed every process of the namespace before the sidecar learns of the end.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_killed_sidecar_refuses_the_next_connection_and_the_agent_ends(place: Lab) -> None:
    lock, up, gone = place.write("orphan", ""), place.home / "up", place.home / "gone"
    program = f"""
import errno, fcntl, os, socket, time
file = open({str(lock)!r}); fcntl.flock(file, fcntl.LOCK_SH)
assert socket.create_connection(("1.2.3.4", 80)).recv(99)
open({str(up)!r}, "w").write("up\\n")
while True:
    try:
        # Alive, the sidecar answers; dead, nothing may be read and nothing may hang.
        socket.create_connection(("1.2.3.4", 80), timeout=5).close()
    except OSError:
        break
    time.sleep(0.01)
found = []
for host, port in (("1.2.3.4", 80), ("2001:db8::1", 443), ("8.8.8.8", 53)):
    try:
        socket.create_connection((host, port), timeout=5)
    except OSError as error:
        found.append(errno.errorcode.get(error.errno, repr(error)))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(5)
    sock.connect(("8.8.8.8", 53)); sock.send(b"x")
    try:
        sock.recv(9)
    except OSError as error:
        found.append(errno.errorcode.get(error.errno, repr(error)))
open({str(gone)!r}, "w").write(" ".join(found) + "\\n")
time.sleep(1000)
"""
    sidecar = place.start([place.python, "-I", "-S", "-c", program], grace_s=1.0)
    until(up)
    sidecar.kill()
    sidecar.wait()
    assert until(gone).split() == ["ECONNREFUSED"] * 4
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # returns when nobody in the jail is left


def test_missing_hidden_path_is_an_error(place: Lab) -> None:
    report, _, _ = place.run(["true"], hidden=[str(place.home / "not-yet")])
    assert report["kind"] == "FileNotFoundError"


def test_redirect_that_cannot_be_installed_starts_nothing(place: Lab) -> None:
    report, _, _ = place.run(["touch", str(place.home / "started")], rules=False)
    assert report == {"error": "no such thing here", "kind": "Unsupported"}
    assert not (place.home / "started").exists()


def test_new_path_outside_the_private_directories_is_refused(place: Lab) -> None:
    pem = place.write("pem", "x")
    report, _, _ = place.run(["true"], readable={str(pem): "/usr/share/creto-test.pem"})
    assert report["kind"] == "Unsupported"
    assert "/usr/share/creto-test.pem" in report["error"]
    assert not Path("/usr/share/creto-test.pem").exists()


def test_working_directory_that_is_covered_is_refused(place: Lab) -> None:
    state = place.directory("covered")
    (state / "work").mkdir()
    report, _, _ = place.run(["true"], hidden=[str(state)], argv_cwd=str(state / "work"))
    assert "covered/work" in report["error"]


class Shell:
    """A terminal with the sidecar in its foreground, as an interactive shell would leave it."""

    def __init__(self, place: Lab, argv: list[str], *, inside: list[str] | None = None) -> None:
        command, self.report, environment = place.command(argv)
        self.sidecar = shlex.join(command)
        command = inside or command
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            if place.uid != os.geteuid():
                os.fchown(0, place.uid, place.uid)
                os.setgroups([])
                os.setresgid(place.uid, place.uid, place.uid)
                os.setresuid(place.uid, place.uid, place.uid)
            os.chdir(place.home)
            os.execve(command[0], command, environment)
        self.seen = b""

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.seen:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.seen
            self.seen += os.read(self.terminal, 4096)
        self.seen = self.seen.partition(text)[2]

    def type(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def close(self) -> None:
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


def test_interactive_agent_has_the_terminal(place: Lab) -> None:
    program = (
        "import os, sys, time\n"
        "print('mine', os.tcgetpgrp(0) == os.getpgrp(), os.ttyname(0), flush=True)\n"
        "print('line', input(), flush=True)\n"
        # A signal that comes just before input() reads would be seen when the read returns: never.
        "try:\n    print('again', flush=True)\n    while True: time.sleep(0.05)\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True); sys.exit(9)\n"
    )
    shell = Shell(place, [place.python, "-I", "-S", "-c", program])
    shell.expect(b"mine True /dev/console")
    shell.type(b"hello\n")
    shell.expect(b"line hello")
    shell.expect(b"again")
    shell.type(b"\x03")
    shell.expect(b"interrupted")
    shell.close()
    assert '"status": 9' in shell.report.read_text()
    # Control-C was the agent's alone: the sidecar has to see it through.
    assert '"signals": []' in shell.report.read_text()


def test_stopping_where_nobody_could_continue_does_not_hang(place: Lab) -> None:
    program = "print('ready', flush=True); print('got', input(), flush=True)"
    shell = Shell(place, [place.python, "-I", "-S", "-c", program])
    shell.expect(b"ready")
    shell.type(b"\x1a")
    shell.type(b"on\n")
    shell.expect(b"got on")
    shell.close()
    assert '"status": 0' in shell.report.read_text()


def test_shell_stops_and_continues_the_agent_as_its_job(place: Lab) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    program = "print('ready', flush=True)\nfor _ in range(2): print('got', input(), flush=True)"
    shell = Shell(place, [place.python, "-I", "-S", "-c", program], inside=[bash, "--norc", "-i"])
    shell.type(f"{shell.sidecar}\n".encode())
    shell.expect(b"\nready")
    shell.type(b"one\n")
    shell.expect(b"got one")
    shell.type(b"\x1a")
    shell.expect(b"Stopped")
    shell.type(b"fg\n")
    shell.expect(b"fg\r\n")
    shell.type(b"two\n")
    shell.expect(b"got two")
    shell.type(b"exit\n")
    shell.close()
    assert '"status": 0' in shell.report.read_text()


def test_pipeline_keeps_the_terminal_until_the_agent_asks_for_it(place: Lab) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    program = "import os; print('mine', os.tcgetpgrp(0) == os.getpgrp(), flush=True); print('got', input(), flush=True)"
    shell = Shell(place, [place.python, "-I", "-S", "-c", program], inside=[bash, "--norc", "-i"])
    shell.type(f"{shell.sidecar} | cat\n".encode())
    shell.expect(b"mine False")
    shell.type(b"line\n")
    shell.expect(b"got line")
    shell.type(b"exit\n")
    shell.close()
    assert '"status": 0' in shell.report.read_text()
