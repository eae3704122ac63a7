"""WebSockets of agents that speak HTTP/2 (RFC 8441), framed by nghttp2 and by h2: governed like an HTTP/1.1 upgrade."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Message, TextMessage

from creto_proxy.deadline import Guard
from creto_proxy.hookspecs import Direction, MessageKind
from creto_proxy.model import Decision, Verdict
from creto_proxy.websocket import Watchers

from .h2_lab import HOSTS, framed_by, h2_lab, http1_origin
from .h2_wire import (
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PROTOCOL_ERROR,
    RST,
    SETTINGS,
    WINDOW,
    Frame,
    Wire,
    frame,
)
from .websocket_lab import GRANTED, Watching

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from standins import certificates

BIG = bytes(range(256)) * 4096
# RFC 8441 section 3.
ENABLE_CONNECT_PROTOCOL = b"\0\x08\0\0\0\x01"


class Echo:
    """A ``websockets`` server that says everything back. requests: the heads of the upgrades that it got."""

    def __init__(self) -> None:
        self.requests: list[dict[str, str]] = []
        self.closes: list[int | None] = []
        self.ended = threading.Semaphore(0)

    def __call__(self, ws: ServerConnection) -> None:
        assert ws.request is not None
        self.requests.append({name.lower(): value for name, value in ws.request.headers.raw_items()})
        with contextlib.suppress(ConnectionClosed):
            for message in ws:
                ws.send(message)
        self.closes.append(ws.close_code)
        self.ended.release()


@contextlib.contextmanager
def echoing(tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, Echo]]:
    echo = Echo()
    options: dict[str, Any] = {"max_size": None, "ping_interval": None, "ssl": tls}
    options["select_subprotocol"] = lambda ws, offered: next(iter(offered), None)
    with serve(echo, "127.0.0.1", 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.socket.getsockname()[1], echo
        server.shutdown()
        thread.join(60)


@contextlib.contextmanager
def scripted(script: Callable[[socket.socket, bytes], None]) -> Iterator[int]:
    """The port of an upstream that reads a head and does what the script says with the connection and that head."""
    failures: list[BaseException] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve_one() -> None:
        with contextlib.suppress(OSError):
            sock, _ = server.accept()
            with sock:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += sock.recv(65536)
                try:
                    script(sock, head)
                except BaseException as error:
                    failures.append(error)

    thread = threading.Thread(target=serve_one, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
        thread.join(60)
    finally:
        server.close()
    assert failures == [] and not thread.is_alive()


class Refusing:
    """Refuses one text."""

    def open(self, request: Any) -> Refusing:
        return self

    def message(self, direction: Direction, kind: MessageKind, data: bytes) -> bytes | Decision:
        return Decision(Verdict.DENY, "said_it") if data == b"secret" else data


class Socket:
    """A WebSocket on a stream. Sends and reads frames of RFC 6455; flow control is given back as data comes."""

    def __init__(self, wire: Wire, stream: int = 1, path: bytes = b"/good/chat?room=1", *fields: tuple[bytes, bytes]) -> None:
        self.wire, self.stream = wire, stream
        self.frames = Connection(ConnectionType.CLIENT)
        self.room = 65535
        block = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"), (b":path", path)]
        block += [(b":authority", b"h.test"), (b"sec-websocket-version", b"13"), *fields]
        wire.send(frame(HEADERS, END_HEADERS, stream, wire.encoder.encode(block)))

    def next(self) -> Frame:
        """The next frame of this stream."""
        for got in self.wire.frames():
            if got.kind == WINDOW and got.stream == self.stream:
                self.room += int.from_bytes(got.payload, "big")
                return got
            if got.stream == self.stream:
                if got.kind == DATA and got.payload:
                    more = len(got.payload).to_bytes(4, "big")
                    self.wire.send(frame(WINDOW, 0, 0, more) + frame(WINDOW, 0, self.stream, more))
                return got
            if got.kind == HEADERS:
                self.wire.decoder.decode(got.payload, raw=True)  # of another stream, and still part of the compression
            elif got.kind == WINDOW:
                return got  # of the connection: who waits for a window waits for this one, too
        raise ConnectionError("closed")

    def opened(self) -> dict[bytes, bytes]:
        """The head of the answer."""
        while (got := self.next()).kind != HEADERS:
            pass
        return {bytes(each[0]): bytes(each[1]) for each in self.wire.decoder.decode(got.payload, raw=True)}

    def say(self, event: Message[Any] | CloseConnection, end: bool = False) -> None:
        self.send(self.frames.send(event), end)

    def send(self, data: bytes, end: bool = False) -> None:
        while data:
            piece, data = data[: min(16384, self.room)], data[min(16384, self.room) :]
            self.room -= len(piece)
            if piece:
                self.wire.send(frame(DATA, END_STREAM if end and not data else 0, self.stream, piece))
            if data and not self.room:
                self.hear()

    def hear(self) -> bool:
        """Takes one frame. Whether it was the stream's last."""
        got = self.next()
        if got.kind == DATA:
            self.frames.receive_data(got.payload)
            return bool(got.flags & END_STREAM)
        return got.kind == RST

    def messages(self, count: int) -> list[Any]:
        """What the next ``count`` whole messages or Close frames hold."""
        found: list[Any] = []
        parts: list[Any] = []
        ended = False
        while True:
            for event in self.frames.events():
                if isinstance(event, CloseConnection):
                    found.append((event.code, event.reason))
                elif isinstance(event, Message):
                    parts.append(event.data)
                    if event.message_finished:
                        found.append(parts[0][:0].join(parts))
                        parts = []
            if len(found) >= count:
                return found
            assert not ended, found
            ended = self.hear()


