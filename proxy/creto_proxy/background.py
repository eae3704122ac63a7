"""Threads that work behind the requests: on a full machine requests go first."""

from __future__ import annotations

import ctypes
import os
import platform
import threading

# Niceness, and the slice for which such a thread may run while somebody waits: the shortest there is.
NICE = 10
SLICE_NS = 100_000

# sched_setattr(2), which glibc has from 2.41 on.
_NUMBERS = {"x86_64": 314, "aarch64": 274}


class Attributes(ctypes.Structure):
    """struct sched_attr, first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def stand_back() -> None:
    """Lowers the share of this thread and of those it starts, and the time for which they may keep others waiting.

    Since Linux 6.6 a thread that was given a core keeps it for its slice, 3 ms, however nice it is; since 6.12 it can
    ask for less. Where that is not to be had the niceness remains. Raises OSError when not even that is allowed.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    number = _NUMBERS.get(platform.machine())
    if number is not None:
        asked = Attributes(size=ctypes.sizeof(Attributes), nice=NICE, runtime=SLICE_NS)
        ctypes.CDLL(None).syscall(number, 0, ctypes.byref(asked), 0)
