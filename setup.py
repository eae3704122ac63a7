"""Compiles ext/creto_hotpath and says which folders are packages; everything else stands in pyproject.toml.

Each root below is a source root holding uniquely named packages. ``policies/`` has no code: it is installed as the
data package ``creto_policies``, so that the files a reader sees in the checkout are the files that run.
"""

import ctypes.util
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOTS = ("proxy", "plugins", "ext")

packages = {name: root for root in ROOTS for name in find_packages(root)}
locations = {name: f"{root}/{name}" for name, root in packages.items() if "." not in name}

hotpath = Path("ext/creto_hotpath")
# A module is either a .pyx beside its twin, or the twin itself compiled with the C types of an augmenting .pxd.
sources = {path.stem: path for path in hotpath.glob("*_c.pyx")}
# HTTP/2 framing has a second implementation, the h2 package, so this library is used where it is and never required.
libraries = {"_h2_c": ["nghttp2"]}
if ctypes.util.find_library("nghttp2") is None or not any(
    Path(root, "nghttp2/nghttp2.h").exists() for root in ("/usr/include", "/usr/local/include")
):
    sources.pop("_h2_c", None)
for types in hotpath.glob("*_c.pxd"):
    sources.setdefault(types.stem, types.with_name(f"{types.stem.removesuffix('_c')}_py.py"))
extensions = [
    Extension(
        f"creto_hotpath.{name}",
        [str(source)],
        include_dirs=[str(hotpath)],
        libraries=libraries.get(name, []),
        depends=[str(header) for header in sorted(hotpath.glob("*.h"))],
        extra_compile_args=["-O3"],
    )
    for name, source in sorted(sources.items())
]
# Cython does not see that the C types of a .py source changed through another .pxd.
generated = [path.stat().st_mtime for path in Path("build", hotpath).glob("*.c")]
outdated = any(path.stat().st_mtime > min(generated, default=0.0) for path in hotpath.glob("*.pxd"))


class Compile(build_ext):
    """build_ext that says what is missing when there is no compiler: the compiled path is not optional."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (CCompilerError, ExecError, PlatformError) as error:
            raise SystemExit(
                f"creto: cannot compile its request path: {error}\n"
                "It needs a C compiler and the Python headers. Debian and Ubuntu: apt-get install gcc python3-dev"
            ) from error


setup(
    packages=[*packages, "creto_policies"],
    package_dir={**locations, "creto_policies": "policies"},
    # build_dir keeps generated C out of the tree and out of the wheel.
    ext_modules=cythonize(extensions, build_dir="build", include_path=["ext"], language_level=3, force=outdated),
    cmdclass={"build_ext": Compile},
)
