"""Authorization: may this agent do that? The port, and Cedar as its embedded implementation."""

from creto_platform.authz.bundled import bundled_policies
from creto_platform.authz.embedded import EmbeddedAuthz, Explanation
from creto_platform.authz.port import (
    ACTIONS,
    Answer,
    Authz,
    EngineUnsafe,
    OversightProfile,
    PolicyError,
    PolicyProblem,
    Query,
)

__all__ = [
    "ACTIONS",
    "Answer",
    "Authz",
    "EmbeddedAuthz",
    "EngineUnsafe",
    "Explanation",
    "OversightProfile",
    "PolicyError",
    "PolicyProblem",
    "Query",
    "bundled_policies",
]
