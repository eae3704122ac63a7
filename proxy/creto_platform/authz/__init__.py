"""Authorization: may this agent do that? The port, and Cedar as its embedded implementation."""

from creto_platform.authz.bundled import bundled_policies
from creto_platform.authz.embedded import EmbeddedAuthz, Explanation
from creto_platform.authz.port import (
    ACTIONS,
    INSIDE,
    PROTOCOLS,
    Answer,
    Authz,
    EngineUnsafe,
    OversightProfile,
    PolicyError,
    PolicyProblem,
    Query,
    Watch,
)

__all__ = [
    "ACTIONS",
    "INSIDE",
    "PROTOCOLS",
    "Answer",
    "Authz",
    "EmbeddedAuthz",
    "EngineUnsafe",
    "Explanation",
    "OversightProfile",
    "PolicyError",
    "PolicyProblem",
    "Query",
    "Watch",
    "bundled_policies",
]
