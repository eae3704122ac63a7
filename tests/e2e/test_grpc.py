"""gRPC through a real ``creto sidecar``: an unmodified client that was told of a proxy, an unmodified server.

grpcio asks its proxy for a tunnel (CONNECT) and speaks HTTP/2 inside: in plain, or in TLS that creto intercepts.
"""

from __future__ import annotations

import contextlib
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from standins import certificates

from creto_proxy.audit import outcomes

from .conftest import Creto

POLICY = """
@id("use-allowed-hosts")
permit (principal is Creto::Agent, action in Creto::Action::"egress", resource is Creto::Host);
@id("no-denied")
forbid (principal, action, resource == Creto::Host::"denied.example.com");
"""


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Methods without a schema: messages are bytes."""

    def __init__(self) -> None:
        self.hanging = threading.Event()
        self.cancelled = threading.Event()
        self.metadata: list[Any] = []

    def service(self, details: Any) -> Any:
        self.metadata.append(dict(details.invocation_metadata))
        return {
            "/t.S/Unary": grpc.unary_unary_rpc_method_handler(lambda message, context: message[::-1]),
            "/t.S/Fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "/t.S/Down": grpc.unary_stream_rpc_method_handler(lambda message, context: iter([bytes([n]) for n in range(50)])),
            "/t.S/Up": grpc.stream_unary_rpc_method_handler(lambda messages, context: b"%d" % sum(map(len, messages))),
            "/t.S/Both": grpc.stream_stream_rpc_method_handler(lambda messages, context: (m.upper() for m in messages)),
            "/t.S/Hang": grpc.unary_unary_rpc_method_handler(self._hang),
        }.get(details.method)

    def _fail(self, message: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-why", "because"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "no such thing: é")
        return b""

    def _hang(self, message: bytes, context: Any) -> bytes:
        self.hanging.set()
        over = threading.Event()
        context.add_callback(over.set)
        over.wait(60)
        self.cancelled.set()
        return b""


@dataclass
class Sidecar:
    service: Service
    proxy: str
    ca: bytes
    plain: int
    secure: int
    state: Path
    upstream_ca: Path

    def channel(self, host: str, *, tls: bool = False) -> grpc.Channel:
        options = [("grpc.http_proxy", self.proxy), ("grpc.enable_http_proxy", 1), ("grpc.max_receive_message_length", -1)]
        if tls:
            return grpc.secure_channel(f"{host}:{self.secure}", grpc.ssl_channel_credentials(self.ca), options)
        return grpc.insecure_channel(f"{host}:{self.plain}", options)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    directory = tmp_path_factory.mktemp("grpc")
    hosts = ["grpc.example.com", "secure.example.com", "denied.example.com", "down.example.com"]
    ca, _ = certificates(directory, hosts)
    pem = (directory / "standin.pem").read_bytes()
    service = Service()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((service,))
    plain = server.add_insecure_port("127.0.0.1:0")
    secure = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pem, pem)]))
    server.start()
    (directory / "policies").mkdir()
    (directory / "policies" / "test.cedar").write_text(POLICY)
    allow = ", ".join(f'"{host}:{port}"' for host in hosts for port in (plain, secure))
    config = directory / "creto.toml"
    config.write_text(
        f"""
