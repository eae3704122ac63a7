"""The ``Redirect`` of ``creto run``: the wanted rules, put into the kernel."""

from __future__ import annotations

from creto_egress import nft, ruleset
from creto_proxy.hookspecs import RedirectPorts


class NetfilterRedirect:
    """Loads the run-mode ruleset into the network namespace of the calling process."""

    def install(self, ports: RedirectPorts) -> None:
        """Raises ``Unsupported`` where the kernel lacks nftables, ``nft.RuleRefused`` naming what it does not take."""
        nft.load(ruleset.run_mode(ports.tcp, ports.dns))
