"""What a parsed head asks for, by the way it came in: the one normalised ``Request`` that every stage judges.

Names must agree: the Host field (or the target's authority) with the TLS server name, and both with the name that
creto's DNS answered for the address that was dialled. Whatever does not agree is refused here, before any stage.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from urllib.parse import urlsplit

from creto_hotpath.http1 import BadMessage, RequestHead, split_authority
from creto_proxy.authorize import action_of
from creto_proxy.control import HOST as CONTROL_HOST
from creto_proxy.egress import literal
from creto_proxy.errors import Permanent, Refused
from creto_proxy.model import Agent, Decision, Flow, Kind, Request, Verdict
from creto_proxy.observe.tracecontext import traceparent
from creto_proxy.paths import AmbiguousPath, canonical

# Ids must be unique, not secret: seeded by the kernel once instead of a system call per request.
_random = Random()


def request_id(unix_ns: int | None = None) -> bytes:
    """A UUIDv7 (RFC 9562 section 5.7): 16 bytes, ordered by time, so that journals and indexes stay local."""
    ms = (time.time_ns() if unix_ns is None else unix_ns) // 1_000_000
    high = 0x7000 | _random.getrandbits(12)
    low = 0x8000_0000_0000_0000 | _random.getrandbits(62)
    return (ms << 80 | high << 64 | low).to_bytes(16, "big")


@dataclass(frozen=True, slots=True)
class ReverseRoute:
    """``http://127.0.0.1:PORT/<prefix>/...`` stands for ``base``: scheme, host, port and path prefix of an upstream."""

    prefix: str
    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, name: str, base: str) -> ReverseRoute:
        """Raises ValueError when ``base`` is not an http(s) URL without credentials, query or fragment."""
        url = urlsplit(base)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query or url.fragment:
            raise ValueError(f"{base!r} is not an http(s) URL without credentials, query or fragment")
        port = url.port or _default_port(url.scheme)
        return cls(f"/{name.strip('/')}", url.scheme, url.hostname.lower(), port, url.path.rstrip("/"))


class Targets:
    """Reads the target of a request for each way in."""

    def __init__(self, routes: Sequence[ReverseRoute] = ()) -> None:
        # The longest prefix wins, so that "/openai/eu" may stand beside "/openai".
        self._routes = tuple(sorted(routes, key=lambda r: -len(r.prefix)))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """First parts of the paths of reverse routes, longest first."""
        return tuple(route.prefix for route in self._routes)

    def route(self, target: str) -> ReverseRoute | None:
        """The reverse route of a request target."""
        for route in self._routes:
            if target == route.prefix or target.startswith((route.prefix + "/", route.prefix + "?")):
                return route
        return None

    def request(self, head: RequestHead, flow: Flow, agent: Agent, received_ns: int) -> Request:
        """The normalised request. Raises Permanent (4xx, malformed or not for this listener) or Refused (names
        that do not agree)."""
        if flow.way == "reverse":
            return self._reverse(head, flow, agent, received_ns)
        if flow.way == "explicit" and not flow.bound_names:
            return self._explicit(head, flow, agent, received_ns)
        return self._origin(head, flow, agent, received_ns)

    def _origin(self, head: RequestHead, flow: Flow, agent: Agent, received_ns: int) -> Request:
        """A request sent to the origin as far as the agent knows: transparent, or inside an intercepted CONNECT."""
        if head.method == "CONNECT":
            raise _denied("connect_in_transparent", "CONNECT is for proxies; nested proxies are not allowed here.")
        scheme = "https" if flow.tls else "http"
        target = _origin_target(head, scheme)
        host, port = _authority(head)
        if host == CONTROL_HOST and CONTROL_HOST in flow.bound_names and not flow.tls:
            return _make(head, flow, agent, received_ns, scheme, host, 80, target)
        if port is not None and flow.port and port != flow.port:
            raise _denied("port_mismatch", f"The Host field says port {port}, the connection is to {flow.port}.", 421)
        if flow.tls and host != flow.sni:
            raise _denied(
                "sni_host_mismatch", f"The Host field says {host}, the TLS session is for {flow.sni}.", status=421
            )
        address = literal(host)
        if address is not None:
            # The kernel reports an IPv4-mapped destination as the IPv4 address it is; egress judges it as written.
            if flow.original is None or flow.original[0] not in (address, getattr(address, "ipv4_mapped", None)):
                raise _denied("host_address_mismatch", "The Host field names another address than was dialled.")
        elif host not in flow.bound_names:
            raise _denied(
                "ip_not_resolved_for_name",
                f"The address dialled was not answered for {host} on this link; ask DNS for that name and use it.",
            )
        return _make(head, flow, agent, received_ns, scheme, host, flow.port or port or 80, target)

    def _explicit(self, head: RequestHead, flow: Flow, agent: Agent, received_ns: int) -> Request:
        if head.method == "CONNECT":
            host, port = _split(head.target)
            if port is None:
                raise Permanent("CONNECT needs host:port.", reason="bad_target", status=400)
            return _make(head, flow, agent, received_ns, "tcp", host, port, "/", kind="tunnel", action="tunnel")
        scheme, sep, rest = head.target.partition("://")
        scheme = scheme.lower()
        if not sep:
            raise Permanent(
                "This is a proxy: ask for an absolute URL, or use CONNECT.", reason="not_a_proxy_request", status=404
            )
        if scheme not in ("http", "https"):
            raise Permanent(f"The scheme {scheme[:16]!r} is not proxied.", reason="bad_scheme", status=400)
        authority, path = _cut_authority(rest)
        host, port = _split(authority)
        path = path or ("*" if head.method == "OPTIONS" else "/")  # RFC 9112 section 3.2.4
        return _make(head, flow, agent, received_ns, scheme, host, port or _default_port(scheme), path)

    def _reverse(self, head: RequestHead, flow: Flow, agent: Agent, received_ns: int) -> Request:
        asked = _origin_target(head, "http")
        route = self.route(asked)
        if route is not None:
            rest = asked[len(route.prefix) :]
            target = route.path + (rest if rest.startswith("/") or not rest else "/" + rest)
            return _make(head, flow, agent, received_ns, route.scheme, route.host, route.port, target or "/")
        known = ", ".join(r.prefix for r in self._routes) or "none"
        raise Permanent(f"No [[reverse]] route has this prefix; known: {known}.", reason="no_route", status=404)


