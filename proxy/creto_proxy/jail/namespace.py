"""Makes the namespaces, maps the ids, and explains why when the machine refuses.

There are two nested user namespaces. The outer one owns network, mounts and processes; it is entered by the launching
child and by init. The agent runs in an inner one: whatever power it gains there (every user namespace makes its
creator root inside) ends at the border, so rules cannot be flushed and mounts cannot be lifted.

Ids are mapped onto themselves in both, so that files the agent writes belong to the user: only the user's own ids
without root, every id when root starts it.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from creto_proxy.errors import Unsupported
from creto_proxy.jail import kernel

OUTER = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
)

_WITHOUT = "To run without enforcement instead, say --enforce=proxy-env; the agent could then go around creto."

# file, value that forbids, what to do
_SWITCHES = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
    ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=10000"),
)


@dataclass(frozen=True, slots=True)
class IdMaps:
    """What goes into ``uid_map``, ``gid_map`` and (``deny_groups``, without root) ``setgroups`` of a user namespace."""

    uids: str
    gids: str
    deny_groups: bool

    def write(self, pid: int) -> None:
        """Maps the ids of the user namespace of ``pid``, from outside it. Source: user_namespaces(7)."""
        base = Path(f"/proc/{pid}")
        if self.deny_groups:
            (base / "setgroups").write_text("deny")
        (base / "gid_map").write_text(self.gids)
        (base / "uid_map").write_text(self.uids)


def id_maps() -> IdMaps:
    """Identity maps: all ids this process can name when it may map them (root), its own two otherwise."""
    if os.geteuid() == 0 and _may_map_all():
        return IdMaps(uids=_whole("uid_map"), gids=_whole("gid_map"), deny_groups=False)
    uid, gid = os.geteuid(), os.getegid()
    return IdMaps(uids=f"{uid} {uid} 1\n", gids=f"{gid} {gid} 1\n", deny_groups=True)


def _may_map_all() -> bool:
    setgid, setuid = 6, 7
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            return bool(effective >> setgid & 1 and effective >> setuid & 1)
    return False


def _whole(name: str) -> str:
    lines = []
    for line in Path("/proc/self", name).read_text().splitlines():
        inside, _, count = line.split()
        lines.append(f"{inside} {inside} {count}\n")
    return "".join(lines)


def enter_outer() -> None:
    """Unshares everything of the outer namespace; the pid namespace takes effect for the next child.

    Raises ``Unsupported`` saying which switch of this machine is in the way.
    """
    try:
        kernel.unshare(OUTER, "user, network, mount, pid, ipc and uts namespaces")
    except OSError as error:
        raise Unsupported(refusal(error)) from error


def refusal(error: OSError) -> str:
    """Why the kernel will not make namespaces here, and what to do about it."""
    for name, forbidding, remedy in _SWITCHES:
        try:
            value = Path("/proc/sys", name).read_text().strip()
        except OSError:
            continue
        if value == forbidding:
            what = name.replace("/", ".")
            return f"This machine forbids user namespaces ({what} = {value}). As root: {remedy}. {_WITHOUT}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return (
            f"Namespaces are refused ({error.strerror or error}), as in most containers. Allow them (docker run "
            "--security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt "
            f"systempaths=unconfined; Kubernetes: use the sidecar instead). {_WITHOUT}"
        )
    if error.errno in (errno.ENOSPC, errno.EUSERS):
        return f"The limit of namespaces is reached (see /proc/sys/user). {_WITHOUT}"
    return f"The kernel lacks a namespace that creto needs ({error.strerror or error}). {_WITHOUT}"
