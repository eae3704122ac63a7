"""Identity hangs on links and credentials, never on addresses; whoever is nobody stays nobody."""

from __future__ import annotations

import base64

import pytest

from creto_proxy.identify import Identify, Links, proxy_credentials
from creto_proxy.model import Agent, Flow
from creto_proxy.testing import make_agent, make_flow


def links(secret: str | None = None) -> Links:
    made = Links()
    made.attach("run", lambda: make_agent("a"), secret=secret)
    return made


def test_a_link_has_its_agent_and_others_have_none() -> None:
    identify = Identify(links(), ())
    found = identify(make_flow(link="run"))
    assert found is not None and found.name == "a"
    assert identify(make_flow(link="elsewhere")) is None


@pytest.mark.parametrize(("given", "known"), [("s3cret", True), ("S3cret", False), ("", False), (None, False)])
def test_a_link_with_a_secret_demands_it(given: str | None, known: bool) -> None:
    flow = make_flow(link="run")
    flow.credentials = given
    assert (Identify(links("s3cret"), ())(flow) is not None) is known


def test_an_expired_delegation_is_nobody() -> None:
    made = Links()
    made.attach("run", lambda: make_agent("a", expires_at=1000.0))
    assert Identify(made, (), unix_s=lambda: 999.0)(make_flow(link="run")) is not None
    assert Identify(made, (), unix_s=lambda: 1000.0)(make_flow(link="run")) is None


def test_plugins_are_asked_after_the_links() -> None:
    class ByPeer:
        def identify(self, flow: Flow) -> Agent | None:
            return make_agent("from-plugin") if flow.peer == "sandbox" else None

    identify = Identify(links(), (ByPeer(),))
    found = identify(make_flow(link="x", peer="sandbox"))
    assert found is not None and found.name == "from-plugin"
    assert identify(make_flow(link="x", peer="other")) is None


def test_proxy_credentials_are_the_password_of_basic_and_nothing_else() -> None:
    token = base64.b64encode(b"agent:pa:ss").decode()
    assert proxy_credentials(f"Basic {token}") == "pa:ss"
    for field in (None, "Bearer x", "Basic !!!", "Basic " + base64.b64encode(b"nocolon").decode(), "Basic"):
        assert proxy_credentials(field) is None
