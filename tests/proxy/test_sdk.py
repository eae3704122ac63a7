"""``import creto`` in agent code: three questions, answered from ``creto.internal`` and nowhere else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import creto

ANSWERS = {
    "/v1/whoami": (200, {"id": "spiffe://local/agent/a"}),
    "/v1/usage": (200, {"cost_nano_usd": 12}),
    "/v1/approvals/a%2Fb": (200, {"state": "pending"}),
    "/v1/approvals/none": (404, {"title": "Not Found", "detail": "no approval of that id"}),
}


class Internal(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, document = ANSWERS.get(self.path, (500, "not json"))
        body = json.dumps(document).encode() if isinstance(document, dict) else b"<html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def internal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Internal) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(creto, "BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        yield
        server.shutdown()
        thread.join()


def test_answers_come_as_they_are(internal: None) -> None:
    assert creto.whoami() == {"id": "spiffe://local/agent/a"}
    assert creto.usage() == {"cost_nano_usd": 12}


def test_an_id_cannot_lead_to_another_path(internal: None) -> None:
    assert creto.approval("a/b") == {"state": "pending"}


def test_a_refusal_carries_status_and_problem(internal: None) -> None:
    with pytest.raises(creto.CretoError, match="no approval of that id") as refused:
        creto.approval("none")
    assert (refused.value.status, refused.value.problem["title"]) == (404, "Not Found")


def test_an_error_without_a_document_still_has_its_status(internal: None) -> None:
    with pytest.raises(creto.CretoError, match="HTTP 500"):
        creto.approval("broken")


def test_proxy_variables_do_not_send_it_around(internal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert creto.whoami()["id"] == "spiffe://local/agent/a"


def test_without_creto_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(creto, "BASE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(creto.NotGoverned, match="creto run"):
        creto.whoami()
