"""What of an action may be stored and shown: everything a person needs to decide, nothing that opens a door."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode

from creto_oversight.fingerprint import Action, Unhashable, parse_json, replaced, tokens_of
from creto_oversight.requests import Shown
from creto_proxy.model import Request

MASK = "[redacted]"
# Names are compared without case, dash and underscore: "X-Api-Key", "api_key" and "apiKey" are one.
_SECRET_FIELD = re.compile(r"auth|cookie|token|apikey|secret|password|passwd|credential|signature|session|privatekey")
_SECRET_MEMBER = re.compile(
    r".*(?:password|passwd|passphrase|secret|apikey|privatekey|accesstoken|refreshtoken|idtoken|clientassertion)"
    r"|token|authorization|cvc|cvv"
)
# Short names that are credentials in a query string, but may be the very thing to decide on in a body.
_SECRET_PARAMETER = re.compile(rf"{_SECRET_MEMBER.pattern}|key|code|auth|sig|.*signature|.*token")


def shown(request: Request, action: Action, pointers: Sequence[str]) -> Shown:
    """The action of ``request`` without credentials. pointers: JSON pointers into the body to replace as well."""
    body = action.body or b""
    return Shown(
        kind=request.kind,
        method=request.method,
        scheme=request.scheme,
        host=request.host,
        port=request.port,
        path=request.path,
        query=_pairs(request.query, _SECRET_PARAMETER),
        content_type=action.content_type or "",
        headers=tuple((name, MASK if _secret_field(name) else value) for name, value in request.headers.items()),
        body=body_text(action, pointers),
        body_bytes=len(body),
        body_sha256=hashlib.sha256(body).hexdigest() if body else "",
    )


def body_text(action: Action, pointers: Sequence[str]) -> str:
    """The body as text: JSON and form fields with secrets replaced, other text as it is, binary only described.

    Raises Unhashable for JSON nested deeper than can be shown.
    """
    if not action.body:
        return ""
    if action.is_json:
        try:
            document = _masked(parse_json(action.body))
            for pointer in pointers:
                document = replaced(document, tokens_of(pointer), drop=False, by=MASK)
            text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        except RecursionError:
            raise Unhashable("approval_ambiguous_body", "The body is nested too deeply to be shown.") from None
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        text = action.body.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{len(action.body)} bytes of {action.content_type or 'unknown type'}>"
    if (action.content_type or "").startswith("application/x-www-form-urlencoded"):
        return _pairs(text, _SECRET_MEMBER)
    return text


def _masked(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: MASK if _named(key, _SECRET_MEMBER) else _masked(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_masked(item) for item in document]
    return document


def _pairs(text: str, secret: re.Pattern[str]) -> str:
    """A query or form with secret values replaced; unchanged, byte for byte, when it has none."""
    pairs = parse_qsl(text, keep_blank_values=True)
    if not any(_named(name, secret) for name, _ in pairs):
        return text
    return urlencode([(name, MASK if _named(name, secret) else value) for name, value in pairs], safe="[]")


def _secret_field(name: str) -> bool:
    return _SECRET_FIELD.search(_plain(name)) is not None


def _named(name: str, pattern: re.Pattern[str]) -> bool:
    return pattern.fullmatch(_plain(name)) is not None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
