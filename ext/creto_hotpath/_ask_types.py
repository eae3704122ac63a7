"""What both forms of ``ask`` give back."""

from __future__ import annotations

from typing import Final, NamedTuple

# More members, deeper brackets or longer model names are for whoever reads with care.
MAX_MEMBERS: Final = 48
MAX_DEPTH: Final = 64
MAX_NAME: Final = 128
MAX_TOKENS: Final = 10**9
MAX_CHOICES: Final = 10**6
# What a tariff can count with: no product of these leaves 64 bits.
TARIFF_TOKENS: Final = 2**22
TARIFF_RATE: Final = 2**39
BYTES_PER_TOKEN: Final = 2


class Ask(NamedTuple):
    """What a body asks of a model. None stands for "the body does not say".

    includes_usage: it asks for usage in a stream itself. limit: the largest of the limits it sets on output tokens.
    choices: answers asked for (``n``, ``best_of``), at least 1. tools: how many it offers. refers: part of its input is
    named and not contained. caches: some string is ``cache_control``. audio: some string is ``audio`` or
    ``input_audio``.
    """

    model: str | None
    stream: bool | None
    includes_usage: bool
    limit: int | None
    choices: int
    tools: int | None
    refers: bool
    caches: bool
    audio: bool
