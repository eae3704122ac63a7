"""Keeps a plugin from taking the sidecar with it: whatever raises or hangs in a stage refuses that one request.

Stages are called synchronously on the event loop's thread, so a stage that never returns would stop every flow. A
``Guard`` marks "the main thread is inside plugin X, stage Y" with a few attribute stores, and a kernel timer looks
at that mark a few times per deadline. When one call has been seen through a whole deadline, the timer's signal handler
raises inside it; the call comes back to the core as ``StageFailed``.

Why a POSIX timer aimed at the main thread and not a watchdog thread: a thread needs the GIL, and the likeliest hang in
a policy plugin, a regular expression that backtracks for ever, holds it. The kernel needs nothing: the handler runs in
busy loops, in blocking system calls (they return EINTR) and in the C loops that check for signals, as ``re`` does. What
it cannot interrupt is native code that neither returns nor checks for signals.

The timer counts its own ticks, not the clock: a machine that stops the whole process for a second delivers one tick, so
no plugin is blamed for it. It is armed by a guarded call and disarms itself when nothing happens: an idle sidecar is
not woken.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from creto_proxy.errors import StageFailed
from creto_proxy.model import Decision

T = TypeVar("T")

log = logging.getLogger("creto.plugins")

TICKS = 8  # looks per deadline: a call is interrupted after 7/8 to 8/8 of it, never later
IDLE_TICKS = 4 * TICKS
LOG_INTERVAL_S = 1.0
# A durable write behind a busy disk or a locked database takes this long; what waits longer hangs.
ASIDE_S = 5.0

# timer_create(2): SIGEV_THREAD_ID delivers to one thread. Same values on every Linux architecture.
_SIGEV_THREAD_ID = 4
_SIGNAL = signal.SIGRTMIN + 5  # SIGALRM and SIGUSR* belong to applications (pytest-timeout, faulthandler)


class StageTimeout(BaseException):
    """Raised inside a stage that overran. Not an ``Exception``, so that a plugin's own handlers let it through."""


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread_id", ctypes.c_int),
        ("padding", ctypes.c_byte * 44),
    )


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class _Ticker:
    """A periodic signal to the thread that made it. Raises OSError where the kernel has no timer to give."""

    def __init__(self, interval_ns: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._id = ctypes.c_void_p()
        event = _SigEvent(signo=_SIGNAL, notify=_SIGEV_THREAD_ID, thread_id=threading.get_native_id())
        self._check(self._libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)))
        step = _TimeSpec(*divmod(interval_ns, 10**9))
        self._running, self._stopped = _TimerSpec(step, step), _TimerSpec()

    def start(self) -> None:
        self._check(self._libc.timer_settime(self._id, 0, ctypes.byref(self._running), None))

    def pause(self) -> None:
        self._check(self._libc.timer_settime(self._id, 0, ctypes.byref(self._stopped), None))

    def close(self) -> None:
        self._check(self._libc.timer_delete(self._id))

    def _check(self, result: int) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


