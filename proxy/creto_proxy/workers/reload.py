"""What a reload has to do: nothing but new policies, or everything anew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from creto_proxy.config import Config
from creto_proxy.plugins import Found


@dataclass(frozen=True, slots=True)
class Footing:
    """What a generation of workers stands on, besides the policies: equal ones behave alike."""

    config: Config
    found: tuple[Found, ...]
    files: Mapping[Path, str]

    @classmethod
    def of(cls, config: Config, found: Sequence[Found]) -> Footing:
        """``config`` with the content of the files that it names, as they are now."""
        bare = replace(config, sources={})
        return cls(bare, tuple(found), {path: _digest(path) for path in sorted(_files(bare)) if path.is_file()})


def _files(config: Config) -> Iterator[Path]:
    for each in fields(config):
        yield from _paths(getattr(config, each.name))


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, tuple | list | frozenset | set):
        for item in value:
            yield from _paths(item)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return str(error)
