"""The ``[metering]`` section."""

from __future__ import annotations

import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from creto_metering.money import nano_usd
from creto_metering.windows import parse_rate, parse_window

Metric = Literal["requests", "tokens", "cost_usd"]

# A quota path holds at most this many counters.
MAX_BUDGETS_PER_AGENT = 48

_HOST = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def _amount(value: Any) -> Any:
    """Whole numbers and decimal text; a float would have been rounded before it was read."""
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal)):
        raise ValueError('write the amount as text, e.g. "5.00"')
    return str(value)


Amount = Annotated[str, BeforeValidator(_amount)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BudgetSettings(_Section):
    """One ``[[metering.budgets]]``: a limit per window, or a steady rate of requests."""

    level: Literal["platform", "org", "team", "agent"] = Field("agent", description="Level of the quota path.")
    match: str = Field("*", description='Name at that level, or "*": each of them has a counter of its own.')
    metric: Metric = Field("requests", description="What is counted.")
    limit: Amount | None = Field(None, description="The most per window: dollars for cost_usd, else a whole number.")
    window: str | None = Field(None, description="total, hour, day, week, month, or a period such as 30m.")
    timezone: str = Field("UTC", description="IANA zone whose clocks begin the day, week or month.")
    mode: Literal["hard", "soft", "shadow"] = Field(
        "hard", description="hard refuses; soft allows and warns; shadow only logs what hard would have refused."
    )
    rate: str | None = Field(None, description='Requests per time, e.g. "60/m", instead of limit and window.')
    burst: int | None = Field(None, ge=0, lt=10**9, description="Requests beyond the first that may come at once.")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> BudgetSettings:
        if self.rate is not None:
            if self.limit is not None or self.window is not None or self.metric != "requests":
                raise ValueError("a rate counts requests and has neither limit nor window")
            if self.timezone != "UTC":
                raise ValueError("a rate has no timezone")
            if self.mode != "hard":
                raise ValueError("a rate is always hard")
            parse_rate(self.rate)
            return self
        if self.limit is None or self.window is None:
            raise ValueError("a budget needs limit and window, or rate")
        if self.burst is not None:
            raise ValueError("burst belongs to rate")
        parse_window(self.window, self.timezone)
        self.limit_units()
        return self

    @model_validator(mode="after")
    def _names_something(self) -> BudgetSettings:
        if self.level == "platform" and self.match != "*":
            raise ValueError("there is one platform; leave match out")
        if not self.match or (self.match != "*" and "*" in self.match):
            raise ValueError('match is an exact name or "*"')
        return self

    def limit_units(self) -> int:
        """The limit as counted: nano-dollars for cost_usd, tokens, or requests. Raises ValueError."""
        text = self.limit or "0"
        if self.metric == "cost_usd":
            return nano_usd(text)
        if not re.fullmatch(r"[0-9]{1,15}", text):
            raise ValueError(f"limit {text!r} is not a whole number of {self.metric}")
        return int(text)

    def counter(self) -> tuple[str, str, str, str]:
        """Budgets with the same counter differ in whom they match only; the exact name goes before "*"."""
        window = self.window if self.rate is None else f"rate of {parse_rate(self.rate)[1]} ns"
        return (self.level, self.metric, window or "", self.timezone)


class PriceSettings(_Section):
    """One ``[[metering.price]]``: dollars per million tokens of a model that has no published price, or another."""

    provider: str = Field("openai", description="Provider of the model, as in `providers`.")
    model: str = Field(
        min_length=1, description='Exact name of the model, or "*" for every model of the provider without a price.'
    )
    input: Amount = Field(description="Dollars per million input tokens.")
    output: Amount = Field("0", description="Dollars per million output tokens.")
    cache_read: Amount | None = Field(None, description="Dollars per million tokens read from a prompt cache.")
    cache_write: Amount | None = Field(None, description="Dollars per million tokens written to a prompt cache.")
    context_window: int = Field(0, ge=0, description="Most tokens the model reads at once; 0 when not known.")
    max_output: int = Field(0, ge=0, description="Most tokens the model writes; 0 when not known.")
    effective_from: date | None = Field(None, description="First day (UTC) this price holds; before it, it holds too.")

    @field_validator("input", "output", "cache_read", "cache_write")
    @classmethod
    def _is_money(cls, value: str | None) -> str | None:
        if value is not None:
            nano_usd(value)
        return value

    def row(self) -> dict[str, Any]:
        """The same as a row of a price file."""
        kinds = ("input", "output", "cache_read", "cache_write")
        usd = {kind: getattr(self, kind) for kind in kinds}
        version: dict[str, Any] = {"usd": {kind: price for kind, price in usd.items() if price is not None}}
        if self.effective_from is not None:
            version["from"] = self.effective_from.isoformat()
        return {
            "provider": self.provider,
            "model": self.model,
            "match": ["starts_with", ""] if self.model == "*" else ["equals", self.model],
            "context_window": self.context_window,
            "max_output": self.max_output,
            "prices": [version],
        }


class Settings(_Section):
    """What is metered, what it costs, and what may be spent."""

    providers: dict[str, str] = Field(
        {}, description='Hosts with paths of a model provider, and whose prices hold: "llm.x" = "openai".'
    )
    budgets: tuple[BudgetSettings, ...] = Field((), description="Limits, all of which must hold.")
    price: tuple[PriceSettings, ...] = Field((), description="Prices that go before those of the price file.")
    prices_file: Path | None = Field(None, description="Price file to use instead of the installed one.")
    unknown_model: Literal["deny", "default"] = Field(
        "default", description="What happens to a model without a price: refused, or charged default_cost_usd."
    )
    default_cost_usd: Amount = Field("1.00", description="What a request to a model without a price is charged.")
    default_max_output: int = Field(
        16_384, ge=1, le=10**7, description="Output tokens reserved when neither request nor price row limits them."
    )
    max_body: int = Field(32 << 20, ge=1, le=1 << 30, description="Largest body of a model request, in bytes.")
    include_usage: bool = Field(
        True, description="Ask for usage in OpenAI streams whose client did not, and hide it from the client again."
    )
    unmetered: Literal["deny", "allow"] = Field(
        "deny",
        description="Requests to a model provider whose cost cannot be known, by an agent with a hard budget of tokens "
        "or dollars.",
    )
    reservation_ttl_s: int = Field(
        3600, ge=10, le=86_400, description="After how long a reservation that nobody settled is given back."
    )

    @field_validator("default_cost_usd")
    @classmethod
    def _is_money(cls, value: str) -> str:
        nano_usd(value)
        return value

    @field_validator("providers")
    @classmethod
    def _are_hosts(cls, value: dict[str, str]) -> dict[str, str]:
        for host, provider in value.items():
            if not _HOST.fullmatch(host):
                raise ValueError(f'{host!r} is not a lower-case host name without port, nor "*." and one')
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", provider):
                raise ValueError(f"{provider!r} is not the name of a provider such as openai")
        return value

    @field_validator("budgets")
    @classmethod
    def _are_distinct(cls, value: tuple[BudgetSettings, ...]) -> tuple[BudgetSettings, ...]:
        seen = set()
        for number, budget in enumerate(value, 1):
            key = (budget.match, budget.counter())
            if key in seen:
                raise ValueError(f"budget {number} limits the same as one before it")
            seen.add(key)
        if len({budget.counter() for budget in value}) > MAX_BUDGETS_PER_AGENT:
            raise ValueError(f"more than {MAX_BUDGETS_PER_AGENT} budgets would apply to one agent")
        return value

    @property
    def default_cost_nano(self) -> int:
        return nano_usd(self.default_cost_usd)
