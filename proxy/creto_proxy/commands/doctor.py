"""``creto doctor``: what this machine can do for creto, and what to change where it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from creto_proxy.cli import FAILED, Operator
from creto_proxy.errors import ConfigError

Status = Literal["ok", "warn", "fail"]

PROBE = Path(__file__).with_name("probe.py")
PROBE_TIMEOUT_S = 20
LOW_SPACE_BYTES = 256 << 20
REINSTALL = "pip install --force-reinstall creto-enablement"
MODULES = {"nftables redirect": "nft_chain_nat", "veth links": "veth"}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``advice`` is empty when nothing needs to be done."""

    name: str
    status: Status
    found: str
    advice: str = ""


@click.command()
@click.pass_obj
def doctor(operator: Operator) -> int:
    """Check kernel, build, cryptography, configuration and state directory. Exit status 1 when something fails."""
    from rich.table import Table
    from rich.text import Text

    checks = list(examine(operator))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(Text(check.status, COLOURS[check.status]), check.name, Text(check.found), Text(check.advice))
    operator.emit(table, [asdict(check) for check in checks])
    return FAILED if any(check.status == "fail" for check in checks) else 0


def examine(operator: Operator) -> Iterator[Check]:
    """Every finding, in the order they matter."""
    yield _python()
    yield _extensions()
    yield from _kernel()
    yield _records()
    yield _self_test("cryptography", _crypto)
    yield _self_test("policy engine", _cedar)
    yield _configuration(operator)
    yield _state_directory(operator)


def _python() -> Check:
    system = f"{platform.system()} {platform.release()}"
    found = f"{platform.python_implementation()} {platform.python_version()} on {system}"
    if sys.platform != "linux":
        return Check("platform", "fail", found, "creto needs Linux: run it in a Linux container or virtual machine")
    return Check("platform", "ok", found)


def _extensions() -> Check:
    """Each module with a Python twin must have its compiled form; the twins are many times slower."""
    package = importlib.util.find_spec("creto_hotpath")
    folders = [Path(place) for place in package.submodule_search_locations or ()] if package else []
    twins = sorted(source.stem.removesuffix("_py") for folder in folders for source in folder.glob("_*_py.py"))
    missing = [name for name in twins if importlib.util.find_spec(f"creto_hotpath.{name}_c") is None]
    if not twins:
        return Check("compiled path", "fail", "creto_hotpath is not installed", REINSTALL)
    if missing:
        names = ", ".join(name.strip("_") for name in missing)
        return Check("compiled path", "fail", f"not built: {names}", f"install a C compiler, then: {REINSTALL}")
    if os.environ.get("CRETO_NO_EXTENSIONS", "") not in ("", "0"):
        return Check("compiled path", "warn", "built, but CRETO_NO_EXTENSIONS is set", "unset it: the twins are slow")
    return Check("compiled path", "ok", f"{len(twins)} modules")


def _records() -> Check:
    from creto_hotpath import tls

    if tls.ENGINE == "openssl":
        return Check("TLS records", "ok", "by libssl")
    return Check(
        "TLS records", "warn", "by Python's ssl objects: its libssl is not one creto knows", "it costs CPU only"
    )


def _kernel() -> Iterator[Check]:
    for name, failure in probe().items():
        yield _feature(name, failure)


def probe() -> dict[str, list[object] | None]:
    """Feature -> None when it works here, else [errno, text]; without what an earlier failure made unreachable."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(PROBE)], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True
        )
        result: dict[str, list[object] | None] = json.loads(done.stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        return {"user namespaces": [0, f"the probe failed: {error}"]}
    return result


def _feature(name: str, failure: list[object] | None) -> Check:
    if failure is None:
        return Check(name, "ok", "available")
    from creto_proxy.jail.namespace import refusal

    number, text = failure
    cure = MODULES.get(name)
    advice = f"load the kernel module: modprobe {cure}" if cure else refusal(OSError(number, text))
    return Check(name, "fail", str(text), advice)


def _self_test(name: str, test: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", test())
    except (ArithmeticError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}", REINSTALL)


def _crypto() -> str:
    from creto_platform.crypto import selftest
    from creto_platform.crypto.embedded import CryptographyProvider
    from creto_platform.crypto.port import SelfTestFailed

    provider = CryptographyProvider()
    try:
        selftest.check(provider)
    except SelfTestFailed as error:
        raise ValueError(str(error)) from error
    return f"{len(provider.capabilities())} algorithms give their known answers"


def _cedar() -> str:
    from creto_platform.authz.cedar import self_test

    self_test()
    return "Cedar decides as expected"


def _configuration(operator: Operator) -> Check:
    try:
        plugins = operator.plugins
    except ConfigError as error:
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        return Check("configuration", "fail", error.problems[0] + more, "creto config check lists every problem")
    names = ", ".join(each.name for each in plugins) or "none"
    return Check("configuration", "ok", f"valid; plugins: {names}")


def _state_directory(operator: Operator) -> Check:
    name = "state directory"
    try:
        path = operator.state_dir
    except ConfigError:
        return Check(name, "fail", "unknown while the configuration is wrong", "creto config check")
    another = "choose another with --state-dir"
    try:
        status = path.stat()
        space = os.statvfs(path)
    except FileNotFoundError:
        return Check(name, "ok", f"{path} will be created")
    except OSError as error:
        return Check(name, "fail", f"{path}: {error.strerror}", another)
    if not stat.S_ISDIR(status.st_mode):
        return Check(name, "fail", f"{path} is not a directory", another)
    if status.st_uid != os.geteuid():
        return Check(name, "fail", f"{path} belongs to user {status.st_uid}", another)
    if status.st_mode & 0o077:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        return Check(name, "fail", f"{path} has mode {mode}: others can read its keys", f"chmod 700 {path}")
    free = space.f_bavail * space.f_frsize
    if free < LOW_SPACE_BYTES:
        return Check(name, "warn", f"{path}: {free >> 20} MiB free", "make room: a full disk refuses new flows")
    return Check(name, "ok", f"{path}, {free >> 30} GiB free")
