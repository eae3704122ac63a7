"""What metering keeps open while creto runs: the quota table, the ledger, and the sweeping of dead reservations."""

from __future__ import annotations

import asyncio
import logging

from creto_hotpath.quota import QuotaBusy, QuotaTable
from creto_metering.budgets import Budgets
from creto_metering.ledger import Ledger
from creto_metering.meter import RequestMeter
from creto_metering.prices import PriceBook, bundled_prices, load_prices, price_directories, price_row
from creto_metering.settings import Settings
from creto_metering.windows import SECOND_NS
from creto_proxy.hookspecs import Core

log = logging.getLogger("creto.metering")

# Holds of processes that died stand in the way of the living until they are swept; seconds do not matter.
SWEEP_EVERY_S = 5.0


class Service:
    """Opened by ``start`` and closed by ``stop``; the stage objects work in between."""

    def __init__(self, settings: Settings, core: Core, meter: RequestMeter, ledger: Ledger) -> None:
        self._settings = settings
        self._core = core
        self._meter = meter
        self._ledger = ledger
        self._table: QuotaTable | None = None
        self._sweeper: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Raises PricesInvalid, LedgerError or QuotaTableError, each naming its file."""
        prices = load_book(self._settings, self._core)
        self._core.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._ledger.open()
        self._table = QuotaTable(str(self._core.state_dir / "quota.tab"))
        self._table.sweep(self._core.clock.unix_ns())
        ttl_ns = self._settings.reservation_ttl_s * SECOND_NS
        self._meter.open(Budgets(self._settings.budgets, self._table, ttl_ns), prices)

    def keep_sweeping(self) -> None:
        """Gives back, until ``stop``, what processes that died had reserved. One process per node does."""
        if self._core.role == "worker":
            return
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None
        if self._table is not None:
            self._table.close()
            self._table = None
        self._ledger.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            if self._table is None:
                return
            try:
                if swept := self._table.sweep(self._core.clock.unix_ns()):
                    log.warning("gave back %d reservations that nobody settled", swept)
            except QuotaBusy as error:
                log.warning("cannot sweep reservations: %s", error)


def load_book(settings: Settings, core: Core) -> PriceBook:
    """The prices of the configuration, then those of the price file."""
    book = load_prices(settings.prices_file) if settings.prices_file else bundled_prices(
        price_directories([core.policies_dir])
    )  # fmt: skip
    named = PriceBook([price_row(price.row()) for price in settings.price if price.model != "*"])
    others = PriceBook([price_row(price.row()) for price in settings.price if price.model == "*"], book.source)
    return named.joined(book).joined(others)
