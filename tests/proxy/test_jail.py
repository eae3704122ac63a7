"""What an agent in the jail can and cannot do, found out by an agent that tries (``jail_probe.py``)."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .jail_lab import HERE, Lab, lab, users

Findings = dict[str, Any]


@pytest.fixture(scope="module", params=list(users()))
def place(request: pytest.FixtureRequest) -> Iterator[Lab]:
    # Not tmp_path: pytest makes that for its own user only.
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        yield lab(users()[request.param], Path(top))


@pytest.fixture(scope="module")
def report(place: Lab) -> Findings:
    """One probe for all tests: its findings, with what its sidecar saw under "sidecar"."""
    state = place.directory("state")
    secret = state / "secret"
    secret.write_text("the key of the run")
    key = place.write("agent.key", "a private key")
    bundle = place.write("state/bundle.pem", "the bundle")
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(place.home / "docker.sock"))
        os.chmod(place.home / "docker.sock", 0o777)
        daemon.listen()
        environment = {
            "HIDDEN": str(state),
            "KEY": str(key),
            "DAEMON": str(place.home / "docker.sock"),
            "OUT": str(place.home / "findings"),
        }
        sidecar, _, errors = place.run(
            [place.python, "-I", "-S", str(HERE / "jail_probe.py")],
            env=environment,
            hidden=[str(state), str(key)],
            readable={str(bundle): "/run/creto/extra.pem"},
            ca_bundle=str(bundle),
        )
    assert sidecar.get("status") == 7, (sidecar, errors)
    findings: Findings = json.loads((place.home / "findings").read_text())
    findings["sidecar"] = sidecar
    return findings


def test_tcp_is_redirected_with_its_destination(report: Findings) -> None:
    assert report["tcp 1.2.3.4:443"] == ["1.2.3.4", 443]
    assert report["tcp 2001:db8::1:8443"] == ["2001:db8::1", 8443]


def test_dialling_the_listener_itself_has_no_destination(report: Findings) -> None:
    assert report["tcp 127.0.0.1:15001"] is None


def test_dns_reaches_the_sidecar_wherever_it_is_sent(report: Findings) -> None:
    for host in ("8.8.8.8", "127.0.0.1", "127.0.0.53", "2001:db8::1", "::1"):
        assert report[f"udp {host}:53"] == "dns:x"
    assert report["tcp 8.8.8.8:53"] == ["8.8.8.8", 53]
    assert "nameserver 127.0.0.1" in report["resolv"]


@pytest.mark.parametrize("to", ["8.8.8.8:443", "2001:db8::1:443", "224.0.0.251:5353", "192.0.0.1:4444"])
def test_other_udp_fails_at_once(report: Findings, to: str) -> None:
    assert report[f"udp {to}"] in ("EPERM", "EACCES")


def test_rules_and_links_cannot_be_changed(report: Findings) -> None:
    assert [report[name] for name in ("rules", "rules_nested", "link", "link_nested")] == ["EPERM"] * 4


def test_no_socket_leaves_by_another_way(report: Findings) -> None:
    assert report["raw"] == report["raw_nested"] == "EPERM"
    assert report["packet"] == report["packet_own_network"] == report["vsock"] == "EAFNOSUPPORT"
    assert report["io_uring"] == "ENOSYS"
    assert report["pair"] == "opened"


def test_other_system_call_tables_are_closed(report: Findings) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x32 and i386 belong to x86-64")
    assert report["x32"] == "ENOSYS"
    assert report["i386"] == "SIGSYS"


def test_state_directory_is_empty_and_stays_so(report: Findings) -> None:
    assert report["hidden"] == []
    assert report["hidden_write"] == "EROFS"
    assert report["key"] in ("", "EACCES")


def test_sockets_of_the_host_do_not_answer(report: Findings, place: Lab) -> None:
    assert report["daemon"] in ("ECONNREFUSED", "EACCES")
    assert "docker.sock" not in report["runtime"]


def test_covers_cannot_be_lifted(report: Findings) -> None:
    if report["ids"][0] != 0:
        assert report["umount"] == "EPERM"
    assert report["umount"] != "unmounted"
    for name in ("umount_nested", "umount_socket_nested", "umount_run_nested", "reveal_nested", "move_nested"):
        assert report[name] == "EINVAL", name


def test_sidecar_cannot_be_seen_or_signalled(report: Findings) -> None:
    assert report["sidecar_signal"] == "ESRCH"
    assert report["processes"] == [1]
    assert report["group_signal"] == "sent"
    assert report["sidecar"]["signals"] == []


def test_first_process_cannot_be_looked_into(report: Findings) -> None:
    assert report["init"] == "creto-init"
    assert report["init_trace"] == "EPERM"
    for name in ("root", "cwd", "exe", "ns/net", "ns/mnt", "fd/3", "environ", "mem", "maps"):
        assert report[f"init_{name}"] in ("EACCES", "EPERM"), name


def test_agent_has_no_new_privileges_and_a_filter(report: Findings) -> None:
    status = report["status"]
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    if report["ids"][0] != 0:
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def test_kernel_cannot_be_steered(report: Findings) -> None:
    for name in ("sysctl", "core_pattern", "sysrq", "sysfs"):
        assert report[name] in ("EACCES", "EROFS", "EPERM", "ENOENT"), name
    assert report["ip_forward"] == "0"
    assert report["disk"] == "EPERM"
    assert report["cgroup_namespace"] == "EPERM"
    assert not {name for name in report["devices"] if name.startswith(("sd", "vd", "loop", "kvm", "vhost", "mem"))}


def test_terminal_cannot_be_typed_into(report: Findings) -> None:
    assert report["terminal"] == "EPERM"


def test_nested_namespaces_still_work(report: Findings) -> None:
    # For root the unmaskable parts of /proc are covered, and the kernel then refuses further instances.
    assert report["nested_proc"] == ("mounted" if report["ids"][0] else "EPERM")


def test_only_standard_descriptors_are_inherited(report: Findings) -> None:
    assert report["descriptors"] == [0, 1, 2]


def test_network_has_only_the_dead_end(report: Findings) -> None:
    assert report["links"] == ["creto0", "creto1", "lo"]


def test_certificates_are_in_place(report: Findings) -> None:
    assert report["readable"] == "the bundle"
    assert report["bundle"] in ("the bundle", None)
    assert report["bundle_write"] in ("EROFS", "EACCES", "ENOENT")


def test_files_belong_to_the_user(report: Findings, place: Lab) -> None:
    assert report["ids"] == [place.uid, place.uid]
    owner = (place.home / "findings").stat()
    assert (owner.st_uid, owner.st_gid) == (place.uid, place.uid)
    assert report["cwd"] == str(place.home)


def test_host_keeps_what_the_jail_covered(report: Findings, place: Lab) -> None:
    assert (place.home / "state" / "secret").read_text() == "the key of the run"
    assert not Path("/run/creto").exists()
    assert not list(Path("/run").glob(".creto-*"))
