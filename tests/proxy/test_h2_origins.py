"""HTTP/2 to upstreams: by ALPN, by prior knowledge and for gRPC; many exchanges on one connection; how it ends."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
from h2.connection import ConnectionState

from creto_proxy.model import Decision, Verdict

from ..ports import free_port
from .h2_lab import HOSTS, Lab, framed_by, h2_lab, http1_origin, tls_client
from .h2_wire import Wire
from .test_pipeline import Hosts

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from standins import certificates


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self) -> None:
        self.peers: set[str] = set()
        self.metadata: list[dict[str, Any]] = []

    def service(self, details: Any) -> Any:
        def echo(message: bytes, context: Any) -> bytes:
            self.peers.add(context.peer())
            self.metadata.append(dict(context.invocation_metadata()))
            return message

        return grpc.unary_unary_rpc_method_handler(echo)


@pytest.fixture(params=["nghttp2", "h2"])
def framing(request: pytest.FixtureRequest) -> Iterator[str]:
    with framed_by(request.param):
        yield request.param


@pytest.fixture
def server() -> Iterator[tuple[int, Service]]:
    service = Service()
    running = grpc.server(futures.ThreadPoolExecutor(8))
    running.add_generic_rpc_handlers((service,))
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield port, service
    running.stop(0).wait()


def call(lab: Lab, host: str = "good.test") -> tuple[grpc.StatusCode, dict[str, Any]]:
    options = [("grpc.http_proxy", lab.proxy)]
    with grpc.insecure_channel(f"{host}:80", options) as channel:
        try:
            channel.unary_unary("/t.S/Echo")(b"abc", timeout=60)
        except grpc.RpcError as error:
            return error.code(), dict(error.trailing_metadata())
    return grpc.StatusCode.OK, {}


@pytest.mark.usefixtures("framing")
def test_many_calls_share_one_connection(tmp_path: Path, server: tuple[int, Service]) -> None:
    port, service = server
    with h2_lab(tmp_path, port) as lab, grpc.insecure_channel("good.test:80", [("grpc.http_proxy", lab.proxy)]) as channel:
        echo = channel.unary_unary("/t.S/Echo")
        calls = [echo.future(b"%d" % number, timeout=60) for number in range(40)]
        assert [each.result() for each in calls] == [b"%d" % number for number in range(40)]
        assert len(lab.recorded(40)) == 40
    assert len(service.peers) == 1


@pytest.mark.usefixtures("framing")
def test_via_says_that_both_sides_speak_http2(tmp_path: Path, server: tuple[int, Service]) -> None:
    port, service = server
    with h2_lab(tmp_path, port) as lab, grpc.insecure_channel("good.test:80", [("grpc.http_proxy", lab.proxy)]) as channel:
        _, told = channel.unary_unary("/t.S/Echo").with_call(b"abc", timeout=60)
        assert dict(told.initial_metadata())["via"] == "2.0 creto"
    assert service.metadata[0]["via"] == "2.0 creto"


@pytest.mark.parametrize(
    ("decision", "code"),
    [
        (Decision(Verdict.DENY, "policy_forbid", "No."), grpc.StatusCode.PERMISSION_DENIED),
        (Decision(Verdict.DENY, "budget_exhausted", "Spent.", status=429, retry_after_s=3), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Decision(Verdict.DENY, "who", "Who?", status=401), grpc.StatusCode.UNAUTHENTICATED),
    ],
)
def test_refusals_are_grpc_statuses(tmp_path: Path, decision: Decision, code: grpc.StatusCode) -> None:
    with h2_lab(tmp_path, 1, authorizers=[("plugin", Hosts(lambda: decision))]) as lab:
        got, metadata = call(lab, "bad.test")
        assert (got, metadata["creto-reason"]) == (code, decision.reason)
        assert [outcome.status for outcome in lab.recorded()] == [decision.status]
    if decision.retry_after_s:
        assert metadata["grpc-retry-pushback-ms"] == "-1", "a spent budget does not come back within a retry"


class Asking:
    """A gate that holds without an answer."""

    async def hold(self, request: Any, decision: Decision, client: Any) -> Decision:
        client.interim(102)
        return Decision(Verdict.ESCALATE, "approval_pending", "A person must approve.", facts={"approval_id": "ap-1"})

    def spend(self, request: Any) -> bool:
        return True

    def settled(self, request: Any, outcome: Any) -> None:
        return None


def test_a_held_call_is_a_failed_precondition_and_an_unreachable_upstream_unavailable(tmp_path: Path) -> None:
    with h2_lab(tmp_path, 1, gate=Asking()) as lab:
        code, metadata = call(lab, "held.test")
        assert (code, metadata["creto-approval-id"]) == (grpc.StatusCode.FAILED_PRECONDITION, "ap-1")
        code, metadata = call(lab)
        assert (code, metadata["creto-reason"]) == (grpc.StatusCode.UNAVAILABLE, "upstream_unreachable")


@pytest.mark.usefixtures("framing")
@pytest.mark.skipif(shutil.which("nghttpd", path="/usr/sbin:/usr/bin") is None, reason="nghttpd is not installed (nghttp2-server)")
def test_prior_knowledge_for_an_http1_agent(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"x" * 300_000)
    port = free_port()
    nghttpd = shutil.which("nghttpd", path="/usr/sbin:/usr/bin")
    with subprocess.Popen([str(nghttpd), "--no-tls", "-a", "127.0.0.1", "-d", str(tmp_path), str(port)]) as process:
        try:
            _until_listening(port)
            with h2_lab(tmp_path, port, prior=True) as lab:
                for _ in range(2):
                    with Wire(lab.reverse, greet=False) as wire:
                        wire.send(b"GET /good/page HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                        answer = wire.sock.makefile("rb").read()
                    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"x") >= 300_000
                    assert b"\r\nVia: 2.0 creto\r\n" in answer
        finally:
            process.terminate()


def _until_listening(port: int) -> None:
    waiting = threading.Event()
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            waiting.wait(0.01)
    raise AssertionError("the server does not listen")


@pytest.mark.usefixtures("framing")
def test_an_upstream_that_declines_http2_gets_http1(tmp_path: Path) -> None:
    ca, context = certificates(tmp_path, list(HOSTS))
    context.set_alpn_protocols(["http/1.1"])
    with http1_origin(b"one", context) as (port, seen), h2_lab(tmp_path, port, origin_ca=ca) as lab:
        with Wire(lab.tls, tls=tls_client(lab.ca, "h2")) as wire:
            for stream in (1, 3):
                block = wire.encoder.encode(
                    [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", f"localhost:{lab.tls}".encode()), (b":path", b"/")]
                )
                wire.send(len(block).to_bytes(3, "big") + b"\x01\x05" + stream.to_bytes(4, "big") + block)
                assert wire.answer(stream).body == b"one"
    assert len(seen) == 2


def test_an_upstream_that_talks_nonsense_is_a_bad_gateway(tmp_path: Path) -> None:
    with http1_origin() as (port, _), h2_lab(tmp_path, port, prior=True) as lab, Wire(lab.reverse) as wire:
        wire.request(1)
        assert wire.answer(1).status in (502, 504)
        assert lab.recorded()[-1].error == "upstream_closed"


def _refuse_the_first(listener: socket.socket, how: str, seen: list[int]) -> None:
    """An HTTP/2 origin that does nothing with its first stream, says so, and answers every other."""
    refused = False
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        with sock:
            connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
            connection.initiate_connection()
            sock.sendall(connection.data_to_send())
            # After its GOAWAY the h2 package takes nothing more; what was on its way is not looked at.
            while (data := sock.recv(65536)) and connection.state_machine.state is not ConnectionState.CLOSED:
                for event in connection.receive_data(data):
                    if not isinstance(event, h2.events.RequestReceived):
                        continue
                    stream = event.stream_id or 0
                    seen.append(stream)
                    if refused:
                        connection.send_headers(stream, [(":status", "200"), ("content-length", "3")])
                        connection.send_data(stream, b"yes", end_stream=True)
                    elif how == "reset":
                        connection.reset_stream(stream, 7)
                    else:
                        connection.close_connection(0, last_stream_id=0)
                    refused = True
                sock.sendall(connection.data_to_send())


@pytest.mark.usefixtures("framing")
@pytest.mark.parametrize("how", ["reset", "goaway"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_an_origin_did_nothing_with_is_sent_again(tmp_path: Path, how: str, method: str) -> None:
    seen: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_refuse_the_first, args=(listener, how, seen), daemon=True).start()
        with h2_lab(tmp_path, listener.getsockname()[1], prior=True) as lab:
            with Wire(lab.reverse, greet=False) as wire:
                wire.send(f"{method} /good/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
                answer = wire.sock.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"yes")
            assert len(seen) == 2 and [outcome.status for outcome in lab.recorded()] == [200]
