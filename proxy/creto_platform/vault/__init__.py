"""Secrets by lease and delegation (see ``port``); embedded: not configured."""

from __future__ import annotations

from creto_platform.vault.embedded import NoVault
from creto_platform.vault.port import (
    Delegation,
    Lease,
    LeaseExpired,
    Secret,
    SecretNotFound,
    Vault,
    VaultError,
    VaultUnavailable,
    VersionConflict,
)

__all__ = [
    "Delegation",
    "Lease",
    "LeaseExpired",
    "NoVault",
    "Secret",
    "SecretNotFound",
    "Vault",
    "VaultError",
    "VaultUnavailable",
    "VersionConflict",
]
