"""The request that stages judge is read from the head by the way it came in, and names must agree."""

from __future__ import annotations

import ipaddress

import pytest

from creto_hotpath.http1 import parse_request
from creto_proxy.errors import CretoError
from creto_proxy.model import Flow, Request
from creto_proxy.target import ReverseRoute, Targets, request_id
from creto_proxy.testing import make_agent, make_flow

ROUTES = [ReverseRoute.parse("openai", "https://api.openai.com"), ReverseRoute.parse("openai/eu", "http://eu.test:8080/x")]


def read(raw: str, flow: Flow) -> Request:
    parsed = parse_request(raw.replace("\n", "\r\n").encode())
    assert parsed is not None
    return Targets(ROUTES).request(parsed[0], flow, make_agent(), 0)


def transparent(*names: str, port: int = 80, sni: str | None = None) -> Flow:
    flow = make_flow(way="transparent", sni=sni)
    flow.original = (ipaddress.ip_address("203.0.113.9"), port)
    flow.bound_names, flow.port = names, port
    return flow


def test_transparent_plain_http_takes_host_and_the_dialled_port() -> None:
    request = read("GET /a?b=c HTTP/1.1\nHost: API.Allowed.TEST\n\n", transparent("api.allowed.test", port=8080))
    assert (request.scheme, request.host, request.port) == ("http", "api.allowed.test", 8080)
    assert (request.path, request.query, request.action) == ("/a", "b=c", "httpRead")


def test_inside_tls_the_host_is_the_server_name() -> None:
    request = read("POST / HTTP/1.1\nHost: a.test\n\n", transparent("a.test", port=443, sni="a.test"))
    assert (request.scheme, request.port, request.action) == ("https", 443, "httpWrite")


REFUSED = {
    "other host than SNI": ("GET / HTTP/1.1\nHost: b.test\n\n", transparent("a.test", "b.test", port=443, sni="a.test"), "sni_host_mismatch"),
    "unbound host": ("GET / HTTP/1.1\nHost: b.test\n\n", transparent("a.test"), "ip_not_resolved_for_name"),
    "other port": ("GET / HTTP/1.1\nHost: a.test:8080\n\n", transparent("a.test"), "port_mismatch"),
    "CONNECT inside": ("CONNECT b.test:443 HTTP/1.1\nHost: a.test\n\n", transparent("a.test"), "connect_in_transparent"),
    "absolute form inside": ("GET http://b.test/ HTTP/1.1\nHost: a.test\n\n", transparent("a.test"), "target_mismatch"),
    "absolute form of another port": ("GET http://a.test:81/ HTTP/1.1\nHost: a.test\n\n", transparent("a.test"), "target_mismatch"),
    "absolute form of another scheme": ("GET https://a.test/ HTTP/1.1\nHost: a.test\n\n", transparent("a.test"), "target_mismatch"),
    "absolute form at a route": ("GET http://b.test/openai/ HTTP/1.1\nHost: a.test\n\n", make_flow(way="reverse"), "target_mismatch"),
    "other literal": ("GET / HTTP/1.1\nHost: 10.0.0.1\n\n", transparent("a.test"), "host_address_mismatch"),
    "decimal address": ("GET / HTTP/1.1\nHost: 2852039166\n\n", transparent("a.test"), "ip_not_resolved_for_name"),
    "origin form at a proxy": ("GET / HTTP/1.1\nHost: a.test\n\n", make_flow(), "not_a_proxy_request"),
    "odd scheme": ("GET gopher://a.test/ HTTP/1.1\nHost: a.test\n\n", make_flow(), None),
    "userinfo": ("GET http://a.test@evil.test/ HTTP/1.1\nHost: a.test\n\n", make_flow(), None),
    "CONNECT without port": ("CONNECT a.test HTTP/1.1\nHost: a.test\n\n", make_flow(), None),
    "no such route": ("GET /other/ HTTP/1.1\nHost: x\n\n", make_flow(way="reverse"), "no_route"),
    "prefix without boundary": ("GET /openaix HTTP/1.1\nHost: x\n\n", make_flow(way="reverse"), "no_route"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_agree_is_refused(name: str) -> None:
    raw, flow, reason = REFUSED[name]
    with pytest.raises((CretoError, ValueError)) as refused:
        read(raw, flow)
    if reason is not None:
        assert getattr(refused.value, "reason", None) == reason


def test_explicit_absolute_form_takes_the_targets_authority() -> None:
    request = read("GET http://up.test/x?y HTTP/1.1\nHost: other.test\n\n", make_flow())
    assert (request.host, request.port, request.path, request.query) == ("up.test", 80, "/x", "y")
    assert read("GET https://up.test HTTP/1.1\nHost: up.test\n\n", make_flow()).port == 443


@pytest.mark.parametrize("flow", [transparent("a.test"), make_flow(way="reverse")], ids=["transparent", "reverse"])
def test_origins_take_absolute_form_that_says_what_the_host_field_says(flow: Flow) -> None:
    request = read("GET HTTP://A.test:80/openai/x?y HTTP/1.1\nHost: a.test\n\n", flow)
    assert (request.path, request.query) == ("/openai/x" if flow.way == "transparent" else "/x", "y")


def test_options_without_a_path_are_about_the_server() -> None:
    assert read("OPTIONS http://up.test HTTP/1.1\nHost: up.test\n\n", make_flow()).sent_path == "*"
    assert read("OPTIONS http://up.test?x HTTP/1.1\nHost: up.test\n\n", make_flow()).sent_path == "/"


def test_explicit_connect_is_a_tunnel() -> None:
    request = read("CONNECT up.test:8443 HTTP/1.1\nHost: up.test:8443\n\n", make_flow())
    assert (request.kind, request.action, request.host, request.port) == ("tunnel", "tunnel", "up.test", 8443)


def test_reverse_routes_replace_the_longest_prefix_by_the_base() -> None:
    one = read("GET /openai/v1/models?x=1 HTTP/1.1\nHost: localhost\n\n", make_flow(way="reverse"))
    assert (one.scheme, one.host, one.port, one.path, one.query) == ("https", "api.openai.com", 443, "/v1/models", "x=1")
    two = read("GET /openai/eu/v1 HTTP/1.1\nHost: localhost\n\n", make_flow(way="reverse"))
    assert (two.scheme, two.host, two.port, two.path) == ("http", "eu.test", 8080, "/x/v1")


def test_request_ids_are_uuid7_ordered_by_time() -> None:
    early, late = request_id(1_000_000_000), request_id(2_000_000_000)
    assert early < late and len(early) == 16
    assert early[6] >> 4 == 7 and early[8] >> 6 == 0b10
