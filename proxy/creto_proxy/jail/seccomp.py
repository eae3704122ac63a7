"""The system-call filter of the agent: what could get around the network namespace or reach out of the jail by kernel
features that namespaces do not cover.

It is not a general sandbox filter. Refused are socket families that do not end in the agent's own network namespace
(vsock, packet, Bluetooth...), io_uring (it opens sockets without calling socket(2)), typing into the user's terminal
(TIOCSTI, TIOCLINUX; CVE-2017-5226), new cgroup namespaces (a cgroup2 mount of one would reach ``cgroup.kill`` of the
sidecar), and every way to make calls under another ABI, whose numbers this filter would misread.

Source: seccomp(2), linux/filter.h, linux/seccomp.h; ioctl comparison of the low 32 bits after CVE-2019-10063.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from creto_proxy.jail.kernel import MACHINES, Machine

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
FAMILIES = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)
CLONE_NEWCGROUP = 0x02000000
TIOCSTI, TIOCLINUX = 0x5412, 0x541C

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000
_X32_BIT = 0x40000000

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG = 0, 4, 16  # offsets in struct seccomp_data; arguments are u64, low half first on both machines

_NUMBERS: Mapping[int, Mapping[str, int]] = {
    MACHINES["x86_64"].audit_arch: {"socket": 41, "socketpair": 53, "clone": 56, "ioctl": 16, "unshare": 272},
    MACHINES["aarch64"].audit_arch: {"socket": 198, "socketpair": 199, "clone": 220, "ioctl": 29, "unshare": 97},
}
# Numbers assigned since 5.1 are the same on all machines.
_IO_URING = (425, 426, 427)
_CLONE3 = 435  # its flags are behind a pointer; libc falls back to clone on ENOSYS


@dataclass(frozen=True, slots=True)
class _Op:
    """One BPF instruction; ``yes`` and ``no`` are how many of the following instructions to skip."""

    code: int
    k: int
    yes: int = 0
    no: int = 0

    def pack(self) -> bytes:
        return struct.pack("=HBBI", self.code, self.yes, self.no, self.k)


def _deny(code: int) -> _Op:
    return _Op(_RETURN, _ERRNO | code)


def _call(number: int, *body: _Op) -> list[_Op]:
    """``body`` when the call is ``number``; it must return. The accumulator holds the number before and after."""
    return [_Op(_JUMP_EQ, number, 0, len(body)), *body]


def program(machine: Machine) -> bytes:
    """The filter as packed ``struct sock_filter[]`` (8 bytes each), ready for seccomp(2)."""
    numbers = _NUMBERS[machine.audit_arch]
    allow = _Op(_RETURN, _ALLOW)
    ops = [
        _Op(_LOAD, _ARCH),
        _Op(_JUMP_EQ, machine.audit_arch, 1, 0),
        _Op(_RETURN, _KILL_PROCESS),
        _Op(_LOAD, _NR),
        # x32 calls carry the native AUDIT_ARCH; no native number is that high.
        _Op(_JUMP_GE, _X32_BIT, 0, 1),
        _deny(errno.ENOSYS),
    ]
    for name in ("socket", "socketpair"):
        tests = [_Op(_JUMP_EQ, family, len(FAMILIES) - index, 0) for index, family in enumerate(FAMILIES)]
        ops += _call(numbers[name], _Op(_LOAD, _ARG), *tests, _deny(errno.EAFNOSUPPORT), allow)
    for name in ("clone", "unshare"):
        ops += _call(
            numbers[name],
            _Op(_LOAD, _ARG),
            _Op(_JUMP_SET, CLONE_NEWCGROUP, 0, 1),
            _deny(errno.EPERM),
            allow,
        )
    ops += _call(
        numbers["ioctl"],
        _Op(_LOAD, _ARG + 8),
        _Op(_JUMP_EQ, TIOCSTI, 1, 0),
        _Op(_JUMP_EQ, TIOCLINUX, 0, 1),
        _deny(errno.EPERM),
        allow,
    )
    for number in (*_IO_URING, _CLONE3):
        ops += _call(number, _deny(errno.ENOSYS))
    ops.append(allow)
    return b"".join(op.pack() for op in ops)
