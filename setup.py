"""Build of the compiled kernels: CMake puts libmodiff_cpu.so and, where nvcc is found, libmodiff_cuda.so into
modiff_kernels/_lib (see CONTRIBUTING.md). Where a compiler or torch is missing, the Python part is built alone.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
COMPILERS = (os.environ.get("CXX") or "").split()[:1] or ["c++", "g++", "clang++", "icpx"]


def find_torch() -> Path | None:
    """Folder of the torch to compile against; it is read (headers, libtorch_cpu.so), never imported or downloaded.

    Looked up in this interpreter, in the environment into which pip will install, and in those on PATH: the stable ABI
    makes any torch do, of any Python."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    folders += [Path(sysconfig.get_path(key), "torch") for key in ("platlib", "purelib")]
    for programs in os.environ.get("PATH", "").split(os.pathsep):
        folders += sorted(Path(programs).absolute().parent.glob("lib/python3*/site-packages/torch"))
    for folder in folders:
        text = (folder / "version.py").read_text() if (folder / "version.py").is_file() else ""
        found = re.search(r"__version__ = '(\d+)\.(\d+)", text)
        if found and tuple(map(int, found.groups())) >= OLDEST_TORCH:
            return folder
    return None


def find_program(name: str) -> str | None:
    """Path of a build program on PATH or beside this interpreter (a virtual environment that is not activated)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def missing() -> str | None:
    """What the build of the kernels needs and does not find, and how to get it."""
    if not any(map(shutil.which, COMPILERS)):
        names = " or ".join(COMPILERS)
        return f"no C++ compiler {names}: install one (Debian, Ubuntu: apt install g++) or set CXX to it"
    if find_torch() is None:
        return "no torch 2.11 or newer in this environment or on PATH: install the torch that you want first"
    return None if find_program("cmake") else "no cmake: pip install cmake ninja"


class CMakeBuild(build_ext):
    """Builds every library with CMake and installs it into <root>/modiff_kernels/_lib.

    <root> is the build folder of a wheel, or the source tree for an editable install.
    """

    def install_root(self) -> Path:
        editable = self.inplace or getattr(self, "editable_mode", False)
        return ROOT if editable else Path(self.build_lib).resolve()

    def run(self) -> None:
        cmake, ninja = find_program("cmake"), find_program("ninja")
        build_dir = ROOT / "build" / ("cmake-ninja" if ninja else "cmake-make")
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DTORCH_DIR={find_torch()}", f"-DMODIFF_CUDA={os.environ.get('MODIFF_CUDA') or 'AUTO'}"]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        build = [cmake, "--build", str(build_dir), "--parallel", jobs]
        install = [cmake, "--install", str(build_dir), "--prefix", str(self.install_root())]
        if any(subprocess.run(command).returncode for command in (configure, build, install)):
            text = "see above; MODIFF_SKIP_BUILD=1 installs the Python part alone"
            raise SystemExit(f"modiff-kernels: the compiled kernels could not be built, {text}")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (self.install_root() / "modiff_kernels" / "_lib").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The stable ABI ties the libraries to the platform, not to a Python or torch version: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# Metadata and source distributions (other commands) need none of what is looked for here.
building = {"bdist_wheel", "editable_wheel", "build", "build_ext", "install"} & set(sys.argv)
skip = os.environ.get("MODIFF_SKIP_BUILD", "")
reason = "MODIFF_SKIP_BUILD=1" if skip not in ("", "0") else missing() if building else None
if reason is not None and building:
    if skip == "0" or "build_ext" in sys.argv:
        raise SystemExit(f"modiff-kernels: the kernels cannot be compiled: {reason}")
    print(f"modiff-kernels: the Python part alone is built, without the fast kernels: {reason}", file=sys.stderr)
kernels = {
    "ext_modules": [Extension("modiff_kernels._lib.libmodiff_cpu", [])],
    "cmdclass": {"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
}
setup(**(kernels if reason is None else {}))
