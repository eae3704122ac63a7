"""The policies that the configuration names, loaded with its zones and with the profiles its plugins define."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from creto_platform.authz import EmbeddedAuthz, OversightProfile, PolicyError, bundled_policies
from creto_proxy.config import Config
from creto_proxy.errors import ConfigError
from creto_proxy.hookspecs import DefinesProfiles


def load_authz(config: Config, directory: Path | None = None) -> EmbeddedAuthz:
    """The policies in ``directory``, else where ``[policy] dir`` says, else those that come with creto.

    Raises ConfigError with every problem.
    """
    chosen = directory or config.policy.dir or bundled_policies() / "default"
    try:
        return EmbeddedAuthz(chosen, zones=config.zones, profiles=profiles(config))
    except PolicyError as error:
        raise ConfigError([str(problem) for problem in error.problems]) from None


def profiles(config: Config) -> Mapping[str, OversightProfile]:
    """What plugins' settings say about who can approve, for "would an approval help at all?"."""
    found: dict[str, OversightProfile] = {}
    for section in config.sections.values():
        if isinstance(section, DefinesProfiles):
            for name, (approvals, groups) in section.oversight_profiles().items():
                found[name] = OversightProfile(approvals, groups)
    return found
