"""Creto beside what else a user could put in front of an upstream: one question per file, one run, one machine.

    make bench-peers                       everything; writes .benchmarks/peers.json and docs/performance.md
    make bench-peers ONLY=cpu,latency ROUNDS=3 SECONDS=2

``programs`` starts and stops every peer, ``load`` drives them and accounts for their CPU, ``report`` writes the page.
"""
