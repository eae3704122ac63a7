"""Which requests use a model, and whose: the core's table, as far as the usage in the answers can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from creto_hotpath.usage import Dialect
from creto_proxy.protocols import llm


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a request asks of a model provider; operation None means that its cost cannot be known."""

    provider: str
    operation: str | None
    dialect: Dialect = "openai"
    deployment: str = ""


class Providers:
    """Finds the endpoint of a request. Hosts given in the configuration come before the public ones."""

    def __init__(self, configured: Mapping[str, str]) -> None:
        self._table = llm.Providers(configured)

    def provider(self, host: str) -> str | None:
        """The provider behind a host, None for a host without models."""
        return self._table.provider(host)

    def endpoint(self, *, kind: str, method: str, host: str, path: str, upgrade: bool) -> Endpoint | None:
        """What the request asks for, None when it uses no model.

        A tunnel, a WebSocket or a path that is not known, on the host of a model provider, may well use a model, but
        how much of it cannot be seen: its operation is None.
        """
        found = self._table.endpoint(kind=kind, method=method, host=host, path=path, upgrade=upgrade)
        if found is None:
            return None
        if found.operation is None or found.dialect is None:
            return Endpoint(found.provider, None)
        return Endpoint(found.provider, found.operation, found.dialect, found.model)
