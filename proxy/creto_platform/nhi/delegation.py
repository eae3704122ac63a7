"""Delegation tokens: one link of authority, signed by the key above it.

A token is msgpack ``{"b": body, "s": signature}``; the signature (id-MLDSA65-Ed25519-SHA512, context
``creto/v1/delegation``) covers the body bytes as they are, so nothing has to be re-encoded to verify. Body keys:
``v id iss ik sub sk spk root par d md cap nbf exp aud bnd rl``; unknown keys are refused unless they start with
``x-``. Times are unix seconds.

The rules a link must keep (``check_link``) are applied when a token is issued and again when it is verified:
narrowing that only the issuer enforces is no narrowing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from creto_platform.crypto import COMPOSITE, BadSignature, Crypto, Key, KeyInvalid
from creto_platform.crypto.port import PUBLIC_BYTES, SIGNATURE_BYTES
from creto_platform.nhi import spiffe
from creto_platform.nhi.port import Anchor, Refused
from creto_platform.nhi.scope import BadScope, Capability
from creto_platform.wire import Value, WireError, pack, unpack

CONTEXT = b"creto/v1/delegation"
MAX_DEPTH = 10
# Two ids, a key (1,984 B), a signature (3,373 B) and 64 capabilities fit; a usual token has 5.6 KB.
TOKEN_LIMIT = 65_536
_ROOT_PARENT = bytes(32)
_CAPABILITIES_LIMIT = 64
_LIST_LIMIT = 16
_TEXT_LIMIT = 2048
_BODY_KEYS = frozenset("v id iss ik sub sk spk root par d md cap nbf exp aud bnd rl".split())
_BINDINGS = frozenset({"sandbox", "session"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Body:
    """What a token says. kids are SHA-256 of public keys; depth counts from 1; further: how many links may follow."""

    id: bytes
    issuer: str
    issuer_kid: bytes
    subject: str
    subject_kid: bytes
    subject_public: bytes
    root: str
    parent: bytes
    depth: int
    further: int
    capabilities: tuple[Capability, ...]
    not_before: int
    expires: int
    revocation_log: str
    audience: tuple[str, ...] = ()
    binding: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        capabilities: list[Value] = [
            {"a": item.action, "r": item.resource, "c": dict(item.constraints)} for item in self.capabilities
        ]
        return pack(
            {
                "v": 1,
                "id": self.id,
                "iss": self.issuer,
                "ik": self.issuer_kid,
                "sub": self.subject,
                "sk": self.subject_kid,
                "spk": self.subject_public,
                "root": self.root,
                "par": self.parent,
                "d": self.depth,
                "md": self.further,
                "cap": capabilities,
                "nbf": self.not_before,
                "exp": self.expires,
                "aud": list(self.audience),
                "bnd": dict(self.binding),
                "rl": self.revocation_log,
            }
        )


@dataclass(frozen=True, slots=True)
class Token:
    """A parsed token: its exact bytes, what was signed, and what it says. Parsing proves nothing."""

    data: bytes
    signed: bytes
    signature: bytes
    body: Body

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()


class Trust:
    """What a verifier believes besides the tokens: anchors by key id, and what was withdrawn."""

    def __init__(
        self,
        trust_domain: str,
        anchor: Callable[[bytes], Anchor | None],
        revoked: Callable[[Sequence[tuple[str, str]]], tuple[str, str] | None],
    ) -> None:
        self.trust_domain = trust_domain
        self.revocation_log = revocation_log(trust_domain)
        self.anchor = anchor
        self.revoked = revoked


def revocation_log(trust_domain: str) -> str:
    """Name of the revocation log that tokens of a trust domain point at."""
    return f"{trust_domain}/revocations"


def chain_digest(tokens: Sequence[bytes]) -> bytes:
    """SHA-256 over the tokens in order; what journal and audit carry instead of them (32 bytes)."""
    return hashlib.sha256(b"".join(tokens)).digest()


def issue(crypto: Crypto, key: Key, parent: Token | None, body: Body) -> bytes:
    """The signed token. Raises Refused when it would break a rule under ``parent`` (None: it is the root)."""
    if parent is None:
        _check_root(body)
    else:
        check_link(parent, body, body.depth - 1)
    if key.kid != body.issuer_kid:
        raise Refused("chain_broken", "the signing key is not the issuer's")
    signed = body.encode()
    token = pack({"b": signed, "s": crypto.sign(key, signed, CONTEXT)})
    # What cannot be read back must not leave.
    parse(token, body.depth - 1)
    return token


def parse(data: bytes, link: int = -1) -> Token:
    """The token in ``data``. Raises Refused("bad_format") naming what is wrong."""
    try:
        envelope = _Fields(unpack(data, limit=TOKEN_LIMIT), frozenset({"b", "s"}))
        signed = envelope.take("b", _is_bytes)
        signature = envelope.take("s", _sized_bytes(SIGNATURE_BYTES[COMPOSITE]))
        body = _parse_body(_Fields(unpack(signed, limit=TOKEN_LIMIT), _BODY_KEYS))
    except (WireError, spiffe.BadSpiffeId, BadScope) as error:
        raise Refused("bad_format", f"not a delegation token: {error}", link) from None
    return Token(bytes(data), signed, signature, body)


def verify(
    crypto: Crypto,
    tokens: Sequence[bytes],
    now: float,
    trust: Trust,
    audience: str | None = None,
    binding: Mapping[str, str] | None = None,
) -> tuple[Token, ...]:
    """The chain, every rule kept, at ``now``. Raises Refused with the first rule that is broken and its link.

    Cheap checks run first; signatures (0.2 ms each) only once everything else holds.
    """
    if not tokens:
        raise Refused("chain_broken", "the chain is empty")
    if len(tokens) > MAX_DEPTH:
        raise Refused("chain_too_deep", f"{len(tokens)} links, the limit is {MAX_DEPTH}")
    chain = tuple(parse(data, link) for link, data in enumerate(tokens))
    _check_root(chain[0].body)
    anchor = trust.anchor(chain[0].body.issuer_kid)
    if anchor is None or anchor.kind != "human" or anchor.principal != chain[0].body.issuer:
        raise Refused("root_not_human", "the root of the chain is not a human this trust domain knows", 0)
    for link, (parent, token) in enumerate(zip(chain, chain[1:], strict=False), start=1):
        check_link(parent, token.body, link)
    _check_keys_unique(chain)
    for link, token in enumerate(chain):
        _check_trust_domain(token.body, trust, link)
        _check_time(token.body, now, link)
    _check_use(chain[-1].body, audience, binding or {}, len(chain) - 1)
    check_revoked(chain, trust)
    _check_signatures(crypto, chain, anchor)
    return chain


def check_link(parent: Token, child: Body, link: int) -> None:
    """Raises Refused unless ``child`` may stand below ``parent``: right place, and nowhere wider."""
    above = parent.body
    if child.depth > MAX_DEPTH:
        raise Refused("chain_too_deep", f"depth {child.depth}, the limit is {MAX_DEPTH}", link)
    _check_self(child, link)
    broken = (
        (child.parent != parent.digest, "it names another parent"),
        (child.issuer != above.subject or child.issuer_kid != above.subject_kid, "its issuer is not the subject above"),
        (child.root != above.root, "it names another root"),
        (child.depth != above.depth + 1, "its depth is not one more than its parent's"),
    )
    for is_broken, why in broken:
        if is_broken:
            raise Refused("chain_broken", why, link)
    if child.further >= above.further:
        raise Refused("chain_too_deep", "it may not be delegated that much further", link)
    widened = (
        (child.not_before < above.not_before or child.expires > above.expires, "it is valid longer than its parent"),
        (
            bool(above.audience) and not (child.audience and set(child.audience) <= set(above.audience)),
            "it serves audiences its parent does not",
        ),
        (any(child.binding.get(name) != value for name, value in above.binding.items()), "it drops a binding"),
        (child.revocation_log != above.revocation_log, "it names another revocation log"),
    )
    for is_wider, why in widened:
        if is_wider:
            raise Refused("scope_widened", why, link)
    for capability in child.capabilities:
        # Within one parent capability: two halves of two capabilities must not add up to a third.
        if not any(capability.within(held) for held in above.capabilities):
            raise Refused("scope_widened", f"{capability.action} on {capability.resource} is not held above", link)


def check_revoked(chain: Sequence[Token], trust: Trust) -> None:
    """Raises Refused when any token, key or principal of the chain was withdrawn: a withdrawal takes all below."""
    marks: list[tuple[str, str]] = []
    for token in chain:
        body = token.body
        marks += [("token", body.id.hex()), ("key", body.issuer_kid.hex()), ("key", body.subject_kid.hex())]
        marks += [("principal", body.issuer), ("principal", body.subject)]
    hit = trust.revoked(list(dict.fromkeys(marks)))
    if hit is not None:
        raise Refused("revoked", f"{hit[0]} {hit[1]} was revoked")


def _check_root(body: Body) -> None:
    _check_self(body, 0)
    if body.parent != _ROOT_PARENT or body.depth != 1 or body.root != body.issuer:
        raise Refused("chain_broken", "the first token is not a root token", 0)
    if spiffe.parse(body.issuer).kind != "human":
        raise Refused("root_not_human", "the root of the chain is not a human", 0)


def _check_self(body: Body, link: int) -> None:
    if hashlib.sha256(body.subject_public).digest() != body.subject_kid:
        raise Refused("chain_broken", "the subject's key does not match its id", link)
    if spiffe.parse(body.subject).kind == "human":
        raise Refused("chain_broken", "authority is delegated to agents, not to humans", link)
    if body.expires <= body.not_before:
        raise Refused("bad_format", "it expires before it begins", link)
    if body.depth + body.further > MAX_DEPTH:
        raise Refused("chain_too_deep", f"depth and further depth exceed {MAX_DEPTH}", link)
    if not body.capabilities:
        raise Refused("bad_format", "it allows nothing", link)


def _check_keys_unique(chain: Sequence[Token]) -> None:
    kids = [chain[0].body.issuer_kid, *(token.body.subject_kid for token in chain)]
    if len(set(kids)) != len(kids):
        raise Refused("chain_broken", "a key appears twice in the chain")


def _check_trust_domain(body: Body, trust: Trust, link: int) -> None:
    if {spiffe.parse(body.issuer).trust_domain, spiffe.parse(body.subject).trust_domain} != {trust.trust_domain}:
        raise Refused("chain_broken", "it leaves the trust domain", link)
    if body.revocation_log != trust.revocation_log:
        raise Refused("chain_broken", "its revocation log is not one we follow", link)


def _check_time(body: Body, now: float, link: int) -> None:
    if now < body.not_before:
        raise Refused("not_yet_valid", "it is not valid yet", link)
    if now >= body.expires:
        raise Refused("expired", "it has expired", link)


def _check_use(body: Body, audience: str | None, binding: Mapping[str, str], link: int) -> None:
    if body.audience and audience not in body.audience:
        raise Refused("wrong_audience", "it is meant for another audience", link)
    for name, value in body.binding.items():
        if binding.get(name) != value:
            raise Refused("wrong_binding", f"it is bound to another {name}", link)


def _check_signatures(crypto: Crypto, chain: Sequence[Token], anchor: Anchor) -> None:
    public = anchor.public
    for link, token in enumerate(chain):
        try:
            crypto.verify(COMPOSITE, public, token.signed, token.signature, CONTEXT)
        except (BadSignature, KeyInvalid):
            raise Refused("bad_signature", "the signature does not verify", link) from None
        public = token.body.subject_public


def _parse_body(fields: _Fields) -> Body:
    fields.take("v", lambda value: value if value == 1 and type(value) is int else None)
    return Body(
        id=fields.take("id", _sized_bytes(16)),
        issuer=_spiffe(fields.take("iss", _is_text)),
        issuer_kid=fields.take("ik", _sized_bytes(32)),
        subject=_spiffe(fields.take("sub", _is_text)),
        subject_kid=fields.take("sk", _sized_bytes(32)),
        subject_public=fields.take("spk", _sized_bytes(PUBLIC_BYTES[COMPOSITE])),
        root=_spiffe(fields.take("root", _is_text)),
        parent=fields.take("par", _sized_bytes(32)),
        depth=fields.take("d", _number(1, 255)),
        further=fields.take("md", _number(0, 255)),
        capabilities=tuple(_capability(item) for item in fields.take("cap", _list(_CAPABILITIES_LIMIT))),
        not_before=fields.take("nbf", _number(0, (1 << 53) - 1)),
        expires=fields.take("exp", _number(0, (1 << 53) - 1)),
        audience=tuple(_each_text(fields.take("aud", _list(_LIST_LIMIT)))),
        binding=_binding(fields.take("bnd", _map)),
        revocation_log=fields.take("rl", _is_text),
    )


class _Fields:
    """A map whose keys are all known; ``take`` reads one of them in its type or says which is wrong."""

    def __init__(self, value: Value, known: frozenset[str]) -> None:
        if not isinstance(value, dict):
            raise WireError("not a map")
        for key in value:
            if key not in known and not key.startswith("x-"):
                raise WireError("a key that is not defined")
        self._fields = value

    def take(self, key: str, read: Callable[[Value], T | None]) -> T:
        if key not in self._fields:
            raise WireError(f"no {key}")
        result = read(self._fields[key])
        if result is None:
            raise WireError(f"{key} is malformed")
        return result


def _is_bytes(value: Value) -> bytes | None:
    return value if isinstance(value, bytes) else None


def _is_text(value: Value) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= _TEXT_LIMIT else None


def _map(value: Value) -> dict[str, Value] | None:
    return value if isinstance(value, dict) else None


def _sized_bytes(size: int) -> Callable[[Value], bytes | None]:
    return lambda value: value if isinstance(value, bytes) and len(value) == size else None


def _number(low: int, high: int) -> Callable[[Value], int | None]:
    # bool is an int in Python and must not pass for a depth.
    return lambda value: value if type(value) is int and low <= value <= high else None


def _list(limit: int) -> Callable[[Value], list[Value] | None]:
    return lambda value: value if isinstance(value, list) and len(value) <= limit else None


def _each_text(values: list[Value]) -> list[str]:
    texts = [value for value in values if _is_text(value)]
    if len(texts) != len(values):
        raise WireError("an audience is malformed")
    return [str(text) for text in texts]


def _spiffe(text: str) -> str:
    return str(spiffe.parse(text))


def _capability(value: Value) -> Capability:
    fields = _Fields(value, frozenset({"a", "r", "c"}))
    return Capability(fields.take("a", _is_text), fields.take("r", _is_text), fields.take("c", _map))


def _binding(value: dict[str, Value]) -> dict[str, str]:
    binding: dict[str, str] = {}
    for name, bound in value.items():
        text = _is_text(bound)
        if name not in _BINDINGS or text is None:
            raise WireError("bnd is malformed")
        binding[name] = text
    return binding
