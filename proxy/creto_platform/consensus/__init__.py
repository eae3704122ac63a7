"""Ordering across processes and machines; embedded: a hybrid logical clock (see ``port``)."""

from __future__ import annotations

from creto_platform.consensus.embedded import HybridClock
from creto_platform.consensus.port import ClockDrift, Consensus, ConsensusError, Timestamp

__all__ = ["ClockDrift", "Consensus", "ConsensusError", "HybridClock", "Timestamp"]
