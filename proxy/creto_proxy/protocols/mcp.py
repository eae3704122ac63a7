"""Model Context Protocol: methods become actions, header fields must say what the body says.

Revisions 2024-11-05 (a POST beside an event stream) to 2026-07-28 (``Mcp-Method`` and ``Mcp-Name``, SEP-2243).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence

from creto_proxy.model import Headers
from creto_proxy.protocols.call import Call, Value, recorded
from creto_proxy.protocols.jsonrpc import AMBIGUOUS, BATCH, MALFORMED, MISMATCH, Body, Rpc, refused

VERSION, METHOD, NAME, SESSION = "mcp-protocol-version", "mcp-method", "mcp-name", "mcp-session-id"
HEADERS = (VERSION, METHOD, NAME, SESSION)

# The revisions from which on there are no batches, and header fields must repeat the body.
UNBATCHED, MIRRORED = "2025-06-18", "2026-07-28"

# What changes nothing on the server but the caller's own session. Whatever is not here writes.
READS = frozenset(
    {
        "initialize",
        "ping",
        "server/discover",
        "tools/list",
        "resources/list",
        "resources/templates/list",
        "resources/read",
        "resources/subscribe",
        "resources/unsubscribe",
        "subscriptions/listen",
        "prompts/list",
        "prompts/get",
        "completion/complete",
        "tasks/get",
        "tasks/list",
        "tasks/result",
        "notifications/initialized",
        "notifications/cancelled",
        "notifications/progress",
    }
)
METHODS = READS | {
    "tools/call",
    "logging/setLevel",
    "tasks/cancel",
    "tasks/update",
    "notifications/roots/list_changed",
    "notifications/elicitation/complete",
}
# The parameter that says what a method is about, and whether there can be no call without it.
_ABOUT: Mapping[str, tuple[str, bool]] = {
    "tools/call": ("name", True),
    "prompts/get": ("name", True),
    "resources/read": ("uri", True),
    "resources/subscribe": ("uri", False),
    "resources/unsubscribe": ("uri", False),
    "tasks/get": ("task", False),
    "tasks/result": ("task", False),
    "tasks/cancel": ("task", False),
    "tasks/update": ("task", False),
}
# Some servers strip names, and some end them at a NUL.
_UNCLEAR = re.compile(r"\x00|\A\s|\s\Z")
_REVISION = re.compile(r"\d{4}-\d\d-\d\d\Z")
_BASE64 = re.compile(r"=\?base64\?(.*)\?=\Z")


def call(message: Rpc) -> Call:
    """What one message asks for. Raises Refused when it does not say on what."""
    method = message.method
    if method is None:
        return Call("mcpWrite", "mcp:answer")
    about = _about(message)
    if about is None and _ABOUT.get(method, ("", False))[1]:
        raise refused(MALFORMED, f"A {method} call must name what it is for in a string.")
    if _UNCLEAR.search(method) or (about is not None and _UNCLEAR.search(about)):
        raise refused(AMBIGUOUS, "A name in this call has a NUL in it, or a space before or after it.")
    attributes: list[tuple[str, Value]] = [("rpc_method", method)]
    if method == "tools/call" and about is not None:
        return Call("mcpCall", recorded("tool", about), (*attributes, ("tool", about)))
    resource = recorded("mcp", method)
    if method == "prompts/get" and about is not None:
        attributes.append(("prompt", about))
        resource = recorded("prompt", about)
    elif message.uri is not None and _ABOUT.get(method, ("", False))[0] == "uri":
        attributes.append(("uri", message.uri))
        # A query may carry secrets, and records carry none.
        resource = recorded("resource", re.split(r"[?#]", message.uri, maxsplit=1)[0])
    return Call("mcpRead" if method in READS else "mcpWrite", resource, tuple(attributes))


def session_call(method: str) -> Call:
    """A request without a message: the stream of a session is read (GET), or the session ends (DELETE)."""
    return Call("mcpRead" if method in ("GET", "HEAD", "OPTIONS") else "mcpWrite", "mcp:session")


def check_headers(headers: Headers, body: Body) -> None:
    """Raises Refused when the header fields that gateways route by say something else than the body."""
    fields = {name: _single(headers.getall(name), name) for name in (VERSION, METHOD, NAME)}
    version, method, name = fields[VERSION], fields[METHOD], fields[NAME]
    dated = version if version is not None and _REVISION.match(version) else ""
    if body.batch:
        if dated >= UNBATCHED or method is not None:
            raise refused(BATCH, "This revision of MCP has no batches; send one message per request.")
        return
    for message in body.messages:
        if version is not None and message.revision not in (None, version):
            raise _mismatch("MCP-Protocol-Version")
        required = dated >= MIRRORED and message.id is not None and message.method is not None
        if method != message.method and (method is not None or required):
            raise _mismatch("Mcp-Method")
        about = _about(message)
        required = required and _ABOUT.get(message.method or "", ("", False))[1]
        if (message.method in _ABOUT and name is not None) or required:
            if about is None or name is None or _decoded(name) != about:
                raise _mismatch("Mcp-Name")


def _about(message: Rpc) -> str | None:
    parameter = _ABOUT.get(message.method or "", ("", False))[0]
    return {"name": message.name, "uri": message.uri, "task": message.task}.get(parameter)


def _single(values: Sequence[str], name: str) -> str | None:
    if len(values) > 1:
        raise refused(MISMATCH, f"{name} is there more than once.")
    return values[0].strip() if values else None


def _decoded(value: str) -> str | None:
    """The text of a field, None for broken base64; it must be canonical, or two readers might differ."""
    match = _BASE64.match(value)
    if match is None:
        return value
    try:
        data = base64.b64decode(match[1], validate=True)
        return data.decode() if base64.b64encode(data).decode() == match[1] else None
    except (binascii.Error, ValueError):
        return None


def _mismatch(name: str) -> Exception:
    return refused(MISMATCH, f"The {name} header field does not say what the body says.")
