"""The command line: options anywhere, one line per mistake, exit statuses that scripts can use."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from creto_proxy import cli
from creto_proxy.cli import COMMANDS, FAILED, INTERRUPTED, MISUSED, UNSUPPORTED, Operator, run_command
from creto_proxy.commands import doctor
from creto_proxy.errors import ConfigError, Permanent, Unsupported

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in a directory and with a state directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("creto_proxy.layers.SYSTEM_FILE", tmp_path / "absent.toml")
    for name in [name for name in os.environ if name.startswith("CRETO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CRETO_STATE", str(tmp_path / "state"))

    def call(*arguments: str) -> tuple[int, str, str]:
        status = run_command(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def extra(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Adds a core command named ``extra`` that calls the function with the Operator."""

    def add(function: Callable[[Operator], Any]) -> None:
        command = click.Command("extra", callback=click.pass_obj(function))
        monkeypatch.setattr(cli, "_extra", command, raising=False)
        monkeypatch.setattr(cli, "COMMANDS", {**COMMANDS, "extra": ("creto_proxy.cli:_extra", "For a test.")})
        monkeypatch.setattr(cli.cli, "commands", {})

    return add


def test_help_lists_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for name, (_, text) in COMMANDS.items():
        assert name in out and text in out


def test_the_command_itself_imports_no_heavy_library() -> None:
    code = (
        "import sys; from creto_proxy.cli import run_command; run_command(['--version']);"
        "heavy = {'pydantic', 'rich', 'cedarpy', 'sqlalchemy', 'cryptography', 'aiohttp', 'uvloop'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=os.environ, capture_output=True)


@pytest.mark.parametrize("arguments", ["--help", "config check", "usage --help", "approvals --help"])
def test_what_only_reads_settings_and_commands_imports_no_database_and_no_policy_engine(arguments: str) -> None:
    code = (
        "import sys; from creto_proxy.cli import run_command; assert run_command(sys.argv[1:]) == 0;"
        "heavy = {'cedarpy', 'sqlalchemy', 'cryptography', 'pyroute2', 'uvloop', 'h2', 'wsproto'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, timeout=100, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_commands_and_options_exit_2(run: Run) -> None:
    assert run("nope")[0] == MISUSED
    assert run("config", "check", "--nope")[0] == MISUSED


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_common_options_are_accepted_anywhere(run: Run, tmp_path: Path, where: str) -> None:
    (tmp_path / "my.toml").write_text('[common]\norg = "acme"')
    options = ["--json", "--config", "my.toml", "--state-dir", "elsewhere"]
    words = {"before": [*options, "config", "show"], "between": ["config", *options, "show"]}.get(
        where, ["config", "show", *options]
    )
    status, out, _ = run(*words)
    shown = json.loads(out)
    assert status == 0
    assert shown["common.org"] == {"value": "acme", "source": "my.toml"}
    assert shown["common.state_dir"] == {"value": str(tmp_path / "elsewhere"), "source": "command line"}


def test_every_configuration_mistake_is_a_line_and_the_status_is_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[limits]\nstage_deadline_ms = 1\nbody_bytes = -1\n")
    status, out, err = run("config", "check", "--config", "my.toml")
    assert (status, out) == (MISUSED, "")
    assert err.splitlines() == [
        "creto: my.toml: limits.stage_deadline_ms: should be greater than or equal to 10 (got 1)",
        "creto: my.toml: limits.body_bytes: should be greater than or equal to 0 (got -1)",
    ]


def test_a_missing_configuration_file_is_one_line(run: Run) -> None:
    assert run("config", "check", "--config", "nope.toml") == (MISUSED, "", "creto: nope.toml: no such file\n")


def test_config_check_says_valid(run: Run) -> None:
    status, out, _ = run("config", "check", "--json")
    assert (status, json.loads(out)) == (0, {"valid": True, "sources": []})


def test_config_show_changed_leaves_defaults_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[limits]\ndrain_s = 9\n")
    _, out, _ = run("config", "show", "--changed", "--config", "my.toml")
    assert "limits.drain_s" in out and "body_bytes" not in out


def test_config_default_prints_a_file_that_loads(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("config", "default")
    assert status == 0 and "limits" in tomllib.loads(out)
    (tmp_path / "all.toml").write_text(out)
    assert run("config", "check", "--config", "all.toml")[0] == 0


def test_tables_are_not_cut_when_piped(run: Run, tmp_path: Path) -> None:
    name = "x" * 300
    (tmp_path / "my.toml").write_text(f'[zones]\n{name} = ["a.example"]\n')
    assert name in run("config", "show", "--config", "my.toml")[1]


class TestOutcomes:
    def test_unsupported_is_one_line_and_3(self, run: Run, extra: Callable[..., None]) -> None:
        def fail(operator: Operator) -> None:
            raise Unsupported("no user namespaces; run as root")

        extra(fail)
        assert run("extra") == (UNSUPPORTED, "", "creto: no user namespaces; run as root\n")

    def test_a_failure_is_one_line_and_1(self, run: Run, extra: Callable[..., None]) -> None:
        def fail(operator: Operator) -> None:
            raise Permanent("upstream is gone")

        extra(fail)
        assert run("extra") == (FAILED, "", "creto: upstream is gone\n")

    def test_problems_found_by_a_command_exit_2(self, run: Run, extra: Callable[..., None]) -> None:
        def fail(operator: Operator) -> None:
            raise ConfigError(["one", "two"])

        extra(fail)
        assert run("extra") == (MISUSED, "", "creto: one\ncreto: two\n")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, click.Abort])
    def test_interruption_is_130(self, run: Run, extra: Callable[..., None], error: type[BaseException]) -> None:
        def fail(operator: Operator) -> None:
            raise error

        extra(fail)
        assert run("extra")[0] == INTERRUPTED

    def test_a_command_may_return_its_exit_status(self, run: Run, extra: Callable[..., None]) -> None:
        extra(lambda operator: 42)
        assert run("extra")[0] == 42

    def test_a_command_may_exit_through_click(self, run: Run, extra: Callable[..., None]) -> None:
        extra(lambda operator: click.get_current_context().exit(7))
        assert run("extra")[0] == 7


class TestOperator:
    def test_rows_become_a_table_and_json_is_the_document(
        self, run: Run, extra: Callable[..., None]
    ) -> None:
        extra(lambda operator: operator.emit([{"name": "[red]a", "n": 1}], {"n": 1}))
        assert "[red]a" in run("extra")[1]
        assert json.loads(run("extra", "--json")[1]) == {"n": 1}

    def test_no_rows_print_no_table(self, run: Run, extra: Callable[..., None]) -> None:
        extra(lambda operator: operator.emit([], []))
        assert run("extra")[1].strip() == ""

    def test_overrides_are_the_strongest_layer(self, tmp_path: Path) -> None:
        operator = Operator(environ={"CRETO_RUN__NAME": "env", "HOME": "/x"})
        assert operator.config.run.name == "env"
        operator.override("run", "name", "cli")
        assert operator.config.run.name == "cli"
        assert operator.config.sources["run", "name"] == "command line"

    def test_state_dir_from_the_command_line_needs_no_configuration(self, tmp_path: Path) -> None:
        operator = Operator(config_file=tmp_path / "absent.toml", state_dir=Path("here"), environ={})
        assert operator.state_dir == Path("here").absolute()


class TestInit:
    def test_writes_a_configuration_that_is_valid(self, run: Run, tmp_path: Path) -> None:
        status, out, _ = run("init", "project", "--json")
        assert status == 0
        assert json.loads(out) == {"written": ["project/creto.toml", "project/policies"]}
        assert list((tmp_path / "project/policies").glob("*.cedar"))
        status, _, err = run("config", "check", "--config", "project/creto.toml")
        assert (status, err) == (0, "")

    def test_the_check_it_names_is_of_the_file_it_wrote(self, run: Run) -> None:
        status, out, _ = run("init", "my project")
        command = shlex.split(out.splitlines()[-1].partition("creto ")[2])
        assert status == 0 and command[:2] == ["config", "check"]
        status, out, err = run(*command)
        assert (status, err) == (0, "") and "my project/creto.toml" in out

    def test_a_file_that_is_there_and_not_read_is_named(self, run: Run) -> None:
        run("init")
        for command in (["config", "check"], ["config", "show", "--json"]):
            status, out, err = run(*command)
            assert status == 0 and "--config creto.toml" in err and err.count("\n") == 1
            assert "creto.toml" not in out
        assert run("config", "check", "--config", "creto.toml")[2] == ""

    @pytest.mark.parametrize("present", ["creto.toml", "policies"])
    def test_overwrites_nothing(self, run: Run, tmp_path: Path, present: str) -> None:
        (tmp_path / present).write_text("mine")
        status, _, err = run("init")
        assert (status, err) == (MISUSED, f"creto: {present}: already exists; creto init overwrites nothing\n")
        assert (tmp_path / present).read_text() == "mine"
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_place_that_cannot_be_written_is_one_line(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        status, _, err = run("init", "file/below")
        assert status == FAILED and err.startswith("creto: file") and err.count("\n") == 1


class TestDoctor:
    def examine(self, operator: Operator) -> dict[str, doctor.Check]:
        return {check.name: check for check in doctor.examine(operator)}

    def test_every_failure_says_what_to_do(self, run: Run) -> None:
        status, out, _ = run("doctor", "--json")
        checks = json.loads(out)
        assert {check["name"] for check in checks} >= {
            "platform", "compiled path", "user namespaces", "cryptography", "policy engine", "configuration",
            "state directory",
        }  # fmt: skip
        assert [check for check in checks if check["status"] != "ok" and not check["advice"]] == []
        assert status == (FAILED if any(check["status"] == "fail" for check in checks) else 0)

    def test_a_kernel_without_namespaces_fails_with_the_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "probe", lambda: {"user namespaces": [1, "Operation not permitted"]})
        check = self.examine(Operator(environ={}))["user namespaces"]
        assert check.status == "fail" and "--enforce=proxy-env" in check.advice

    def test_a_missing_module_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "probe", lambda: {"nftables redirect": [2, "No such file or directory"]})
        assert "modprobe nft_chain_nat" in self.examine(Operator(environ={}))["nftables redirect"].advice

    def test_a_state_directory_others_can_read_fails(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o755)
        check = self.examine(Operator(state_dir=tmp_path, environ={}))["state directory"]
        assert check.status == "fail" and "mode 0755" in check.found
        tmp_path.chmod(0o700)
        assert self.examine(Operator(state_dir=tmp_path, environ={}))["state directory"].status != "fail"

    def test_a_wrong_configuration_is_a_finding_not_a_crash(self, tmp_path: Path) -> None:
        (tmp_path / "c.toml").write_text("[limits]\nx = 1\ny = 2\n")
        checks = self.examine(Operator(config_file=tmp_path / "c.toml", environ={}))
        assert checks["configuration"].status == "fail"
        assert checks["configuration"].found.endswith("(and 1 more)")
        assert checks["state directory"].status == "fail"

    def test_the_probe_reports_every_feature_it_reached(self) -> None:
        result = doctor.probe()
        assert next(iter(result)) == "user namespaces"
        assert all(failure is None or len(failure) == 2 for failure in result.values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(run: Run, shell: str) -> None:
    status, out, _ = run("completion", shell)
    assert status == 0 and "_CRETO_COMPLETE" in out


def test_completion_offers_commands() -> None:
    environ = {**os.environ, "_CRETO_COMPLETE": "bash_complete", "COMP_WORDS": "creto con", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "creto_proxy"], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "plain,config"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m creto_proxy config show | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
