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
    "policy": Policy,
    "limits": Limits,
    "plugins": Plugins,
}
RESERVED = frozenset({*CORE, "zones", "reverse"})
