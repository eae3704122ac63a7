"""A plugin that raises, hangs or answers nonsense costs one request; the event loop goes on."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from creto_proxy import deadline
from creto_proxy.deadline import Guard
from creto_proxy.errors import StageFailed
from creto_proxy.model import Decision
from creto_proxy.testing import allow

SHORT_S = 0.08


@pytest.fixture
def guard() -> Iterator[Guard]:
    with Guard(SHORT_S) as started:
        yield started


@pytest.fixture
def patient() -> Guard:
    """A guard that never interrupts: not started."""
    return Guard(SHORT_S)


def spin() -> None:
    while True:
        pass


def swallow_everything() -> None:
    while True:
        try:
            time.sleep(0.001)
        except Exception:
            continue


HANGS = {
    "busy loop": (spin,),
    "blocking call": (time.sleep, 60),
    "regular expression that backtracks for ever": (re.match, r"(a+)+$", "a" * 64 + "b"),
    "handler that swallows every Exception": (swallow_everything,),
}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS.keys())
def test_a_hang_is_interrupted_and_named(guard: Guard, hang: tuple[Any, ...]) -> None:
    function, *arguments = hang
    with pytest.raises(StageFailed, match="plugin slow did not answer in time in stage authorize") as failed:
        guard.call("slow", "authorize", function, *arguments)
    assert failed.value.reason == "stage_timeout"
    assert failed.value.status == 503


def test_the_loop_runs_on_under_uvloop_after_a_hang() -> None:
    async def scene() -> list[str]:
        seen = []
        with Guard(SHORT_S) as guard:
            other = asyncio.create_task(asyncio.sleep(0.001, "other flow"))
            try:
                guard.call("slow", "gate", spin)
            except StageFailed as failed:
                seen.append(failed.reason)
            seen.append(await other)
            seen.append(guard.call("quick", "gate", str.upper, "ok"))
        return seen

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(scene()) == ["stage_timeout", "other flow", "OK"]


def test_one_hang_after_another_is_interrupted(guard: Guard) -> None:
    for _ in range(3):
        with pytest.raises(StageFailed):
            guard.call("slow", "meter", spin)


def test_many_quick_calls_through_a_whole_deadline_are_left_alone(guard: Guard) -> None:
    until = time.monotonic() + 2 * SHORT_S
    while time.monotonic() < until:
        assert guard.call("quick", "authorize", len, "four") == 4


def test_time_between_calls_is_not_the_plugins(guard: Guard) -> None:
    guard.call("quick", "authorize", len, "x")
    until = time.monotonic() + 2 * SHORT_S
    while time.monotonic() < until:
        pass
    assert guard.call("quick", "authorize", len, "x") == 1


@pytest.mark.parametrize("error", [ValueError("sk-secret"), SystemExit(1), GeneratorExit(), asyncio.CancelledError()])
def test_whatever_a_plugin_raises_refuses_without_its_words(
    guard: Guard, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(StageFailed) as failed:
        guard.call("broken", "egress", fail)
    assert failed.value.detail == "plugin broken failed in stage egress"
    assert failed.value.__cause__ is None
    assert type(error).__name__ in caplog.text


def test_the_operator_gets_the_traceback(guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    def lookup() -> int:
        nothing: dict[str, int] = {}
        return nothing["absent"]

    with pytest.raises(StageFailed):
        guard.call("broken", "egress", lookup)
    assert "in lookup" in caplog.text and "KeyError" in caplog.text


def test_a_plugin_that_always_fails_does_not_fill_the_log(guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        with pytest.raises(StageFailed):
            guard.call("broken", "egress", int, "not a number")
    assert len(caplog.records) == 1


def test_ctrl_c_is_not_a_plugin_failure(guard: Guard) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.call("any", "gate", interrupted)


def test_a_call_within_a_call_shares_the_outer_deadline(guard: Guard) -> None:
    with pytest.raises(StageFailed, match="plugin outer failed|plugin outer did not"):
        guard.call("outer", "gate", lambda: guard.call("inner", "gate", spin))


@pytest.mark.parametrize("answer", [None, True, "allow"])
def test_an_answer_that_is_no_decision_is_not_a_yes(guard: Guard, answer: object) -> None:
    with pytest.raises(StageFailed, match="gave no decision"):
        guard.decide("odd", "authorize", lambda: answer)  # type: ignore[arg-type,return-value]


def test_a_decision_comes_back_unchanged(guard: Guard) -> None:
    decision: Decision = allow()
    assert guard.decide("good", "authorize", lambda: decision) is decision


def test_off_the_main_thread_failures_are_still_named(guard: Guard) -> None:
    caught: list[str] = []

    def work() -> None:
        try:
            guard.call("broken", "consumer", int, "x")
        except StageFailed as failed:
            caught.append(failed.detail)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert caught == ["plugin broken failed in stage consumer"]


def test_starting_off_the_main_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(deadline._SIGNAL)
    worker = threading.Thread(target=Guard(SHORT_S).start)
    worker.start()
    worker.join()
    assert signal.getsignal(deadline._SIGNAL) == before


def test_an_idle_guard_disarms_its_timer_and_the_next_call_arms_it() -> None:
    with Guard(0.01) as guard:
        guard.call("quick", "authorize", len, "x")
        until = time.monotonic() + 60
        while guard._armed and time.monotonic() < until:
            time.sleep(0.005)
        assert not guard._armed
        with pytest.raises(StageFailed):
            guard.call("slow", "authorize", spin)


def test_a_stopped_guard_does_not_interrupt(patient: Guard) -> None:
    with patient:
        pass
    assert patient.call("slow", "gate", time.sleep, 0.001) is None


class TestWait:
    """Coroutines: each step is guarded, the waiting between steps is not."""

    async def test_waiting_longer_than_the_deadline_is_allowed(self, guard: Guard) -> None:
        async def hold() -> str:
            await asyncio.sleep(2 * SHORT_S)
            return "approved"

        assert await guard.wait("oversight", "gate", hold()) == "approved"

    async def test_a_step_that_hangs_is_interrupted(self, guard: Guard) -> None:
        async def hold() -> None:
            await asyncio.sleep(0)
            spin()

        with pytest.raises(StageFailed) as failed:
            await guard.wait("slow", "gate", hold())
        assert failed.value.reason == "stage_timeout"

    async def test_what_a_step_raises_is_named(self, guard: Guard) -> None:
        async def hold() -> None:
            await asyncio.sleep(0)
            raise ValueError("sk-secret")

        with pytest.raises(StageFailed, match=r"^plugin broken failed in stage gate$"):
            await guard.wait("broken", "gate", hold())

    async def test_cancellation_passes_through_and_the_plugin_cleans_up(self, guard: Guard) -> None:
        cleaned = asyncio.Event()

        async def hold() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.set()

        task = asyncio.create_task(guard.wait("oversight", "gate", hold()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned.is_set()

    async def test_a_timeout_around_it_works(self, guard: Guard) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await guard.wait("oversight", "gate", asyncio.Event().wait())

    async def test_the_failure_of_what_was_awaited_is_the_plugins(self, guard: Guard) -> None:
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        broken.set_exception(ConnectionError("db down"))

        async def hold() -> None:
            await broken

        with pytest.raises(StageFailed, match="plugin oversight failed"):
            await guard.wait("oversight", "gate", hold())


@pytest.fixture(autouse=True)
def log_at_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="creto.plugins")
