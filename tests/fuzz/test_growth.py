"""Memory that compiled parsers take and never give back: accepted and refused messages, over and over."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

import pytest

from creto_hotpath._select import extensions_wanted

from .targets import TARGETS

MESSAGES = int(os.environ.get("CRETO_FUZZ_MESSAGES", "300"))
# One target call makes some hundred calls into the compiled module, because each message is also given cut.
COMPILED = ("request", "response", "chunked", "counted", "edits", "usage_document", "usage_stream", "usage_native", "members", "journal", "jsonrpc", "h2")  # fmt: skip
# The C library counts what it keeps in hand as used. The smallest leak loses 16 bytes in each of 30,000 calls.
IN_HAND = 128 << 10


class _Heap(ctypes.Structure):
    """``struct mallinfo2``: uordblks is what is in use, hblkhd what is mapped on its own."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def _mallinfo() -> Any:
    try:
        found = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    found.restype = _Heap
    return found


def in_use() -> tuple[int, int]:
    """(blocks of Python objects, bytes of the C heap)."""
    gc.collect()
    heap = _mallinfo()()
    return sys.getallocatedblocks(), heap.uordblks + heap.hblkhd


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer has a heap of its own")
@pytest.mark.skipif(_mallinfo() is None, reason="the C library does not tell what is in use (mallinfo2)")
@pytest.mark.skipif(not extensions_wanted(), reason="there is no compiled module")
@pytest.mark.parametrize("name", COMPILED)
def test_parsing_keeps_no_memory(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    def play(rounds: int) -> None:
        for _ in range(rounds):
            for seed in seeds:
                target.check(seed)

    rounds = -(-MESSAGES // len(seeds))
    play(2)
    blocks, heap = in_use()
    play(rounds)
    more_blocks, more_heap = in_use()
    assert more_blocks - blocks < rounds * len(seeds), "a Python object per message stays"
    assert more_heap - heap < IN_HAND, "memory of the C heap stays with each message"