@pytest.fixture(params=["nghttp2", "h2"])
def framing(request: pytest.FixtureRequest) -> Iterator[str]:
    with framed_by(request.param):
        yield request.param


@pytest.mark.usefixtures("framing")
def test_it_is_allowed_by_a_setting_and_carries_messages_both_ways(tmp_path: Path) -> None:
    with echoing() as (port, echo), h2_lab(tmp_path, port) as lab:
        with Wire(lab.reverse) as wire:
            settings = next(got for got in wire.frames() if got.kind == SETTINGS)
            assert ENABLE_CONNECT_PROTOCOL in [settings.payload[at : at + 6] for at in range(0, len(settings.payload), 6)]
            ws = Socket(wire, 1, b"/good/chat?room=1", (b"sec-websocket-protocol", b"chat"), (b"origin", b"http://a.test"))
            answer = ws.opened()
            assert answer[b":status"] == b"200" and answer[b"sec-websocket-protocol"] == b"chat"
            assert not {b"connection", b"upgrade", b"sec-websocket-accept", b"content-length"} & answer.keys()
            ws.say(TextMessage("hi"))
            ws.say(BytesMessage(BIG))
            assert ws.messages(2) == ["hi", BIG]
            wire.request(3)
            beside = Socket(wire, 5)
            beside.opened()
            ws.say(CloseConnection(1000, "bye"), end=True)
            assert ws.messages(1) == [(1000, "bye")]
        assert all(echo.ended.acquire(timeout=60) for _ in range(2)) and 1000 in echo.closes
        assert echo.requests[0]["host"] == "good.test" and echo.requests[0]["origin"] == "http://a.test"


@pytest.mark.usefixtures("framing")
def test_stages_and_record_see_what_they_see_of_an_http1_upgrade(tmp_path: Path) -> None:
    watching = Watching()
    with echoing() as (port, echo), h2_lab(tmp_path, port, messages=Watchers([("watch", watching)], Guard(5.0))) as lab:
        with Wire(lab.reverse) as wire:
            ws = Socket(wire)
            ws.opened()
            ws.say(TextMessage("hi"))
            assert ws.messages(1) == ["hi"]
            ws.say(CloseConnection(1000), end=True)
            while not ws.hear():
                pass
        lab.recorded(1)
        url = f"ws://127.0.0.1:{lab.reverse}/good/chat?room=1"
        with connect(url, compression=None, proxy=None, user_agent_header=None) as plain:
            plain.send("hi")
            assert plain.recv() == "hi"
        ours, theirs = map(asdict, lab.recorded(2))
    assert watching.seen[:2] == [("up", "text", b"hi"), ("down", "text", b"hi")] == watching.seen[2:]
    one, other = watching.opened
    assert (one.action, one.method, one.path, one.query) == (other.action, other.method, other.path, other.query)
    ignored = {"id", "at_unix_ns", "creto_ns", "upstream_ns", "total_ns", "held_ns", "bytes_up", "bytes_down", "trace"}
    assert {k: v for k, v in ours.items() if k not in ignored} == {k: v for k, v in theirs.items() if k not in ignored}
    assert (ours["status"], ours["error"], ours["decision"]) == (101, "", "allow")
    differ = {"sec-websocket-key", "host", "user-agent", "via"}
    sent = [{name: value for name, value in each.items() if name not in differ} for each in echo.requests]
    assert sent[0] == sent[1] and len({each["sec-websocket-key"] for each in echo.requests}) == 2


