"""The lane of requests that need not be asked about, compiled unless the twin is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath import _express_py as _impl
else:
    _impl = select("express")

AT = _impl.AT
BYTES_DOWN = _impl.BYTES_DOWN
BYTES_UP = _impl.BYTES_UP
CRETO_NS = _impl.CRETO_NS
ERROR = _impl.ERROR
ID = _impl.ID
STATUS = _impl.STATUS
TARGET = _impl.TARGET
TOTAL_NS = _impl.TOTAL_NS
TRACE = _impl.TRACE
UPSTREAM_NS = _impl.UPSTREAM_NS
USAGE = _impl.USAGE

if TYPE_CHECKING:
    from creto_hotpath._express_py import Express, Metered, Share, Standing, Valve
else:
    Express = _impl.Express
    Metered = _impl.Metered
    Share = _impl.Share
    Standing = _impl.Standing
    Valve = _impl.Valve

__all__ = [
    "AT",
    "BYTES_DOWN",
    "BYTES_UP",
    "CRETO_NS",
    "ERROR",
    "ID",
    "STATUS",
    "TARGET",
    "TOTAL_NS",
    "TRACE",
    "UPSTREAM_NS",
    "USAGE",
    "Express",
    "Metered",
    "Share",
    "Standing",
    "Valve",
]
