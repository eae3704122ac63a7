"""TLS on a connection, compiled unless the twin is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from creto_hotpath._select import select

if TYPE_CHECKING:
    import asyncio

    from creto_hotpath import _openssl_py as _openssl
    from creto_hotpath import _tls_py
    from creto_hotpath._tls_py import Records

    # asyncio asks for its own base classes; this answers to their methods without inheriting from them.
    class Secured(_tls_py.Secured, asyncio.Protocol): ...

else:
    _openssl = select("openssl")
    _tls = select("tls")
    Records = _tls.Records
    Secured = _tls.Secured

# How records reach OpenSSL: "openssl", libssl is called for each; "ssl", Python's objects are, which takes longer.
ENGINE: Final = _openssl.choose("openssl")

__all__ = ["ENGINE", "Records", "Secured"]