@pytest.mark.usefixtures("framing")
def test_a_message_that_is_refused_ends_it_with_1008(tmp_path: Path) -> None:
    with echoing() as (port, echo), h2_lab(tmp_path, port, messages=Watchers([("watch", Refusing())], Guard(5.0))) as lab:
        with Wire(lab.reverse) as wire:
            ws = Socket(wire)
            ws.opened()
            ws.say(TextMessage("open"))
            assert ws.messages(1) == ["open"]
            ws.say(TextMessage("secret"))
            assert ws.messages(1) == [(1008, "said_it")]
            assert echo.ended.acquire(timeout=60)
            while not ws.hear():
                pass
        [outcome] = lab.recorded()
    assert (outcome.status, outcome.error, echo.closes) == (101, "said_it", [1008])


SMUGGLED = b"GET /good/smuggled HTTP/1.1\r\nHost: h.test\r\n\r\n"


@pytest.mark.usefixtures("framing")
def test_a_refused_one_is_an_ordinary_answer_and_what_came_early_is_no_request(tmp_path: Path) -> None:
    with http1_origin() as (port, seen), h2_lab(tmp_path, port) as lab, Wire(lab.reverse) as wire:
        ws = Socket(wire, 1, b"/denied/chat")
        wire.send(frame(DATA, 0, 1, SMUGGLED) + frame(DATA, END_STREAM, 1, SMUGGLED))
        answer = wire.answer(1)
        assert (answer.status, json.loads(answer.body)["reason"], ws.stream) == (403, "policy_deny", 1)
        wire.request(3)
        assert wire.answer(3).status == 200
        assert [each.status for each in lab.recorded(2)] == [403, 200] and len(seen) == 1


@pytest.mark.usefixtures("framing")
def test_what_comes_before_the_answer_goes_up_after_it(tmp_path: Path) -> None:
    def script(sock: socket.socket, head: bytes) -> None:
        sock.sendall(accepted(head) + b"first")
        data = b""
        while not data.endswith(b"early"):
            data += sock.recv(65536)
        assert data == b"early"
        assert sock.recv(1) == b"", "the end of the stream is a FIN"
        sock.sendall(b"last")

    with scripted(script) as port, h2_lab(tmp_path, port) as lab, Wire(lab.reverse) as wire:
        ws = Socket(wire)
        ws.send(b"early", end=True)
        answer = wire.answer(1)
        assert (answer.status, answer.body, answer.reset) == (200, b"firstlast", -1)
        [outcome] = lab.recorded()
    assert (outcome.status, outcome.error) == (101, "")


@pytest.mark.usefixtures("framing")
def test_the_upstreams_end_ends_the_stream(tmp_path: Path) -> None:
    with scripted(lambda sock, head: sock.sendall(accepted(head) + b"bye")) as port, h2_lab(tmp_path, port) as lab:
        with Wire(lab.reverse) as wire:
            ws = Socket(wire)
            answer = wire.answer(1)
            assert (answer.status, answer.body, answer.reset) == (200, b"bye", -1)
            ws.send(b"x", end=True)
            [outcome] = lab.recorded()
    assert outcome.status == 101


@pytest.mark.usefixtures("framing")
def test_a_reset_by_the_agent_is_a_reset_for_the_upstream(tmp_path: Path) -> None:
    def script(sock: socket.socket, head: bytes) -> None:
        sock.sendall(accepted(head))
        with pytest.raises(ConnectionResetError):
            while sock.recv(65536):
                pass

    with scripted(script) as port, h2_lab(tmp_path, port) as lab, Wire(lab.reverse) as wire:
        assert Socket(wire).opened()[b":status"] == b"200"
        wire.send(frame(RST, 0, 1, CANCEL.to_bytes(4, "big")))
        [outcome] = lab.recorded()
    assert (outcome.status, outcome.error) == (101, "connection_reset")


def test_a_header_block_inside_is_malformed(tmp_path: Path) -> None:
    """The h2 package ends the whole connection for it."""

    def script(sock: socket.socket, head: bytes) -> None:
        sock.sendall(accepted(head))
        with pytest.raises(ConnectionResetError):
            while sock.recv(65536):
                pass

    with framed_by("nghttp2"), scripted(script) as port, h2_lab(tmp_path, port) as lab, Wire(lab.reverse) as wire:
        assert Socket(wire).opened()[b":status"] == b"200"
        wire.send(frame(HEADERS, END_HEADERS, 1, wire.encoder.encode([(b"a", b"b")])))
        while (got := next(wire.frames())).kind != RST:
            pass
        assert (got.stream, got.code) == (1, PROTOCOL_ERROR)
        [outcome] = lab.recorded()
    assert (outcome.status, outcome.error) == (101, "connection_reset")


