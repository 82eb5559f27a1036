"""What `setup.py` asks of an environment, and what it says where that is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_TORCH = """
import importlib.util, sys, sysconfig
find_spec, get_path = importlib.util.find_spec, sysconfig.get_path
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find_spec(name, *more)
sysconfig.get_path = lambda key, *more, **named: "/none" if key.endswith("lib") else get_path(key, *more, **named)
"""
BUILD_SDIST = (
    "from setuptools import build_meta as b; assert b.get_requires_for_build_sdist() == []; b.build_sdist('.')"
)
BUILD_WHEEL = "from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel('.')"
BUILD_KERNELS = "import runpy, sys; sys.argv[1:] = ['build_ext', '--inplace']; runpy.run_path('setup.py')"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (WITHOUT_TORCH + BUILD_SDIST, None),
        (WITHOUT_TORCH + BUILD_WHEEL, "no torch in this environment. Install"),
        (BUILD_KERNELS, "need a C++ compiler"),
    ],
    ids=["sdist without torch", "wheel without torch", "kernels without a compiler"],
)
def test_build(tmp_path, code, message):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.24)\nproject(none LANGUAGES CXX)\n")
    env = {**os.environ, "CXX": "/nonexistent", "MODIFF_SKIP_BUILD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1:]
    if message is None:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "modiff_kernels-0.1.0.tar.gz").is_file()
    else:
        assert done.returncode == 1
        assert message in last[0]
        assert "MODIFF_SKIP_BUILD=1" in last[0]
