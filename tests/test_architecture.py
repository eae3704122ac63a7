"""The rules that keep the parts apart. Each test says the rule; a failure names the file and the line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]

# package -> packages of ours it may import; nothing points back, and plugins never import each other
PLUGIN = {"creto_hotpath", "creto_platform", "creto_proxy"}
ARROWS: dict[str, set[str]] = {
    "creto_hotpath": set(),
    "creto_platform": {"creto_hotpath"},
    "creto_proxy": {"creto_hotpath", "creto_platform"},
    "creto": set(),
    "creto_egress": PLUGIN,
    "creto_metering": PLUGIN,
    "creto_oversight": PLUGIN,
}
SOURCE_ROOTS = ("ext", "proxy", "plugins")
PACKAGES = {mark.parent.name: mark.parent for root in SOURCE_ROOTS for mark in (ROOT / root).glob("*/py.typed")}

# Where code that is not ours is called, or a thread must not end; each turns what comes into a refusal or a finding.
BROAD_EXCEPTS = {
    "proxy/creto_proxy/deadline.py": "a plugin's stage",
    "proxy/creto_proxy/plugins.py": "a plugin's import, constructor, hooks, start and stop",
    "proxy/creto_proxy/pipeline.py": "a request's task: an agent must always be answered",
    "proxy/creto_proxy/replay.py": "a plugin's journal consumer, in its worker thread",
    "proxy/creto_proxy/jail/launch.py": "a plugin's redirect, before the agent exists",
    "proxy/creto_platform/audit/embedded.py": "the publishing thread, which nothing may end for good",
    "ext/creto_hotpath/_relay_py.py": "the handler and the taps that the relay was given",
}
# A name like these hides a missing noun.
VAGUE = {"utils", "util", "helpers", "helper", "misc", "common", "tools", "stuff", "lib"}
MAX_LINES = 500


def sources(package: str = "") -> Iterator[Path]:
    for name, folder in PACKAGES.items():
        if package in ("", name):
            yield from sorted(folder.rglob("*.py"))
            yield from sorted(folder.rglob("*.pyx"))


def at(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every absolute import, in Python by syntax tree and in Cython by line."""
    text = path.read_text()
    if path.suffix == ".pyx":
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r"\s*(?:from\s+([\w.]+)\s+c?import\b|c?import\s+([\w.]+))", line):
                yield number, match[1] or match[2]
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def test_every_package_is_known_to_this_file() -> None:
    assert PACKAGES.keys() == ARROWS.keys()


@pytest.mark.parametrize("package", ARROWS)
def test_imports_follow_the_arrows(package: str) -> None:
    wrong = [
        f"{at(path, line)} imports {module}"
        for path in sources(package)
        for line, module in imported(path)
        if (top := module.split(".")[0]) in ARROWS and top != package and top not in ARROWS[package]
    ]
    assert wrong == []


def test_packages_are_imported_by_their_own_name_only() -> None:
    """``proxy.creto_proxy`` imports from a checkout too, as a second copy whose classes are not the same."""
    files = [*sources(), *(ROOT / "tests").rglob("*.py")]
    used = [(path, line, module.split(".")[0]) for path in files for line, module in imported(path)]
    wrong = [at(path, line) for path, line, top in used if top in SOURCE_ROOTS]
    assert wrong == []


def test_no_package_reaches_above_itself_by_relative_import() -> None:
    wrong = []
    for path in sources():
        depth = len(path.relative_to(PACKAGES[_package(path)]).parts)
        if path.suffix == ".py":
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            wrong += [at(path, node.lineno) for node in nodes if node.level > depth]
    assert wrong == []


def _package(path: Path) -> str:
    return path.relative_to(ROOT).parts[1]


def test_only_the_egress_stage_makes_a_permit() -> None:
    makers = {
        at(path)
        for path in sources()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "Permit"
    }
    assert makers == {"proxy/creto_proxy/egress.py"}


def test_broad_excepts_stand_at_boundaries_only() -> None:
    found = {
        at(path): node.lineno
        for path in sources()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _only_cleans_up(node)
    }
    assert {path: line for path, line in found.items() if path not in BROAD_EXCEPTS} == {}
    assert BROAD_EXCEPTS.keys() <= found.keys(), "a boundary that is none any more"


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_is_broad(each) for each in kind.elts)
    return kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))


def _only_cleans_up(handler: ast.ExceptHandler) -> bool:
    """Undoes something and lets the same exception go on."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_no_module_has_a_name_that_hides_a_noun() -> None:
    assert [at(path) for path in sources() if path.stem.strip("_") in VAGUE] == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        at(path)
        for path in sources()
        if path.suffix == ".py" and path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_files_stay_readable() -> None:
    long = {at(path): lines for path in sources() if (lines := path.read_text().count("\n")) > MAX_LINES}
    assert {path: lines for path, lines in long.items() if path.endswith(".py") and "_py.py" not in path} == {}


def test_the_compiled_path_does_not_log() -> None:
    used = [(path, line, module) for path in sources("creto_hotpath") for line, module in imported(path)]
    wrong = [at(path, line) for path, line, module in used if module == "logging"]
    assert wrong == []


class TestHooks:
    """A hook exists only when it is documented and used."""

    @staticmethod
    def hooks() -> list[str]:
        return re.findall(r"def (creto_\w+)\(", (ROOT / "proxy/creto_proxy/hookspecs.py").read_text())

    def test_every_hook_is_documented(self) -> None:
        page = (ROOT / "docs/plugins.md").read_text()
        assert [hook for hook in self.hooks() if f"`{hook}`" not in page] == []

    def test_every_hook_is_used_by_a_plugin(self) -> None:
        files = [*(ROOT / "plugins").rglob("*.py"), ROOT / "tests/thirdparty/creto_example.py"]
        text = "\n".join(path.read_text() for path in files)
        assert [hook for hook in self.hooks() if not re.search(rf"@hookimpl\s+def {hook}\(", text)] == []

    def test_every_method_of_a_stage_is_documented(self) -> None:
        from creto_proxy.plugins import STAGES, stage_members

        page = (ROOT / "docs/plugins.md").read_text()
        missing = [
            f"{shape.__name__}.{member}"
            for _, shape in STAGES.values()
            for member in stage_members(shape)
            if not re.search(rf"`{member}\b", page)
        ]
        assert missing == []


def test_every_core_setting_is_documented() -> None:
    from creto_proxy.settings import CORE, Network

    page = (ROOT / "docs/configuration.md").read_text()
    models: dict[str, type[BaseModel]] = {**CORE, "egress": Network}
    keys = [(name, key) for name, model in models.items() for key in model.model_fields]
    assert [f"{name}.{key}" for name, key in keys if f"`{key}`" not in page] == []


def test_deploy_file_holds_every_setting_at_its_default() -> None:
    """``creto config default > deploy/creto.toml`` brings it up to date."""
    from creto_proxy.commands.config import render
    from creto_proxy.plugins import discover

    discovery = discover()
    assert discovery.problems == ()
    assert (ROOT / "deploy/creto.toml").read_text() == render(discovery.settings)


def test_every_plugin_setting_says_what_it_is() -> None:
    from creto_proxy.plugins import discover

    silent = [
        f"{name}.{key}"
        for name, model in discover().settings.items()
        for key, info in model.model_fields.items()
        if not info.description
    ]
    assert silent == []