class Guard:
    """Guards every synchronous call into a plugin: ``guard.call(plugin, stage, function, *args)``.

    Use as a context manager on the main thread, around the event loop. Anywhere else (worker threads, tests, before
    ``start``) calls are made unguarded in time, but what a plugin raises is still turned into ``StageFailed``.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._thread = 0  # ident of the guarded thread, 0 while stopped
        self._busy = False
        self._serial = 0
        self._armed = False
        self._seen = self._ticks = self._idle = 0
        self._ticker: _Ticker | None = None
        self._previous: Any = None
        self._logged: dict[tuple[str, str], float] = {}

    def start(self) -> None:
        """Guards from now on. Off the main thread, where Python delivers no signals, it stays unguarded in time."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._previous = signal.signal(_SIGNAL, self._tick)
        self._ticker = _Ticker(max(1_000_000, int(self.limit_s * 1e9) // TICKS))
        self._thread = threading.get_ident()

    def stop(self) -> None:
        if self._ticker is not None:
            self._thread = 0
            self._armed = False
            self._ticker.close()
            self._ticker = None
            # A tick already on its way must not meet the default action, which ends the process.
            signal.signal(_SIGNAL, self._previous if callable(self._previous) else signal.SIG_IGN)

    def __enter__(self) -> Guard:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def call(self, plugin: str, stage: str, function: Callable[..., T], *args: Any) -> T:
        """What ``function(*args)`` returns, within the deadline.

        Raises StageFailed, naming plugin and stage only, when it raises or overruns: what a plugin says in an
        exception may hold secrets, so it goes to the operator's log and never to the agent.
        """
        if self._thread != threading.get_ident() or self._busy:
            try:
                return function(*args)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise self._failed(plugin, stage, error) from None
        self._serial += 1
        if not self._armed:
            self._arm()
        # The inner handlers may themselves be interrupted, between their first two instructions; the outer one is
        # not: a second interruption is a whole deadline away.
        try:
            try:
                self._busy = True
                result = function(*args)
                self._busy = False
                return result
            except KeyboardInterrupt:
                self._busy = False
                raise
            except BaseException as error:
                self._busy = False
                raise self._failed(plugin, stage, error) from None
        except StageTimeout as error:
            self._busy = False
            raise self._failed(plugin, stage, error) from None

    def decide(self, plugin: str, stage: str, function: Callable[..., Decision], *args: Any) -> Decision:
        """Like ``call``, and StageFailed as well when what came back is not a ``Decision``: None is not a yes."""
        decision = self.call(plugin, stage, function, *args)
        if isinstance(decision, Decision):
            return decision
        log.error("plugin %s, stage %s: returned %s, not a Decision", plugin, stage, type(decision).__name__)
        raise StageFailed(f"plugin {plugin} gave no decision in stage {stage}")

    async def wait(self, plugin: str, stage: str, coroutine: Coroutine[Any, Any, T]) -> T:
        """What ``coroutine`` returns; every step of it is guarded, the time it waits between steps is not.

        Cancellation passes through unchanged. Raises StageFailed as ``call`` does.
        """
        result: T = await _Guarded(self, plugin, stage, coroutine)
        return result

    async def aside(self, plugin: str, stage: str, function: Callable[..., T], *args: Any) -> T:
        """``call`` in a thread of its own, for the few calls that have to wait for a disk.

        Nothing can interrupt a thread. One that overruns ``ASIDE_S`` is left behind, and being a daemon it keeps
        neither other calls nor the end of the process waiting. Raises StageFailed as ``call`` does.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = self.call(plugin, stage, function, *args)
            except StageFailed as error:
                _tell(loop, answer, answer.set_exception, error)
            else:
                _tell(loop, answer, answer.set_result, result)

        threading.Thread(target=work, name=f"creto-{stage}", daemon=True).start()
        try:
            async with asyncio.timeout(ASIDE_S):
                return await answer
        except TimeoutError:
            raise self._failed(plugin, stage, StageTimeout(), ASIDE_S) from None

    def _arm(self) -> None:
        self._armed = True
        self._seen = self._ticks = self._idle = 0
        assert self._ticker is not None
        self._ticker.start()

    def _tick(self, signum: int, frame: FrameType | None) -> None:
        if not self._armed:
            return
        if self._serial != self._seen:
            self._seen, self._ticks, self._idle = self._serial, 0, 0
        elif not self._busy:
            self._idle += 1
            if self._idle >= IDLE_TICKS and self._ticker is not None:
                self._armed = False
                self._ticker.pause()
        else:
            self._ticks += 1
            if self._ticks >= TICKS - 1:
                self._ticks = 0
                raise StageTimeout

    def _failed(self, plugin: str, stage: str, error: BaseException, limit_s: float | None = None) -> StageFailed:
        overran = isinstance(error, StageTimeout)
        if self._may_log(plugin, stage):
            what = (
                f"overran its deadline of {limit_s or self.limit_s:g} s"
                if overran
                else f"raised {type(error).__name__}"
            )
            log.error("plugin %s, stage %s: %s", plugin, stage, what, exc_info=error)
        if overran:
            return StageFailed(f"plugin {plugin} did not answer in time in stage {stage}", reason="stage_timeout")
        return StageFailed(f"plugin {plugin} failed in stage {stage}")

    def _may_log(self, plugin: str, stage: str) -> bool:
        """Whether to log now: a plugin that fails on every request must not fill the disk with tracebacks."""
        now = time.monotonic()
        if now - self._logged.get((plugin, stage), float("-inf")) < LOG_INTERVAL_S:
            return False
        self._logged[plugin, stage] = now
        return True


def _tell(
    loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any], settle: Callable[[Any], None], value: object
) -> None:
    """Settles a future of ``loop`` from another thread, unless nobody waits for it any more."""

    def at_once() -> None:
        if not answer.done():
            settle(value)

    try:
        loop.call_soon_threadsafe(at_once)
    except RuntimeError:
        pass  # the loop has ended


class _Guarded:
    """Awaitable that drives a coroutine step by step through ``Guard.call``."""

    def __init__(self, guard: Guard, plugin: str, stage: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._guard, self._plugin, self._stage, self._coroutine = guard, plugin, stage, coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = self._coroutine.send
        value: Any = None
        while True:
            done, result = self._guard.call(self._plugin, self._stage, _advance, step, value)
            if done:
                return result
            if isinstance(result, _Escaped):
                raise result.error
            try:
                value = yield result
                step = self._coroutine.send
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as error:  # a cancellation or the failure of what was awaited: the plugin's to handle
                step, value = self._coroutine.throw, error


class _Escaped:
    """A cancellation that the plugin let through; it is the caller's doing, not the plugin's failure."""

    def __init__(self, error: asyncio.CancelledError) -> None:
        self.error = error


def _advance(step: Callable[[Any], Any], value: Any) -> tuple[bool, Any]:
    try:
        return False, step(value)
    except StopIteration as stop:
        return True, stop.value
    except asyncio.CancelledError as error:
        if error is value:
            return False, _Escaped(error)
        raise
