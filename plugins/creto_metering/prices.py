"""What a model costs: versioned price rows, compiled to integers, and the exact cost of a usage.

A rate is nano-dollars per million units, which every published price is an integer of. A cost is the sum of
``tokens * rate`` divided by a million and rounded half up once, so it equals the decimal calculation to the
nano-dollar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from creto_metering.money import nano_usd
from creto_metering.windows import SECOND_NS

FORMAT = 1
MILLION = 1_000_000
# A day of UTC: they are all of this length.
_DAY_NS = 86_400 * SECOND_NS
# Names come from agents and upstreams; longer ones are no model's.
MAX_MODEL_NAME = 256

KINDS = (
    "input", "output", "cache_read", "cache_write", "cache_write_1h", "input_audio", "output_audio", "web_search",
    "cache_read_audio", "input_image", "input_video", "output_image", "output_video",
)  # fmt: skip
# A usage of nothing else has two rates.
_PLAIN = frozenset({"input", "output", "reasoning", "total"})
# A usage with none of these is of text and sound, none of which was cached.
_RICH = frozenset(
    {"cache_read_audio", "cache_read_image", "cache_read_video", "input_image", "input_video", "output_image"}
    | {"output_video"}
)
# Providers whose models cost what they do at another.
_PRICED_AS = {"google-vertex": "google"}
# Providers that number the stable versions of a model ("gemini-2.0-flash-001"), which cost the same.
_NUMBERED = frozenset(_PRICED_AS.values())


class PricesInvalid(ValueError):
    """A price file cannot be used; the text names the file and the row."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per million tokens of each kind; ``web_search`` per million calls."""

    input: int
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    input_audio: int = 0
    output_audio: int = 0
    web_search: int = 0
    cache_read_audio: int = 0
    input_image: int = 0
    input_video: int = 0
    output_image: int = 0
    output_video: int = 0

    @classmethod
    def compiled(cls, rates: Mapping[str, int]) -> Rates:
        """Rates with every kind filled in: what has no price of its own costs what its parent kind costs."""
        plain_in = rates.get("input", 0)
        plain_out = rates.get("output", 0)
        write = rates.get("cache_write", plain_in)
        read = rates.get("cache_read", plain_in)
        return cls(
            input=plain_in,
            output=plain_out,
            cache_read=read,
            cache_write=write,
            cache_write_1h=rates.get("cache_write_1h", write),
            input_audio=rates.get("input_audio", plain_in),
            output_audio=rates.get("output_audio", plain_out),
            web_search=rates.get("web_search", 0),
            cache_read_audio=rates.get("cache_read_audio", read),
            input_image=rates.get("input_image", plain_in),
            input_video=rates.get("input_video", plain_in),
            output_image=rates.get("output_image", plain_out),
            output_video=rates.get("output_video", plain_out),
        )


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one model at one time.

    tiers: (threshold, rates), ascending; *above* a threshold of input tokens all tokens cost the tier's rates.
    context_window, max_output: in tokens, 0 when not known. effective_from: "" or the ISO date of this version.
    """

    provider: str
    model: str
    base: Rates
    tiers: tuple[tuple[int, Rates], ...] = ()
    context_window: int = 0
    max_output: int = 0
    effective_from: str = ""

    def rates(self, input_tokens: int) -> Rates:
        """The rates of a request with that many input tokens; output is priced by the same tier."""
        found = self.base
        for above, rates in self.tiers:
            if input_tokens > above:
                found = rates
        return found

    def cost_nano(self, tokens: Mapping[str, int]) -> int:
        """Nano-dollars of a usage (keys as ``Usage.tokens``; ``input`` includes what caches read and wrote)."""
        if _PLAIN.issuperset(tokens):
            read, written = tokens.get("input", 0), tokens.get("output", 0)
            rates = self.rates(read) if self.tiers else self.base
            return (read * rates.input + written * rates.output + MILLION // 2) // MILLION
        return rounded(sum(self.cost_parts(tokens)))

    def cost_parts(self, tokens: Mapping[str, int]) -> tuple[int, int, int]:
        """(input, output, calls) in millionths of a nano-dollar: exact, not yet rounded."""
        rates = self.rates(tokens.get("input", 0))
        read, write = tokens.get("cache_read", 0), tokens.get("cache_write", 0)
        long_write = min(write, tokens.get("cache_write_1h", 0))
        audio_in = tokens.get("input_audio", 0)
        audio_out = tokens.get("output_audio", 0)
        other_in = other_out = rich_in = rich_out = 0
        if not _RICH.isdisjoint(tokens):
            # What was cached is in the count of its kind as well, and is paid for as cached.
            audio_read = min(read, audio_in, tokens.get("cache_read_audio", 0))
            audio_in -= audio_read
            image_in = max(0, tokens.get("input_image", 0) - tokens.get("cache_read_image", 0))
            video_in = max(0, tokens.get("input_video", 0) - tokens.get("cache_read_video", 0))
            image_out, video_out = tokens.get("output_image", 0), tokens.get("output_video", 0)
            other_in, other_out = image_in + video_in, image_out + video_out
            rich_in = image_in * rates.input_image + video_in * rates.input_video
            rich_in += audio_read * (rates.cache_read_audio - rates.cache_read)
            rich_out = image_out * rates.output_image + video_out * rates.output_video
        return (
            max(0, tokens.get("input", 0) - read - write - audio_in - other_in) * rates.input
            + rich_in
            + read * rates.cache_read
            + (write - long_write) * rates.cache_write
            + long_write * rates.cache_write_1h
            + audio_in * rates.input_audio,
            max(0, tokens.get("output", 0) - audio_out - other_out) * rates.output
            + rich_out
            + audio_out * rates.output_audio,
            tokens.get("web_search", 0) * rates.web_search,
        )

    def ceiling_nano(self, input_tokens: int, output_tokens: int, *, caches: bool, audio: bool) -> int:
        """The most that so many tokens can cost, whichever of them are written to a cache or are sound."""
        dearest_in, dearest_out = self.dearest(input_tokens, caches=caches, audio=audio)
        return rounded(input_tokens * dearest_in + output_tokens * dearest_out)

    def dearest(self, input_tokens: int, *, caches: bool, audio: bool) -> tuple[int, int]:
        """The dearest rates of input and output in a request with that many input tokens."""
        rates = self.rates(input_tokens)
        dearest_in = max(rates.input, rates.input_image, rates.input_video)
        dearest_out = max(rates.output, rates.output_image, rates.output_video)
        if caches:
            dearest_in = max(dearest_in, rates.cache_write, rates.cache_write_1h)
        if audio:
            dearest_in = max(dearest_in, rates.input_audio)
            dearest_out = max(dearest_out, rates.output_audio)
        return dearest_in, dearest_out

    def tier_of(self, input_tokens: int) -> tuple[int, int]:
        """The least and the most input tokens for which the same rates hold."""
        least, most = 0, 2**63
        for above, _ in self.tiers:
            if input_tokens > above:
                least = above + 1
            else:
                most = min(most, above)
        return least, most


def rounded(millionths: int) -> int:
    """Nano-dollars, half up."""
    return (millionths + MILLION // 2) // MILLION


@dataclass(frozen=True, slots=True)
class _Version:
    """rates: kind -> (base, tiers as (above, rate)). when: the request facts it needs, () for the list price."""

    effective_from: date
    rates: Mapping[str, tuple[int, tuple[tuple[int, int], ...]]]
    when: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Model:
    provider: str
    name: str
    matches: Callable[[str], bool]
    versions: tuple[_Version, ...]
    context_window: int
    max_output: int


@dataclass(slots=True)
class PriceBook:
    """Finds the price of a model by the name a request or an answer used. Earlier rows win."""

    models: Sequence[_Model]
    source: str = ""
    _in_force: dict[tuple[str, str, int, tuple[tuple[str, str], ...]], Price | None] = field(default_factory=dict)

    def price(self, provider: str, model: str, unix_ns: int, when: Mapping[str, str] | None = None) -> Price | None:
        """The price in force at ``unix_ns`` (UTC date), None for a model nobody priced.

        when: what the request asked for that changes its price, e.g. ``{"service_tier": "priority"}``.
        """
        key = (provider, model, unix_ns // _DAY_NS, tuple(sorted(when.items())) if when else ())
        try:
            return self._in_force[key]
        except KeyError:
            pass
        if not model or len(model) > MAX_MODEL_NAME:
            return None
        found = self._find(provider, model.lower())
        day = datetime.fromtimestamp(unix_ns // SECOND_NS, UTC).date()
        price = None if found is None else _price_on(found, day, dict(key[3]))
        if len(self._in_force) >= 4096:
            self._in_force.clear()
        self._in_force[key] = price
        return price

    def _find(self, provider: str, name: str) -> _Model | None:
        also = _PRICED_AS.get(provider, provider)
        found = self._first(provider, name)
        if found is None and also in _NUMBERED:
            plain = re.sub(r"-\d{3}\Z", "", name)
            found = self._first(also, name) or self._first(provider, plain) or self._first(also, plain)
        return found

    def _first(self, provider: str, name: str) -> _Model | None:
        return next((m for m in self.models if m.provider == provider and m.matches(name)), None)

    def joined(self, other: PriceBook) -> PriceBook:
        """This book's rows, then the other's."""
        return PriceBook((*self.models, *other.models), other.source)


def _price_on(model: _Model, day: date, facts: Mapping[str, str]) -> Price:
    listed = [v for v in model.versions if not v.when]
    in_force = [v for v in listed if v.effective_from <= day]
    version = max(in_force or listed[:1], key=lambda v: v.effective_from)
    rates = dict(version.rates)
    for variant in model.versions:
        if variant.when and variant.effective_from <= day and all(facts.get(k) == v for k, v in variant.when):
            rates.update(variant.rates)
    thresholds = sorted({above for _, tiers in rates.values() for above, _ in tiers})
    return Price(
        provider=model.provider,
        model=model.name,
        base=Rates.compiled({kind: base for kind, (base, _) in rates.items()}),
        tiers=tuple((above, Rates.compiled({k: _at(r, above) for k, r in rates.items()})) for above in thresholds),
        context_window=model.context_window,
        max_output=model.max_output,
        effective_from="" if version.effective_from == date.min else version.effective_from.isoformat(),
    )


def _at(rate: tuple[int, tuple[tuple[int, int], ...]], above: int) -> int:
    found, tiers = rate
    for start, price in tiers:
        if start <= above:
            found = price
    return found


def load_prices(path: Path) -> PriceBook:
    """The rows of a price file. Raises PricesInvalid naming the file and the row."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PricesInvalid(f"{path}: {error}") from None
    rows = document.get("models") if isinstance(document, dict) and document.get("format") == FORMAT else None
    if not isinstance(rows, list):
        raise PricesInvalid(f"{path}: not a price file of format {FORMAT}")
    models = []
    for number, row in enumerate(rows, 1):
        try:
            models.append(price_row(row))
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            name = row.get("model", "?") if isinstance(row, dict) else "?"
            raise PricesInvalid(f"{path}: row {number} ({name}): {error}") from None
    return PriceBook(models, str(document.get("source", "")))


