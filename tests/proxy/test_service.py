"""An agent's identity over a long run: renewed in time, and refused for good once somebody revokes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from creto_platform import embedded
from creto_proxy.errors import ConfigError
from creto_proxy.service import DELEGATION_TTL_S, Delegation, private_directory
from creto_proxy.testing import make_config


def test_a_delegation_is_renewed_before_it_runs_out_and_a_revocation_ends_it(tmp_path: Path) -> None:
    now = [1_800_000_000.0]
    platform = embedded(tmp_path, authz=cast(Any, None), user="alice", clock=lambda: now[0])
    config = make_config({"common": {"owner": "alice"}})
    try:
        delegation = Delegation(platform, config, "researcher", lambda: now[0])
        first = delegation()
        assert first.chain == ("spiffe://local/human/alice", "spiffe://local/agent/researcher")
        now[0] += DELEGATION_TTL_S / 2 + 2
        renewed = delegation()
        assert renewed.expires_at > first.expires_at and renewed.id == first.id
        platform.nhi.revoke("principal", renewed.id, "lost")
        now[0] += 2
        assert delegation().expires_at == 0.0
        now[0] += DELEGATION_TTL_S
        assert delegation().expires_at == 0.0, "a revoked agent is not issued a new token"
    finally:
        platform.close()


def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file/state"):
        private_directory(tmp_path / "file" / "state")
    made = private_directory(tmp_path / "state")
    assert made.stat().st_mode & 0o777 == 0o700
