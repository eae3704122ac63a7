"""The ``creto`` command: finds sub-commands when they are used, and turns failures into one line and an exit status.

Every command, ours or a plugin's, accepts ``--config``, ``--state-dir`` and ``--json`` before or after its name, and
gets an ``Operator`` as its click context object.

Exit status: 0 done; 1 failed; 2 wrong command line or configuration, nothing was started; 3 this machine cannot do what
was asked; 130 interrupted. ``creto run`` ends with the status of the command it ran.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from creto_proxy.errors import ConfigError, CretoError, Unsupported

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from creto_proxy.config import Config
    from creto_proxy.plugins import Found

FAILED, MISUSED, UNSUPPORTED, INTERRUPTED = 1, 2, 3, 130

# What `creto init` writes.
_PROJECT_FILE = Path("creto.toml")

# name -> (module:attribute, help). The help stands here so that `creto --help` imports none of them.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("creto_proxy.commands.run:run", "Run a command as a governed agent."),
    "sidecar": ("creto_proxy.commands.sidecar:sidecar", "Listen for agents as a forward or reverse proxy."),
    "status": ("creto_proxy.commands.node:status", "Show the running sidecars and their workers."),
    "reload": ("creto_proxy.commands.node:reload", "Have running sidecars take their configuration anew."),
    "top": ("creto_proxy.commands.top:top", "Show what a running creto does right now."),
    "init": ("creto_proxy.commands.init:init", "Write a configuration and policies to start from."),
    "config": ("creto_proxy.commands.config:config", "Check and show the configuration."),
    "doctor": ("creto_proxy.commands.doctor:doctor", "Say what this machine can do, and what to change."),
    "plugins": ("creto_proxy.commands.plugins:plugins", "List the installed plugins."),
    "policy": ("creto_proxy.commands.policy:policy", "Validate and try policies."),
    "audit": ("creto_proxy.commands.audit:audit", "Follow, prove and verify the audit log."),
    "keys": ("creto_proxy.commands.keys:keys", "Show and rotate keys of the trust domain."),
    "completion": ("creto_proxy.cli:completion", "Print the completion script for a shell."),
}


class Operator:
    """What a command works with. Nothing is read before it is asked for.

    Raises ConfigError from every property that needs the configuration when that cannot be used.
    """

    def __init__(
        self,
        *,
        config_file: Path | None = None,
        state_dir: Path | None = None,
        as_json: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.config_file = config_file
        self.json = as_json
        self.environ: Mapping[str, str] = os.environ if environ is None else environ
        self._state_dir = state_dir
        self._overrides: dict[tuple[str | int, ...], Any] = {}
        self._hinted = False

    @cached_property
    def _configured(self) -> tuple[Config, tuple[Found, ...]]:
        from creto_proxy.plugins import configure

        overrides = dict(self._overrides)
        if self._state_dir is not None:
            overrides["common", "state_dir"] = str(self._state_dir.absolute())
        if self.config_file is None and not self._hinted and _PROJECT_FILE.is_file():
            # An agent that may write where its operator stands must not be able to configure creto by that.
            self._hinted = True
            click.echo(f"creto: {_PROJECT_FILE} is not read unless named: --config {_PROJECT_FILE}", err=True)
        return configure(self.config_file, environ=self.environ, overrides=overrides)

    @property
    def config(self) -> Config:
        """The validated configuration, command line included."""
        return self._configured[0]

    @property
    def plugins(self) -> tuple[Found, ...]:
        """The enabled plugins, in configured order."""
        return self._configured[1]

    @cached_property
    def plugin_commands(self) -> dict[str, click.Command]:
        """Commands of every plugin that loads, by name, even when the configuration has other mistakes.

        A broken plugin is named on standard error and costs only its own commands.
        """
        from creto_proxy.layers import read
        from creto_proxy.plugins import discover, list_commands

        discovery = discover(read(self.config_file, environ=self.environ).disabled)
        commands, problems = list_commands(discovery.found, taken=COMMANDS)
        for problem in (*discovery.problems, *problems):
            click.echo(f"creto: {problem}", err=True)
        return commands

    @property
    def state_dir(self) -> Path:
        """Absolute path; it need not exist."""
        return self._state_dir.absolute() if self._state_dir is not None else self.config.state_dir

    @cached_property
    def console(self) -> Console:
        """Standard output. Coloured on a terminal; elsewhere plain, and wide enough that no cell is cut."""
        from rich.console import Console

        return Console(width=None if sys.stdout.isatty() else 4096, highlight=False, emoji=False, markup=False)

    def override(self, section: str, key: str, value: Any) -> None:
        """A setting given on the command line, strongest of all; to be called before ``config`` is used."""
        self._overrides[section, key] = value
        self.__dict__.pop("_configured", None)

    def reread(self) -> tuple[Config, tuple[Found, ...]]:
        """The configuration as files and environment say it now, and its plugins; ``config`` is this one afterwards."""
        self.__dict__.pop("_configured", None)
        return self._configured

    def emit(self, rows: Table | Sequence[Mapping[str, object]], document: Any) -> None:
        """Prints ``document`` under ``--json``, else ``rows``: a rich table, or one mapping per row."""
        if self.json:
            click.echo(_visible(json.dumps(document, indent=2, ensure_ascii=False, default=str)))
            return
        from rich.table import Table

        self.console.print(rows if isinstance(rows, Table) else _table(rows))

    def use(self, option: str, value: Any) -> None:
        """Takes one of the options every command has; an option given twice keeps the last."""
        if option == "config":
            self.config_file = value
        elif option == "state_dir":
            self._state_dir = value
        else:
            self.json = value
        self.__dict__.pop("_configured", None)


def _table(rows: Sequence[Mapping[str, object]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0] if rows else ():
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(_visible(str(value))) for value in row.values()))
    return table


def _visible(text: str) -> str:
    """Text from agents without the power to move the cursor or to turn letters around; in JSON these are escapes."""
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)


def _escape(char: str) -> str:
    return json.dumps(char)[1:-1] if char != "\x7f" else "\\u007f"


def _take(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value is not None and value is not False:
        context.ensure_object(Operator).use(str(parameter.name), value)
    return value


def _common_options() -> list[click.Option]:
    path = click.Path(path_type=Path)
    return [
        click.Option(
            ["--config"],
            type=path,
            metavar="FILE",
            callback=_take,
            expose_value=False,
            help="Configuration on top of /etc/creto/enablement.toml.",
        ),
        click.Option(
            ["--state-dir"],
            type=path,
            metavar="DIR",
            callback=_take,
            expose_value=False,
            help="Keys, ledger and audit log.",
        ),
        click.Option(
            ["--json"], is_flag=True, callback=_take, expose_value=False, help="Print JSON instead of tables."
        ),
    ]


def _with_common_options(command: click.Command) -> click.Command:
    """``command``, and every command below it, accepting the common options it does not define itself."""
    taken = {option for parameter in command.params for option in parameter.opts}
    command.params.extend(option for option in _common_options() if not taken.intersection(option.opts))
    if isinstance(command, click.Group):
        for below in command.commands.values():
            _with_common_options(below)
    return command


class Creto(click.Group):
    """The root group: core commands by name, then those of plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(ctx.ensure_object(Operator).plugin_commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, _, attribute = COMMANDS[cmd_name][0].partition(":")
            command = getattr(importlib.import_module(module), attribute)
        else:
            command = ctx.ensure_object(Operator).plugin_commands.get(cmd_name)
        if not isinstance(command, click.Command) or cmd_name in self.commands:
            return self.commands.get(cmd_name)
        self.commands[cmd_name] = _with_common_options(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])
        extra = ctx.ensure_object(Operator).plugin_commands
        rows = [(name, each.get_short_help_str(80)) for name, each in sorted(extra.items())]
        if rows:
            with formatter.section("Commands of plugins"):
                formatter.write_dl(rows)


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from creto_proxy import __version__

        click.echo(f"creto {__version__}")
        context.exit()