def price_row(row: Mapping[str, Any]) -> _Model:
    """A compiled row.

    ``{"provider", "model", "match", "context_window", "max_output", "prices": [{"from", "when", "usd": {kind: usd}}]}``
    where usd is decimal dollars per million tokens (``web_search``: per thousand calls), or
    ``{"base": usd, "above": [[threshold, usd], ...]}``.
    """
    versions = tuple(_version(v) for v in row["prices"])
    if not any(not v.when for v in versions):
        raise ValueError("has no list price")
    return _Model(
        provider=row["provider"],
        name=row["model"],
        matches=_matcher(row.get("match") or ["equals", row["model"]]),
        versions=versions,
        context_window=int(row.get("context_window") or 0),
        max_output=int(row.get("max_output") or 0),
    )


def _version(version: Mapping[str, Any]) -> _Version:
    starts = version.get("from")
    rates = {}
    for kind, price in version["usd"].items():
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
        # Calls are priced per thousand; everything else per million.
        scale = 1000 if kind == "web_search" else 1
        base, tiers = (price["base"], price["above"]) if isinstance(price, Mapping) else (price, ())
        rates[kind] = (_rate(base, scale), tuple(sorted((int(above), _rate(p, scale)) for above, p in tiers)))
    return _Version(
        effective_from=date.fromisoformat(starts) if starts else date.min,
        rates=rates,
        when=tuple(sorted((version.get("when") or {}).items())),
    )


