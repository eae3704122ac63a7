"""Where requests are made, decided and spent: the engine's rules applied to the durable record, one command at a time.

Every command runs in one transaction: read, apply what time did meanwhile, apply the command, write by compare-and-set
with the history lines. People are told only after the commit, so a crash can repeat a notification but never lose a
request. All methods are synchronous, safe from any thread and from any number of processes on the same file.
"""

from __future__ import annotations

import base64
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from creto_oversight import engine
from creto_oversight.approvers import Directory
from creto_oversight.engine import CommandRefused, Standing
from creto_oversight.notify import Notifier
from creto_oversight.owners import Owner
from creto_oversight.requests import SECOND_NS, ApprovalRequest, Change, Happened, Previous, Rules, Shown
from creto_oversight.states import OPEN, Event, State
from creto_oversight.store import Conflict, Line, Session, Store
from creto_proxy.hookspecs import Clock
from creto_proxy.model import Agent

log = logging.getLogger("creto.oversight")

# Compare-and-set is lost only to another process; losing this often means that something is badly wrong.
ATTEMPTS = 8
MINUTE_NS = 60 * SECOND_NS
# A request that its own process has not announced by then is announced by whoever sees it.
ANNOUNCE_AFTER_NS = 5 * SECOND_NS
_TELL = frozenset(
    {Event.SUBMITTED, Event.ESCALATED, Event.ASKED, Event.ANSWERED, Event.EDITED, Event.GRANTED, Event.REFUSED}
    | {Event.EXPIRED, Event.LAPSED, Event.CANCELLED, Event.LOST}
)


class TooMany(Exception):
    """Asking has become flooding: nobody is told. detail: for the agent; retry_after_s: when it may ask again."""

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Caps:
    """How much asking is allowed: open requests, and new ones per minute, for one agent and for one root human."""

    open_agent: int
    open_root: int
    minute_agent: int
    minute_root: int


@dataclass(frozen=True, slots=True)
class Submission:
    """An action that needs approval. rules: one per profile that policy demands, all have to be satisfied."""

    agent: Agent
    fingerprint: str
    rules: tuple[Rules, ...]
    directory: Directory
    shown: Shown
    policies: tuple[str, ...] = ()
    run: str = ""


@dataclass(frozen=True, slots=True)
class Submitted:
    """The request that answers a submission, how it answers, and whether it was made for it."""

    request: ApprovalRequest
    standing: Standing
    created: bool


