"""Which requests use a model, and whose: provider and dialect by host and path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from creto_hotpath.usage import Dialect

Operation: TypeAlias = Literal["chat", "completion", "responses", "embedding", "messages"]

# Public hosts whose requests and answers have one of the known shapes, and the provider whose prices they have.
HOSTS: Mapping[str, str] = {
    "api.openai.com": "openai",
    "eu.api.openai.com": "openai",
    "us.api.openai.com": "openai",
    "*.openai.azure.com": "azure",
    "*.services.ai.azure.com": "azure",
    "api.anthropic.com": "anthropic",
    "api.mistral.ai": "mistral",
    "api.groq.com": "groq",
    "api.deepseek.com": "deepseek",
    "api.x.ai": "x-ai",
    "api.cerebras.ai": "cerebras",
    "openrouter.ai": "openrouter",
    "api.together.xyz": "together",
    "api.fireworks.ai": "fireworks",
}

# How a path ends -> what it does and how its usage is written. Longer endings first.
_OPERATIONS: tuple[tuple[str, Operation, Dialect], ...] = (
    ("/chat/completions", "chat", "openai"),
    ("/completions", "completion", "openai"),
    ("/embeddings", "embedding", "openai"),
    ("/responses", "responses", "openai-responses"),
    ("/v1/messages", "messages", "anthropic"),
)

# POSTs that use no model, so they cost nothing that would have to be reserved.
_FREE = re.compile(
    r"/(messages/count_tokens|responses/input_tokens|responses/[\w-]+/cancel|chat/completions/[\w-]+|moderations|files"
    r"|uploads|uploads/[\w-]+/(parts|complete|cancel)|conversations|conversations/[\w-]+(/items)?)$"
)
_READS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_DEPLOYMENT = re.compile(r"/deployments/([^/]+)/")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a request asks of a model provider; operation None means that its cost cannot be known."""

    provider: str
    operation: Operation | None
    dialect: Dialect = "openai"
    deployment: str = ""


class Providers:
    """Finds the endpoint of a request. Hosts given in the configuration come before the public ones."""

    def __init__(self, configured: Mapping[str, str]) -> None:
        hosts = {**HOSTS, **configured}
        self._exact = {host: provider for host, provider in hosts.items() if not host.startswith("*.")}
        self._below = tuple((host[1:], provider) for host, provider in hosts.items() if host.startswith("*."))

    def provider(self, host: str) -> str | None:
        """The provider behind a host, None for a host without models."""
        found = self._exact.get(host)
        if found is None:
            found = next((provider for suffix, provider in self._below if host.endswith(suffix)), None)
        return found

    def endpoint(self, *, kind: str, method: str, host: str, path: str, upgrade: bool) -> Endpoint | None:
        """What the request asks for, None when it uses no model.

        A tunnel, a WebSocket or a path that is not known, on the host of a model provider, may well use a model, but
        how much of it cannot be seen: its operation is None.
        """
        provider = self.provider(host)
        if provider is None:
            return None
        if kind != "http" or upgrade:
            return Endpoint(provider, None)
        if method in _READS or (method == "POST" and _FREE.search(path)):
            return None
        if method == "POST":
            for ending, operation, dialect in _OPERATIONS:
                if path.endswith(ending):
                    deployment = _DEPLOYMENT.search(path)
                    return Endpoint(provider, operation, dialect, deployment[1] if deployment else "")
        return Endpoint(provider, None)
