"""Counters in a file: what was counted is what a reader sees, in another process too, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from creto_hotpath.counters import (
    BUCKETS,
    HISTOGRAM_CELLS,
    CountersFull,
    CountersInvalid,
    bucket_end,
    bucket_of,
    read_counters,
)

from .conftest import Form

words = st.integers(-(2**63), 2**63 - 1)


def test_what_is_counted_is_read(form: Form, tmp_path: Path) -> None:
    counters = form("counters").Counters(str(tmp_path / "a.tab"), 4096, 4096)
    first = counters.allocate("requests{agent=\"a\"}")
    second = counters.allocate("lag", 2)
    counters.add(first)
    counters.add(first, 41)
    counters.set(second + 1, -7)
    reading = read_counters(tmp_path / "a.tab")
    assert [(entry.name, list(entry.values)) for entry in reading.entries] == [
        ('requests{agent="a"}', [42]),
        ("lag", [0, -7]),
    ]
    assert (counters.get(first), counters.get(second + 1), counters.used) == (42, -7, 3)
    assert reading.alive and reading.pid == os.getpid() and reading.started_ns > 0


def test_a_histogram_keeps_sum_and_buckets(form: Form, tmp_path: Path) -> None:
    counters = form("counters").Counters(str(tmp_path / "a.tab"))
    counters.allocate("before")
    cell = counters.histogram("seconds")
    for value in (0, 999, 1000, 1001, 12_345_678, 10**12, 10**12 + 1, -5):
        counters.observe(cell, value)
    values = read_counters(tmp_path / "a.tab").entries[1].values
    assert len(values) == HISTOGRAM_CELLS
    assert values[0] == 999 + 1000 + 1001 + 12_345_678 + 10**12 + 10**12 + 1
    assert {bucket: n for bucket, n in enumerate(values[1:]) if n} == {
        0: 4, 1: 1, bucket_of(12_345_678): 1, BUCKETS - 2: 1, BUCKETS - 1: 1,
    }  # fmt: skip


@given(st.integers(0, 10**13))
@example(1000)
@example(1001)
@example(10**12)
def test_a_value_lies_in_its_bucket_and_within_a_tenth_of_its_end(value: int) -> None:
    index = bucket_of(value)
    assert index == 0 or value > bucket_end(index - 1) or index == BUCKETS - 1
    if index < BUCKETS - 1:
        assert value <= bucket_end(index)
    if 0 < index < BUCKETS - 1:
        assert bucket_end(index) <= value * 1.1 + 1


def test_buckets_end_at_round_numbers() -> None:
    ends = [bucket_end(index) for index in range(BUCKETS - 1)]
    assert ends == sorted(set(ends))
    assert {mantissa * 10**power for power in range(3, 12) for mantissa in (1, 2, 5)} <= set(ends)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(st.tuples(st.sampled_from(["add", "set", "observe"]), st.integers(-1, 900), words), max_size=12))
def test_both_forms_write_the_same_file(both: tuple[Form, Form], tmp_path: Path, steps: list[tuple[str, int, int]]) -> None:
    results = []
    for form in both:
        path = tmp_path / f"{form.name}.tab"
        counters = form("counters").Counters(str(path), 2048, 256)
        counters.allocate("first", 20)
        counters.histogram("second")
        answers = []
        for name, cell, value in steps:
            try:
                getattr(counters, name)(cell, value)
                answers.append("done")
            except IndexError:
                answers.append("IndexError")
        results.append((answers, read_counters(path).entries))
        counters.close()
    assert results[0] == results[1]


@pytest.mark.parametrize("cell", [-1, 1, 2**40])
def test_a_cell_that_was_not_given_out_is_refused(form: Form, tmp_path: Path, cell: int) -> None:
    counters = form("counters").Counters(str(tmp_path / "a.tab"), 4096, 4096)
    counters.allocate("one")
    for use in (counters.add, counters.set, counters.observe):
        with pytest.raises(IndexError, match="not given out"):
            use(cell, 1)
    with pytest.raises(IndexError):
        counters.observe(0, 1)  # one cell is no histogram
    with pytest.raises(OverflowError):
        counters.add(0, 2**63)


def test_a_full_file_says_so_and_stays_as_it_was(form: Form, tmp_path: Path) -> None:
    counters = form("counters").Counters(str(tmp_path / "a.tab"), 4, 64)
    counters.allocate("three", 3)
    with pytest.raises(CountersFull):
        counters.allocate("two", 2)
    with pytest.raises(CountersFull):
        counters.allocate("x" * 60)
    for name in ("", "a\nb", "a\tb"):
        with pytest.raises(ValueError, match="not a name"):
            counters.allocate(name)
    counters.add(counters.allocate("last"))
    assert [entry.name for entry in read_counters(tmp_path / "a.tab").entries] == ["three", "last"]


def test_a_file_has_one_writer(form: Form, tmp_path: Path) -> None:
    path = str(tmp_path / "a.tab")
    counters = form("counters").Counters(path)
    with pytest.raises(BlockingIOError):
        form("counters").Counters(path)
    counters.add(counters.allocate("x"), 5)
    counters.close()
    counters.close()
    reading = read_counters(path)
    assert not reading.alive and reading.entries[0].values[0] == 5
    counters.add(0)  # counted in vain, and no error
    assert form("counters").Counters(path).used == 0, "a new writer begins anew"


def test_what_a_killed_process_counted_is_still_there(form: Form, tmp_path: Path) -> None:
    path = tmp_path / "a.tab"
    code = (
        f"from {form.module('counters')} import Counters\nimport sys, time\nc = Counters({str(path)!r})\n"
        "c.add(c.allocate('n'), 12345)\nprint('ready', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        reading = read_counters(path)
        assert reading.alive and reading.pid == process.pid
        process.send_signal(signal.SIGKILL)
        process.wait()
    reading = read_counters(path)
    assert not reading.alive and list(reading.entries[0].values) == [12345]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tab"
    for content in (b"", b"x" * 10_000, bytes(4096)):
        path.write_bytes(content)
        with pytest.raises(CountersInvalid):
            read_counters(path)
    with pytest.raises(FileNotFoundError):
        read_counters(tmp_path / "none")


def test_both_forms_choose_the_same_bucket_at_every_edge(form: Form, tmp_path: Path) -> None:
    counters = form("counters").Counters(str(tmp_path / "a.tab"), 1024, 256)
    cell = counters.histogram("seconds")
    expected = [0] * BUCKETS
    for index in range(BUCKETS - 1):
        for value in (bucket_end(index) - 1, bucket_end(index), bucket_end(index) + 1):
            counters.observe(cell, value)
            expected[bucket_of(value)] += 1
    assert list(read_counters(tmp_path / "a.tab").entries[0].values[1:]) == expected
