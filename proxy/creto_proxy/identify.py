"""Connection facts -> the agent behind them, with its delegation chain, or nobody.

Identity hangs on the link a connection came in by (a namespace, a listener) or on the credentials it carries, never
on a source address: addresses are chosen by the agent.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Callable

from creto_platform.nhi import Identity
from creto_proxy.hookspecs import Identifier
from creto_proxy.model import Agent, Flow


def agent_of(identity: Identity, *, org: str, env: str, team: str = "") -> Agent:
    """The agent a verified identity speaks for; quota levels run platform, org, team (when given), agent."""
    levels = ["platform", f"org:{org}"]
    if team:
        levels.append(f"team:{team}")
    levels.append(f"agent:{identity.name}")
    return Agent(
        id=identity.id,
        name=identity.name,
        chain=identity.chain,
        chain_digest=identity.chain_digest,
        path=tuple(levels),
        expires_at=identity.expires_at,
        org=org,
        env=env,
    )


class Links:
    """Agents by the link they are attached to, with the secret a link may demand (explicit proxy on loopback)."""

    def __init__(self) -> None:
        self._agents: dict[str, tuple[Callable[[], Agent], str | None]] = {}

    def attach(self, link: str, agent: Callable[[], Agent], *, secret: str | None = None) -> None:
        """``agent`` is asked per request, so that a renewed or revoked delegation takes effect on open connections."""
        self._agents[link] = (agent, secret)

    def agent(self, link: str) -> Agent:
        """The agent on a link. Raises KeyError when nothing is attached to it."""
        return self._agents[link][0]()

    def identify(self, flow: Flow) -> Agent | None:
        entry = self._agents.get(flow.link)
        if entry is None:
            return None
        agent, secret = entry
        if secret is not None and not hmac.compare_digest(secret.encode(), (flow.credentials or "").encode()):
            return None
        return agent()


class Identify:
    """The identify stage: the core's links first, then what plugins recognise. An expired delegation is nobody."""

    def __init__(
        self, links: Links, identifiers: tuple[Identifier, ...], unix_s: Callable[[], float] = time.time
    ) -> None:
        self._identifiers: tuple[Identifier, ...] = (links, *identifiers)
        self._unix_s = unix_s

    def __call__(self, flow: Flow) -> Agent | None:
        for identifier in self._identifiers:
            agent = identifier.identify(flow)
            if agent is not None:
                return agent if agent.expires_at > self._unix_s() else None
        return None


def proxy_credentials(field: str | None) -> str | None:
    """The password of a ``Proxy-Authorization: Basic`` field (RFC 7617), None when absent or malformed."""
    if field is None:
        return None
    scheme, _, token = field.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, sep, password = base64.b64decode(token.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return password if sep else None
