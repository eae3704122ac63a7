"""Puts an agent into its jail: namespaces, rules, sockets, mounts, then its first process.

Three processes take part. The sidecar forks a *launcher*, which enters the outer namespaces, installs the redirect
and opens the listening sockets; the launcher clones *init* as a sibling inside the new pid namespace and ends; init
arranges the mounts and executes a fresh interpreter that starts the agent (``init.py``). After that nothing in the
jail shares memory, descriptors or a parent with the sidecar, except one control socket held by init.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from creto_proxy.errors import Unsupported
from creto_proxy.hookspecs import Redirect, RedirectPorts
from creto_proxy.jail import init, kernel, mounts, namespace, network, seccomp
from creto_proxy.jail.process import Jail, Terminal

_SETUP_TIMEOUT_S = 30.0

# In a fresh namespace every port is free. 53 because resolvers cannot be told another; 15001 as Istio's outbound.
PORTS = RedirectPorts(tcp=15001, dns=53)


@dataclass(frozen=True, slots=True)
class JailSpec:
    """What to run, and what it must and must not see.

    hidden: existing directories, sockets and files that are covered (the state directory, keys).
    readable: host file -> path inside; a copy is made before anything is hidden. New paths are possible below /run.
    ca_bundle: PEM file put in place of the system's own bundles, wherever the distribution keeps them.
    grace_s: how long the agent may go on, without network, after the sidecar has died.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    hidden: tuple[Path, ...] = ()
    readable: Mapping[Path, Path] = field(default_factory=dict)
    ca_bundle: Path | None = None
    ports: RedirectPorts = PORTS
    hostname: str | None = None
    grace_s: float = 10.0


def launch(spec: JailSpec, redirect: Redirect) -> Jail:
    """Builds the jail around the agent, which then waits, ready to execute, for ``Jail.start``.

    Whether the program exists is the agent's own exit status (127, 126), as in a shell. Forks, so call it early: before
    threads, and before keys are in memory. Blocks for about 100 ms.

    Raises ``Unsupported`` saying why this machine cannot and what to do, FileNotFoundError when a hidden or readable
    path does not exist, ValueError for an empty command.
    """
    if not spec.argv:
        raise ValueError("There is no command to run.")
    numbers = kernel.machine()
    if numbers is None:
        raise Unsupported(f"creto run knows x86-64 and AArch64, not {os.uname().machine}.")
    plan = mounts.survey(
        hidden=spec.hidden, readable=spec.readable, ca_bundle=spec.ca_bundle, environment={**os.environ, **spec.env}
    )
    maps = namespace.id_maps()
    terminal = Terminal()
    lent = terminal.interactive
    _fill_standard_descriptors()
    ours, theirs = socket.socketpair()
    control, control_inside = socket.socketpair()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        launcher = os.fork()
        if launcher == 0:
            ours.close()
            control.close()
            _Launcher(spec, redirect, numbers, plan, theirs, control_inside).run()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()
    control_inside.close()
    pid, listeners = None, None
    try:
        with ours:
            ours.settimeout(_SETUP_TIMEOUT_S)
            _expect(ours, "unshared")
            _map(maps, launcher)
            _send(ours, {"say": "mapped"})
            listeners = _expect_listeners(ours)
            pid = _expect(ours, "cloned")["pid"]
            _send(ours, {"say": "arrange"})
            _expect(ours, "arranged")
        _instruct(control, spec, numbers, maps, lent)
    except BaseException:
        os.kill(launcher, signal.SIGKILL)
        control.close()
        terminal.close()
        if listeners is not None:
            listeners.close()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        os.waitpid(launcher, 0)
    return Jail(pid, control, listeners, terminal, lent)


def _fill_standard_descriptors() -> None:
    """Where creto was started with one of 0, 1, 2 closed: else our sockets would take its place in the agent."""
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        os.set_inheritable(null, True)
        null = os.dup(null)
    os.close(null)


def _map(maps: namespace.IdMaps, launcher: int) -> None:
    try:
        maps.write(launcher)
    except OSError as error:
        raise Unsupported(namespace.refusal(error)) from error


