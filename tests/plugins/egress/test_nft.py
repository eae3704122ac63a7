"""The ruleset as a value, and the same rules in a real kernel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from creto_egress.ruleset import Hook, Verdict, run_mode


def test_rules_read_as_intended() -> None:
    written = {chain.name: [rule.text for rule in chain.rules] for chain in run_mode(15001, 53).chains}
    assert written == {
        "fragments": ["meta nfproto ipv4 ip frag-off & 0x3fff != 0 drop", "exthdr frag exists drop"],
        "redirect": [
            "udp dport 53 redirect to :53",
            "tcp dport 53 redirect to :53",
            'oifname "lo" accept',
            "meta l4proto tcp redirect to :15001",
        ],
        "leave": ['oifname "lo" accept', "ct status dnat accept", "reject with icmpx admin-prohibited"],
        "forward": [],
    }


def test_what_no_rule_accepts_is_dropped() -> None:
    chains = {chain.name: chain for chain in run_mode(15001, 53).chains}
    assert chains["leave"].policy is chains["forward"].policy is Verdict.DROP
    assert (chains["leave"].hook, chains["forward"].hook) == (Hook.OUTPUT, Hook.FORWARD)
    assert chains["fragments"].priority < -400 < chains["redirect"].priority < chains["leave"].priority


def in_namespace(program: str) -> str:
    """Standard output of a program run as root of a new user and network namespace. Skips where there are none."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1) here")
    if subprocess.run(["unshare", "-Urn", "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no user and network namespaces")
    done = subprocess.run(
        ["unshare", "-Urn", sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernel_has_the_rules_that_were_meant() -> None:
    if shutil.which("nft") is None:
        pytest.skip("nft(8), which shows what the kernel has, is not installed")
    shown = in_namespace(
        """
        import subprocess
        from creto_egress import nft, ruleset
        nft.load(ruleset.run_mode(15001, 5300))
        print(subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, text=True, check=True).stdout)
        """
    )
    entries = json.loads(shown)["nftables"]
    chains = {e["chain"]["name"]: e["chain"] for e in entries if "chain" in e}
    assert {name: (c["type"], c["hook"], c["prio"], c["policy"]) for name, c in chains.items()} == {
        "fragments": ("filter", "output", -450, "accept"),
        "redirect": ("nat", "output", -100, "accept"),
        "leave": ("filter", "output", 0, "drop"),
        "forward": ("filter", "forward", 0, "drop"),
    }
    rules = [(e["rule"]["chain"], json.dumps(e["rule"]["expr"])) for e in entries if "rule" in e]
    assert [chain for chain, _ in rules] == ["fragments"] * 2 + ["redirect"] * 4 + ["leave"] * 3
    text = "\n".join(expression for _, expression in rules)
    for part in ('"dnat"', '"port": 15001', '"port": 5300', '"admin-prohibited"', '"frag"', '"frag-off"'):
        assert part in text, part


def test_loading_again_replaces_and_a_bad_rule_changes_nothing() -> None:
    found = in_namespace(
        """
        import socket
        from dataclasses import replace
        from creto_egress import nft, ruleset
        table = ruleset.run_mode(15001, 53)
        flags = [nft.load(table), nft.load(ruleset.run_mode(15002, 53))]
        broken = ruleset.Rule("broken rule", (ruleset.MetaIs(ruleset.Meta.OIFNAME, b"x" * 40), ruleset.Verdict.DROP))
        chain = replace(table.chains[0], rules=(*table.chains[0].rules, broken))
        try:
            nft.load(replace(table, chains=(chain,)))
            print("taken")
        except nft.RuleRefused as error:
            print(error.what, "|", error)
        from pyroute2.nftables.main import NFTables
        with NFTables(nfgen_family=1) as kernel:
            print(len(list(kernel.get_chains())), len(list(kernel.get_rules())), flags[0] == flags[1])
        """
    ).splitlines()
    assert found[0].startswith("broken rule | ")
    assert "nftables refuses 'broken rule'" in found[0]
    assert found[1] == "4 9 True"


def test_rules_outlive_the_loader_and_resist_others() -> None:
    found = in_namespace(
        """
        import os, subprocess, sys
        from creto_egress import nft, ruleset
        pid = os.fork()
        if pid == 0:
            os._exit(nft.load(ruleset.run_mode(15001, 53)))
        flags = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        from pyroute2.nftables.main import NFTables
        with NFTables(nfgen_family=1) as kernel:
            print(flags, len(list(kernel.get_rules())))
        """
    ).split()
    assert int(found[0]) in (0, 6)
    assert found[1] == "9"


def test_without_privilege_nothing_is_loaded() -> None:
    program = """
        from creto_egress import nft, ruleset
        import os
        from pyroute2.netlink.nfnetlink import nftsocket
        from pyroute2.nftables import expressions
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        try:
            nft.load(ruleset.run_mode(15001, 53))
        except nft.RuleRefused as error:
            print(error.what)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "the transaction", done.stderr