def _rate(price: Any, scale: int) -> int:
    rate = nano_usd(price)
    if Decimal(price) * 10**9 != rate:
        raise ValueError(f"price {price} is finer than a nano-dollar per million")
    return rate * scale


def _matcher(clause: Sequence[Any]) -> Callable[[str], bool]:
    """A test of a lower-case model name from ``["or" | "and", clause...]`` or ``[how, text]``."""
    how, *rest = clause
    if how in ("or", "and"):
        tests = tuple(_matcher(c) for c in rest)
        return (lambda name: any(t(name) for t in tests)) if how == "or" else (lambda name: all(t(name) for t in tests))
    (text,) = rest
    if how == "regex":
        pattern = re.compile(text)
        return lambda name: pattern.search(name) is not None
    text = text.lower()
    tests_by_name: dict[str, Callable[[str], bool]] = {
        "equals": lambda name: name == text,
        "starts_with": lambda name: name.startswith(text),
        "ends_with": lambda name: name.endswith(text),
        "contains": lambda name: text in name,
    }
    if how not in tests_by_name:
        raise ValueError(f"unknown match {how!r}")
    return tests_by_name[how]


@lru_cache(maxsize=4)
def bundled_prices(directories: tuple[Path, ...]) -> PriceBook:
    """The first ``prices.json`` in ``directories``. Raises PricesInvalid when there is none."""
    for directory in directories:
        path = directory / "prices.json"
        if path.is_file():
            return load_prices(path)
    raise PricesInvalid(f"no prices.json in {', '.join(map(str, directories))}; set metering.prices_file")


def price_directories(policies: Iterable[Path]) -> tuple[Path, ...]:
    """Where prices are looked for: the given policy directories, then what was installed, then the source tree."""
    installed = find_spec("creto_policies")
    places = installed.submodule_search_locations if installed is not None else None
    return (*policies, *map(Path, places or ()), Path(__file__).resolve().parents[2] / "policies")
