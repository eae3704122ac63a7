"""The ``[egress]`` section without ``resolve``, ``resolver`` and ``upstream_ca``, which are the core's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from creto_egress.names import pattern_labels
from creto_egress.rules import ANY_PORT, parse

Preset = Literal["llm_apis", "registries", "git_hosts", "public_only"]
TlsMode = Literal["intercept", "splice"]


def _allowing(entry: str) -> str:
    parse(entry)
    return entry


def _denying(entry: str) -> str:
    parse(entry, default_ports=ANY_PORT)
    return entry


def _pattern(entry: str) -> str:
    pattern_labels(entry)
    return entry


Allowed = Annotated[str, AfterValidator(_allowing)]
Denied = Annotated[str, AfterValidator(_denying)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsSettings(_Section):
    """``[egress.tls]``: what happens to TLS, by name. Where both lists match, intercept wins: it sees more."""

    default: TlsMode = Field("intercept", description="For names in neither list: intercept or splice.")
    intercept: tuple[Pattern, ...] = Field((), description="Names whose TLS ends at creto, so that requests are seen.")
    splice: tuple[Pattern, ...] = Field((), description="Names whose TLS passes; only the server name is judged.")
    ech: Literal["deny"] = Field(
        "deny", description="Encrypted ClientHello, when TLS is spliced: deny, since the true name cannot be judged."
    )


class EgressSettings(_Section):
    allow: tuple[Allowed, ...] = Field(
        (),
        description='What may be reached: "api.example.com", "*.x.test:8443", "10.0.0.0/8:5432", "tcp://db.test:5432".',
    )
    deny: tuple[Denied, ...] = Field(
        (), description="What may not, whatever allow says; here a wildcard covers any number of labels."
    )
    presets: tuple[Preset, ...] = Field(
        (), description="Lists that come with creto: llm_apis, registries, git_hosts; public_only: every public host."
    )
    tls: TlsSettings = Field(TlsSettings(), description="What happens to TLS.")
