"""The hybrid logical clock: strictly increasing whatever the wall clock does, across restarts and processes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_platform.consensus import ClockDrift, ConsensusError, HybridClock, Timestamp


class Wall:
    """A wall clock the test moves, in milliseconds."""

    def __init__(self, ms: int = 1_700_000_000_000) -> None:
        self.ms = ms

    def __call__(self) -> float:
        return self.ms / 1000


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def clock(tmp_path: Path, wall: Wall) -> HybridClock:
    return HybridClock(tmp_path, clock=wall)


def remote(ms: int, counter: int = 0) -> Timestamp:
    return Timestamp(ms << 16 | counter, "peer")


def test_a_timestamp_is_milliseconds_and_a_counter(clock: HybridClock, wall: Wall) -> None:
    first, second = clock.now(), clock.now()
    assert (first.unix_ms, first.counter) == (wall.ms, 0)
    assert (second.unix_ms, second.counter) == (wall.ms, 1)
    assert first.node == clock.node and not first.unconfirmed
    wall.ms += 1
    assert (clock.now().unix_ms, clock.now().counter) == (wall.ms, 1)


def test_more_events_than_the_counter_holds_still_increase(clock: HybridClock, wall: Wall) -> None:
    last = clock.now().value
    for _ in range(70_000):
        value = clock.now().value
        assert value > last
        last = value
    assert last >> 16 == wall.ms + 1


def test_a_wall_clock_that_steps_back_is_told_and_changes_nothing(tmp_path: Path, wall: Wall) -> None:
    steps: list[int] = []
    clock = HybridClock(tmp_path, clock=wall, stepped_back=steps.append)
    before = clock.now()
    wall.ms -= 1000
    assert clock.now() > before
    assert steps == []
    wall.ms -= 1001
    assert clock.now() > before
    assert steps == [1001]


def test_after_a_restart_timestamps_go_on_even_when_time_went_back(tmp_path: Path, wall: Wall) -> None:
    last = HybridClock(tmp_path, clock=wall).now()
    wall.ms -= 60_000
    again = HybridClock(tmp_path, clock=wall)
    assert again.now().value > last.value
    assert again.node != last.node
    assert again.node.partition(".")[0] == last.node.partition(".")[0]


def test_the_high_water_is_written_once_per_second_of_time(tmp_path: Path, wall: Wall) -> None:
    clock = HybridClock(tmp_path, clock=wall)
    clock.now()
    mark = (tmp_path / "high_water").read_text()
    assert int(mark) == wall.ms + 1000
    for _ in range(100):
        wall.ms += 9
        clock.now()
    assert (tmp_path / "high_water").read_text() == mark
    wall.ms += 100
    clock.now()
    assert int((tmp_path / "high_water").read_text()) == wall.ms + 1000


def test_two_processes_never_lower_the_mark(tmp_path: Path) -> None:
    ahead, behind = Wall(1_700_000_050_000), Wall()
    HybridClock(tmp_path, clock=ahead).now()
    slow = HybridClock(tmp_path, clock=behind)
    slow.now()
    assert int((tmp_path / "high_water").read_text()) >= ahead.ms + 1000


@pytest.mark.parametrize(
    ("ahead_ms", "followed"), [(-5000, True), (0, True), (500, True), (501, False), (60_000, False)]
)
def test_a_peer_is_followed_up_to_half_a_second(clock: HybridClock, wall: Wall, ahead_ms: int, followed: bool) -> None:
    before, theirs = clock.now(), remote(wall.ms + ahead_ms, 7)
    after = clock.observe(theirs)
    assert after > before
    assert (after.value > theirs.value) is followed
    assert clock.now() > after


def test_a_peer_a_minute_ahead_is_refused(clock: HybridClock, wall: Wall) -> None:
    before = clock.now()
    with pytest.raises(ClockDrift) as caught:
        clock.observe(remote(wall.ms + 60_001))
    assert caught.value.ahead_ms == 60_001
    assert clock.now().value == before.value + 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["now", "observe", "restart"]), st.integers(-70_000, 70_000)), max_size=20))
def test_whatever_happens_timestamps_only_grow(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    wall = Wall()
    directory = tmp_path_factory.mktemp("clock")
    clock = HybridClock(directory, clock=wall)
    last = -1
    for what, amount in steps:
        if what == "restart":
            clock = HybridClock(directory, clock=wall)
        wall.ms += amount
        try:
            value = (clock.observe(remote(wall.ms + amount)) if what == "observe" else clock.now()).value
        except ClockDrift:
            assert amount > 60_000
            continue
        assert value > last
        last = value


def test_threads_never_get_the_same_timestamp(clock: HybridClock) -> None:
    issued: list[int] = []
    threads = [threading.Thread(target=lambda: issued.extend(clock.now().value for _ in range(500))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(issued)) == len(issued) == 2000


@pytest.mark.parametrize("content", ["x", "12", "9" * 21, "9" * 20 + "\n", " " * 20 + "\n"])
def test_a_damaged_mark_is_an_error_that_names_the_file(tmp_path: Path, wall: Wall, content: str) -> None:
    (tmp_path / "high_water").write_text(content)
    with pytest.raises(ConsensusError, match=r"high_water: not a high-water mark"):
        HybridClock(tmp_path, clock=wall)


def test_time_beyond_48_bits_is_an_error(tmp_path: Path) -> None:
    clock = HybridClock(tmp_path, clock=Wall(1 << 48))
    with pytest.raises(ConsensusError, match="48 bits"):
        clock.now()
