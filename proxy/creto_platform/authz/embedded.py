"""The authorization port in this process: Cedar, with a table of answers in front of it.

A decision costs Cedar tens of microseconds and grows with the number of policies, so three things keep it off the
path. Policies are sliced by (action, host) at first use: those whose scope cannot match are left out. Answers are
remembered under a 128-bit key over the policy epoch, who asks, what for, and the values of exactly those context
attributes that the slice reads. And everything else of the context never reaches Cedar, so a remembered answer is
the evaluated answer by construction.

Never remembered: anything with an approval in it, "oversight", answers of a slice that reads the clock or uses the
context in a way that cannot be followed, and evaluations with an error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cedarpy

from creto_hotpath.admit import UNCHARGED, DecisionTable
from creto_hotpath.hashing import hash128
from creto_platform.authz.cedar import (
    Approval,
    Evaluation,
    Rule,
    Ruling,
    best_approval,
    entities_for,
    evaluate,
    request_for,
    rule_on,
    self_test,
    to_json,
)
from creto_platform.authz.policyset import OPTIONAL, REQUIRED, Policy, PolicySet, compile_some, load_policies
from creto_platform.authz.port import ACTIONS, INSIDE, PROTOCOLS, Answer, OversightProfile, Query, Value, Watch
from creto_platform.authz.reads import ATTRIBUTES
from creto_platform.authz.zones import host_problem, is_address

# An answer is never older than this, so a mistake in invalidation heals itself.
MAX_TTL_NS = 60 * 10**9
# Bounds on what an agent that asks for ever new hosts can make us keep; both are simply rebuilt when full.
_MAX_SLICES = 8192
_MAX_ENTITIES = 4096
_MAX_ANSWERS = 0x7FFF


class Table(Protocol):
    """What is used of ``creto_hotpath.admit.DecisionTable``."""

    epoch: int

    def get(self, key: bytes, epoch: int, now_ns: int, /) -> int: ...
    def put(self, key: bytes, epoch: int, code: int, expires_ns: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Slice:
    """The policies that can match one (action, host). key_reads: what an answer depends on, None: not cacheable."""

    policies: cedarpy.PolicySet
    rules: Mapping[str, Rule]
    reads: frozenset[str] | None
    key_reads: tuple[str, ...] | None
    words: frozenset[str]


@dataclass(frozen=True, slots=True)
class Explanation:
    """An answer with how it came about. errors: what Cedar reported; may quote values, so show it to operators only.

    reads: the attributes the answer depends on, None when that cannot be told. cacheable: may be remembered.
    """

    answer: Answer
    determining: tuple[Policy, ...]
    considered: tuple[str, ...]
    reads: frozenset[str] | None
    cacheable: bool
    errors: tuple[str, ...]


@dataclass(slots=True)
class _State:
    """Everything that belongs to one epoch; replaced as a whole, so a late writer can only write into the past."""

    epoch: int
    policies: PolicySet
    reads: Mapping[str, frozenset[str]]
    slices: dict[tuple[str, str], Slice] = field(default_factory=dict)
    compiled: dict[tuple[str, ...], Slice] = field(default_factory=dict)
    entities: dict[tuple[str | None, ...], cedarpy.Entities] = field(default_factory=dict)
    watches: dict[str, Watch] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)
    codes: dict[Answer, int] = field(default_factory=dict)


class EmbeddedAuthz:
    """``Authz`` by Cedar. See the module for what is remembered and what is not.

    directory, zones, profiles, schema: as for ``load_policies``. clock: unix nanoseconds. table: where answers are
    remembered, shared with ``creto_hotpath.admit.Admission`` if wanted. Raises PolicyError when the policies cannot be
    used and EngineUnsafe when the engine misbehaves. ``decide`` may be called from any thread.
    """

    def __init__(
        self,
        directory: Path,
        *,
        zones: Mapping[str, Iterable[str]] | None = None,
        profiles: Mapping[str, OversightProfile] | None = None,
        schema: Path | None = None,
        table: Table | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self_test()
        self._directory = directory
        self._schema = schema
        self._zones = zones
        self._profiles = profiles
        self._clock = clock
        self._reloading = threading.Lock()
        self.table: Table = DecisionTable() if table is None else table
        self.evaluations = 0
        self._install(1, self._load())

    @property
    def epoch(self) -> int:
        return self._state.epoch

    @property
    def policy_epoch(self) -> str:
        """SHA-256 (hex) over policies, schema, zones and profiles: equal on every node that decides alike."""
        return self._state.policies.digest

    @property
    def policies(self) -> PolicySet:
        return self._state.policies

    def reload(
        self,
        *,
        zones: Mapping[str, Iterable[str]] | None = None,
        profiles: Mapping[str, OversightProfile] | None = None,
    ) -> int:
        """Reads the policies again, with new zones and profiles where given; the new epoch.

        All or nothing: on PolicyError everything stays as it was.
        """
        with self._reloading:
            before = self._zones, self._profiles
            self._zones = before[0] if zones is None else zones
            self._profiles = before[1] if profiles is None else profiles
            try:
                loaded = self._load()
            except BaseException:
                self._zones, self._profiles = before
                raise
            self._install(self._state.epoch + 1, loaded)
            return self._state.epoch

    def invalidate(self) -> int:
        """Forgets every answer at once, after a revocation say; the new epoch."""
        with self._reloading:
            self._install(self._state.epoch + 1, self._state.policies)
            return self._state.epoch

    def reads(self, action: str) -> frozenset[str]:
        return self._state.reads.get(action, frozenset())

    def lasting(self, query: Query) -> frozenset[str] | None:
        state = self._state
        key = self._key(state, query)
        if key is None:
            return None
        answer = state.answers.get(self.table.get(key, state.epoch, self._clock()))
        # The caller may have been answered before the policies were read again.
        if answer is None or answer.verdict != "allow":
            return None
        return frozenset(self._slice(state, query.action, query.host).key_reads or ())

    def watch(self, host: str) -> Watch:
        state = self._state
        found = state.watches.get(host)
        if found is None:
            zones = state.policies.zones.of(host)
            found = _watch_of([p for p in state.policies.policies.values() if p.reach.may_be_at(host, zones)])
            if len(state.watches) >= _MAX_SLICES:
                state.watches.clear()
            state.watches[host] = found
        return found

    def key(self, query: Query) -> bytes | None:
        """16 bytes under which the answer may be remembered, None when it must not be.

        Together with ``table``, ``epoch`` and ``answer_for`` this is what ``Admission.admit`` needs.
        """
        return self._key(self._state, query)

    def answer_for(self, code: int, epoch: int) -> Answer | None:
        """The answer that a ``code`` from the table stands for; None when ``epoch`` is over, so ask ``decide``."""
        state = self._state
        return state.answers.get(code) if epoch == state.epoch else None

    def decide(self, query: Query) -> Answer:
        state = self._state
        key = self._key(state, query)
        now_ns = self._clock()
        if key is not None:
            remembered = state.answers.get(self.table.get(key, state.epoch, now_ns))
            if remembered is not None:
                return remembered
        answer, ruling = self._evaluate(state, query)
        if key is not None and ruling is not None and ruling.settled:
            self._remember(state, query, key, answer, now_ns)
        return answer

    def explain(self, query: Query) -> Explanation:
        """Like ``decide``, evaluated afresh and with its reasons spelled out."""
        state = self._state
        answer, ruling = self._evaluate(state, query)
        known = state.policies.policies
        piece = None if ruling is None else self._slice(state, query.action, query.host)
        return Explanation(
            answer=answer,
            determining=tuple(known[name] for name in answer.policies),
            considered=() if piece is None else tuple(sorted(piece.rules)),
            reads=frozenset() if piece is None else piece.reads,
            cacheable=self._key(state, query) is not None and ruling is not None and ruling.settled,
            errors=() if ruling is None else ruling.errors,
        )

    def _install(self, epoch: int, policies: PolicySet) -> None:
        self._state = _state_of(epoch, policies)
        self.table.epoch = epoch

    def _load(self) -> PolicySet:
        return load_policies(self._directory, zones=self._zones, profiles=self._profiles, schema=self._schema)

    def _key(self, state: _State, query: Query) -> bytes | None:
        context = query.context
        if "approval" in context or query.action not in ACTIONS:
            return None
        reads = self._slice(state, query.action, query.host).key_reads
        if reads is None:
            return None
        values = []
        for name in reads:
            value = context.get(name)
            if isinstance(value, str):
                values.append("s" + value)
            elif isinstance(value, (bool, int)):
                values.append(f"{type(value).__name__[0]}{value}")
            elif value is None:
                # Absent and empty are two things: `context has x` tells them apart.
                values.append("-")
            else:
                return None
        try:
            return hash128(
                str(state.epoch), query.principal, query.org, query.owner, query.env, query.action, query.host, *values
            )
        except UnicodeEncodeError:
            return None

    def _remember(self, state: _State, query: Query, key: bytes, answer: Answer, now_ns: int) -> None:
        expires_ns = now_ns + MAX_TTL_NS
        if query.expires_ns:
            expires_ns = min(expires_ns, query.expires_ns)
        code = state.codes.get(answer)
        if code is None:
            with self._reloading:
                if len(state.codes) >= _MAX_ANSWERS:
                    return
                # Refusals carry the bit that tells Admission to charge nothing for them.
                refusal = 0 if answer.verdict == "allow" else UNCHARGED
                code = state.codes.setdefault(answer, (len(state.codes) + 1) | refusal)
                state.answers[code] = answer
        if expires_ns > now_ns:
            self.table.put(key, state.epoch, code, expires_ns)

    def _slice(self, state: _State, action: str, host: str) -> Slice:
        piece = state.slices.get((action, host))
        if piece is None:
            zones = state.policies.zones.of(host)
            chosen = [p for p in state.policies.policies.values() if p.reach.may_match(action, host, zones)]
            names = tuple(policy.id for policy in chosen)
            piece = state.compiled.get(names)
            if piece is None:
                piece = state.compiled[names] = _slice_of(chosen)
            if len(state.slices) >= _MAX_SLICES:
                state.slices.clear()
            state.slices[action, host] = piece
        return piece

    def _evaluate(self, state: _State, query: Query) -> tuple[Answer, Ruling | None]:
        """The answer by evaluation; no ruling when the query was refused before Cedar saw it."""
        if query.action not in ACTIONS:
            return Answer("deny", "unknown_action", "the proxy asked about an action that policies do not know"), None
        if host_problem(query.host) is not None:
            return Answer("deny", "host_not_normalised", "the host is not in the form that policies compare"), None
        piece = self._slice(state, query.action, query.host)
        try:
            entities = self._entities(state, query, piece.reads)
            context = _cedar_context(query, piece.reads)
            approval = _matching_approval(query.context)
        except ValueError:
            return _UNREADABLE, None

        def evaluate_with(candidate: Approval | None) -> Evaluation:
            self.evaluations += 1
            known = context if candidate is None else {**context, "approval": to_json("approval", candidate)}
            return evaluate(piece.policies, entities, request_for(query, known), state.policies.schema)

        fingerprint = query.context.get("fingerprint")
        bound_to = fingerprint if isinstance(fingerprint, str) else ""
        hypothetical = best_approval(state.policies.profiles, piece.words, bound_to)
        try:
            ruling = rule_on(evaluate_with, piece.rules, hypothetical, approval)
        except ValueError:
            return _UNREADABLE, None
        return _answer(ruling, piece.rules, query.action), ruling

    def _entities(self, state: _State, query: Query, reads: frozenset[str] | None) -> cedarpy.Entities:
        tool, model = (_named(query, attribute, reads) for attribute in ("tool", "model"))
        who = (query.principal, query.org, query.owner, query.env, query.host, tool, model)
        entities = state.entities.get(who)
        if entities is None:
            zones = state.policies.zones.of(query.host)
            entities = entities_for(query, zones, state.policies.schema, tool=tool, model=model)
            if len(state.entities) >= _MAX_ENTITIES:
                state.entities.clear()
            state.entities[who] = entities
        return entities


_FILLERS = {name: to_json(name, value) for name, value in REQUIRED.items()}
_UNREADABLE = Answer("deny", "policy_error", "what is known of the request cannot be put to policy, so it is denied")


def _state_of(epoch: int, policies: PolicySet) -> _State:
    reads = {}
    for action in ACTIONS:
        found: frozenset[str] = frozenset()
        for policy in policies.policies.values():
            if policy.reach.may_be(action):
                every = frozenset((*REQUIRED, *OPTIONAL))
                found |= every if policy.reach.reads is None else policy.reach.reads
        reads[action] = found
    return _State(epoch=epoch, policies=policies, reads=reads)


def _watch_of(policies: Iterable[Policy]) -> Watch:
    actions: set[str] = set()
    permits: set[str] = set()
    reads: set[str] = set()
    for policy in policies:
        known = policy.reach.reads
        reads |= {*REQUIRED, *OPTIONAL} if known is None else known
        told = {action for action in INSIDE if policy.reach.inside and policy.reach.may_be(action)}
        actions |= told
        if policy.effect == "permit":
            permits |= told
    groups = {
        group
        for group, told in PROTOCOLS.items()
        if not (actions.isdisjoint(told) and reads.isdisjoint(ATTRIBUTES[group]))
    }
    return Watch(frozenset(actions), frozenset(permits), frozenset(reads), frozenset(groups))


def _named(query: Query, attribute: str, reads: frozenset[str] | None) -> str | None:
    """The name of a tool or model, None where no policy asks for it. Raises ValueError when it is not text."""
    value = query.context.get(attribute) if reads is None or attribute in reads else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f'context attribute "{attribute}" is not text')
    return value


def _slice_of(policies: Iterable[Policy]) -> Slice:
    chosen = list(policies)
    reads = _union(policy.reach.reads for policy in chosen)
    bare = _union(policy.reach.bare_reads for policy in chosen)
    asking = [policy for policy in chosen if policy.rule.profile]
    return Slice(
        policies=compile_some(chosen),
        rules={policy.id: policy.rule for policy in chosen},
        reads=reads,
        key_reads=None if reads is None or bare is None or "now" in bare else tuple(sorted(bare - {"approval"})),
        words=frozenset[str]().union(*(policy.reach.words for policy in asking)),
    )


def _union(sets: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    found: frozenset[str] = frozenset()
    for one in sets:
        if one is None:
            return None
        found |= one
    return found


def _cedar_context(query: Query, reads: frozenset[str] | None) -> dict[str, object]:
    """The bare context for Cedar: what is read, plus constants where the schema demands a value nobody reads.

    With unknown reads everything that is known goes in. ``approval`` is added by the caller; ``ip`` is added here
    when the host is an address, so that a range cannot be avoided by naming the address.
    """
    names = query.context.keys() if reads is None else reads & query.context.keys()
    known = {name: to_json(name, query.context[name]) for name in names if name != "approval"}
    if "ip" not in known and (reads is None or "ip" in reads) and is_address(query.host):
        known["ip"] = to_json("ip", query.host)
    if reads is not None:
        known |= {name: filler for name, filler in _FILLERS.items() if name not in reads}
    return known


def _matching_approval(context: Mapping[str, Value]) -> Approval | None:
    """The approval, if it was given for this very action; one for another action counts for nothing."""
    approval = context.get("approval")
    if approval is None:
        return None
    if not isinstance(approval, Mapping):
        raise ValueError('context attribute "approval" is not a record')
    fingerprint = approval.get("fingerprint")
    return approval if fingerprint and fingerprint == context.get("fingerprint") else None


def _answer(ruling: Ruling, rules: Mapping[str, Rule], action: str) -> Answer:
    named = [f'"{name}"' for name in ruling.policies]
    by = ("policy " if len(named) == 1 else "policies ") + ", ".join(named)
    said = [rules[name].description for name in ruling.policies if rules[name].description]
    because = f": {'; '.join(said)}" if said else ""
    match ruling.reason:
        case "policy_permit":
            detail = f"permitted by {by}"
        case "policy_forbid":
            detail = f"forbidden by {by}{because}"
        case "policy_no_permit":
            detail = f"no policy permits {action} here"
        case "oversight_required":
            detail = f"{by} asks for a human decision ({', '.join(ruling.profiles)}){because}"
        case _:
            detail = "the policies could not be evaluated for this request, so it is denied"
    return Answer(ruling.verdict, ruling.reason, detail, ruling.policies, ruling.profiles, ruling.obligations)
