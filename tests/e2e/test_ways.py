"""The ways in beside ``creto run``: explicit proxy and reverse routes of ``creto sidecar``, and odd protocols inside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ..ports import free_port as free_port
from .conftest import Creto


@dataclass
class Sidecar:
    """A running ``creto sidecar``: proxy is its explicit listener as a URL, reverse that of its reverse routes."""

    process: subprocess.Popen[str]
    proxy: str
    reverse: str
    port: int


@contextlib.contextmanager
def running(creto: Creto) -> Iterator[Sidecar]:
    explicit, reverse = free_port(), free_port()
    creto.add(
        f'\n[listen]\nexplicit = "127.0.0.1:{explicit}"\nreverse = "127.0.0.1:{reverse}"\n'
        '[[reverse]]\nname = "openai"\nupstream = "https://api.openai.com"\n'
        f'[policy]\ndir = "{creto.policies}"\n'
    )
    process = subprocess.Popen(
        creto.command("sidecar"), env=creto.environment, cwd=creto.directory, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        for port in (explicit, reverse):
            await_port(port, process)
        yield Sidecar(process, f"http://127.0.0.1:{explicit}", f"http://127.0.0.1:{reverse}", explicit)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        sys.stderr.write(err)


def await_port(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10):
            return
        time.sleep(0.05)
    raise AssertionError("the sidecar did not listen")


def curl(*arguments: str) -> str:
    done = subprocess.run(["curl", "-sS", "-m", "60", *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def ca_of(creto: Creto) -> str:
    """The certificate the sidecar publishes; it is there before the first answer."""
    deadline = time.monotonic() + 60
    while not (found := list(creto.state.rglob("ca.pem"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return str(found[0])


def test_connect_is_intercepted_and_each_request_inside_is_judged(creto: Creto) -> None:
    with running(creto) as sidecar:
        answer = curl("-x", sidecar.proxy, "--cacert", ca_of(creto), "https://api.allowed.test/a", "https://api.allowed.test/b")
        assert '"path": "/a"' in answer and '"path": "/b"' in answer, answer
        usage = json.loads(creto.call("usage", "--json").stdout)
        assert "requests" in json.dumps(usage)


def test_a_connect_to_a_host_that_is_not_allowed_is_a_readable_403(creto: Creto) -> None:
    with running(creto) as sidecar:
        with socket.create_connection(("127.0.0.1", sidecar.port)) as sock:
            sock.sendall(b"CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\nGET http://x/ HTTP/1.1\r\n\r\n")
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 403") and b"host_not_allowed" in answer
        assert answer.count(b"HTTP/1.1 ") == 1, "what follows a refused CONNECT is never parsed as a request"


def test_absolute_form_is_proxied_with_the_targets_authority(creto: Creto) -> None:
    with running(creto) as sidecar:
        answer = curl("-x", sidecar.proxy, "-H", "Host: other.test", "http://plain.allowed.test/p")
        assert '"hello": "plain.allowed.test"' in answer, answer


def test_reverse_route_serves_an_sdk_by_base_url(creto: Creto) -> None:
    import openai

    with running(creto) as sidecar:
        client = openai.OpenAI(base_url=f"{sidecar.reverse}/openai/v1", api_key="sk-x", max_retries=0)
        answer = client.chat.completions.create(
            model="gpt-4o-mini", max_tokens=5, messages=[{"role": "user", "content": "x"}]
        )
        assert answer.usage is not None and answer.usage.total_tokens > 0
        with pytest.raises(openai.NotFoundError):
            openai.OpenAI(base_url=f"{sidecar.reverse}/nowhere/v1", api_key="sk-x").models.list()


MALFORMED = {
    "two hosts": b"GET http://plain.allowed.test/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "length and chunked": b"POST http://plain.allowed.test/ HTTP/1.1\r\nHost: plain.allowed.test\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded field": b"GET http://plain.allowed.test/ HTTP/1.1\r\nHost: plain.allowed.test\r\nX: a\r\n b\r\n\r\n",
    "space before colon": b"GET http://plain.allowed.test/ HTTP/1.1\r\nHost : plain.allowed.test\r\n\r\n",
    "NUL": b"GET http://plain.allowed.test/ HTTP/1.1\r\nHost: plain.allowed.test\r\nX: a\0b\r\n\r\n",
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_malformed_http_is_400_and_close_and_never_forwarded(creto: Creto, name: str) -> None:
    with running(creto) as sidecar:
        with socket.create_connection(("127.0.0.1", sidecar.port)) as sock:
            sock.sendall(MALFORMED[name])
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 400"), answer
    assert creto.world.seen.requests == []


def test_a_port_in_use_is_one_clear_line_and_exit_2(creto: Creto) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        creto.add(f'\n[listen]\nexplicit = "127.0.0.1:{port}"\n')
        done = creto.call("sidecar")
    assert done.returncode == 2
    assert str(port) in done.stderr and "listen.explicit" in done.stderr and "Traceback" not in done.stderr


def test_sigterm_ends_the_sidecar_gracefully(creto: Creto) -> None:
    with running(creto) as sidecar:
        curl("-x", sidecar.proxy, "http://plain.allowed.test/p")
        sidecar.process.send_signal(signal.SIGTERM)
        assert sidecar.process.wait(timeout=60) == 0
    assert json.loads(creto.call("audit", "verify", "--json").stdout)


def test_proxy_env_mode_says_that_it_can_be_bypassed_and_still_governs(creto: Creto) -> None:
    result = creto.run(["curl", "-sS", "https://api.allowed.test/e"], "--enforce", "proxy-env")
    assert result.status == 0, result.err
    assert '"path": "/e"' in result.out
    assert "bypass" in result.err
    assert result.to("api.allowed.test")[0]["way"] == "explicit"


def test_plain_tcp_passes_only_by_rule(creto: Creto) -> None:
    with echo_server() as port:
        text = creto.config.read_text()
        creto.config.write_text(text.replace('[egress.resolve]\n', f'[egress.resolve]\n"db.allowed.test" = "127.0.0.1:{port}"\n'))
        code = """
