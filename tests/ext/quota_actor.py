"""One process of several that share a quota table: run by test_quota_processes as a script.

``quota_actor.py <module> <file> <what> <arguments...>``; it says "ready" on stdout when it is, and does its part when a
line comes in on stdin.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

from creto_hotpath import _quota_file as layout
from creto_hotpath._quota_types import QuotaBusy

NOW = 1_800_000_000_000_000_000
TTL = 60_000_000_000


def key(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def wait_for_go() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def patiently(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call gives, however long others keep the table: on a busy machine whoever has it may not get to run."""
    while True:
        try:
            return call(*arguments)
        except QuotaBusy:
            continue


def hammer(table: Any, names: str, attempts: str) -> None:
    """Reserves one unit at a time on all of ``names``; prints how many it got."""
    path = table.path([(key(name), 0) for name in names.split(",")])
    wait_for_go()
    got = 0
    for _ in range(int(attempts)):
        rid = patiently(table.reserve, path, (1,), NOW, TTL)
        if rid > 0:
            got += 1
            patiently(table.commit, rid, (1,), NOW)
    print(got, flush=True)


def define(table: Any, count: str) -> None:
    wait_for_go()
    for number in range(int(count)):
        patiently(table.define, key(f"q{number}"), 4, 1000)


def churn(table: Any, names: str) -> None:
    """Reserves and settles for ever, until it is killed."""
    path = table.path([(key(name), 0) for name in names.split(",")])
    wait_for_go()
    while True:
        patiently(table.commit, patiently(table.reserve, path, (2,), NOW, TTL), (1,), NOW)


def shared_words(file: str) -> tuple[mmap.mmap, memoryview]:
    fd = os.open(file, os.O_RDWR)
    mem = mmap.mmap(fd, 0)
    os.close(fd)
    return mem, memoryview(mem).cast("q")


def enter(file: str, words: memoryview) -> None:
    """Into the critical section, by hand: whichever form the table is open in."""
    if words[layout.H_ENGINE] == layout.COMPILED:
        pids = words[layout.H_PIDS : layout.H_PIDS + layout.SEATS].tolist()
        words[layout.H_LOCK] = pids.index(os.getpid()) + 1
        return
    fd = os.open(file, os.O_RDWR)
    layout._flock(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, layout.LOCK_MUTEX)


def slot_of(words: memoryview, name: str) -> int:
    mask = words[layout.H_SLOTS] - 1
    number = int.from_bytes(key(name)[8:], "little") & mask
    first = int.from_bytes(key(name)[:8], "little", signed=True)
    while words[layout.HEADER_WORDS + number * layout.SLOT_WORDS + layout.S_A] != first:
        number = (number + 1) & mask
    return layout.HEADER_WORDS + number * layout.SLOT_WORDS


def die_halfway(table: Any, name: str) -> None:
    """Enters the critical section, changes a word as the log allows, and is killed."""
    mem, words = shared_words(table.filename)
    enter(table.filename, words)
    at = slot_of(words, name) + layout.S_RESERVED
    words[layout.H_UNDO], words[layout.H_UNDO + 1] = at, words[at]
    words[layout.H_UNDO_COUNT] = 1
    words[at] = 999
    os.kill(os.getpid(), signal.SIGKILL)


def stay_inside(table: Any) -> None:
    mem, words = shared_words(table.filename)
    enter(table.filename, words)
    print("ready", flush=True)
    threading.Event().wait(60)


def die_with_a_child(table: Any) -> None:
    """Forks a child that lives on without using the table, and dies in the critical section."""
    mem, words = shared_words(table.filename)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")
        sys.stdin.readline()
        os._exit(0)
    os.read(reading, 1)
    enter(table.filename, words)
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def fork_and_share(table: Any, names: str, attempts: str) -> None:
    """Parent and child use the table opened before the fork; prints what each got."""
    path = table.path([(key(name), 0) for name in names.split(",")])
    got = 0
    child = os.fork()
    for _ in range(int(attempts)):
        got += patiently(table.reserve, path, (1,), NOW, TTL) > 0
    if child == 0:
        print(got, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print(got, flush=True)


if __name__ == "__main__":
    module, file, what, *arguments = sys.argv[1:]
    globals()[what](import_module(module).QuotaTable(file, 64, 64), *arguments)
