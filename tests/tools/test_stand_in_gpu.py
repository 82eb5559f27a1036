"""Tests of a GPU run on one that the CPU plays: that shows nothing of its kernels, but that they still fit the code."""

import os
import subprocess
import sys
from pathlib import Path

from tools import stand_in_gpu

ROOT = Path(__file__).resolve().parents[2]
FILES = "tests/backends/cuda/test_on_gpu.py", "tests/integrations/test_graphs_on_gpu.py"
FEW = "cuda and not triton and (waits_for_the_device or dynamic or 4-torch.bfloat16 or in_a_graph)"


def test_tests_of_a_gpu_fit_the_code(tmp_path):
    stand_in_gpu.write(tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    env.pop("TRITON_INTERPRET", None)  # which is for processes without a GPU
    command = (sys.executable, "-m", "pytest", "-q", "-p", "tools.pytest_gpu", "-m", "gpu", "-k", FEW, *FILES)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
