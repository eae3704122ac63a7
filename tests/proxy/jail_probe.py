"""The agent of the jail tests: tries every way out it can think of and writes down what each attempt gave.

Run inside the jail by a bare interpreter (standard library only). An attempt is recorded as its result or, when it
raises OSError, as the name of the errno.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEWNS, NEWCGROUP, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x02000000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_NOSUID, MS_NODEV, MS_NOEXEC, MNT_DETACH = 4096, 2, 4, 8, 2

libc = ctypes.CDLL(None, use_errno=True)
findings: dict[str, Any] = {}


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def attempt(name: str, action: Callable[[], Any]) -> None:
    try:
        findings[name] = action()
    except OSError as error:
        findings[name] = errno.errorcode.get(error.errno or 0, repr(error))


def forked(name: str, action: Callable[[], Any]) -> None:
    """The same in a child, for what changes the process; the child's death by a signal is recorded as its name."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        attempt(name, action)
        os.write(writer, json.dumps(findings[name]).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    data = os.read(reader, 65536)
    os.close(reader)
    findings[name] = json.loads(data) if data else signal.Signals(os.WTERMSIG(status)).name


def as_nested_root(action: Callable[[], Any], flags: int = NEWUSER | NEWNS) -> Callable[[], Any]:
    def run() -> Any:
        uid, gid = os.getuid(), os.getgid()
        checked(libc.unshare(flags))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        return action()

    return run


def mount(source: str, target: str, kind: str | None, flags: int) -> str:
    checked(libc.mount(source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), None))
    return "mounted"


def umount(path: str) -> str:
    checked(libc.umount2(path.encode(), MNT_DETACH))
    return "unmounted"


def delete_rules() -> str:
    """One nftables batch: delete table inet creto. The answer's errno, or "deleted"."""
    name = b"creto\0"
    body = struct.pack("=BBH", 1, 0, 0) + struct.pack("=HH", 4 + len(name), 1) + name + b"\0" * (-len(name) % 4)
    delete = struct.pack("=IHHII", 16 + len(body), 10 << 8 | 2, 5, 2, 0) + body
    marks = [struct.pack("=IHHII", 20, kind, 1, seq, 0) + struct.pack("=BBH", 0, 0, socket.htons(10))
             for kind, seq in ((0x10, 1), (0x11, 3))]  # fmt: skip
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        netlink.settimeout(5)
        netlink.send(marks[0] + delete + marks[1])
        code = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
    if code:
        raise OSError(code, os.strerror(code))
    return "deleted"


def delete_link() -> str:
    """RTM_DELLINK of the loopback's neighbour."""
    index = socket.if_nametoindex("creto0")
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.settimeout(5)
        netlink.send(struct.pack("=IHHII", 16 + len(body), 17, 5, 1, 0) + body)
        code = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
    if code:
        raise OSError(code, os.strerror(code))
    return "deleted"


def tcp(host: str, port: int) -> Any:
    with socket.create_connection((host, port), timeout=30) as connection:
        return json.loads(connection.makefile().readline())


def udp(host: str, port: int) -> str:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(b"x", (host, port))
        return sock.recv(100).decode()


def opened(family: int, kind: int, protocol: int = 0) -> str:
    socket.socket(family, kind, protocol).close()
    return "opened"


def pair() -> str:
    for end in socket.socketpair():
        end.close()
    return "opened"


def connect_unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
    return "connected"


def system_call(number: int, *arguments: int) -> int:
    return checked(libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in arguments)))


