"""Starts and stops what is compared: an upstream, and each proxy in front of it, at its documented fast settings.

Every proxy runs one worker, keeps its upstream connections open, and is pinned to one core (``harness.PROXY_CPU``);
upstream and client share the other. Programs write to a log in their folder, whose end is shown when they fail.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent
INSTALLED = Path(".benchmarks/peers").resolve()

NGINX = """
{user}
worker_processes 1;
worker_rlimit_nofile {descriptors};
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    keepalive_timeout 3600s;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_cache shared:tls:10m;
    {http}
}}
"""
UPSTREAM = """
    server {{
        listen 127.0.0.1:{plain} backlog=4096;
        listen 127.0.0.1:{secure} ssl backlog=4096;
        ssl_certificate {certificate};
        ssl_certificate_key {certificate};
        default_type application/json;
        location / {{ return 200 "{body}"; }}
        location /v1/chat/completions {{ return 200 '{completion}'; }}
        location = /status {{ stub_status; }}
        location = /tls {{ return 200 "$ssl_protocol $ssl_cipher"; }}
        location /files/ {{ alias {folder}/files/; }}
    }}
"""
NGINX_PROXY = """
    upstream origin {{
        server 127.0.0.1:{upstream};
        keepalive 256;
        keepalive_requests 100000000;
        keepalive_timeout 1h;
    }}
    server {{
        listen 127.0.0.1:{port} {listen} backlog=4096;
        {certificate}
        location / {{
            proxy_pass {scheme}://origin;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
"""
# no strict-limits: it serves as many connections as the machine's limit of descriptors allows and says so.
HAPROXY = """
global
    nbthread 1
    maxconn {connections}
    no strict-limits
defaults
    mode http
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    timeout http-keep-alive 1h
    option http-no-delay
    http-reuse always
frontend agents
    bind 127.0.0.1:{port} backlog 4096 {bind}
    default_backend origin
backend origin
    server origin 127.0.0.1:{upstream} {server}
"""
LITELLM = """
model_list:
  - model_name: gpt-4o
    litellm_params: {{model: openai/gpt-4o, api_base: "http://127.0.0.1:{upstream}/v1", api_key: sk-upstream}}
general_settings: {{master_key: sk-bench-00000000000000000000000000000000}}
litellm_settings: {{telemetry: false}}
"""
COMPLETION = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": "gpt-4o",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "benchmark " * 66}}
        ],
        "usage": {"prompt_tokens": 480, "completion_tokens": 66, "total_tokens": 546},
    }
)


@dataclass(frozen=True, slots=True)
class Peer:
    """A proxy under test. ``pid`` None: no proxy, the client talks to the upstream. ``prefix`` goes before every path.

    secure: the client speaks TLS to it. connect: authority the client opens a tunnel to first, "" for none.
    split: it does work that others do not, beside the requests, which is accounted for apart.
    """

    name: str
    port: int
    pid: int | None
    prefix: str = ""
    secure: bool = False
    connect: str = ""
    split: bool = False

    def url(self, path: str) -> str:
        return f"{'https' if self.secure else 'http'}://{NAME if self.secure else '127.0.0.1'}:{self.port}" + (
            self.prefix + path
        )


# What the upstream's certificate is for, and what clients that speak TLS ask for.
NAME = "up.test"


@dataclass(frozen=True, slots=True)
class Upstream:
    """nginx that answers at once: ``/`` 1 KiB, ``/v1/chat/completions`` a completion, ``/files/`` from ``files``."""

    plain: int
    secure: int
    pid: int
    certificate: Path
    files: Path


class NotInstalled(Exception):
    """A peer is not on this machine; the text says how to get it."""


def program(name: str, package: str) -> str:
    """Path of a command. Raises NotInstalled."""
    found = harness.find(name)
    if found is None:
        raise NotInstalled(f"{name} is not installed (Debian: apt-get install {package})")
    return found


def in_environment(peer: str, command: str) -> str:
    """A command of the peer's own Python environment, which ``make bench-peers`` builds. Raises NotInstalled."""
    path = INSTALLED / f"venv-{peer}" / "bin" / command
    if not path.exists():
        raise NotInstalled(f"{peer} is not installed: pip could not build {path.parents[1]}")
    return str(path)


def tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    folder: Path,
    *,
    cpu: int | None,
    env: Mapping[str, str] | None = None,
    patience_s: float = 20.0,
    stop_s: float = 30.0,
) -> Iterator[int]:
    """Runs a server, on ``cpu`` alone unless that is None, until the block ends; gives its pid once ``port`` answers.

    Raises RuntimeError with the end of its log when it does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd=folder,
            start_new_session=True,  # what interrupts the bench is not also sent to what it stops in order
            preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
        )
    try:
        try:
            harness.wait_for_port(port, process, patience_s)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{tail(log)}") from None
        yield process.pid
    finally:
        stop(process, stop_s)


def stop(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM, and SIGKILL for what is left of the tree when the time is up."""
    if process.poll() is not None:
        return
    tree = harness.process_tree(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        for pid in tree:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def certificate(folder: Path) -> Path:
    """A PEM with key and self-signed certificate for ``NAME``, P-256. Raises NotInstalled."""
    path = folder / "certificate.pem"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        key, cert = folder / "key.pem", folder / "cert.pem"
        # fmt: off
        subprocess.run(
            [program("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-noenc", "-days", "30", "-subj", "/CN=bench", "-addext", f"subjectAltName=DNS:{NAME},DNS:llm.test",
             "-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-keyout", str(key), "-out", str(cert)],
            check=True, capture_output=True,
        )
        # fmt: on
        path.write_text(key.read_text() + cert.read_text())
    return path


def connect_library(folder: Path) -> Path:
    """``connect.c``, built."""
    library = folder / "connect.so"
    source = str(HERE / "connect.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
    return library


@contextmanager
def _nginx(folder: Path, http: str, port: int, cpu: int | None, connections: int) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    config.write_text(
        NGINX.format(
            user="user root;" if os.geteuid() == 0 else "",  # its folder is ours alone
            folder=folder,
            http=http,
            connections=connections,
            descriptors=min(connections + 64, most_files()),
        )
    )
    command = [program("nginx", "nginx-light"), "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(config)]
    with running(command, port, folder, cpu=cpu) as pid:
        yield pid


def most_files() -> int:
    """Descriptors a process may have, all of which this one now may use."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


@contextmanager
def upstream(folder: Path, body_bytes: int = 1024, cpu: int | None = harness.CLIENT_CPU) -> Iterator[Upstream]:
    plain, secure, pem = harness.free_port(), harness.free_port(), certificate(folder)
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    http = UPSTREAM.format(
        plain=plain, secure=secure, certificate=pem, body="x" * body_bytes, completion=COMPLETION, folder=folder
    )
    with _nginx(folder, http, plain, cpu, 8192) as pid:
        yield Upstream(plain, secure, pid, pem, files)


@contextmanager
def nginx(folder: Path, to: Upstream, *, tls: bool = False, connections: int = 4096) -> Iterator[Peer]:
    port = harness.free_port()
    pem = f"ssl_certificate {to.certificate}; ssl_certificate_key {to.certificate};" if tls else ""
    http = NGINX_PROXY.format(
        upstream=to.secure if tls else to.plain,
        port=port,
        listen="ssl" if tls else "",
        certificate=pem,
        scheme="https" if tls else "http",
    )
    with _nginx(folder, http, port, harness.PROXY_CPU, connections) as pid:
        yield Peer("nginx proxy_pass", port, pid, secure=tls)


@contextmanager
def haproxy(folder: Path, to: Upstream, *, tls: bool = False, connections: int = 4096) -> Iterator[Peer]:
    port = harness.free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "haproxy.cfg"
    config.write_text(
        HAPROXY.format(
            port=port,
            upstream=to.secure if tls else to.plain,
            connections=connections,
            bind=f"ssl crt {to.certificate}" if tls else "",
            server="ssl verify none" if tls else "",
        )
    )
    command = [program("haproxy", "haproxy"), "-db", "-f", str(config)]
    with running(command, port, folder, cpu=harness.PROXY_CPU, stop_s=1.0) as pid:
        yield Peer("haproxy", port, pid, secure=tls)


@contextmanager
def mitmproxy(folder: Path, to: Upstream, *, tls: bool = False) -> Iterator[Peer]:
    """Reverse mode; with TLS the regular proxy that a client opens tunnels through, intercepted by its own CA."""
    port = harness.free_port()
    mode = (
        ["regular", "--ssl-insecure", "--set", "upstream_cert=false"]
        if tls
        else [f"reverse:http://127.0.0.1:{to.plain}"]
    )
    # fmt: off
    command = [
        in_environment("mitmproxy", "mitmdump"), "-q", "--mode", *mode, "--listen-host", "127.0.0.1", "-p", str(port),
        "--set", "flow_detail=0", "--set", "termlog_verbosity=error", "--set", "connection_strategy=lazy",
        "--set", f"confdir={folder}",
    ]
    # fmt: on
    with running(command, port, folder, cpu=harness.PROXY_CPU) as pid:
        yield Peer("mitmproxy", port, pid, secure=tls, connect=f"127.0.0.1:{to.secure}" if tls else "")


@contextmanager
def aiohttp(folder: Path, to: Upstream, *, tls: bool = False) -> Iterator[Peer]:
    port = harness.free_port()
    origin = f"https://127.0.0.1:{to.secure}" if tls else f"http://127.0.0.1:{to.plain}"
    command = [in_environment("aiohttp", "python"), str(HERE / "aiohttp_proxy.py"), str(port), origin]
    with running([*command, *([str(to.certificate)] if tls else [])], port, folder, cpu=harness.PROXY_CPU) as pid:
        yield Peer("aiohttp proxy", port, pid, secure=tls)


@contextmanager
def litellm(folder: Path, to: Upstream) -> Iterator[Peer]:
    """One worker, a master key, no database; prices are read from the package, not from the network."""
    port = harness.free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "litellm.yaml"
    config.write_text(LITELLM.format(upstream=to.plain))
    command = [
        in_environment("litellm", "litellm"),
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    quiet = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "HOME": str(folder),
    }
    command += ["--num_workers", "1", "--telemetry", "False"]
    with running(command, port, folder, cpu=harness.PROXY_CPU, env=quiet, patience_s=120) as pid:
        yield Peer("LiteLLM", port, pid)
