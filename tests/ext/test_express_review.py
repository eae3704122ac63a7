"""The express lane when the quota table fails: nothing leaks, and whatever was sent is on record."""

from __future__ import annotations

import asyncio
import functools
import time
from pathlib import Path

import pytest

from .conftest import Form
from .test_express import HOST, ONE, lab


async def test_without_room_for_a_reservation_the_handler_is_asked(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = form("express").Share(5)
    monkeypatch.setattr(form("quota"), "QuotaTable", functools.partial(form("quota").QuotaTable, reservations=1))
    monkeypatch.setattr(form("express"), "Standing", functools.partial(form("express").Standing, share=share))
    async with lab(form, tmp_path) as here:
        await here.ask()
        assert here.quota.reserve(here.path, ONE, time.time_ns(), 10**12) > 0
        assert await here.ask("/b") == b"HTTP/1.1 200 OK ok"
        assert here.asked == ["/a", "/b"] and here.lane.taken == 0 and share.count == 0


async def test_what_was_sent_is_recorded_although_it_cannot_be_charged(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask()
        here.writer.write(f"POST /b HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 4\r\n\r\nha".encode())
        here.writer.write(b"lf")
        await here.reader.readuntil(b"ok")
        here.writer.write(f"POST /c HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 4\r\n\r\nha".encode())
        async with asyncio.timeout(60):
            while here.lane.taken == 0:
                await asyncio.sleep(0.01)
        here.quota.close()
        here.writer.write(b"lf")
        await here.reader.readuntil(b"ok")
        assert [record[2] for record in here.records()] == ["/c"]
