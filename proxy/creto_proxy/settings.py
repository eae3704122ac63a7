"""What the core can be told: one frozen model per section of the configuration file, every field with its default.

The descriptions here are the comments in ``deploy/creto.toml`` and the text of ``creto config default``; there is no
second place where a setting is documented. Empty strings mean "not set" wherever a setting may be absent, because TOML
has no null.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    DirectoryPath,
    Field,
    FilePath,
    PlainSerializer,
)

from creto_proxy.model import Address

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_WORD = r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address literal and a port, written ``127.0.0.1:8443`` or ``[::1]:8443``; port 0 lets the kernel choose."""

    address: Address
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Raises ValueError saying what an endpoint looks like."""
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            address = ipaddress.ip_address(bare)
        except ValueError:
            raise ValueError("should be ADDRESS:PORT with a literal address, such as 127.0.0.1:8443") from None
        if not colon or (address.version == 6) != (bare is not host):
            raise ValueError("should be ADDRESS:PORT, an IPv6 address in brackets: [::1]:8443")
        if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
            raise ValueError("should end in a port between 0 and 65535")
        return cls(address, int(port))


def _endpoint(value: Any) -> Any:
    return Endpoint.parse(value) if isinstance(value, str) else value


def _unset(value: Any) -> Any:
    return None if value == "" else value


def host_name(text: str) -> str:
    """``text`` as a canonical host name: lower case, A-labels, no trailing dot. Raises ValueError (RFC 1123)."""
    name = text.lower().removesuffix(".")
    if not name.isascii():
        raise ValueError("should be written with A-labels (xn--...), as it appears on the wire")
    if not name or len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError("should be a host name such as api.example.com, without scheme, port or path")
    return name


def host_pattern(text: str) -> str:
    """A host name, ``*.`` and a host name (any name below it), or ``*``. Raises ValueError."""
    if text == "*":
        return text
    return f"*.{host_name(text[2:])}" if text.startswith("*.") else host_name(text)


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("should be an http:// or https:// URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("should carry no user name or password: agents send their own credentials")
    if parts.query or parts.fragment:
        raise ValueError("should carry no query and no fragment")
    if not parts.path.isascii():
        raise ValueError("should have a path as it is sent, with everything but ASCII percent-encoded")
    if not _is_address(parts.hostname):
        host_name(parts.hostname)
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("should end in a port between 0 and 65535") from None
    return text.rstrip("/")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _absolute(text: str) -> str:
    if text and not os.path.isabs(text):
        raise ValueError("should be an absolute path")
    return text


def _json_pointer(text: str) -> str:
    if text and not text.startswith("/") or re.search(r"~(?![01])", text):
        raise ValueError('should be a JSON pointer such as "/messages/0/content" (RFC 6901)')
    return text


HostName = Annotated[str, AfterValidator(host_name)]
HostPattern = Annotated[str, AfterValidator(host_pattern)]
HostPort = Annotated[Endpoint, BeforeValidator(_endpoint), PlainSerializer(str)]
Word = Annotated[str, Field(pattern=_WORD)]


class Section(BaseModel):
    """Base of every section; plugins may use it for theirs. Frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def default_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """``$CRETO_STATE``, else ``$XDG_STATE_HOME/creto``, else ``~/.local/state/creto``."""
    env = os.environ if environ is None else environ
    if env.get("CRETO_STATE"):
        return Path(env["CRETO_STATE"]).absolute()
    base = env.get("XDG_STATE_HOME") or str(Path(env.get("HOME") or Path.home()) / ".local/state")
    return Path(base).absolute() / "creto"


