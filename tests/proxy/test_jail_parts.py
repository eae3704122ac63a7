"""The parts of the jail that are plain functions."""

from __future__ import annotations

import errno
import struct

import pytest

from creto_proxy.jail import seccomp
from creto_proxy.jail.kernel import MACHINES
from creto_proxy.jail.mounts import aliases, mountinfo, unix_sockets
from creto_proxy.jail.namespace import refusal

MOUNTS = mountinfo(
    "\n".join(
        [
            r"21 1 254:0 / / rw - ext4 /dev/vda rw",
            r"22 21 0:5 / /dev rw - devtmpfs dev rw",
            r"30 21 254:1 / /home rw - ext4 /dev/vdb rw",
            r"31 21 254:1 /ann /srv/ann\040home rw shared:3 - ext4 /dev/vdb rw",
            r"32 21 254:1 /ann/state/keys /mnt/keys rw - ext4 /dev/vdb rw",
            r"33 21 0:40 / /tmp rw - tmpfs tmpfs rw",
        ]
    )
)


@pytest.mark.parametrize(
    ("path", "everywhere"),
    [
        ("/home/ann/state", ["/home/ann/state", "/srv/ann home/state", "/mnt/keys"]),
        ("/srv/ann home/state", ["/srv/ann home/state", "/home/ann/state", "/mnt/keys"]),
        ("/home/bob/state", ["/home/bob/state"]),
        ("/home/annex", ["/home/annex"]),
        ("/var/lib/creto", ["/var/lib/creto"]),
        ("/tmp/state", ["/tmp/state"]),
    ],
)
def test_a_hidden_path_is_found_under_every_name(path: str, everywhere: list[str]) -> None:
    assert aliases(path, MOUNTS) == everywhere


def test_sockets_with_a_path_are_read_from_the_kernels_table() -> None:
    table = (
        "Num       RefCount Protocol Flags    Type St Inode Path\n"
        "00000000: 00000002 00000000 00010000 0001 01 14522 /run/docker.sock\n"
        "00000000: 00000002 00000000 00010000 0001 01    22 /tmp/with space/s\n"
        "00000000: 00000003 00000000 00000000 0001 03 17432\n"
        "00000000: 00000002 00000000 00010000 0001 01 17433 @/tmp/.X11-unix/X0\n"
    )
    assert unix_sockets(table) == ["/run/docker.sock", "/tmp/with space/s"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSPC, errno.EINVAL])
def test_refusal_says_why_and_what_to_do(code: int) -> None:
    text = refusal(OSError(code, "denied by the test"))
    assert "--enforce=proxy-env" in text
    assert text.endswith(".")


def judge(filter_: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel would return for a system call: a small interpreter of the BPF instructions seccomp uses."""
    words = (*arguments, *([0] * (6 - len(arguments))))
    data = struct.pack("=IIQ6Q", number, arch, 0, *words)
    program = [struct.unpack_from("=HBBI", filter_, at) for at in range(0, len(filter_), 8)]
    at = accumulator = 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif code == 0x06:
            return int(k)
        else:
            hit = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += yes if hit else no


ALLOW, KILL = 0x7FFF0000, 0x80000000


def denied(code: int) -> int:
    return 0x00050000 | code


CALLS = {
    "x86_64": {"socket": 41, "socketpair": 53, "clone": 56, "ioctl": 16, "unshare": 272, "read": 0},
    "aarch64": {"socket": 198, "socketpair": 199, "clone": 220, "ioctl": 29, "unshare": 97, "read": 63},
}


@pytest.mark.parametrize("machine", list(MACHINES))
@pytest.mark.parametrize(
    ("call", "arguments", "verdict"),
    [
        ("read", (0, 0, 0), ALLOW),
        ("socket", (1, 1, 0), ALLOW),
        ("socket", (2, 1, 0), ALLOW),
        ("socket", (10, 2, 0), ALLOW),
        ("socket", (16, 3, 0), ALLOW),
        ("socket", (17, 3, 0), denied(errno.EAFNOSUPPORT)),
        ("socket", (40, 1, 0), denied(errno.EAFNOSUPPORT)),
        ("socket", (0, 1, 0), denied(errno.EAFNOSUPPORT)),
        ("socket", (0xFFFFFFFF, 1, 0), denied(errno.EAFNOSUPPORT)),
        # The kernel looks at the low half only, and so must the filter.
        ("socket", (0xDEAD_0000_0028, 1, 0), denied(errno.EAFNOSUPPORT)),
        ("socketpair", (1, 1, 0), ALLOW),
        ("socketpair", (30, 1, 0), denied(errno.EAFNOSUPPORT)),
        ("clone", (17,), ALLOW),
        ("clone", (0x10000000 | 17,), ALLOW),
        ("clone", (0x12000000 | 17,), denied(errno.EPERM)),
        ("unshare", (0x10020000,), ALLOW),
        ("unshare", (0x02000000,), denied(errno.EPERM)),
        ("ioctl", (0, 0x5401, 0), ALLOW),
        ("ioctl", (0, 0x5412, 0), denied(errno.EPERM)),
        ("ioctl", (0, 0xABCD_0000_5412, 0), denied(errno.EPERM)),
        ("ioctl", (0, 0x541C, 0), denied(errno.EPERM)),
    ],
)
def test_filter_judges_calls(machine: str, call: str, arguments: tuple[int, ...], verdict: int) -> None:
    numbers = MACHINES[machine]
    assert judge(seccomp.program(numbers), numbers.audit_arch, CALLS[machine][call], *arguments) == verdict


@pytest.mark.parametrize("machine", list(MACHINES))
def test_filter_closes_every_other_table(machine: str) -> None:
    numbers = MACHINES[machine]
    program = seccomp.program(numbers)
    assert judge(program, 0x40000003, 1) == KILL  # i386
    assert judge(program, numbers.audit_arch ^ 1, 1) == KILL
    for number in (0x40000000, 0x40000029, 0xFFFFFFFF):
        assert judge(program, numbers.audit_arch, number) == denied(errno.ENOSYS)
    for number in (425, 426, 427, 435):
        assert judge(program, numbers.audit_arch, number) == denied(errno.ENOSYS)
