"""The fingerprint of an action: what an approval is bound to.

    fp = "sha256:" + hex(SHA-256(JCS({v, agent, kind, method, scheme, host, port, path, query, content_type, body})))

JCS is RFC 8785. ``body`` is the parsed JSON document, so that key order and white space do not matter, and
"sha256:<hex>" of the bytes for other media types. JSON that two parsers could read differently (duplicate keys, NaN,
broken UTF-8) has no fingerprint and is refused; JSON with integers beyond 2**53, which JCS cannot write, is bound by
its bytes under a key of its own (``body_sha256``), so that no document can be mistaken for a digest. Header fields
that change what the rest means join as ``headers`` when they are present.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import rfc8785

from creto_proxy.model import Request

VERSION = 1
# Fields by which common frameworks let a request be another one than its request line says, and the coding of its body.
ALWAYS_BOUND = (
    "content-encoding",
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "x-original-url",
    "x-rewrite-url",
)


class Unhashable(Exception):
    """The action cannot be bound, so nobody can be asked about it. reason: snake_case code; status: for the agent."""

    def __init__(self, reason: str, detail: str, status: int = 422) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.status = status


@dataclass(frozen=True, slots=True)
class Action:
    """What would be sent, as far as an approval binds it. Equal actions have equal fingerprints.

    agent: id of the identity that asks. content_type: media type in lower case with its parameters, None when absent.
    headers: bound header fields that are present, lower-case names. body: bytes as they will be sent, None when none.
    """

    agent: str
    kind: str
    method: str
    scheme: str
    host: str
    port: int
    path: str
    query: str
    content_type: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, request: Request, bind_headers: Iterable[str] = ()) -> Action:
        """The action of a request. Raises Unhashable when two Content-Type fields contradict each other."""
        types = request.headers.getall("content-type")
        if len(types) > 1:
            raise Unhashable("approval_ambiguous_body", "The request has more than one Content-Type.", 400)
        names = sorted({*ALWAYS_BOUND, *bind_headers})
        return cls(
            agent=request.agent.id,
            kind=request.kind,
            method=request.method,
            scheme=request.scheme,
            host=request.host.lower(),
            port=request.port,
            path=request.path,
            query=request.query,
            content_type=_media_type(types[0]) if types else None,
            headers=tuple((name, value) for name in names for value in request.headers.getall(name)),
            body=request.body or None,
        )

    @property
    def is_json(self) -> bool:
        essence = (self.content_type or "").partition(";")[0]
        return essence == "application/json" or essence == "text/json" or essence.endswith("+json")


def fingerprint(action: Action, volatile: Sequence[str] = ()) -> str:
    """``"sha256:<hex>"``. volatile: JSON pointers whose values are not bound. Raises Unhashable."""
    document: dict[str, Any] = {
        "v": VERSION,
        "agent": action.agent,
        "kind": action.kind,
        "method": action.method,
        "scheme": action.scheme,
        "host": action.host.lower(),
        "port": action.port,
        "path": action.path,
        "query": action.query,
        "content_type": action.content_type,
    }
    if action.headers:
        document["headers"] = [list(pair) for pair in action.headers]
    if action.body is None:
        return _digest({**document, "body": None})
    if not action.is_json:
        return _digest({**document, "body": _sha256(action.body)})
    body = parse_json(action.body)
    for pointer in volatile:
        body = without(body, pointer)
    try:
        return _digest({**document, "body": body})
    except rfc8785.IntegerDomainError:
        return _digest({**document, "body_sha256": _sha256(action.body)})


def parse_json(body: bytes) -> Any:
    """The document, read so strictly that every other parser must read the same. Raises Unhashable."""
    try:
        return json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_not_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError):
        # Not the parser's own words: they can quote the body.
        raise Unhashable("approval_ambiguous_body", "The body is declared as JSON but is not UTF-8 JSON.") from None


def tokens_of(pointer: str) -> tuple[str, ...]:
    """The reference tokens of a JSON pointer (RFC 6901 section 4). Raises ValueError when it is none or the root."""
    if not pointer.startswith("/"):
        raise ValueError(f"{pointer!r} is not a JSON pointer to a part of the body; it must start with '/'")
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:])


def without(document: Any, pointer: str) -> Any:
    """The document without what ``pointer`` names (null in an array, so that nothing shifts)."""
    return replaced(document, tokens_of(pointer), drop=True)


def replaced(document: Any, tokens: Sequence[str], *, drop: bool, by: Any = None) -> Any:
    """A copy in which the value at ``tokens`` is ``by``, or gone when ``drop``. Unchanged when there is none."""
    head, rest = tokens[0], tokens[1:]
    if isinstance(document, dict) and head in document:
        if rest:
            return {**document, head: replaced(document[head], rest, drop=drop, by=by)}
        if drop:
            return {key: value for key, value in document.items() if key != head}
        return {**document, head: by}
    if isinstance(document, list) and head.isascii() and head.isdigit() and int(head) < len(document):
        index = int(head)
        inner = replaced(document[index], rest, drop=drop, by=by) if rest else by
        return [*document[:index], inner, *document[index + 1 :]]
    return document


def _digest(document: dict[str, Any]) -> str:
    try:
        return _sha256(rfc8785.dumps(document))
    except rfc8785.IntegerDomainError:
        raise
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError):
        raise Unhashable("approval_ambiguous_body", "The body is JSON that has no canonical form (RFC 8785).") from None


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _media_type(value: str) -> str:
    essence, *parameters = (part.strip() for part in value.split(";"))
    return ";".join((essence.lower(), *parameters))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise Unhashable("approval_ambiguous_body", "The body has an object with the same key twice.")
    return document


def _not_finite(name: str) -> Any:
    raise Unhashable("approval_ambiguous_body", f"The body holds {name}, which is not JSON.")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise Unhashable("approval_ambiguous_body", "The body holds a number too large for any parser to agree on.")
    return value
