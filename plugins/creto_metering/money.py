"""US dollars as integers: nano-dollars (1e-9 USD). Decimal at the edges, never a float."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation

NANO = 10**9
# What one counter of the quota table takes: 1.15 billion dollars.
MAX_NANO = 2**60 - 1

_CONTEXT = Context(prec=38, rounding=ROUND_HALF_UP)


def nano_usd(usd: str | int | Decimal) -> int:
    """Nano-dollars of a decimal amount, rounded half up. Raises ValueError for what is not a number >= 0 in range."""
    try:
        amount = _CONTEXT.create_decimal(usd)
        nano = int(_CONTEXT.quantize(amount * NANO, Decimal(1)))
    except (InvalidOperation, ValueError, OverflowError):
        raise ValueError(f"{usd!r} is not an amount of dollars such as 5.00") from None
    if amount.is_signed() and nano or nano > MAX_NANO:
        raise ValueError(f"{usd!r} is not between 0 and {MAX_NANO // NANO} dollars")
    return nano


def usd(nano: int) -> str:
    """Decimal dollars of an integer, exact, with at least two places: ``usd(1_230_000_000) == "1.23"``."""
    sign, nano = ("-", -nano) if nano < 0 else ("", nano)
    whole, fraction = divmod(nano, NANO)
    places = f"{fraction:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{places}"
