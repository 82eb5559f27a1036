"""Build of the compiled kernels: CMake puts libmodiff_cpu.so and, where nvcc is found, libmodiff_cuda.so into
modiff_kernels/_lib (see CONTRIBUTING.md).
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
COMPILERS = ("c++", "g++", "clang++", "icpx")  # where CXX names none
NEEDED = (
    "They need a C++ compiler: install one (Debian, Ubuntu: apt install g++) or set CXX to it, "
    "or set MODIFF_SKIP_BUILD=1 for an install without compiled kernels."
)


def find_torch() -> Path:
    """Folder of the torch to compile against; it is read (headers, libtorch_cpu.so), never imported or downloaded.

    Looked up in this interpreter, then in the environment into which an isolated build will install.
    """
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    folders += [os.path.join(sysconfig.get_path(key), "torch") for key in ("platlib", "purelib")]
    for folder in map(Path, folders):
        version_file = folder / "version.py"
        if not version_file.is_file():
            continue
        found = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
        if found and tuple(map(int, found.groups())) < OLDEST_TORCH:
            raise SystemExit(
                f"modiff-kernels: torch {'.'.join(found.groups())} in {folder} is too old, the compiled kernels need "
                "2.11 or newer. Upgrade torch, or set MODIFF_SKIP_BUILD=1 for an install without compiled kernels."
            )
        return folder
    raise SystemExit(
        "modiff-kernels: no torch in this environment. Install the torch build you want first (e.g. pip install "
        "torch==2.13.0) and run this again, or set MODIFF_SKIP_BUILD=1 for an install without compiled kernels."
    )


def find_program(name: str) -> str | None:
    """Path of a build program on PATH or beside this interpreter (a virtual environment that is not activated)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


class CMakeBuild(build_ext):
    """Builds every library with CMake and installs it into <root>/modiff_kernels/_lib.

    <root> is the build folder of a wheel, or the source tree for an editable install.
    """

    def install_root(self) -> Path:
        editable = self.inplace or getattr(self, "editable_mode", False)
        return ROOT if editable else Path(self.build_lib).resolve()

    def run(self) -> None:
        cmake, ninja = find_program("cmake"), find_program("ninja")
        if cmake is None:
            raise SystemExit("modiff-kernels: cmake was not found. Run `pip install cmake ninja` and try again.")
        build_dir = ROOT / "build" / ("cmake-ninja" if ninja else "cmake-make")
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DTORCH_DIR={TORCH_DIR}", f"-DMODIFF_CUDA={os.environ.get('MODIFF_CUDA') or 'AUTO'}"]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        build = [cmake, "--build", str(build_dir), "--parallel", jobs]
        install = [cmake, "--install", str(build_dir), "--prefix", str(self.install_root())]
        if any(subprocess.run(command).returncode for command in (configure, build, install)):
            raise SystemExit(f"modiff-kernels: the compiled kernels could not be built, see above. {NEEDED}")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (self.install_root() / "modiff_kernels" / "_lib").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The stable ABI ties the libraries to the platform, not to a Python or torch version: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


skip_build = os.environ.get("MODIFF_SKIP_BUILD", "0") not in ("", "0")
if skip_build:
    setup()
else:
    # Looked up before pip resolves the dependencies: a missing torch must not start the download of the newest build.
    # A source distribution needs none, nor does the question what it takes to build one (egg_info).
    TORCH_DIR = None if {"sdist", "egg_info"} & set(sys.argv) else find_torch()
    compilers = (os.environ.get("CXX") or "").split()[:1] or COMPILERS
    if TORCH_DIR is not None and not any(map(shutil.which, compilers)):
        raise SystemExit(
            f"modiff-kernels: the C++ compiler {' or '.join(compilers)} of the kernels was not found. {NEEDED}"
        )
    setup(
        ext_modules=[Extension("modiff_kernels._lib.libmodiff_cpu", [])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
