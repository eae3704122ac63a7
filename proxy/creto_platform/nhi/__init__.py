"""Non-human identities with a delegation chain to a human (``port``: the rules, ``delegation``: the format)."""

from __future__ import annotations

from creto_platform.nhi.delegation import chain_digest
from creto_platform.nhi.embedded import EmbeddedNhi
from creto_platform.nhi.port import (
    DEFAULT_CAPABILITIES,
    AgentKey,
    Anchor,
    Identity,
    IssuedToken,
    Nhi,
    NhiError,
    Reason,
    Refused,
    Revocation,
    RevocationKind,
)
from creto_platform.nhi.scope import BadScope, Capability
from creto_platform.nhi.spiffe import BadSpiffeId, SpiffeId

__all__ = [
    "DEFAULT_CAPABILITIES",
    "AgentKey",
    "Anchor",
    "BadScope",
    "BadSpiffeId",
    "Capability",
    "EmbeddedNhi",
    "Identity",
    "IssuedToken",
    "Nhi",
    "NhiError",
    "Reason",
    "Refused",
    "Revocation",
    "RevocationKind",
    "SpiffeId",
    "chain_digest",
]
