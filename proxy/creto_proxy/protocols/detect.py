"""Which protocol a request says it speaks: pure functions of its method, host, path and a few header fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from creto_proxy.model import Headers
from creto_proxy.paths import readings
from creto_proxy.protocols import a2a, mcp

# Header fields by which common frameworks take another method than the request line says.
METHOD_OVERRIDES = ("x-http-method", "x-http-method-override", "x-method-override")
# Without any of these, a request whose method reads says nothing that ``Inspector`` would look into but by its host and
# path. For all others ``accept``, ``content-type`` and the body count as well.
DETECTION_HEADERS: frozenset[str] = frozenset((*mcp.HEADERS, *a2a.HEADERS, *METHOD_OVERRIDES))

READS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


class Declared(NamedTuple):
    """protocol: "" for none. certain: nothing else would say so; what is inside must then be of that protocol."""

    protocol: Literal["", "mcp", "a2a"]
    certain: bool


NOTHING = Declared("", False)


def declared(method: str, headers: Headers) -> Declared:
    """What the header fields say."""
    if any(headers.get(name) is not None for name in mcp.HEADERS):
        return Declared("mcp", True)
    if any(headers.get(name) is not None for name in a2a.HEADERS):
        return Declared("a2a", True)
    if method != "POST":
        return NOTHING
    if essence(headers.get("content-type")) == a2a.MEDIA_TYPE:
        return Declared("a2a", True)
    accept = headers.get("accept") or ""
    # What MCP demands of its clients; some model SDKs send the same.
    return Declared("mcp", False) if "application/json" in accept and "text/event-stream" in accept else NOTHING


def reads_only(method: str, headers: Headers) -> bool:
    """True for requests that have no body that a server would act on (RFC 9110 section 9.2.1)."""
    return method in READS and all(headers.get(name) is None for name in METHOD_OVERRIDES)


def essence(value: str | None) -> str:
    """A media type, or any other field value, without parameters and in lower case."""
    return (value or "").partition(";")[0].strip().lower()


class Places:
    """Hosts, or parts of hosts, from the configuration: ``host``, ``*.domain`` or ``host/path/prefix``."""

    __slots__ = ("_places",)

    def __init__(self, places: Sequence[str]) -> None:
        self._places = tuple((host, slash + path) for host, slash, path in (each.partition("/") for each in places))

    @property
    def any(self) -> bool:
        return bool(self._places)

    def have(self, host: str, path: str) -> bool:
        for pattern, prefix in self._places:
            if pattern == host or (pattern.startswith("*.") and host.endswith(pattern[1:])):
                if not prefix or any(_below(reading, prefix) for reading in readings(path)):
                    return True
        return False


def _below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix if prefix.endswith("/") else prefix + "/")
