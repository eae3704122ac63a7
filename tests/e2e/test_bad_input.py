"""Every mistake of the operator is one clear line and exit 2, with nothing started."""

from __future__ import annotations

import subprocess

import pytest

from .conftest import PATIENT, Creto

CONFIG_MISTAKES = {
    "broken TOML": ("[egress\n", ["creto.toml", "not TOML"]),
    "unknown key": ('[metering]\nbugets = []\n', ["metering.bugets"]),
    "unknown section": ("[metring]\nx = 1\n", ["metring", "metering"]),
    "wrong type": ('[limits]\nstage_deadline_ms = "soon"\n', ["limits.stage_deadline_ms"]),
    "unset variable": ('[common]\norg = "${NO_SUCH_VARIABLE_X}"\n', ["NO_SUCH_VARIABLE_X"]),
    "missing file": ('[egress]\nupstream_ca = "/no/such/file.pem"\n', ["egress.upstream_ca", "/no/such/file.pem"]),
}


@pytest.mark.parametrize("name", sorted(CONFIG_MISTAKES))
def test_a_configuration_mistake_names_file_key_and_reason(creto: Creto, name: str) -> None:
    text, words = CONFIG_MISTAKES[name]
    creto.config.write_text(text)
    for name in PATIENT:  # the environment is stronger than the file
        del creto.environment[name]
    result = creto.run(["touch", str(creto.directory / "started")])
    assert result.status == 2
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err
    assert not (creto.directory / "started").exists()


POLICY_MISTAKES = {
    "does not parse": ('@id("a") permit (principal, action', ["test.cedar"]),
    "does not validate": ('@id("a") permit (principal, action, resource) when { context.nope > 3 };', ["a", "nope"]),
    "duplicate id": ('@id("a") permit (principal, action, resource);\n' * 2, ["a", "test.cedar"]),
    "no id": ("permit (principal, action, resource);", ["@id"]),
    "unknown profile": (
        '@id("a") permit (principal, action, resource);\n'
        '@id("b") @require_oversight("nobody") forbid (principal, action, resource) unless { context has approval };',
        ["nobody"],
    ),
}


@pytest.mark.parametrize("name", sorted(POLICY_MISTAKES))
def test_a_policy_mistake_names_file_policy_and_reason(creto: Creto, name: str) -> None:
    text, words = POLICY_MISTAKES[name]
    (creto.policies / "test.cedar").write_text(text)
    result = creto.run(["touch", str(creto.directory / "started")])
    assert result.status == 2, result.err
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err
    assert not (creto.directory / "started").exists()


def test_a_missing_policy_directory_is_named(creto: Creto) -> None:
    missing = creto.directory / "nowhere"
    done = creto.call("run", "--policy", str(missing), "--", "true")
    assert done.returncode == 2
    assert str(missing) in done.stderr


def test_where_namespaces_are_refused_it_says_why_and_what_to_do_and_stops(creto: Creto) -> None:
    """In a user namespace of its own, whose limit on further ones is set to none."""
    started = creto.directory / "started"
    inside = ["unshare", "--user", "--map-root-user", "sh", "-c",
              'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]  # fmt: skip
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let a test lower the limit of a user namespace")
    refused = subprocess.run(
        [*inside, *creto.run_command(["touch", str(started)])],
        env=creto.environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert refused.returncode == 3 and not started.exists()
    assert "max_user_namespaces" in refused.stderr and "--enforce=proxy-env" in refused.stderr
    asked_for = subprocess.run(
        [*inside, *creto.run_command(["touch", str(started)], "--enforce", "proxy-env")],
        env=creto.environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert asked_for.returncode == 0 and started.exists() and "bypass" in asked_for.stderr
