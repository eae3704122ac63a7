"""The identity port: who an agent is, which human it answers to, and how that authority came down.

Ids are SPIFFE ids of one trust domain: ``spiffe://<td>/human/<user>`` and ``spiffe://<td>/agent/<name>``. Authority
is a chain of delegation tokens, root human first; each link is signed by the one above it, can only narrow, and is
checked when it is issued and again whenever it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from creto_platform.errors import PlatformError
from creto_platform.nhi.scope import Capability

# Why a chain, a proof or an id was refused; stable, for programs.
Reason: TypeAlias = Literal[
    "bad_format",
    "bad_signature",
    "chain_broken",
    "chain_too_deep",
    "expired",
    "not_yet_valid",
    "replay",
    "revoked",
    "root_not_human",
    "scope_widened",
    "unknown_sender",
    "wrong_audience",
    "wrong_binding",
]
RevocationKind: TypeAlias = Literal["token", "key", "principal"]

# What an agent may ask for when nothing narrower is said: to go out to hosts. Policy decides which.
DEFAULT_CAPABILITIES = (Capability("egress.*", "host:**"),)


class NhiError(PlatformError):
    """Base of the errors of the identity port; the text says what is wrong with which name or file."""


class Refused(NhiError):
    """An id, token, chain or proof was not accepted.

    reason: stable code. link: place in the chain, 0 is the root, -1 when no single link is to blame.
    """

    def __init__(self, reason: Reason, detail: str, link: int = -1) -> None:
        super().__init__(f"{detail} (link {link})" if link >= 0 else detail)
        self.reason: Reason = reason
        self.detail = detail
        self.link = link


@dataclass(frozen=True, slots=True)
class Identity:
    """A verified agent.

    chain: SPIFFE ids, root human first, the agent last. chain_digest: SHA-256 over the tokens in order (32 bytes).
    expires_at: unix seconds. tokens: the delegation tokens, root first. capabilities: what the last token allows.
    """

    id: str
    name: str
    chain: tuple[str, ...]
    chain_digest: bytes
    expires_at: float
    tokens: tuple[bytes, ...]
    capabilities: tuple[Capability, ...]

    def permits(self, action: str, resource: str) -> bool:
        """Whether some capability covers the action on the resource; constraints are for the caller to honour."""
        return any(capability.covers(action, resource) for capability in self.capabilities)


@dataclass(frozen=True, slots=True)
class Anchor:
    """A root of trust. kind: "human" for people; anything else cannot be the root of a chain."""

    principal: str
    kid: bytes
    public: bytes
    kind: str
    created_at: float


@dataclass(frozen=True, slots=True)
class AgentKey:
    """A registered agent with its current key. owner: SPIFFE id of the human it answers to."""

    name: str
    id: str
    owner: str
    kid: bytes
    created_at: float


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token made here that may still be valid. id: hex, what ``revoke`` takes. Times are unix seconds."""

    id: str
    issuer: str
    subject: str
    depth: int
    not_before: int
    expires: int


@dataclass(frozen=True, slots=True)
class Revocation:
    """One signed withdrawal. value: token id or key id in hex, or a SPIFFE id. at: unix seconds."""

    kind: RevocationKind
    value: str
    at: float
    reason: str
    by: str


class Nhi(Protocol):
    """The trust domain. Synchronous; ``verify_chain`` costs about 0.2 ms per link, so callers keep the digest."""

    @property
    def trust_domain(self) -> str: ...

    def agent(
        self,
        name: str,
        *,
        owner: str | None = None,
        ttl_s: float = 900.0,
        capabilities: Sequence[Capability] = DEFAULT_CAPABILITIES,
        audience: Sequence[str] = (),
        binding: Mapping[str, str] | None = None,
    ) -> Identity:
        """The agent of that name with a fresh token under its owner's root key, its own key made on first use.

        owner: user name; None is the local user. Raises NhiError when the owner has no root key here or the agent
        belongs to somebody else, Refused when the name is no path segment, something was revoked or the request is
        too wide.
        """
        ...

    def sub_delegate(
        self,
        parent: Identity,
        name: str,
        *,
        capabilities: Sequence[Capability],
        ttl_s: float = 900.0,
        audience: Sequence[str] = (),
        binding: Mapping[str, str] | None = None,
    ) -> Identity:
        """A further agent below ``parent``, whose key must be here; it never outlives the parent.

        Raises Refused when it would not be narrower.
        """
        ...

    def verify_chain(
        self,
        tokens: Sequence[bytes],
        now: float,
        audience: str | None = None,
        binding: Mapping[str, str] | None = None,
    ) -> Identity:
        """The identity a chain proves at ``now`` (unix seconds). Raises Refused.

        It does not say that the presenter is that agent: see ``authenticate``.
        """
        ...

    def recheck(self, identity: Identity, now: float) -> None:
        """Expiry and revocation of an already verified identity, without its signatures. Raises Refused."""
        ...

    def challenge(self, audience: str) -> bytes:
        """A nonce (32 bytes) for one proof to ``audience`` within 60 seconds."""
        ...

    def prove(self, identity: Identity, nonce: bytes, audience: str) -> bytes:
        """The proof that we hold the key of ``identity``, for one nonce and audience."""
        ...

    def authenticate(
        self,
        tokens: Sequence[bytes],
        proof: bytes,
        audience: str,
        binding: Mapping[str, str] | None = None,
    ) -> Identity:
        """Verifies the chain and that the presenter holds its last key. Each nonce counts once. Raises Refused."""
        ...

    def revoke(self, kind: RevocationKind, value: str, reason: str) -> Revocation:
        """Withdraws a token, a key or a principal and with it everything below. Cannot be undone."""
        ...

    def enrol_human(self, user: str) -> Anchor:
        """Gives another person a root key here, so that agents can be theirs."""
        ...

    def rotate(self, name: str) -> AgentKey:
        """Gives an agent a new key; tokens for the old one hold until they expire. Raises NhiError when unknown."""
        ...

    @property
    def revocation_epoch(self) -> int:
        """Grows with every revocation, from whichever process; compare to know that ``recheck`` is due."""
        ...

    def anchors(self) -> list[Anchor]: ...
    def agents(self) -> list[AgentKey]: ...
    def issued(self) -> list[IssuedToken]: ...
    def revocations(self) -> list[Revocation]: ...
    def close(self) -> None: ...
