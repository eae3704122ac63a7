"""One record per outcome, durable before the agent sees the end of its answer; everything else is derived from it.

``Recorder`` appends outcomes to this process' journal; ``replay`` feeds them to the consumers, of which ``AuditTrail``
is the core's own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack

from creto_hotpath import express
from creto_hotpath.journal import Journal, read_frames
from creto_platform.audit import Audit
from creto_platform.audit import encode as encode_record
from creto_proxy.batch import FIELD, Batch, Made, Part
from creto_proxy.errors import Transient
from creto_proxy.model import Outcome, Usage

log = logging.getLogger("creto.journal")

# Text from upstreams (a model's name) may hold lone surrogates; a record must not be lost for that.
_pack = msgpack.Packer(use_bin_type=True, autoreset=True, unicode_errors="backslashreplace").pack
_FIELDS = tuple(Outcome.__slots__)
_USAGE_AT = _FIELDS.index("usage")
# Records of earlier versions end here; what was added since has defaults.
_OLDEST = _FIELDS.index("run") + 1


def encode(outcome: Outcome) -> bytes:
    """The journal payload: a msgpack array of the fields of ``Outcome`` in order, ``usage`` as a nested array."""
    row: list[Any] = [getattr(outcome, name) for name in _FIELDS]
    usage = outcome.usage
    row[_USAGE_AT] = [usage.certainty, usage.provider, usage.model, usage.tokens, usage.cost_nano_usd]
    packed: bytes = _pack(row)
    return packed


def encode_usage(usage: Usage) -> bytes:
    """What ``encode`` has of it."""
    packed: bytes = _pack([usage.certainty, usage.provider, usage.model, usage.tokens, usage.cost_nano_usd])
    return packed


# What is only known when an exchange ends.
_FACTS = {
    "id": express.ID,
    "at_unix_ns": express.AT,
    "target": express.TARGET,
    "status": express.STATUS,
    "error": express.ERROR,
    "bytes_up": express.BYTES_UP,
    "bytes_down": express.BYTES_DOWN,
    "creto_ns": express.CRETO_NS,
    "upstream_ns": express.UPSTREAM_NS,
    "total_ns": express.TOTAL_NS,
    "trace": express.TRACE,
}


def template(outcome: Outcome, *, metered: bool = False) -> tuple[bytes | int, ...]:
    """What ``encode`` gives, with a number of ``creto_hotpath.express`` in place of each fact of the exchange, and with
    ``metered`` in place of the usage."""
    parts: list[bytes | int] = [_pack_header(len(_FIELDS))]
    for name in _FIELDS:
        fact = express.USAGE if metered and name == "usage" else _FACTS.get(name)
        if fact is not None:
            parts.append(fact)
            continue
        value = getattr(outcome, name)
        packed: bytes = encode_usage(value) if name == "usage" else _pack(value)
        last = parts[-1]
        if isinstance(last, bytes):
            parts[-1] = last + packed
        else:
            parts.append(packed)
    return tuple(parts)


def _pack_header(size: int) -> bytes:
    """A msgpack array header."""
    packed: bytes = _pack([None] * size)
    return packed[:-size]


def _pack_map_header(size: int) -> bytes:
    packed: bytes = _pack(dict.fromkeys(range(size)))
    return packed[: -2 * size]


def decode(payload: bytes) -> Outcome:
    """The inverse of ``encode``. Raises ValueError when the payload is not an outcome."""
    try:
        row = msgpack.unpackb(payload, raw=False, use_list=False)
    except msgpack.UnpackException as error:
        raise ValueError(f"a journal record is not msgpack: {error}") from None
    if not isinstance(row, tuple) or not _OLDEST <= len(row) <= len(_FIELDS):
        had = f"{len(row)} fields" if isinstance(row, tuple) else "none"
        raise ValueError(f"a journal record has {_OLDEST} to {len(_FIELDS)} fields, this one has {had}")
    usage = row[_USAGE_AT]
    if not isinstance(usage, tuple) or len(usage) != len(Usage.__slots__):
        raise ValueError("a journal record without usage")
    values: list[Any] = list(row)
    values[_USAGE_AT] = Usage(*usage)
    return Outcome(*values)


class Recorder:
    """The audit stage. While ``healthy`` is False (full disk) new flows are refused."""

    def __init__(self, journal: Journal, wake: threading.Event | None = None) -> None:
        """wake: set for a ``Replay`` in this process, which need not look by itself then."""
        self._journal = journal
        self._wake = wake

    @property
    def dirty(self) -> bool:
        """Whether something was written since the last sync."""
        return self._journal.unsynced

    @property
    def journal(self) -> Journal:
        """For lanes, which write their records themselves."""
        return self._journal

    @property
    def records(self) -> int:
        """Outcomes since the start."""
        return self._journal.records

    @property
    def healthy(self) -> bool:
        return bool(self._journal.healthy)

    def record(self, outcome: Outcome) -> None:
        """Appends and writes; after it returns the record survives the death of this process."""
        try:
            self._journal.append(encode(outcome))
            self._journal.flush()
        except OSError as error:
            log.error("the journal cannot be written (%s); new requests are refused until it can", error)

    def probe(self) -> bool:
        """Tries again to write what a full disk kept back; True when the journal is healthy again."""
        try:
            self._journal.flush()
        except OSError:
            return False
        return self.healthy

    def require(self) -> None:
        """Raises Transient when outcomes cannot be recorded now."""
        if not self.healthy and not self.probe():
            raise Transient("creto cannot record outcomes, so it forwards nothing.", reason="journal_unavailable")

    def sync(self) -> None:
        """Forces what is written onto the disk (fdatasync): survives the death of the machine."""
        self._journal.sync()
        if self._wake is not None:
            self._wake.set()

    def close(self) -> None:
        self._journal.close()


class AuditTrail:
    """The consumer that puts every outcome into the Merkle audit log."""

    name = "audit"

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    def position(self, segment: str) -> int:
        return self._audit.position(segment)

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        if not isinstance(records, Batch):
            self._audit.apply(segment, upto, [audit_record(outcome) for outcome in records])
            return
        entries = records.entries(ENTRY, lambda outcome: encode_record(audit_record(outcome)))
        self._audit.apply_encoded(segment, upto, records.column("id"), entries)


_OUTCOMES = {"allow": "success", "approved": "success", "deny": "denied"}


def audit_record(outcome: Outcome) -> dict[str, Any]:
    """What outsiders can verify: who, by which chain, did what to which resource, with which result, and why."""
    usage = outcome.usage
    return {
        "id": outcome.id,
        "who": outcome.agent,
        "dch": outcome.chain_digest,
        "act": outcome.action,
        "res": f"{_origin(outcome.scheme, outcome.host, outcome.port)}{outcome.target}",
        "out": _result(outcome.decision, outcome.error),
        "why": outcome.error or outcome.reason,
        "at": outcome.at_unix_ns,
        "ctx": {
            "chain": list(outcome.chain),
            "method": outcome.method,
            "status": outcome.status,
            "decision": outcome.decision,
            "policies": list(outcome.policies),
            "approval": outcome.approval_id,
            "model": usage.model,
            "tokens": usage.tokens,
            "cost_nano_usd": usage.cost_nano_usd,
            "bytes_up": outcome.bytes_up,
            "bytes_down": outcome.bytes_down,
        },
    }


def _origin(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{host}{f':{port}' if port else ''}"


def _result(decision: str, error: str) -> str:
    if error:
        return "timeout" if error.endswith("timeout") else "failure"
    return _OUTCOMES.get(decision, "failure")


def _made(function: Callable[..., bytes], *names: str) -> Made:
    return Made([FIELD[name] for name in names], function)


# The entry of ``audit_record``, as ``Batch.entries`` makes it: the bytes of the journal in another order.
ENTRY: tuple[Part, ...] = (
    _pack_map_header(9), _pack("id"), FIELD["id"],
    _pack("who"), FIELD["agent"],
    _pack("dch"), FIELD["chain_digest"],
    _pack("act"), FIELD["action"],
    _pack("res"), (_made(lambda *of: _origin(*of).encode(), "scheme", "host", "port"), FIELD["target"]),
    _pack("out"), _made(lambda *of: _pack(_result(*of)), "decision", "error"),
    _pack("why"), _made(lambda error, reason: _pack(error or reason), "error", "reason"),
    _pack("at"), FIELD["at_unix_ns"],
    _pack("ctx"), _pack_map_header(11), _pack("chain"), FIELD["chain"],
    _pack("method"), FIELD["method"],
    _pack("status"), FIELD["status"],
    _pack("decision"), FIELD["decision"],
    _pack("policies"), FIELD["policies"],
    _pack("approval"), FIELD["approval_id"],
    _pack("model"), FIELD["usage.model"],
    _pack("tokens"), FIELD["usage.tokens"],
    _pack("cost_nano_usd"), FIELD["usage.cost_nano_usd"],
    _pack("bytes_up"), FIELD["bytes_up"],
    _pack("bytes_down"), FIELD["bytes_down"],
)  # fmt: skip


def outcomes(directory: Path, run: str) -> Iterator[Outcome]:
    """Every outcome of one run, in the order they happened; what the report is made of."""
    for path in sorted(directory.glob(f"{run}-*.jnl")):
        for payload, _ in read_frames(path, 0):
            yield decode(payload)
