"""The few system calls Python does not wrap, each raising ``OSError`` that says what was attempted.

Numbers and constants are the kernel's (``include/uapi``) for x86-64 and AArch64, the two machines creto jails on.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_CLONE_PARENT = 0x00008000
_SIGCHLD = 17

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4

MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4
MOUNT_ATTR_NOEXEC = 8

_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MNT_DETACH = 2
_MOUNT_SETATTR = 442  # the same on every machine since 5.12

# The GIL is kept during these calls: after the raw clone below there must be nothing to wait for.
_libc = ctypes.PyDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Machine:
    """What differs between processors: AUDIT_ARCH of the native calls and the number of clone(2)."""

    audit_arch: int
    clone: int


MACHINES = {
    "x86_64": Machine(audit_arch=0xC000003E, clone=56),
    "aarch64": Machine(audit_arch=0xC00000B7, clone=220),
}


def machine() -> Machine | None:
    """This machine's numbers, None where creto has none."""
    return MACHINES.get(platform.machine())


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare(flags: int, what: str) -> None:
    """unshare(2); ``what`` names the namespaces in the error."""
    _check(_libc.unshare(ctypes.c_int(flags)), f"unshare {what}")


def prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def mount(source: str | None, target: str, fstype: str | None, flags: int, options: str | None = None) -> None:
    """mount(2) with its five arguments."""
    encoded = [None if a is None else os.fsencode(a) for a in (source, target, fstype)]
    data = None if options is None else options.encode()
    result = _libc.mount(*encoded, ctypes.c_ulong(flags), data)
    _check(result, f"mount {fstype or source or ''} on {target}")


def bind(source: str, target: str, *, recursive: bool = False) -> None:
    mount(source, target, None, MS_BIND | (MS_REC if recursive else 0))


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def set_mount(target: str, *, add: int = 0, remove: int = 0, recursive: bool = False) -> None:
    """Changes some attributes of a mount (``MOUNT_ATTR_*``) and leaves the others alone.

    mount_setattr(2); unlike a remount it works on mounts whose other flags we may not touch. ENOSYS before 5.12.
    """
    attr = _MountAttr(add, remove, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(target),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    _check(result, f"change the mount at {target}")


def unmount(target: str) -> None:
    """Detaches a mount; what is bound from it elsewhere stays."""
    _check(_libc.umount2(os.fsencode(target), _MNT_DETACH), f"unmount {target}")


def sethostname(name: str) -> None:
    encoded = name.encode()
    _check(_libc.sethostname(encoded, ctypes.c_size_t(len(encoded))), "set the host name")


def fork_sibling(numbers: Machine) -> int:
    """fork(2) whose child is our parent's child, not ours: 0 in the child, its pid here.

    For a process with one thread that is about to exec: none of the fork handlers of libc and Python run.
    """
    return _check(_libc.syscall(ctypes.c_long(numbers.clone), _CLONE_PARENT | _SIGCHLD, 0, 0, 0, 0), "clone")
