"""The agent's network: loopback, a default route that ends nowhere, and the sockets the sidecar listens on.

A socket keeps the network namespace it was made in, so these are created inside and handed to the sidecar outside;
nothing else connects the two. The route only exists because connect(2) wants one before the redirect can act: it
leads into a veth pair whose other end has no address and forwards nothing.
"""

from __future__ import annotations

import array
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from creto_proxy.errors import Unsupported
from creto_proxy.hookspecs import RedirectPorts
from creto_proxy.model import Address

_LINK, _PEER = "creto0", "creto1"
# Addresses nobody else uses: 192.0.0.0/29 is for such local plumbing (RFC 7335); the other is a ULA made for this.
_IPV4, _IPV4_LENGTH = "192.0.0.2", 29
_IPV6, _IPV6_LENGTH = "fd63:7265:746f::2", 64

_SO_ORIGINAL_DST = 80  # the same number at SOL_IP and SOL_IPV6 (linux/netfilter_ipv4.h, ip6_tables.h)
_RT_SCOPE_LINK = 253
_IFA_F_NODAD = 0x02  # there is nobody to collide with, and the first connect must not wait for the detection
_BACKLOG = 4096  # the kernel's default net.core.somaxconn, which caps it anyway


@dataclass(frozen=True, slots=True)
class Listeners:
    """Non-blocking sockets inside the agent's namespace: TCP for any destination, and DNS on 127.0.0.1 and ::1."""

    tcp: tuple[socket.socket, ...]
    dns_udp: tuple[socket.socket, ...]
    dns_tcp: tuple[socket.socket, ...]

    def __iter__(self) -> Iterator[socket.socket]:
        return iter((*self.tcp, *self.dns_udp, *self.dns_tcp))

    def close(self) -> None:
        for sock in self:
            sock.close()


def bring_up() -> None:
    """Configures the network namespace of the calling process. Raises ``Unsupported`` naming the missing piece."""
    # Imported here because only the launching child needs it, and it takes 150 ms.
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    _do_not_forward()
    try:
        with IPRoute() as route:
            loopback = route.link_lookup(ifname="lo")[0]
            route.link("set", index=loopback, state="up")
            route.link("add", ifname=_LINK, kind="veth", peer=_PEER)
            ours, peer = route.link_lookup(ifname=_LINK)[0], route.link_lookup(ifname=_PEER)[0]
            route.link("set", index=peer, state="up")
            route.link("set", index=ours, state="up")
            route.addr("add", index=ours, address=_IPV4, prefixlen=_IPV4_LENGTH)
            route.route("add", dst="0.0.0.0/0", oif=ours, family=socket.AF_INET, scope=_RT_SCOPE_LINK)
            try:
                route.addr("add", index=ours, address=_IPV6, prefixlen=_IPV6_LENGTH, flags=_IFA_F_NODAD)
                route.route("add", dst="::/0", oif=ours, family=socket.AF_INET6)
            except NetlinkError as error:
                if error.code not in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EACCES):
                    raise  # those three: IPv6 is not in this kernel, or switched off; then the agent has none
    except NetlinkError as error:
        raise Unsupported(
            f"The agent's network cannot be set up: {error}. The kernel needs the veth driver (modprobe veth)."
        ) from error


def _do_not_forward() -> None:
    """A new namespace inherits forwarding from the host (net.core.devconf_inherit_init_net), a router's from a router.

    Nothing here leads out of the namespace, so where the switch cannot be written (a container's read-only /proc/sys)
    this changes nothing.
    """
    try:
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
    except OSError:
        pass


def listen(ports: RedirectPorts) -> Listeners:
    """The sidecar's sockets, made in the calling process' network namespace.

    Where the kernel has no IPv6 there are only the IPv4 ones. Raises OSError, which in a fresh namespace means that
    the two ports are equal.
    """
    loopbacks = [(socket.AF_INET, "127.0.0.1")]
    any_address = (socket.AF_INET, "0.0.0.0")
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
    else:
        loopbacks.append((socket.AF_INET6, "::1"))
        any_address = (socket.AF_INET6, "::")
    return Listeners(
        tcp=(_bound(*any_address, socket.SOCK_STREAM, ports.tcp),),
        dns_udp=tuple(_bound(family, host, socket.SOCK_DGRAM, ports.dns) for family, host in loopbacks),
        dns_tcp=tuple(_bound(family, host, socket.SOCK_STREAM, ports.dns) for family, host in loopbacks),
    )


def _bound(family: int, host: str, kind: int, port: int) -> socket.socket:
    sock = socket.socket(family, kind)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
    sock.bind((host, port))
    if kind == socket.SOCK_STREAM:
        sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


def send_listeners(channel: socket.socket, listeners: Listeners) -> None:
    """Passes the sockets over a unix socket; the counterpart is ``receive_listeners``."""
    fds = array.array("i", [sock.fileno() for sock in listeners])
    counts = bytes((len(listeners.tcp), len(listeners.dns_udp), len(listeners.dns_tcp)))
    channel.sendmsg([counts], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


def receive_listeners(channel: socket.socket) -> Listeners | None:
    """The sockets, None when the other side ended without sending them."""
    counts, fds, _, _ = socket.recv_fds(channel, 3, 8)
    if len(counts) != 3 or sum(counts) != len(fds):
        for fd in fds:
            socket.close(fd)
        return None
    sockets = iter([socket.socket(fileno=fd) for fd in fds])
    tcp, udp, dns = (tuple(next(sockets) for _ in range(count)) for count in counts)
    listeners = Listeners(tcp, udp, dns)
    for sock in listeners:
        sock.setblocking(False)
        sock.set_inheritable(False)
    return listeners


def original_destination(connection: socket.socket) -> tuple[Address, int] | None:
    """Where a redirected TCP connection was headed: canonical address (v4-mapped ones unmapped) and port.

    None when it was not redirected but dialled the listener itself; relaying such a one would loop.
    Source: ``getorigdst`` in net/netfilter/nf_conntrack_proto.c and nf_conntrack_l3proto_ipv6.
    """
    name = connection.getsockname()
    local = ipaddress.ip_address(name[0].partition("%")[0])
    mapped = local.ipv4_mapped if isinstance(local, ipaddress.IPv6Address) else None
    try:
        if mapped is not None or local.version == 4:
            raw = connection.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
            port, packed = struct.unpack_from("!2xH4s", raw)
        else:
            raw = connection.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
            port, packed = struct.unpack_from("!2xH4x16s", raw)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOPROTOOPT):
            return None
        raise
    address = ipaddress.ip_address(packed)
    if (address, port) == (mapped or local, name[1]):
        return None
    return address, port
