"""The machine's clocks, behind the ``Clock`` of the contract."""

from __future__ import annotations

import time


class SystemClock:
    """``now_ns`` is monotonic, ``unix_ns`` is wall clock; both in nanoseconds."""

    now_ns = staticmethod(time.monotonic_ns)
    unix_ns = staticmethod(time.time_ns)