def _instruct(
    control: socket.socket, spec: JailSpec, numbers: kernel.Machine, maps: namespace.IdMaps, lent: bool
) -> None:
    """Hands init its work and waits until the agent is about to execute."""
    document = json.dumps(
        {
            "argv": list(spec.argv),
            "env": dict(spec.env),
            "cwd": os.fspath(spec.cwd),
            "uids": maps.uids,
            "gids": maps.gids,
            "deny_groups": maps.deny_groups,
            "filter": seccomp.program(numbers).hex(),
            "ignored": _ignored_signals(),
            "foreground": lent,
            "grace_s": spec.grace_s,
        }
    ).encode()
    if len(document) > init.INSTRUCTIONS_BYTES:
        raise Unsupported("The command line and environment are too large.")
    try:
        control.sendall(len(document).to_bytes(8, "big") + document)
        answer = _line(control)
    except OSError:
        answer = ""
    if not answer.startswith("R"):
        raise Unsupported(f"The agent cannot be started: {answer[1:] or 'the first process of its jail ended'}.")


def _ignored_signals() -> list[int]:
    """Signals the caller's caller wants ignored (nohup); Python's own two are not among them."""
    own = {signal.SIGPIPE, signal.SIGXFSZ}
    return [int(n) for n in signal.valid_signals() - own if signal.getsignal(n) is signal.SIG_IGN]


def _line(channel: socket.socket) -> str:
    data = bytearray()
    while not data.endswith(b"\n"):
        byte = channel.recv(1)
        if not byte:
            return ""
        data += byte
    return data.decode(errors="replace").rstrip("\n")


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


def _expect(channel: socket.socket, what: str) -> dict[str, Any]:
    line = _line(channel)
    message: dict[str, Any] = json.loads(line) if line else {"say": "failed", "text": "its first process ended"}
    if message["say"] == what:
        return message
    if message["say"] == "unsupported":
        raise Unsupported(message["text"])
    raise Unsupported(f"The jail cannot be built: {message.get('text', line)}.")


def _expect_listeners(channel: socket.socket) -> network.Listeners:
    _expect(channel, "listening")
    listeners = network.receive_listeners(channel)
    if listeners is None:
        raise Unsupported("The jail cannot be built: its sockets did not arrive.")
    return listeners


class _Launcher:
    """What happens between fork and exec, in the launcher and then in init-to-be. Never returns to the caller."""

    def __init__(
        self,
        spec: JailSpec,
        redirect: Redirect,
        numbers: kernel.Machine,
        plan: mounts.Survey,
        channel: socket.socket,
        control: socket.socket,
    ) -> None:
        self._spec = spec
        self._redirect = redirect
        self._numbers = numbers
        self._plan = plan
        self._channel = channel
        self._control = control

    def run(self) -> NoReturn:
        try:
            self._detach()
            self._build()
        except Unsupported as error:
            self._fail("unsupported", str(error))
        except OSError as error:
            self._fail("failed", error.strerror or str(error))
        except Exception as error:  # a redirect is a plugin's code: whatever it raises, the agent is not started
            self._fail("failed", f"{type(error).__name__}: {error}")
        finally:
            os._exit(1)

    def _fail(self, say: str, text: str) -> None:
        try:
            _send(self._channel, {"say": say, "text": text})
        except OSError:
            pass  # the sidecar is gone, and with it whom to tell

    def _detach(self) -> None:
        """The sidecar's event loop must not hear of our signals, and we must not run its handlers."""
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        # A sidecar that made itself undumpable would leave us with id maps that it may not write.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)

    def _build(self) -> NoReturn:
        namespace.enter_outer()
        _send(self._channel, {"say": "unshared"})
        _expect(self._channel, "mapped")
        network.bring_up()
        self._redirect.install(self._spec.ports)
        listeners = network.listen(self._spec.ports)
        _send(self._channel, {"say": "listening"})
        network.send_listeners(self._channel, listeners)
        listeners.close()
        pid = kernel.fork_sibling(self._numbers)
        if pid == 0:
            self._become_init()
        _send(self._channel, {"say": "cloned", "pid": pid})
        os._exit(0)

    def _become_init(self) -> NoReturn:
        _expect(self._channel, "arrange")
        if self._spec.hostname is not None:
            kernel.sethostname(self._spec.hostname)
        mounts.apply(self._plan)
        os.chdir("/")
        _send(self._channel, {"say": "arranged"})
        if self._control.fileno() != init.CONTROL_FD:
            os.dup2(self._control.fileno(), init.CONTROL_FD)
        os.set_inheritable(init.CONTROL_FD, True)
        os.closerange(init.CONTROL_FD + 1, 1 << 20)
        # Isolated, without site: nothing of the user's environment or of installed packages runs in it.
        interpreter = sys.executable
        os.execve(interpreter, [interpreter, "-I", "-S", "-B", init.__file__], _init_environment())


def _init_environment() -> dict[str, str]:
    kept = ("LD_LIBRARY_PATH",)  # an interpreter built with --enable-shared may need it
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C.UTF-8"}
