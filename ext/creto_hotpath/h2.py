"""HTTP/2 framing without sockets: by libnghttp2 where creto was built with it, by the h2 package otherwise.

The one module with a fallback: which of the two it is depends on a C library that need not be there, and ``framing``
says it. The costs of both stand in docs/http2.md.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from creto_hotpath._h2_types import CLOSED, DATA, END, ENDED, GOAWAY, HEADERS, REFUSED, SETTINGS, SessionError
from creto_hotpath._select import PACKAGE, extensions_wanted

framing = "nghttp2" if extensions_wanted() and find_spec(f"{PACKAGE}._h2_c") is not None else "h2"

if TYPE_CHECKING:
    from creto_hotpath._h2_py import Session
else:
    Session = import_module(f"{PACKAGE}._h2_c" if framing == "nghttp2" else f"{PACKAGE}._h2_py").Session

__all__ = [
    "CLOSED",
    "DATA",
    "END",
    "ENDED",
    "GOAWAY",
    "HEADERS",
    "REFUSED",
    "SETTINGS",
    "Session",
    "SessionError",
    "framing",
]