import socket
s = socket.create_connection(("db.allowed.test", 5432), timeout=30)
print(s.recv(5).decode()); s.sendall(b"ping"); print(s.recv(4).decode())
"""
        refused = creto.python(code)
        assert "ping" not in refused.out
        allowed = creto.python(code, "--allow", "tcp://db.allowed.test:5432")
    assert allowed.out.split() == ["hello", "ping"], allowed.err
    [row] = allowed.to("db.allowed.test")
    assert (row["decision"], row["bytes_up"], row["bytes_down"]) == ("allow", 4, 9)


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    """A server that speaks first, then echoes."""
    import threading

    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                sock.sendall(b"hello")
                while data := sock.recv(1024):
                    sock.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_tls_splice_keeps_the_upstreams_own_certificate(creto: Creto) -> None:
    text = creto.config.read_text()
    creto.config.write_text(text + '\n[egress.tls]\nsplice = ["api.allowed.test"]\n')
    code = """
import ssl, socket
context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
with context.wrap_socket(socket.create_connection(("api.allowed.test", 443)), server_hostname="api.allowed.test") as s:
    print(b"stand-in CA" in s.getpeercert(True))
"""
    result = creto.python(code)
    assert result.out.strip() == "True", result.err
    [row] = result.to("api.allowed.test")
    assert row["action"] == "tunnel" and row["bytes_down"] > 0


def test_server_sent_events_pass_through_chunk_by_chunk(creto: Creto) -> None:
    """The first event arrives while the upstream is still waiting to be told to send the second."""
    code = """
import http.client, json
body = json.dumps({"model": "gpt-4o-mini", "stream": True, "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]})
c = http.client.HTTPSConnection("api.openai.com"); c.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
r = c.getresponse(); reads = 0
while data := r.read1(65536): reads += 1
print(reads)
"""
    result = creto.python(code)
    assert result.status == 0, result.err
    assert int(result.out) >= 5, "each event was written as it came"


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(60)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


@pytest.mark.skipif(os.geteuid() != 0, reason="dropping to another user needs root")
def test_creto_run_works_without_root(creto: Creto) -> None:
    from .unprivileged import as_nobody

    done = as_nobody(creto, ["curl", "-sS", "https://api.allowed.test/rootless"])
    assert '"path": "/rootless"' in done.stdout, done.stdout + done.stderr
    refused = as_nobody(creto, ["curl", "-sSf", "-m", "5", "http://169.254.169.254/"])
    assert refused.returncode != 0