[common]
state_dir = "{directory / "state"}"
[listen]
explicit = "127.0.0.1:0"
[policy]
dir = "{directory / "policies"}"
[egress]
allow = [{allow}]
upstream_ca = "{ca}"
[egress.resolve]
"grpc.example.com" = "127.0.0.1:{plain}"
"denied.example.com" = "127.0.0.1:{plain}"
"secure.example.com" = "127.0.0.1:{secure}"
"down.example.com" = "127.0.0.1:1"
"""
    )
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop, 0)
        yield stack.enter_context(_running(config, service, directory / "state", plain, secure, Path(ca)))


@contextlib.contextmanager
def _running(
    config: Path, service: Service, state: Path, plain: int, secure: int, upstream_ca: Path
) -> Iterator[Sidecar]:
    command = [sys.executable, "-m", "creto_proxy", "--config", str(config), "sidecar"]
    said = config.with_suffix(".log")
    with said.open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            while (found := re.search(r"explicit proxy on (\S+), CA (\S+)", said.read_text())) is None:
                assert process.poll() is None, said.read_text()
            yield Sidecar(service, f"http://{found[1]}", Path(found[2]).read_bytes(), plain, secure, state, upstream_ca)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def test_unary(sidecar: Sidecar) -> None:
    with sidecar.channel("grpc.example.com") as channel:
        assert channel.unary_unary("/t.S/Unary")(b"abc", metadata=(("x-tag", "1"), ("x-bin-bin", b"\x00\xff")), timeout=60) == b"cba"
    seen = sidecar.service.metadata[-1]
    assert seen["x-tag"] == "1" and seen["x-bin-bin"] == b"\x00\xff"


def test_a_server_streams(sidecar: Sidecar) -> None:
    with sidecar.channel("grpc.example.com") as channel:
        assert list(channel.unary_stream("/t.S/Down")(b"", timeout=60)) == [bytes([n]) for n in range(50)]


def test_a_client_streams_more_than_any_window(sidecar: Sidecar) -> None:
    with sidecar.channel("grpc.example.com") as channel:
        messages = iter([b"x" * 100_000] * 50)
        assert channel.stream_unary("/t.S/Up")(messages, timeout=60) == b"5000000"


def test_both_stream_and_answers_come_before_the_request_ends(sidecar: Sidecar) -> None:
    with sidecar.channel("grpc.example.com") as channel:
        asked: queue.Queue[bytes | None] = queue.Queue()
        answers = channel.stream_stream("/t.S/Both")(iter(asked.get, None), timeout=60)
        for word in (b"one", b"two", b"three"):
            asked.put(word)
            assert next(answers) == word.upper()
        asked.put(None)
        assert list(answers) == []
        assert answers.code() is grpc.StatusCode.OK


def test_a_status_and_trailers_come_back(sidecar: Sidecar) -> None:
    with sidecar.channel("grpc.example.com") as channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary("/t.S/Fail")(b"", timeout=60)
    error = failed.value
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing: é")
    assert dict(error.trailing_metadata())["x-why"] == "because"


def test_a_cancelled_call_is_cancelled_at_the_server(sidecar: Sidecar) -> None:
    sidecar.service.cancelled.clear()
    with sidecar.channel("grpc.example.com") as channel:
        call = channel.unary_unary("/t.S/Hang").future(b"", timeout=60)
        assert sidecar.service.hanging.wait(60)
        call.cancel()
        assert sidecar.service.cancelled.wait(60)


def test_a_deadline_ends_the_call_at_the_server(sidecar: Sidecar) -> None:
    sidecar.service.cancelled.clear()
    with sidecar.channel("grpc.example.com") as channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary("/t.S/Hang")(b"", timeout=2)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert sidecar.service.cancelled.wait(60)


def test_tls_is_intercepted_and_http2_negotiated_on_both_sides(sidecar: Sidecar) -> None:
    with sidecar.channel("secure.example.com", tls=True) as channel:
        assert channel.unary_unary("/t.S/Unary")(b"abc", timeout=60) == b"cba"
        assert list(channel.unary_stream("/t.S/Down")(b"", timeout=60)) == [bytes([n]) for n in range(50)]


def test_an_upstream_that_is_down_is_unavailable(sidecar: Sidecar) -> None:
    with sidecar.channel("down.example.com") as channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary("/t.S/Unary")(b"abc", timeout=60)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(failed.value.trailing_metadata())["creto-reason"] == "upstream_unreachable"


def test_a_denied_call_says_so_in_grpc(sidecar: Sidecar) -> None:
    with sidecar.channel("denied.example.com") as channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary("/t.S/Unary")(b"abc", timeout=60)
    error = failed.value
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED and error.details().startswith("creto: ")
    assert dict(error.trailing_metadata())["creto-reason"] == "policy_forbid"


INSIDE = """
import grpc
with grpc.insecure_channel("grpc.example.com:80") as channel:
    print(channel.unary_unary("/t.S/Unary")(b"abc", timeout=20).decode())
    print(len(list(channel.unary_stream("/t.S/Down")(b"", timeout=20))))
    print(channel.stream_unary("/t.S/Up")(iter([b"x" * 100_000] * 5), timeout=20).decode())
with grpc.secure_channel("secure.example.com:443", grpc.ssl_channel_credentials()) as channel:
    print(channel.unary_unary("/t.S/Unary")(b"def", timeout=20).decode())
with grpc.insecure_channel("denied.example.com:80") as channel:
    try:
        channel.unary_unary("/t.S/Unary")(b"abc", timeout=20)
    except grpc.RpcError as error:
        print(error.code().name, dict(error.trailing_metadata())["creto-reason"])
"""


def test_an_agent_that_knows_of_no_proxy_is_governed_the_same(creto: Creto, sidecar: Sidecar) -> None:
    """``creto run``: grpcio, its own DNS and its own roots, on the transparent way."""
    names = ("grpc.example.com:80", "denied.example.com:80", "secure.example.com:443")
    pins = [f'"{name.partition(":")[0]}" = "127.0.0.1:{sidecar.secure if name[:3] == "sec" else sidecar.plain}"' for name in names]
    text = creto.config.read_text().replace("allow = [", "allow = [" + "".join(f'"{name}", ' for name in names))
    text = text.replace("[egress.resolve]", "[egress.resolve]\n" + "\n".join(pins))
    creto.config.write_text(text.replace(str(creto.world.ca), str(sidecar.upstream_ca)))
    (creto.policies / "denied.cedar").write_text(POLICY.rpartition("@id")[1] + POLICY.rpartition("@id")[2])
    result = creto.python(INSIDE, GRPC_VERBOSITY="error")
    assert result.out.split("\n")[:-1] == ["cba", "50", "500000", "fed", "PERMISSION_DENIED policy_forbid"], result.err
    rows = [(row["path"], row["decision"], row["way"]) for row in result.requests if row["path"].startswith("/t.S")]
    assert sorted(rows) == [
        ("/t.S/Down", "allow", "transparent"),
        ("/t.S/Unary", "allow", "transparent"),
        ("/t.S/Unary", "allow", "transparent"),
        ("/t.S/Unary", "deny", "transparent"),
        ("/t.S/Up", "allow", "transparent"),
    ]


def test_every_call_left_its_record(sidecar: Sidecar) -> None:
    journal = sidecar.state / "journal"
    runs = {path.stem.rpartition("-")[0] for path in journal.glob("*.jnl")}
    targets = {(outcome.target, outcome.decision) for run in runs for outcome in outcomes(journal, run)}
    assert {("/t.S/Unary", "allow"), ("/t.S/Both", "allow"), ("/t.S/Unary", "deny")} <= targets
