"""Threads that work behind the requests give way to others."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from creto_proxy import background

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def _standing() -> tuple[int, int]:
    """(niceness, slice in nanoseconds) of a thread that stands back."""
    background.stand_back()
    attributes = background.Attributes(size=ctypes.sizeof(background.Attributes))
    number = _SCHED_GETATTR[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, ctypes.byref(attributes), attributes.size, 0) == 0
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == attributes.nice
    return attributes.nice, attributes.runtime


@pytest.mark.skipif(platform.machine() not in _SCHED_GETATTR, reason="the number of sched_getattr(2) is not known here")
def test_such_a_thread_is_nice_and_its_slice_short() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with ThreadPoolExecutor(1) as threads:
        nice, slice_ns = threads.submit(_standing).result()
    assert nice == background.NICE
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    if release >= (6, 12):
        assert slice_ns == background.SLICE_NS
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before, "only that thread"
