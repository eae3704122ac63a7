"""The eight platform services, each a port with an embedded default.

    port       what it is for                                 embedded default              while it is down
    crypto     suites by number, keys, signatures, AEAD       ``cryptography``, self-tested   everything fails
    nhi        who an agent is, by which chain from a human   files and SQLite, tokens      all are refused
    authz      may this agent do this: yes, no, ask a human   Cedar and a decision table    all are refused
    audit      one provable record per outcome                C2SP tlog-tiles on disk       buffered, then refused
    vault      secrets by lease and delegation                not configured                leases only
    storage    encrypted objects                              not configured                error
    memory     what agents remember                           not configured                empty context
    consensus  order across processes and machines            hybrid logical clock          local, unconfirmed

A port is a sub-package: ``port`` holds the Protocol, its types and its errors, ``embedded`` the default; adapters
stand beside it. This package knows nothing of the proxy and its plugins: they get a ``Platform`` and see ports.

    platform = embedded(state_dir, authz=authz)
    identity = platform.nhi.agent("researcher", ttl_s=3600)
    platform.audit.append([{"id": os.urandom(16), "who": identity.id, "act": "httpRead", ...}])
    platform.close()
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from creto_platform.audit import Audit, EmbeddedAudit
from creto_platform.consensus import Consensus, HybridClock
from creto_platform.crypto import Crypto, EmbeddedCrypto
from creto_platform.errors import NotConfigured, PlatformError
from creto_platform.memory import Memory, NoMemory
from creto_platform.nhi import EmbeddedNhi, Nhi
from creto_platform.storage import NoStorage, Storage
from creto_platform.vault import NoVault, Vault

if TYPE_CHECKING:
    from creto_platform.authz import Authz

__all__ = ["NotConfigured", "Platform", "PlatformError", "audit_directories", "embedded"]


@dataclass(frozen=True, slots=True)
class Platform:
    """One implementation of each port; what the core and the plugins are given."""

    crypto: Crypto
    nhi: Nhi
    authz: Authz
    audit: Audit
    vault: Vault
    storage: Storage
    memory: Memory
    consensus: Consensus

    def close(self) -> None:
        """Publishes the audit log and releases files; nothing works afterwards."""
        self.audit.close()
        self.nhi.close()


def embedded(
    state_dir: Path,
    *,
    authz: Authz,
    trust_domain: str = "local",
    user: str | None = None,
    clock: Callable[[], float] = time.time,
    audit: Audit | None = None,
) -> Platform:
    """Every port on the local machine, its state below ``state_dir`` (made private, 0700).

    user: the local human, by default whoever runs the process. clock: unix seconds. audit: instead of the log on disk,
    for a process that has no business with it. Raises PlatformError's kinds
    naming what cannot be used: a key file others may read, an audit log that is not the one that was signed, ...
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    crypto = EmbeddedCrypto()
    nhi = EmbeddedNhi(state_dir / "nhi", crypto, trust_domain=trust_domain, clock=clock, user=user)
    try:
        audit = audit or EmbeddedAudit(*audit_directories(state_dir), crypto, organisation=trust_domain)
    except BaseException:
        nhi.close()
        raise
    return Platform(
        crypto=crypto,
        nhi=nhi,
        authz=authz,
        audit=audit,
        vault=NoVault(),
        storage=NoStorage(),
        memory=NoMemory(),
        consensus=HybridClock(state_dir / "consensus", clock=clock),
    )


def audit_directories(state_dir: Path) -> tuple[Path, Path]:
    """Where the embedded audit log is, and the second place that remembers what was signed last."""
    return state_dir / "audit", state_dir / "audit-signed"
