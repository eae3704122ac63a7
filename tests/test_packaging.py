"""What a user installs is whole: sources to compile, types, policies, and nothing that was generated."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from creto_hotpath.h2 import framing

ROOT = Path(__file__).resolve().parents[1]
HOTPATH = ROOT / "ext" / "creto_hotpath"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to build, without what building leaves behind in it. The C that was generated beside it is
    there, in ``build``: nothing of it may be taken, and Cython has no need to make it all again."""
    copy = tmp_path_factory.mktemp("checkout") / "creto"
    left_behind = ("__pycache__", "*.so", "*_c.c", "build", "*.egg-info", "*.html")
    for name in ("ext", "proxy", "plugins", "policies", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*left_behind))
    generated = ROOT / "build" / "ext"
    if generated.exists():
        shutil.copytree(generated, copy / "build" / "ext", ignore=shutil.ignore_patterns("*.o", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "CHANGELOG.md", "Makefile", "README.md"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy / name)
    return copy


def build(checkout: Path, what: str, into: Path, **environ: str) -> str:
    """Name of the archive that the build backend makes, as pip calls it."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(into)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sdist_names(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Paths in the source distribution, below its own folder."""
    folder = tmp_path_factory.mktemp("dist")
    with tarfile.open(folder / build(checkout, "sdist", folder)) as archive:
        return {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}


def tree(*roots: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for root in roots:
        for path in (ROOT / root).rglob("*"):
            if path.is_file() and path.suffix in suffixes and "build" not in path.relative_to(ROOT).parts:
                yield str(path.relative_to(ROOT))


def test_the_sdist_holds_every_source(sdist_names: set[str]) -> None:
    sources = set(tree("ext", "proxy", "plugins", suffixes=(".py", ".pyx", ".pxd", ".pyi", ".h", ".typed")))
    assert sources - sdist_names == set()


def test_the_sdist_holds_every_policy_and_the_tests(sdist_names: set[str]) -> None:
    wanted = set(tree("policies", suffixes=(".cedar", ".cedarschema", ".json", ".toml", ".md")))
    wanted |= set(tree("tests", suffixes=(".py", ".json", ".toml"))) | {"Makefile", "LICENSE"}
    assert wanted - sdist_names == set()


def test_the_sdist_holds_nothing_generated(sdist_names: set[str]) -> None:
    assert [name for name in sdist_names if re.search(r"_c\.c$|\.so$|__pycache__|\.pyc$", name)] == []


def test_every_package_is_built_and_typed(checkout: Path, tmp_path: Path) -> None:
    """The Python part of a wheel (build_py), which needs no compiler."""
    lib = tmp_path / "lib"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(lib)]
    subprocess.run(command, cwd=checkout, check=True, timeout=280)
    packages = {path.parent.name for path in lib.glob("*/py.typed")}
    assert packages == {path.parent.name for path in ROOT.glob("*/*/py.typed")}
    sources = {name.split("/", 1)[1] for name in tree("ext", "proxy", "plugins", suffixes=(".py",))}
    assert sources - {str(path.relative_to(lib)) for path in lib.rglob("*.py")} == set()
    assert (lib / "creto_policies" / "schema.cedarschema").is_file()
    assert list((lib / "creto_policies" / "default").glob("*.cedar"))
    top = {path.name for path in lib.iterdir()}
    assert top == packages | {"creto_policies"}, "a wheel takes no name but its own"


def test_a_missing_compiler_is_one_clear_line(checkout: Path, tmp_path: Path) -> None:
    if not list(HOTPATH.glob("*_c.pyx")):
        pytest.skip("nothing to compile")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")],
        cwd=checkout,
        env={**os.environ, "CC": str(tmp_path / "no-such-compiler")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 1
    assert "needs a C compiler and the Python headers" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_compiled_module_has_its_twin() -> None:
    compiled = {path.stem.removesuffix("_c") for kind in ("pyx", "pxd") for path in HOTPATH.glob(f"*_c.{kind}")}
    twins = {path.stem.removesuffix("_py") for path in HOTPATH.glob("*_py.py")}
    assert compiled == twins


@pytest.mark.parametrize("module", sorted(path.stem.replace("_py", "_c") for path in HOTPATH.glob("*_py.py")))
def test_every_compiled_module_is_built_for_this_interpreter(module: str) -> None:
    if module == "_h2_c" and framing == "h2":
        pytest.skip("built where nghttp2's headers are missing; the h2 package does the framing")
    spec = importlib.util.find_spec(f"creto_hotpath.{module}")
    assert spec is not None and spec.origin is not None
    assert spec.origin.endswith(tuple(EXTENSION_SUFFIXES))


def test_what_is_installed_is_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("creto-enablement") == project["version"]


def test_every_import_of_the_product_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [each for name in ("oqs", "otel", "prices") for each in project["optional-dependencies"][name]]
    declared = {_name(each) for each in [*project["dependencies"], *optional]}
    provided = importlib.metadata.packages_distributions()
    text = "\n".join((ROOT / name).read_text() for name in tree("ext", "proxy", "plugins", suffixes=(".py",)))
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    ours = {path.parent.name for path in ROOT.glob("*/*/py.typed")}
    foreign = {name for name in imported - ours - sys.stdlib_module_names if name in provided}
    undeclared = {name for name in foreign if not declared & {_name(each) for each in provided[name]}}
    assert undeclared == set()
    # tzdata is read by zoneinfo, without an import.
    used = {_name(each) for name in foreign for each in provided[name]}
    assert {_name(each) for each in project["dependencies"]} - used - {"tzdata"} == set(), "declared but not used"


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-").replace(".", "-")
