"""``STATE/runs/RUN``: what a running sidecar shows to others, and the policies it has in force.

    ca.pem          what agents must trust
    control.sock    for operators: status, reload, restart
    policies        a link to the policies in force, copied when they were validated
    lock            held as long as the controller lives; without it the directory is a leftover
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from creto_platform.authz import bundled_policies
from creto_platform.authz.policyset import SCHEMA_FILE
from creto_proxy.config import Config
from creto_proxy.errors import ConfigError
from creto_proxy.policies import load_authz
from creto_proxy.service import private_directory

CONTROL = "control.sock"
# A directory as young as this may be one whose owner has not come to lock it.
_YOUNG_S = 10.0


class RunDirectory:
    """The directory of one run. lock: the descriptor that an earlier program image in this process holds."""

    def __init__(self, state: Path, run: str, lock: int | None = None) -> None:
        self.path = private_directory(private_directory(state / "runs") / run)
        self.policies = self.path / "policies"
        self.control = self.path / CONTROL
        self._previous = ""
        self.lock = _locked(self.path) if lock is None else lock
        if self.lock < 0:
            raise ConfigError([f"{self.path}: belongs to a creto that is running"])

    def keep_policies(self, config: Config) -> Config:
        """Copies the policies that ``config`` names; the configuration with the copy instead. What is in force changes
        only when somebody says so, not whenever a file is saved and a worker happens to be started.

        Raises ConfigError when they cannot be copied or used.
        """
        source = config.policy.dir or bundled_policies() / "default"
        version = self.path / f"policies-{time.time_ns()}"
        try:
            _copy(source, version / "default")
            load_authz(config, version / "default")
            previous = os.readlink(self.policies) if self.policies.is_symlink() else ""
            self._link(version.name)
        except (OSError, ConfigError) as error:
            shutil.rmtree(version, ignore_errors=True)
            if isinstance(error, ConfigError):
                raise
            raise ConfigError([f"{source}: the policies cannot be copied to {version}: {error}"]) from None
        for older in set(self.path.glob("policies-*")) - {version, self.path / previous}:
            shutil.rmtree(older, ignore_errors=True)
        self._previous = previous
        return replace(config, policy=config.policy.model_copy(update={"dir": self.policies / "default"}))

    def revert_policies(self) -> None:
        """Puts the policies in force again that were so before the last ``keep_policies``."""
        if self._previous:
            self._link(self._previous)

    def _link(self, version: str) -> None:
        link = self.path / "policies.new"
        link.unlink(missing_ok=True)
        link.symlink_to(version)
        link.replace(self.policies)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def _copy(source: Path, target: Path) -> None:
    """What ``load_policies`` would read of ``source``, and nothing else. Raises OSError."""
    chosen = source if any(source.glob("*.cedar")) else source / "default"
    target.mkdir(mode=0o700, parents=True)
    places = (chosen, chosen.parent) if chosen.name == "default" else (chosen,)
    schemas = [place / SCHEMA_FILE for place in places if (place / SCHEMA_FILE).is_file()]
    for file in (*chosen.glob("*.cedar"), *schemas[:1]):
        shutil.copyfile(file, target / file.name)


def remove_leftovers(state: Path) -> None:
    """Removes the directories of controllers that were killed."""
    for path in (state / "runs").glob("*"):
        try:
            if time.time() - path.stat().st_mtime < _YOUNG_S:
                continue
            lock = _locked(path)
        except OSError:
            continue
        if lock >= 0:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def controls(state: Path) -> Iterator[Path]:
    """Control sockets of the controllers that run on a state directory."""
    yield from sorted((state / "runs").glob(f"*/{CONTROL}"))


def _locked(path: Path) -> int:
    """A descriptor that holds the lock of the directory, -1 when another process does. Raises OSError."""
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd
