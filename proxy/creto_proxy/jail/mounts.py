"""What the agent sees of the file system: everything the user sees, except the ways out and creto's own state.

``survey`` looks at the host while it still is the host; ``apply`` then builds the view inside the new mount and
pid namespaces. When the agent's inner user namespace copies these mounts the kernel locks them (MNT_LOCKED), so what
is covered here stays covered, even for an agent that makes itself root of yet another namespace.

What is covered, and why:
- ``/proc``, ``/sys``, ``/dev``: fresh ones. For root, whose file permissions still count, the parts of ``/proc`` that
  steer the kernel are read-only, ``/dev`` has no disks, and device nodes elsewhere are dead.
- ``/run`` and every unix socket known to the kernel: docker, D-Bus, systemd, ssh-agent, tmux and X11 answer on unix
  sockets, which network namespaces do not separate.
- the hidden paths (creto's state), under every name they have.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from errno import EACCES, ENODEV, ENOENT, ENOSYS, ENOTDIR, EPERM
from pathlib import Path

from creto_proxy.errors import Unsupported
from creto_proxy.jail import kernel

RUN = "/run"
RESOLV_CONF = "/etc/resolv.conf"
# attempts:1, because a refusal is an answer; timeout:10, because a slow upstream is not a dead server.
RESOLV_TEXT = "nameserver 127.0.0.1\noptions attempts:1 timeout:10\n"

# Where distributions keep the one bundle that OpenSSL, GnuTLS and Go read.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# Accelerators, which agents compute on; nothing that stores data or carries packets.
_ACCELERATORS = ("dri", "kfd", "accel", "nvidia")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}

# Writing these as uid 0 needs no capability, or reads what other users do.
_KERNEL_KNOBS = ("sys", "sysrq-trigger", "irq", "bus", "fs", "acpi", "scsi", "driver", "mtrr", "latency_stats")

# Directories that exist to hold sockets: each is replaced by a private one, so that new sockets do not leak in either.
_SOCKET_DIRECTORIES = (".X11-unix", ".ICE-unix", ".XIM-unix", ".font-unix")
_SOCKET_DIRECTORY_PREFIXES = ("ssh-", "tmux-", "vscode-ipc-", "dbus-")

_SEALED = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: device number, the subtree of it that is mounted, and where (proc_pid_mountinfo(5))."""

    device: str
    root: str
    point: str


def mountinfo(text: str) -> list[Mount]:
    """The mounts, later ones over earlier ones."""
    mounts = []
    for line in text.splitlines():
        fields = line.split(" ")
        mounts.append(Mount(device=fields[2], root=_unescaped(fields[3]), point=_unescaped(fields[4])))
    return mounts


def _unescaped(text: str) -> str:
    head, *rest = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def _below(path: str, top: str) -> bool:
    return path == top or top == "/" or path.startswith(top + "/")


def aliases(path: str, mounts: Sequence[Mount]) -> list[str]:
    """Every place where ``path`` (absolute, no links) or something inside it is mounted, ``path`` first."""
    # Of several mounts on one point the last is the one that is seen; max keeps the first it meets.
    home = max((m for m in reversed(mounts) if _below(path, m.point)), key=lambda m: len(m.point))
    inner = os.path.normpath(home.root + "/" + path[len(home.point) :])
    found = [path]
    for mount in mounts:
        if mount.device != home.device or mount.point == home.point:
            continue
        if _below(inner, mount.root):
            found.append(os.path.normpath(mount.point + "/" + inner[len(mount.root) :]))
        elif _below(mount.root, inner):
            found.append(mount.point)
    return found


def unix_sockets(table: str) -> list[str]:
    """Paths bound by sockets, from the text of ``/proc/net/unix``; abstract and unbound ones are left out.

    Abstract names belong to the network namespace and need no cover.
    """
    paths = []
    for line in table.splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8 and fields[7].startswith("/"):
            paths.append(fields[7])
    return paths


def _sockets_named(environment: Mapping[str, str]) -> Iterator[str]:
    """Socket paths the environment points at: ``SSH_AUTH_SOCK``, ``DOCKER_HOST=unix://``, D-Bus addresses, ``TMUX``."""
    for value in environment.values():
        for part in value.replace(";", ",").split(","):
            for prefix in ("unix://", "unix:path=", "unix:dir=", ""):
                if part.startswith(prefix + "/"):
                    yield part[len(prefix) :]
                    break


def _is(path: str, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def _socket_directories() -> list[str]:
    found = []
    for top in dict.fromkeys((os.path.realpath(tempfile.gettempdir()), "/tmp", "/var/tmp")):
        try:
            names = os.listdir(top)
        except OSError:
            continue
        for name in names:
            path = f"{top}/{name}"
            if name in _SOCKET_DIRECTORIES or name.startswith(_SOCKET_DIRECTORY_PREFIXES):
                if _is(path, stat.S_ISDIR):
                    found.append(path)
    return found


def _run_directories() -> list[str]:
    if not os.path.isdir(RUN):
        raise Unsupported(f"{RUN} is not a directory; creto keeps the agent's private files there.")
    return list(dict.fromkeys((os.path.realpath(RUN), os.path.realpath("/var/run"))))


def survey(
    *,
    hidden: Iterable[Path],
    readable: Mapping[Path, Path],
    ca_bundle: Path | None,
    environment: Mapping[str, str],
) -> Survey:
    """Looks at the host and decides what to cover.

    Raises FileNotFoundError when a hidden path does not exist yet (it would be visible once it does) or a readable
    file is missing.
    """
    mounts = mountinfo(Path("/proc/self/mountinfo").read_text())
    covered = [alias for path in hidden for alias in aliases(os.path.realpath(path, strict=True), mounts)]
    files = {os.fspath(inside): Path(host).read_bytes() for host, inside in readable.items()}
    if ca_bundle is not None:
        bundle = ca_bundle.read_bytes()
        files |= {os.path.realpath(path): bundle for path in SYSTEM_BUNDLES if os.path.exists(path)}
    files[os.path.realpath(RESOLV_CONF)] = RESOLV_TEXT.encode()
    candidates = [
        *unix_sockets(Path("/proc/net/unix").read_text(errors="surrogateescape")),
        *(mount.point for mount in mounts),
        *_sockets_named(environment),
    ]
    run = _run_directories()
    directories = _socket_directories()
    private = (*run, *directories, "/dev")
    sockets = [
        path
        for path in dict.fromkeys(candidates)
        if _is(path, stat.S_ISSOCK) and not any(_below(os.path.realpath(path), top) for top in private)
    ]
    return Survey(
        hidden=tuple(covered),
        run=tuple(run),
        socket_directories=tuple(directories),
        sockets=tuple(sockets),
        files=files,
        terminal=_terminal(),
        as_root=os.geteuid() == 0,
    )


def _terminal() -> str | None:
    """The terminal on standard input, output or error, if there is one under /dev."""
    for fd in range(3):
        try:
            path = os.ttyname(fd)
        except OSError:
            continue
        if path.startswith("/dev/"):
            return path
    return None


@dataclass(frozen=True, slots=True)
class Survey:
    """What to cover and what to put in place. ``files``: contents by path inside; ``terminal``: the user's tty node."""

    hidden: tuple[str, ...]
    run: tuple[str, ...]
    socket_directories: tuple[str, ...]
    sockets: tuple[str, ...]
    files: Mapping[str, bytes]
    terminal: str | None
    as_root: bool


def apply(plan: Survey) -> None:
    """Builds the view. Call as the first process of the pid namespace, owning the mount namespace.

    Raises ``Unsupported`` when this machine does not let a namespace have a ``/proc`` of its own.
    """
    try:
        _View(plan).build()
    except OSError as error:
        if error.errno == ENOSYS:
            raise Unsupported("creto run needs Linux 5.12 or newer (mount_setattr).") from error
        raise


class _View:
    def __init__(self, plan: Survey) -> None:
        self._plan = plan
        self._own_devices: set[int] = set()
        self._sealed: list[str] = []

    def build(self) -> None:
        kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        if self._plan.as_root:
            kernel.set_mount("/", add=kernel.MOUNT_ATTR_NODEV, recursive=True)
        self._processes()
        self._runtime_directories()
        self._system()
        self._devices()
        self._cover()
        self._place_files()
        for path in self._sealed:
            kernel.set_mount(path, add=kernel.MOUNT_ATTR_RDONLY)
        if self._plan.as_root:
            self._protect_kernel()

    def _processes(self) -> None:
        try:
            kernel.mount("proc", "/proc", "proc", _SEALED)
        except OSError as error:
            if error.errno != EPERM:
                raise
            raise Unsupported(
                "A fresh /proc is refused, because parts of the present one are masked, as in most containers. "
                "Allow it (docker run --security-opt systempaths=unconfined), or use the sidecar instead."
            ) from error

    def _runtime_directories(self) -> None:
        """Private, empty, writable directories where the sockets of daemons were."""
        links = [
            (entry.path, os.readlink(entry.path))
            for top in self._plan.run
            for entry in os.scandir(top)
            if entry.is_symlink()
        ]
        for path in (*self._plan.run, *self._plan.socket_directories):
            with _unless_out_of_reach():
                self._tmpfs(path, f"mode={stat.S_IMODE(os.stat(path).st_mode):o}")
        for path, target in links:
            # NixOS reaches its programs through links in /run; links that stay inside would dangle.
            place = os.path.normpath(os.path.join(os.path.dirname(path), target))
            if not any(_below(place, top) for top in self._plan.run):
                os.symlink(target, path)
        os.makedirs(f"{self._plan.run[0]}/user/{os.geteuid()}", mode=0o700)
        os.mkdir(f"{self._plan.run[0]}/lock")

    def _system(self) -> None:
        """A /sys that shows the agent's own network, read-only, with the cgroup files programs size themselves by."""
        cgroups, stage = "/sys/fs/cgroup", self._scratch("cgroup")
        try:
            kernel.bind(cgroups, stage, recursive=True)
            kernel.set_mount(stage, add=kernel.MOUNT_ATTR_RDONLY, recursive=True)
            kernel.mount("sysfs", "/sys", "sysfs", _SEALED | kernel.MS_RDONLY)
            kernel.mount(stage, cgroups, None, kernel.MS_MOVE)
        except OSError as error:
            if error.errno not in (EPERM, ENOENT, ENODEV):
                raise
            # In a container no fresh one may be allowed: then the present one, unwritable. (No /sys at all is fine.)
            if os.path.ismount("/sys"):
                kernel.set_mount("/sys", add=kernel.MOUNT_ATTR_RDONLY, recursive=True)
        if os.path.ismount(stage):
            kernel.unmount(stage)
        os.rmdir(stage)

    def _devices(self) -> None:
        stage = self._scratch("dev")
        kernel.mount("tmpfs", stage, "tmpfs", kernel.MS_NOSUID | kernel.MS_NOEXEC, "mode=755,size=64k")
        for name in (*_DEVICES, *(n for n in os.listdir("/dev") if n.startswith(_ACCELERATORS))):
            self._device(f"/dev/{name}", f"{stage}/{name}")
        if self._plan.terminal is not None:
            # /dev/pts below is a new instance; ttyname(3) finds the user's terminal as /dev/console.
            self._device(self._plan.terminal, f"{stage}/console")
        for name, target in _DEVICE_LINKS.items():
            os.symlink(target, f"{stage}/{name}")
        for name in ("pts", "shm", "mqueue"):
            os.mkdir(f"{stage}/{name}")
        quiet = kernel.MS_NOSUID | kernel.MS_NOEXEC
        group = ",gid=5" if self._plan.as_root and _group_mapped(5) else ""
        kernel.mount("devpts", f"{stage}/pts", "devpts", quiet, f"newinstance,ptmxmode=0666,mode=620{group}")
        kernel.mount("tmpfs", f"{stage}/shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
        try:
            kernel.mount("mqueue", f"{stage}/mqueue", "mqueue", _SEALED)
        except OSError as error:
            if error.errno != ENODEV:  # a kernel without POSIX queues
                raise
        kernel.mount(stage, "/dev", None, kernel.MS_MOVE)
        os.rmdir(stage)

    def _device(self, source: str, target: str) -> None:
        if not os.path.exists(source):
            return
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            _touch(target)
        kernel.bind(source, target)
        if self._plan.as_root:
            kernel.set_mount(target, remove=kernel.MOUNT_ATTR_NODEV)

    def _cover(self) -> None:
        dead = f"{self._plan.run[0]}/.creto-dead"
        _touch(dead)
        os.chmod(dead, 0)
        for path in self._plan.sockets:
            with _unless_out_of_reach():
                kernel.bind(dead, path)
        for path in self._plan.hidden:
            with _unless_out_of_reach():
                if stat.S_ISDIR(os.stat(path).st_mode):
                    self._tmpfs(path, "mode=755,size=64k")
                    self._sealed.append(path)
                else:
                    kernel.bind(dead, path)
                    kernel.set_mount(path, add=kernel.MOUNT_ATTR_RDONLY)
        os.unlink(dead)  # it lives on under its covers

    def _place_files(self) -> None:
        stage = self._scratch("files")
        kernel.mount("tmpfs", stage, "tmpfs", _SEALED, "mode=755")
        for index, (target, content) in enumerate(self._plan.files.items()):
            if not os.path.exists(target) and not self._make(target):
                if target == os.path.realpath(RESOLV_CONF):
                    continue  # without the file resolvers ask 127.0.0.1, which is right
                raise Unsupported(f"{target} cannot be given to the agent, because it does not exist on this machine.")
            source = f"{stage}/{index}"
            Path(source).write_bytes(content)
            os.chmod(source, 0o444)
            kernel.bind(source, target)
            kernel.set_mount(target, add=kernel.MOUNT_ATTR_RDONLY)
        kernel.unmount(stage)
        os.rmdir(stage)

    def _make(self, target: str) -> bool:
        """Makes an empty file to mount on, if that happens in one of our own file systems and not on the host's."""
        parent = os.path.dirname(target)
        while not os.path.isdir(parent):
            parent = os.path.dirname(parent)
        if os.stat(parent).st_dev not in self._own_devices:
            return False
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _touch(target)
        return True

    def _protect_kernel(self) -> None:
        for name in _KERNEL_KNOBS:
            path = f"/proc/{name}"
            if os.path.exists(path):
                kernel.bind(path, path)
                kernel.set_mount(path, add=kernel.MOUNT_ATTR_RDONLY)

    def _tmpfs(self, path: str, options: str) -> None:
        kernel.mount("tmpfs", path, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
        self._own_devices.add(os.stat(path).st_dev)

    def _scratch(self, name: str) -> str:
        path = f"{self._plan.run[0]}/.creto-{name}"
        os.mkdir(path)
        return path


@contextlib.contextmanager
def _unless_out_of_reach() -> Iterator[None]:
    """Covering a path fails so when the agent could not reach it either, or when it went away meanwhile."""
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOENT, EACCES, ENOTDIR):
            raise


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def _group_mapped(gid: int) -> bool:
    for line in Path("/proc/self/gid_map").read_text().splitlines():
        inside, _, count = map(int, line.split())
        if inside <= gid < inside + count:
            return True
    return False
