"""TLS on a connection, compiled unless the twin is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from creto_hotpath import _tls_py
    from creto_hotpath._tls_py import Records

    # asyncio asks for its own base classes; this answers to their methods without inheriting from them.
    class Secured(_tls_py.Secured, asyncio.Protocol): ...

else:
    from creto_hotpath._select import select

    _tls = select("tls")
    Records = _tls.Records
    Secured = _tls.Secured

__all__ = ["Records", "Secured"]