class Timeline:
    """Unix nanoseconds that never run backwards within this process, so that a clock step cannot move a deadline."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_ns = clock.unix_ns() - clock.now_ns()

    def now_ns(self) -> int:
        return max(self._clock.unix_ns(), self._clock.now_ns() + self._offset_ns)


class Desk:
    """Commands on requests for approval. CommandRefused, TooMany or StoreUnavailable say that nothing was done."""

    def __init__(self, store: Store, owner: Owner, caps: Caps, clock: Clock, notifier: Notifier) -> None:
        self._store = store
        self._owner = owner
        self._caps = caps
        self._timeline = Timeline(clock)
        self._notifier = notifier

    def now_ns(self) -> int:
        return self._timeline.now_ns()

    def submit(self, submission: Submission) -> Submitted:
        """Finds the request for exactly this action or makes one. Nobody is told twice about the same one."""
        told: list[tuple[ApprovalRequest, Event]] = []
        with self._store.writing(durable=False) as session:
            submitted = self._submit(session, submission, self.now_ns(), told)
        self._tell(told)
        if not submitted.created:
            return submitted
        return replace(submitted, request=self._announce(submitted.request, Event.SUBMITTED))

    def look(self, request_id: str) -> ApprovalRequest:
        """The request as it stands now, deadlines applied."""
        with self._store.reading() as session:
            request = session.get(request_id)
        if request is None:
            raise _unknown(request_id)
        due = engine.due_ns(request)
        return request if due is None or due > self.now_ns() else self._apply(request_id, _nothing)

    def listed(self, *, everything: bool = False, limit: int = 200) -> list[ApprovalRequest]:
        """Open requests and unused grants, or all of them; the youngest first."""
        self.sweep()
        with self._store.reading() as session:
            return session.listed(states=None if everything else (*OPEN, State.APPROVED), limit=limit)

    def history(self, request_id: str) -> list[Line]:
        with self._store.reading() as session:
            return session.history(request_id)

    def decide(
        self,
        request_id: str,
        human: str,
        *,
        approve: bool,
        comment: str = "",
        version: int | None = None,
        via: str = "",
    ) -> ApprovalRequest:
        """One person's vote. A vote that does not count is refused, and written down all the same."""

        def command(request: ApprovalRequest, now_ns: int) -> Change:
            return engine.vote(
                request, human, approve=approve, comment=engine.tidy(comment), now_ns=now_ns, version=version, via=via
            )

        def refused(request: ApprovalRequest, refusal: CommandRefused) -> Change:
            return engine.refused_vote(request, human, refusal, {"approve": approve, "via": via})

        return self._apply(request_id, command, durable=True, refused=refused)

    def ask(self, request_id: str, human: str, question: str) -> ApprovalRequest:
        return self._apply(
            request_id, lambda r, now_ns: engine.ask(r, human, engine.tidy(question), now_ns), durable=True
        )

    def answer(self, request_id: str, agent: str, text: str) -> ApprovalRequest:
        return self._apply(request_id, lambda r, now_ns: engine.answer(r, agent, engine.tidy(text), now_ns))

    def edit(self, request_id: str, human: str, *, binding: str, body: bytes, shown_body: str) -> ApprovalRequest:
        def command(request: ApprovalRequest, now_ns: int) -> Change:
            return engine.edit(request, human, binding=binding, body=body, shown_body=shown_body, now_ns=now_ns)

        return self._apply(request_id, command, durable=True)

    def cancel(self, request_id: str, actor: str, reason: str) -> ApprovalRequest:
        return self._apply(
            request_id, lambda r, now_ns: engine.cancel(r, actor, engine.tidy(reason), now_ns), durable=True
        )

    def acknowledge(self, request_id: str, actor: str, reason: str) -> ApprovalRequest:
        return self._apply(request_id, lambda r, _: engine.acknowledge(r, actor, engine.tidy(reason)), durable=True)

    def spend(self, request_id: str, *, agent: Agent, binding: str) -> ApprovalRequest:
        """Consumes the grant, on disk before this returns. Raises CommandRefused ``grant-spent`` for anything but an
        unused grant of this agent, under this delegation chain, for this action."""

        def command(request: ApprovalRequest, now_ns: int) -> Change:
            if (request.agent, request.chain, request.binding) != (agent.id, agent.chain, binding):
                raise CommandRefused("grant-spent", 409, "The grant is for another action or identity.", request)
            return engine.spend(request, self._owner.id, now_ns)

        return self._apply(request_id, command, durable=True)

    def settle(self, request_id: str, event: Event, *, status: int = 0, error: str = "") -> ApprovalRequest:
        """Stores how the send ended."""
        return self._apply(request_id, lambda r, now_ns: engine.settle(r, event, now_ns, status=status, error=error))

    def sweep(self) -> None:
        """Applies what has fallen due and what the death of other processes left behind, and announces what nobody was
        told about. Anything may call this at any time, as often as it likes."""
        now_ns = self.now_ns()
        with self._store.reading() as session:
            due = session.due(now_ns)
            executing = session.executing()
            unannounced = session.unannounced()
        for request_id in due:
            self._apply(request_id, _nothing)
        for request_id, owner in executing:
            if not self._owner.alive(owner):
                self.settle(request_id, Event.LOST, error="creto ended before the outcome was known")
        for request_id in unannounced:
            request = self.look(request_id)
            if request.state in OPEN and now_ns - request.created_ns >= ANNOUNCE_AFTER_NS:
                self._announce(request, Event.SUBMITTED)

    def _submit(
        self, session: Session, submission: Submission, now_ns: int, told: list[tuple[ApprovalRequest, Event]]
    ) -> Submitted:
        latest = session.latest(submission.agent.id, submission.fingerprint)
        if latest is not None:
            latest = self._advance(session, latest, now_ns, told)
            found = engine.standing(latest, now_ns)
            if found in (Standing.WAIT, Standing.GRANT) and not _covers(latest, submission):
                latest = self._supersede(session, latest, now_ns, told)
            elif found is not Standing.NEW:
                return Submitted(latest, found, created=False)
        self._check_flood(session, submission.agent, now_ns)
        request = _new_request(submission, latest, now_ns)
        facts = {"fingerprint": request.fingerprint, "profiles": request.profiles, "policies": request.policies}
        change = Change(request, (Happened(Event.SUBMITTED, request.agent, facts),))
        return Submitted(session.add(change, engine.due_ns(request), now_ns), Standing.WAIT, created=True)

    def _apply(
        self,
        request_id: str,
        command: Callable[[ApprovalRequest, int], Change],
        *,
        durable: bool = False,
        refused: Callable[[ApprovalRequest, CommandRefused], Change] | None = None,
    ) -> ApprovalRequest:
        for _ in range(ATTEMPTS):
            told: list[tuple[ApprovalRequest, Event]] = []
            refusal: CommandRefused | None = None
            try:
                with self._store.writing(durable=durable) as session:
                    request = session.get(request_id)
                    if request is None:
                        raise _unknown(request_id)
                    now_ns = self.now_ns()
                    request = self._advance(session, request, now_ns, told)
                    try:
                        change = command(request, now_ns)
                    except CommandRefused as error:
                        # What time did is kept even so: the deadline has passed whether or not the vote counts.
                        refusal = error
                        change = refused(request, error) if refused is not None else Change(request)
                    request = self._save(session, request, change, now_ns, told)
            except Conflict:
                continue
            self._tell(told)
            if refusal is not None:
                raise refusal
            return request
        raise CommandRefused("busy", 503, "Too many people are changing this request at once; try again.")

    def _advance(
        self, session: Session, request: ApprovalRequest, now_ns: int, told: list[tuple[ApprovalRequest, Event]]
    ) -> ApprovalRequest:
        return self._save(session, request, engine.advance(request, now_ns), now_ns, told)

    def _save(
        self,
        session: Session,
        before: ApprovalRequest,
        change: Change,
        now_ns: int,
        told: list[tuple[ApprovalRequest, Event]],
    ) -> ApprovalRequest:
        if change.request is before and not change.events:
            return before
        after = session.save(before, change, engine.due_ns(change.request), now_ns)
        told += [(after, happened.event) for happened in change.events if happened.event in _TELL]
        return after

    def _supersede(
        self, session: Session, request: ApprovalRequest, now_ns: int, told: list[tuple[ApprovalRequest, Event]]
    ) -> ApprovalRequest:
        """Policy now demands more than this request can bring, or the agent acts for somebody else: it is void."""
        reason = "superseded: another profile or delegation chain applies now"
        return self._save(session, request, engine.cancel(request, engine.CRETO, reason, now_ns), now_ns, told)

    def _check_flood(self, session: Session, agent: Agent, now_ns: int) -> None:
        caps = self._caps
        for column, name, whose, most_open, most_new in (
            ("agent", agent.id, "This agent", caps.open_agent, caps.minute_agent),
            ("root", agent.root, "The human behind this agent", caps.open_root, caps.minute_root),
        ):
            waiting = session.open_count(column, name)
            if waiting >= most_open:
                raise TooMany(f"{whose} has {waiting} requests waiting for approval already; nobody was asked.", 60.0)
            made = session.youngest(column, name, now_ns - MINUTE_NS, most_new)
            if len(made) >= most_new:
                detail = f"{whose} has asked for approval {most_new} times within a minute; nobody was asked."
                raise TooMany(detail, max(1.0, (made[-1] + MINUTE_NS - now_ns) / SECOND_NS))

    def _announce(self, request: ApprovalRequest, event: Event) -> ApprovalRequest:
        if not self._told(request, event):
            return request
        return self._apply(request.id, lambda r, _: engine.notified(r))

    def _tell(self, told: Sequence[tuple[ApprovalRequest, Event]]) -> None:
        for request, event in told:
            self._told(request, event)

    def _told(self, request: ApprovalRequest, event: Event) -> bool:
        """Whether telling worked. It never decides anything: an approver who was not told finds it in the list."""
        try:
            self._notifier.notify(request, event)
        except OSError as error:
            log.warning("telling about %s (%s) failed: %s", request.id, event, error)
            return False
        return True


def _covers(request: ApprovalRequest, submission: Submission) -> bool:
    demanded = {rules.name for rules in submission.rules}
    return demanded <= set(request.profiles) and request.chain == submission.agent.chain


def _new_request(submission: Submission, latest: ApprovalRequest | None, now_ns: int) -> ApprovalRequest:
    timeout_s = min(rules.timeout_s for rules in submission.rules)
    return ApprovalRequest(
        id="ovr_" + base64.b32encode(secrets.token_bytes(10)).decode().lower(),
        agent=submission.agent.id,
        chain=submission.agent.chain,
        fingerprint=submission.fingerprint,
        binding=submission.fingerprint,
        rules=submission.rules,
        directory=submission.directory,
        shown=submission.shown,
        created_ns=now_ns,
        deadline_ns=now_ns + round(timeout_s * SECOND_NS),
        policies=submission.policies,
        run=submission.run,
        previous=Previous(latest.id, latest.state, latest.ended_ns) if latest is not None else None,
    )


def _nothing(request: ApprovalRequest, _now_ns: int) -> Change:
    return Change(request)


def _unknown(request_id: str) -> CommandRefused:
    return CommandRefused("unknown-request", 404, f"There is no request for approval {request_id!r}.")