def _make(
    head: RequestHead,
    flow: Flow,
    agent: Agent,
    received_ns: int,
    scheme: str,
    host: str,
    port: int,
    target: str,
    *,
    kind: Kind = "http",
    action: str | None = None,
) -> Request:
    sent_path, _, query = target.partition("?")
    try:
        path = canonical(sent_path)
    except AmbiguousPath as error:
        detail = f"Servers would read this path differently: {error}. Send it resolved and plainly spelled."
        raise Permanent(detail, reason="ambiguous_path", status=400) from None
    return Request(
        id=request_id(),
        flow=flow,
        agent=agent,
        kind=kind,
        action=action or action_of(head.method, upgrades=head.upgrade is not None),
        method=head.method,
        scheme=scheme,
        host=host,
        port=port,
        path=path,
        query=query,
        headers=head.headers,
        received_ns=received_ns,
        sent_path=sent_path,
        trace=traceparent(head.headers.getall("traceparent")),
    )


def _origin_target(head: RequestHead, scheme: str) -> str:
    """The target as an origin server is asked for it. Those have to take absolute-form as well (RFC 9112 section
    3.2.2); here only where it says what the connection and the Host field say. Raises Permanent (400)."""
    if head.form != "absolute":
        return head.target
    field = head.headers.get("host")
    named = _with_port(_cut_authority(head.target.partition("://")[2])[0], scheme)
    if head.scheme != scheme or (field is not None and _with_port(field, scheme) != named):
        raise Permanent("The request target and the Host field do not agree.", reason="target_mismatch", status=400)
    return head.origin_target


def _with_port(authority: str, scheme: str) -> tuple[str, int]:
    host, port = _split(authority)
    return host, port or _default_port(scheme)


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _authority(head: RequestHead) -> tuple[str, int | None]:
    field = head.headers.get("host")
    if not field:
        raise Permanent("The Host field is missing.", reason="no_host", status=400)
    return _split(field)


def _split(authority: str) -> tuple[str, int | None]:
    try:
        host, port = split_authority(authority)
    except BadMessage as error:
        raise Permanent("The host is malformed.", reason=error.reason, status=400) from None
    return host, port


def _cut_authority(rest: str) -> tuple[str, str]:
    for index, char in enumerate(rest):
        if char in "/?":
            return rest[:index], rest[index:] if char == "/" else "/" + rest[index:]
    return rest, ""


def _denied(reason: str, detail: str, status: int = 403) -> Refused:
    return Refused(Decision(Verdict.DENY, reason, detail, status=status))


def sent_target(request: Request) -> str:
    """The request target that goes to the upstream, as the agent spelled it."""
    return f"{request.sent_path}?{request.query}" if request.query else request.sent_path


def sent_authority(request: Request) -> str:
    """The Host field that goes to the upstream."""
    host = f"[{request.host}]" if ":" in request.host else request.host
    return host if request.port == _default_port(request.scheme) else f"{host}:{request.port}"