def login_name() -> str:
    """Name of the user this process runs as, reduced to what may stand in a SPIFFE id; ``uid-N`` when unknown."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name.lower()
    except KeyError:
        return f"uid-{os.getuid()}"
    return name if re.fullmatch(_WORD, name) else f"uid-{os.getuid()}"


class Common(Section):
    trust_domain: HostName = Field("local", description="Trust domain: the host part of every SPIFFE id.")
    state_dir: Annotated[Path | None, BeforeValidator(_unset)] = Field(
        None,
        description="Keys, journal, ledger and audit log. Empty: $CRETO_STATE, $XDG_STATE_HOME/creto or "
        "~/.local/state/creto.",
    )
    org: Word = Field("local", description="Organisation that agents belong to: a level of every quota path.")
    team: Annotated[Word | None, BeforeValidator(_unset)] = Field(
        None, description="Team within the organisation; empty for none."
    )
    owner: Annotated[Word | None, BeforeValidator(_unset)] = Field(
        None, description="Human at the root of every delegation. Empty: the user who starts creto."
    )
    env: Word = Field("dev", description="Environment that policies see as the principal's `env`.")


class Run(Section):
    name: Annotated[Word | None, BeforeValidator(_unset)] = Field(
        None, description="Name of the agent. Empty: the name of the command that is run."
    )
    enforce: Literal["namespace", "proxy-env"] = Field(
        "namespace",
        description="namespace: no way around creto. proxy-env: proxy variables only, which an agent can ignore.",
    )
    report: Literal["table", "json", "none"] = Field(
        "table", description="Report when the agent ends: table, json or none."
    )
    report_file: Annotated[Path | None, BeforeValidator(_unset)] = Field(
        None, description="Where the report goes; empty: standard error."
    )


class Network(Section):
    """The part of ``[egress]`` that the core itself reads; the rest of that table belongs to the egress plugin."""

    resolver: Annotated[HostPort | None, BeforeValidator(_unset)] = Field(
        None, description="DNS server that allowed names are asked of, ADDRESS:PORT. Empty: those of /etc/resolv.conf."
    )
    upstream_ca: Annotated[FilePath | None, BeforeValidator(_unset)] = Field(
        None, description="PEM file of authorities trusted for upstreams, besides those of the system."
    )
    resolve: dict[HostName, HostPort] = Field(
        default_factory=dict, description='Names pinned to an endpoint: "api.example.com" = "127.0.0.1:8443".'
    )


class Listen(Section):
    explicit: Annotated[HostPort | None, BeforeValidator(_unset)] = Field(
        Endpoint(ipaddress.IPv4Address("127.0.0.1"), 3128),
        description="`creto sidecar`: forward proxy (CONNECT and absolute-form); empty: off.",
    )
    reverse: Annotated[HostPort | None, BeforeValidator(_unset)] = Field(
        None, description="`creto sidecar`: the [[reverse]] routes as http://ADDRESS:PORT/NAME/...; empty: off."
    )


class Sidecar(Section):
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        1, description="`creto sidecar`: processes that carry requests, or \"auto\" for one per processor."
    )

    @property
    def slots(self) -> int:
        """Number of worker processes."""
        return len(os.sched_getaffinity(0)) if self.workers == "auto" else self.workers


class ReverseRoute(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")] = Field(
        description="First path segment that selects this route."
    )
    upstream: Annotated[str, AfterValidator(_base_url)] = Field(description="URL that replaces it.")


class Extract(Section):
    host: HostPattern = Field(description="Hosts it applies to.")
    path: Annotated[str, Field(pattern="^[/*]")] = Field("*", description="Glob over the path of the request.")
    field: Annotated[str, AfterValidator(_json_pointer)] = Field(description="JSON pointer into the request body.")
    attribute: Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,63}$")] = Field(
        description="Name in the policy's context that the value gets."
    )


class Policy(Section):
    dir: Annotated[DirectoryPath | None, BeforeValidator(_unset)] = Field(
        None, description="Directory of Cedar policies and schema. Empty: the policies installed with creto."
    )
    extract: tuple[Extract, ...] = Field(
        (),
        description="Fields of JSON bodies that policies may decide on: "
        '{ host = "api.example.com", path = "/v1/*", field = "/amount", attribute = "amount" }.',
    )


def _place(text: str) -> str:
    host, slash, path = text.partition("/")
    return host_pattern(host) + slash + path


class Protocols(Section):
    mcp: tuple[Annotated[str, AfterValidator(_place)], ...] = Field(
        (),
        description="Where every request is MCP, whatever it says of itself: a host, or a host and the beginning of a "
        'path, "tools.example.com/mcp".',
    )
    a2a: tuple[Annotated[str, AfterValidator(_place)], ...] = Field(
        (), description="Where every request is A2A, likewise."
    )
    llm: dict[HostPattern, Word] = Field(
        default_factory=dict,
        description="Hosts of model providers besides the public ones, and whose paths and prices they have: "
        '"vllm.example.com" = "openai".',
    )


class Limits(Section):
    stage_deadline_ms: Annotated[int, Field(ge=10, le=60_000)] = Field(
        250, description="Time a plugin may take in one stage before its request is refused."
    )
    body_bytes: Annotated[int, Field(ge=0, le=1 << 30)] = Field(
        1 << 20, description="Most body kept for a decision that reads it; a larger one is refused with 413."
    )
    head_timeout_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        30, description="Time an agent may take to send a request head."
    )
    idle_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        75, description="Time a kept-alive connection may stay unused."
    )
    connect_timeout_s: Annotated[float, Field(gt=0, le=600)] = Field(
        10, description="Time to reach an upstream, TLS included."
    )
    response_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        600, description="Time from a request's end to the head of its answer; then 504. Model APIs think for minutes."
    )
    drain_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        10, description="Time that open exchanges get when creto is told to stop."
    )
    body_timeout_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        30, description="Time without a byte of a request body, and before body_min_rate holds; then 408."
    )
    body_min_rate: Annotated[int, Field(ge=0, le=1 << 30)] = Field(
        100, description="Bytes per second that a request body must come at, on average; then 408. 0: any."
    )
    stall_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        120, description="Time an agent may go without reading what was written to it; then it is cut off."
    )
    stream_idle_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        600, description="Time an upstream may fall silent within an answer, or not read a body; then it is cut off."
    )
    connections: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        0, description="Agent connections at a time; more are reset. 0: as many as the process' descriptors allow."
    )
    connections_per_agent: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        0, description="Connections of one agent at a time; then 429 or a reset. 0: no limit."
    )
    connections_per_second: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        0, description="New connections per second by one link, with a burst of one second's worth; 0: no limit."
    )
    requests_per_agent: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        0, description="Requests and tunnels of one agent under way at a time, held ones too; then 429. 0: no limit."
    )
    held_total_bytes: Annotated[int, Field(ge=0, le=1 << 40)] = Field(
        256 << 20, description="Request bodies held for decisions and approvals, all together; then 503. 0: no limit."
    )


class Upstream(Section):
    try_timeout_s: Annotated[float, Field(gt=0, le=600)] = Field(
        5, description="Time for one address to accept; limits.connect_timeout_s is for all tries together."
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        1, description="Further tries when no address could be connected to, or a kept connection had died unused."
    )
    retry_percent: Annotated[int, Field(ge=0, le=100)] = Field(
        20, description="Most retries over ten seconds, as a part of the requests in them."
    )
    retry_min_per_s: Annotated[float, Field(ge=0, le=10_000)] = Field(
        10, description="Retries per second that are always allowed, however few requests there are."
    )


class Protect(Section):
    shed_lag_ms: Annotated[int, Field(ge=0, le=60_000)] = Field(
        250, description="Median lateness of the event loop from which on new requests are turned away; 0: never."
    )
    breaker_failures: Annotated[int, Field(ge=0, le=10_000)] = Field(
        5, description="Failures in a row after which an upstream address is left alone; 0: never."
    )
    breaker_open_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        1, description="How long at first; it doubles each time in a row."
    )
    breaker_open_max_s: Annotated[float, Field(gt=0, le=86_400)] = Field(60, description="How long at most.")
    eject_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        10, description="How long an address that did not accept is passed over while others of its name do."
    )
    eject_max_percent: Annotated[int, Field(ge=0, le=100)] = Field(
        50, description="Most addresses of one name that are passed over at a time."
    )


class WebSocket(Section):
    """Only for connections that a plugin watches; the bytes of others are not looked at."""

    max_message_bytes: Annotated[int, Field(ge=126, le=1 << 30)] = Field(
        1 << 20, description="Most bytes of one message on a watched WebSocket; a larger one closes it with 1009."
    )


def _host_port(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise ValueError('should be HOST:PORT, such as "grpc.internal:50051"')
    return f"{host if _is_address(host) else host_name(host)}:{port}"


class Http2(Section):
    enabled: bool = Field(
        True, description="Speak HTTP/2 with agents: by ALPN where TLS is intercepted, by prior knowledge elsewhere."
    )
    max_streams: Annotated[int, Field(ge=1, le=1000)] = Field(
        100, description="Streams that an agent may have open on one connection; more are refused."
    )
    prior_knowledge: tuple[Annotated[str, AfterValidator(_host_port)], ...] = Field(
        (),
        description='Upstreams that are always spoken to in HTTP/2, "HOST:PORT". gRPC over plain TCP always is.',
    )


class Admin(Section):
    listen: Annotated[HostPort | None, BeforeValidator(_unset)] = Field(
        None,
        description="Loopback ADDRESS:PORT for /metrics, /livez, /readyz and /status; not for agents. Empty: off.",
    )


class Observe(Section):
    # Not a Path: files that are named so belong to the configuration, and what changes in them calls for a reload.
    access_log: Annotated[str, AfterValidator(_absolute)] = Field(
        "", description="File that gets a line of JSON for each request, or /dev/stdout. Empty: none."
    )
    access_log_bytes: Annotated[int, Field(ge=0, le=1 << 40)] = Field(
        100 << 20, description="Size at which the access log becomes FILE.1 and a new one begins; 0: never."
    )
    access_log_files: Annotated[int, Field(ge=0, le=1000)] = Field(
        5, description="How many of FILE.1, FILE.2 ... are kept."
    )
    otlp_endpoint: Annotated[Annotated[str, AfterValidator(_base_url)] | None, BeforeValidator(_unset)] = Field(
        None,
        description="OTLP/HTTP collector that gets a span for each request, http://127.0.0.1:4318. Empty: none.",
    )
    trace_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Share of the requests without trace context of their own that get a span."
    )


class Plugins(Section):
    order: tuple[str, ...] = Field(
        ("egress", "oversight", "metering"),
        description="Order in which plugins are asked; installed ones that are not named follow by name.",
    )
    disabled: tuple[str, ...] = Field((), description="Installed plugins that are not loaded.")


# Sections of the file that are tables of the core. [egress] is shared, [zones] and [[reverse]] are not models.
CORE: Mapping[str, type[Section]] = {
    "common": Common,
    "run": Run,
    "listen": Listen,
    "sidecar": Sidecar,
    "policy": Policy,
    "protocols": Protocols,
    "limits": Limits,
    "upstream": Upstream,
    "protect": Protect,
    "websocket": WebSocket,
    "http2": Http2,
    "admin": Admin,
    "observe": Observe,
    "plugins": Plugins,
}
RESERVED = frozenset({*CORE, "zones", "reverse"})
