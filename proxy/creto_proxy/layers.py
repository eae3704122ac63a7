"""The layers of the configuration, merged; where each value came from is kept beside it.

Defaults are not a layer here: they stand in the models. What can go wrong while reading (syntax, an unset variable, an
unreadable file) is collected in the draft, so that it is reported together with what validation finds.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

SYSTEM_FILE = Path("/etc/creto/enablement.toml")

KeyPath: TypeAlias = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$(\$\{)|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{([^}]*)\}?")


@dataclass(slots=True)
class Draft:
    """The layers merged, not yet validated. ``opaque`` are the values made from variables, which are never echoed."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[KeyPath, str] = field(default_factory=dict)
    opaque: set[KeyPath] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @property
    def disabled(self) -> frozenset[str]:
        """Names under ``plugins.disabled``, as far as they can be read before validation."""
        table = self.values.get("plugins")
        names = table.get("disabled") if isinstance(table, dict) else None
        return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def read(
    file: Path | None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[KeyPath, Any] | None = None,
    system_file: Path | None = None,
) -> Draft:
    """The layers merged. ``overrides`` are settings from the command line. Problems are kept in the draft."""
    env = os.environ if environ is None else environ
    draft = Draft()
    for path, required in ((system_file or SYSTEM_FILE, False), (file, True)):
        if path is not None:
            _add_file(draft, path, required, env)
    _add_environment(draft, env)
    for key, value in (overrides or {}).items():
        _put(draft, key, value, "command line")
    return draft


def _add_file(draft: Draft, path: Path, required: bool, environ: Mapping[str, str]) -> None:
    try:
        text = path.read_bytes().decode()
        table = tomllib.loads(text)
    except FileNotFoundError:
        if required:
            draft.problems.append(f"{path}: no such file")
        return
    except OSError as error:
        draft.problems.append(f"{path}: cannot be read: {error.strerror}")
        return
    except UnicodeDecodeError as error:
        draft.problems.append(f"{path}: not UTF-8 at byte {error.start}")
        return
    except tomllib.TOMLDecodeError as error:
        draft.problems.append(_syntax_problem(path, error, text))
        return
    except RecursionError:
        draft.problems.append(f"{path}: not TOML: nested too deeply")
        return
    _merge(draft, (), _expanded(draft, table, (), path, environ), str(path))


def _syntax_problem(path: Path, error: tomllib.TOMLDecodeError, text: str) -> str:
    """``FILE:LINE:COLUMN: reason``; tomllib says "at end of document" for the last position."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
    if match is None:
        return f"{path}: not TOML: {error}"
    lines = text.split("\n")
    line, column = (match[2], match[3]) if match[2] else (len(lines), len(lines[-1]) + 1)
    return f"{path}:{line}:{column}: not TOML: {match[1]}"


def _expanded(draft: Draft, value: Any, at: KeyPath, file: Path, environ: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(draft, item, (*at, key), file, environ) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(draft, item, (*at, index), file, environ) for index, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replace(match: re.Match[str]) -> str:
        literal, name, default, malformed = match.groups()
        if literal:
            return str(literal)
        if malformed is not None:
            draft.problems.append(f"{file}: {dotted(at)}: ${{{malformed}}} should be ${{NAME}} or ${{NAME:-default}}")
            return ""
        draft.opaque.add(at)
        found = environ.get(name) or default
        if found is None and name not in environ:
            draft.problems.append(f"{file}: {dotted(at)}: environment variable {name} is not set")
        return found or ""

    return _VARIABLE.sub(replace, value)


def _add_environment(draft: Draft, environ: Mapping[str, str]) -> None:
    for name in sorted(environ):
        if not name.startswith("CRETO_") or "__" not in name:
            continue
        path = tuple(name.removeprefix("CRETO_").lower().split("__"))
        if "" in path:
            draft.problems.append(f"environment: {name}: should be CRETO_SECTION__KEY")
            continue
        _put(draft, path, _from_text(environ[name]), f"environment {name}")


def _from_text(text: str) -> Any:
    """Lists and tables are JSON; everything else stays text, which the models convert."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text  # "[::1]:3128" is text; a broken list is refused by the field it was meant for
    return text


def _put(draft: Draft, path: Sequence[str | int], value: Any, source: str) -> None:
    for key in reversed(path):
        value = {key: value}
    _merge(draft, (), value, source)


def _merge(draft: Draft, at: KeyPath, layer: dict[str, Any], source: str) -> None:
    """Tables are merged key by key; anything else, arrays included, replaces what was there."""
    table = draft.values
    for key in at:
        table = table[key]  # type: ignore[index]
    for key, value in layer.items():
        path = (*at, key)
        if isinstance(value, dict) and (value or isinstance(table.get(key), dict)):
            if not isinstance(table.get(key), dict):
                table[key] = {}
            _merge(draft, path, value, source)
            continue
        table[key] = value
        for old in [known for known in draft.sources if known[: len(path)] == path]:
            del draft.sources[old]
        draft.sources[path] = source


def source_of(sources: Mapping[KeyPath, str], path: KeyPath) -> str | None:
    """Where the value at ``path`` came from: itself, the nearest table above it, or any key below it."""
    for length in range(len(path), 0, -1):
        if path[:length] in sources:
            return sources[path[:length]]
        below = next((source for known, source in sources.items() if known[:length] == path[:length]), None)
        if below is not None:
            return below
    return None


def dotted(path: KeyPath) -> str:
    """``("reverse", 0, "name")`` as ``reverse[0].name``; keys that are not bare TOML keys are quoted."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
            continue
        text += ("." if text else "") + (key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key))
    return text