@click.group(
    cls=Creto,
    params=[
        *_common_options(),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_version,
            help="Show the version and exit.",
        ),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Exit status: 0 done, 1 failed, 2 wrong command line or configuration, 3 not possible on this machine.",
)
def cli() -> None:
    """Governs AI agents: identity, policy, quota, approval, egress, metering and audit, without touching their code."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash: creto completion bash > ~/.local/share/bash-completion/completions/creto
    zsh:  creto completion zsh > "${fpath[1]}/_creto"
    fish: creto completion fish > ~/.config/fish/completions/creto.fish
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None  # the choices above are those click knows
    click.echo(script(cli, {}, "creto", "_CRETO_COMPLETE").source())


def run_command(arguments: Sequence[str] | None = None, operator: Operator | None = None) -> int:
    """Runs one command line and returns its exit status; everything foreseen is said on standard error."""
    try:
        status = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="creto",
            standalone_mode=False,
            obj=operator or Operator(),
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"creto: {problem}", err=True)
        return MISUSED
    except Unsupported as error:
        click.echo(f"creto: {error}", err=True)
        return UNSUPPORTED
    except CretoError as error:
        click.echo(f"creto: {error.detail}", err=True)
        return FAILED
    except BrokenPipeError:
        # `creto usage | head`: the reader has what it wanted. Python must not try to flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status if isinstance(status, int) else 0


def main() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(run_command())
