"""Tries, in a process of its own, the kernel features that ``creto run`` stands on. Standard library only.

Run as a script by ``creto doctor``: entering a namespace cannot be undone, so the trying process is thrown away.
Prints one JSON object: feature -> null when it works, else [errno, what failed]. A feature that could not be reached
because an earlier one failed is absent.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
from collections.abc import Callable

# unshare(2)
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
# mount(2)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 1 << 18
# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h, linux/rtnetlink.h
NETLINK_NETFILTER, NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE, NLMSG_ERROR = 12, 1, 4, 0x400, 2
BATCH_BEGIN, BATCH_END, SUBSYSTEM, NEWTABLE, NEWCHAIN = 0x10, 0x11, 10, 0, 3
NFPROTO_INET, NF_INET_LOCAL_OUT, NAT_PRIORITY = 1, 3, -100
RTM_NEWLINK, IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND = 16, 3, 18, 1
NLA_F_NESTED = 0x8000

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    results: dict[str, list[object] | None] = {}
    uid, gid = os.getuid(), os.getgid()
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("user namespaces", lambda: _own_user(uid, gid)),
        ("network namespaces", lambda: _unshare(CLONE_NEWNET)),
        ("nftables redirect", _redirect),
        ("veth links", _veth),
        ("mount namespaces", lambda: _unshare(CLONE_NEWNS)),
        ("process namespaces", _own_processes),
    )
    for name, step in steps:
        try:
            step()
            results[name] = None
        except OSError as error:
            results[name] = [error.errno or 0, error.strerror or str(error)]
            if name not in ("nftables redirect", "veth links"):
                break
    json.dump(results, sys.stdout)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _unshare(flags: int) -> None:
    _check(libc.unshare(flags))


def _own_user(uid: int, gid: int) -> None:
    _unshare(CLONE_NEWUSER)
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _own_processes() -> None:
    """A child that is process 1 of its namespace and has a /proc of its own."""
    _unshare(CLONE_NEWPID)
    child = os.fork()
    if child == 0:
        try:
            _check(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
            flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
            _check(libc.mount(b"proc", b"/proc", b"proc", flags, None))
        except OSError as error:
            os._exit(min(error.errno or 255, 255))
        os._exit(0 if os.getpid() == 1 else 255)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise OSError(status, f"mounting /proc: {os.strerror(status)}")


def _redirect() -> None:
    """A table with a NAT chain in the output hook, in one transaction, as the redirect of a run has it."""
    table = _attribute(1, b"creto_probe\0")
    hook = _attribute(1, struct.pack("!I", NF_INET_LOCAL_OUT)) + _attribute(2, struct.pack("!i", NAT_PRIORITY))
    chain = table + _attribute(3, b"out\0") + _attribute(4 | NLA_F_NESTED, hook) + _attribute(7, b"nat\0")
    inet = struct.pack("!BBH", NFPROTO_INET, 0, 0)
    batch = struct.pack("!BBH", 0, 0, SUBSYSTEM)
    _transact(
        NETLINK_NETFILTER,
        _message(BATCH_BEGIN, NLM_F_REQUEST, batch)
        + _message(SUBSYSTEM << 8 | NEWTABLE, NLM_F_REQUEST | NLM_F_CREATE, inet + table)
        + _message(SUBSYSTEM << 8 | NEWCHAIN, NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK, inet + chain)
        + _message(BATCH_END, NLM_F_REQUEST, batch),
    )


def _veth() -> None:
    kind = _attribute(IFLA_INFO_KIND, b"veth")
    link = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
    body = link + _attribute(IFLA_IFNAME, b"creto-probe\0") + _attribute(IFLA_LINKINFO | NLA_F_NESTED, kind)
    _transact(0, _message(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK, body))


def _transact(family: int, messages: bytes) -> None:
    """Sends and waits for the acknowledgement. Raises OSError with the kernel's answer."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family) as sock:
        sock.settimeout(5)
        sock.bind((0, 0))
        sock.send(messages)
        answer = sock.recv(65536)
    kind = struct.unpack_from("=IH", answer)[1]
    number = -struct.unpack_from("=i", answer, 16)[0] if kind == NLMSG_ERROR else 0
    if number:
        raise OSError(number, os.strerror(number))


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


if __name__ == "__main__":
    main()