@pytest.mark.usefixtures("framing")
def test_a_reset_by_the_upstream_is_cancel(tmp_path: Path) -> None:
    def script(sock: socket.socket, head: bytes) -> None:
        sock.sendall(accepted(head))
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    with scripted(script) as port, h2_lab(tmp_path, port) as lab, Wire(lab.reverse) as wire:
        ws = Socket(wire)
        ws.opened()
        ws.send(b"x")
        while (got := ws.next()).kind != RST:
            pass
        assert got.code == CANCEL
        [outcome] = lab.recorded()
    assert (outcome.status, outcome.error) == (101, "connection_reset")


# The key that GRANTED answers is another one.
UNOPENED = {"upgrade_ignored": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "bad_websocket_accept": GRANTED}


@pytest.mark.usefixtures("framing")
@pytest.mark.parametrize("reason", UNOPENED)
def test_what_the_agent_could_take_for_an_open_one_is_502(tmp_path: Path, reason: str) -> None:
    """To an agent on HTTP/2 any 2xx is a WebSocket, and the proof of the server is not shown."""
    with scripted(lambda sock, head: sock.sendall(UNOPENED[reason])) as port, h2_lab(tmp_path, port) as lab:
        with Wire(lab.reverse) as wire:
            ws = Socket(wire)
            answer = wire.answer(1)
            assert answer.status == 502 and json.loads(answer.body)["reason"] == reason and ws.room
            [outcome] = lab.recorded()
    assert (outcome.status, outcome.error) == (502, reason)


@pytest.mark.usefixtures("framing")
def test_a_server_that_declines_is_heard(tmp_path: Path) -> None:
    declined = b"HTTP/1.1 426 Upgrade Required\r\nSec-WebSocket-Version: 8\r\nContent-Length: 2\r\n\r\nno"
    with scripted(lambda sock, head: sock.sendall(declined)) as port, h2_lab(tmp_path, port) as lab:
        with Wire(lab.reverse) as wire:
            Socket(wire)
            answer = wire.answer(1)
    assert (answer.status, answer.body, answer.headers[b"sec-websocket-version"]) == (426, b"no", b"8")


def accepted(head: bytes) -> bytes:
    """The 101 that answers the key in ``head``."""
    from websockets.utils import accept_key

    key = next(line.split(b":")[1].strip() for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key:"))
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Accept: " + accept_key(key.decode()).encode() + b"\r\n\r\n"
    )


NODE = """
const http2 = require('http2');
const client = http2.connect(process.argv[1], {ca: require('fs').readFileSync(process.argv[2])});
client.once('remoteSettings', settings => {
  if (!settings.enableConnectProtocol) throw new Error('not announced');
  const stream = client.request({':method': 'CONNECT', ':protocol': 'websocket', ':scheme': 'https', ':path': '/chat',
    ':authority': 'localhost', 'sec-websocket-version': '13'});
  let got = Buffer.alloc(0), status = 0;
  stream.on('response', headers => {
    status = headers[':status'];
    stream.write(Buffer.from([0x82, 0x83, 0, 0, 0, 0, 1, 2, 3]));
  });
  stream.on('data', data => {
    got = Buffer.concat([got, data]);
    if (got.length == 5) stream.write(Buffer.from([0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8]));
    if (got.length == 9) stream.end();
  });
  stream.on('close', () => { console.log(JSON.stringify([status, got.toString('hex'), stream.rstCode])); client.close(); });
});
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.usefixtures("framing")
def test_node_opens_one_through_intercepted_tls(tmp_path: Path) -> None:
    ca, context = certificates(tmp_path, list(HOSTS))
    with echoing(context) as (port, echo), h2_lab(tmp_path, port, origin_ca=ca) as lab:
        done = subprocess.run(
            ["node", "-e", NODE, f"https://localhost:{lab.tls}", str(lab.ca)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [200, "8203010203" + "880203e8", 0]
        assert echo.ended.acquire(timeout=60) and echo.closes == [1000]
        [outcome] = lab.recorded()
    assert (outcome.scheme, outcome.host, outcome.status, outcome.error) == ("https", "localhost", 101, "")
