"""Who a person is: canonical names for humans and agents, and the identities that lead to them.

``human:alice`` is one person, however she reaches creto (``os:alice``, ``slack:T1/U123``, ``oidc:...``). What is not
mapped to a human is nobody. Agents have canonical names too, so that they can be recognised and refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

HUMAN = "human:"
_SPIFFE = re.compile(r"spiffe://[^/]+/(human|agent)/(.+)", re.DOTALL)


def canonical(principal: str) -> str:
    """``spiffe://td/human/alice`` and ``human:alice`` as ``human:alice``, agents alike; anything else unchanged.

    The trust domain is dropped on purpose: it makes separation of duties stricter (a namesake elsewhere counts as
    the same person) and never gives a vote, because voters come from ``Directory`` only.
    """
    match = _SPIFFE.fullmatch(principal)
    return f"{match[1]}:{match[2]}" if match else principal


def is_human(principal: str) -> bool:
    return principal.startswith(HUMAN) and len(principal) > len(HUMAN)


@dataclass(frozen=True, slots=True)
class Directory:
    """Identities -> humans, as configured when a request was made.

    claimed: identity (``os:erin``) -> human (``human:alice``). declared: humans whose identities are listed, who are
    reached through those alone.
    """

    claimed: Mapping[str, str] = field(default_factory=dict)
    declared: frozenset[str] = frozenset()

    def resolve(self, identity: str) -> str | None:
        """The human behind an identity; None means nobody. An OS user nobody claims is the human of that name."""
        human = self.claimed.get(identity)
        if human is not None:
            return human
        scheme, _, name = identity.partition(":")
        human = HUMAN + name
        return human if scheme == "os" and name and human not in self.declared else None