def i386_call() -> int:
    """getpid through int 0x80, the 32-bit ABI."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


def push_to_terminal() -> str:
    fcntl.ioctl(0, 0x5412, b"x")
    return "pushed"


def signal_group() -> str:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.kill(0, signal.SIGUSR1)
    return "sent"


def status_of(pid: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def reveal(path: str) -> list[str]:
    """Looks under a cover by mounting its parent elsewhere without what is mounted inside."""
    parent, name = os.path.split(path)
    mount(parent, "/tmp", None, MS_BIND)
    return os.listdir(f"/tmp/{name}")


def main() -> None:
    hidden, key, daemon, out = (os.environ[name] for name in ("HIDDEN", "KEY", "DAEMON", "OUT"))
    sidecar = int(os.environ["SIDECAR_PID"])
    attempt("hidden", lambda: os.listdir(hidden))
    attempt("hidden_write", lambda: Path(hidden, "new").write_text("x"))
    attempt("key", lambda: Path(key).read_text())
    attempt("daemon", lambda: connect_unix(daemon))
    attempt("umount", lambda: umount(hidden))
    forked("umount_nested", as_nested_root(lambda: umount(hidden)))
    forked("umount_socket_nested", as_nested_root(lambda: umount(daemon)))
    forked("umount_run_nested", as_nested_root(lambda: umount("/run")))
    forked("reveal_nested", as_nested_root(lambda: reveal(hidden)))
    forked("move_nested", as_nested_root(lambda: mount(hidden, "/mnt", None, 8192)))
    attempt("rules", delete_rules)
    forked("rules_nested", as_nested_root(delete_rules))
    attempt("link", delete_link)
    forked("link_nested", as_nested_root(delete_link))
    attempt("raw", lambda: opened(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    forked("raw_nested", as_nested_root(lambda: opened(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)))
    attempt("packet", lambda: opened(socket.AF_PACKET, socket.SOCK_RAW))
    forked("packet_own_network", as_nested_root(lambda: opened(17, socket.SOCK_RAW), NEWUSER | NEWNET))
    attempt("vsock", lambda: opened(40, socket.SOCK_STREAM))
    attempt("pair", pair)
    attempt("io_uring", lambda: system_call(425, 1, 0))
    attempt("cgroup_namespace", lambda: checked(libc.unshare(NEWCGROUP)))
    if os.uname().machine == "x86_64":
        attempt("x32", lambda: system_call(0x40000000 | 39))
        forked("i386", i386_call)
    attempt("terminal", push_to_terminal)
    forked("nested_proc", as_nested_root(nested_proc, NEWUSER | NEWNS | NEWPID))
    attempt("sidecar_signal", lambda: os.kill(sidecar, 0))
    attempt("group_signal", signal_group)
    attempt("init_trace", lambda: checked(libc.ptrace(16, 1, 0, 0)))
    for name in ("root", "cwd", "exe", "ns/net", "ns/mnt", "fd/3"):
        attempt(f"init_{name}", lambda name=name: os.readlink(f"/proc/1/{name}"))  # type: ignore[misc]
    for name in ("environ", "mem", "maps"):
        attempt(f"init_{name}", lambda name=name: Path(f"/proc/1/{name}").read_bytes().decode())  # type: ignore[misc]
    attempt("init_kill", lambda: os.kill(1, signal.SIGKILL))
    findings["processes"] = sorted(int(n) for n in os.listdir("/proc") if n.isdigit() and int(n) != os.getpid())
    attempt("sysctl", lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
    findings["ip_forward"] = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()
    attempt("core_pattern", lambda: Path("/proc/sys/kernel/core_pattern").write_text("|/bin/true"))
    attempt("sysrq", lambda: Path("/proc/sysrq-trigger").open("w").close())
    attempt("sysfs", lambda: Path("/sys/kernel/uevent_helper").write_text("x"))
    attempt("disk", lambda: os.mknod(os.path.join(os.environ["HOME"], "disk"), 0o060600, os.makedev(254, 0)))
    findings["devices"] = sorted(os.listdir("/dev"))
    for host, port in (("1.2.3.4", 443), ("2001:db8::1", 8443), ("8.8.8.8", 53), ("127.0.0.1", 15001)):
        attempt(f"tcp {host}:{port}", lambda host=host, port=port: tcp(host, port))  # type: ignore[misc]
    destinations = [("8.8.8.8", 443), ("2001:db8::1", 443), ("224.0.0.251", 5353), ("192.0.0.1", 4444)]
    resolvers = [("8.8.8.8", 53), ("127.0.0.1", 53), ("127.0.0.53", 53), ("2001:db8::1", 53), ("::1", 53)]
    for host, port in (*destinations, *resolvers):
        attempt(f"udp {host}:{port}", lambda host=host, port=port: udp(host, port))  # type: ignore[misc]
    findings["descriptors"] = sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1]
    findings["links"] = sorted(name for _, name in socket.if_nameindex())
    findings["status"] = status_of("self")
    findings["init"] = status_of("1")["Name"]
    findings["resolv"] = Path("/etc/resolv.conf").read_text()
    findings["readable"] = Path("/run/creto/extra.pem").read_text()
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    findings["bundle"] = bundle.read_text() if bundle.exists() else None
    attempt("bundle_write", lambda: bundle.write_text("x"))
    findings["runtime"] = os.listdir("/run")
    findings["cwd"] = os.getcwd()
    findings["ids"] = [os.getuid(), os.getgid()]
    Path(out).write_text(json.dumps(findings))


def nested_proc() -> str:
    pid = os.fork()
    if pid == 0:
        try:
            mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0 if [n for n in os.listdir("/proc") if n.isdigit()] == ["1"] else 254)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "mounted" if code == 0 else errno.errorcode.get(code, str(code))


if __name__ == "__main__":
    main()
    sys.exit(7)
