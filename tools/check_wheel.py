"""Install the wheel of dist/ into a fresh environment outside the tree and use it there, as a user would.

    python tools/check_wheel.py [dist]      after `make wheel`; exit code 1 and a line where something is not right

The environment sees the packages of this interpreter (torch, diffusers) behind its own, so that nothing is downloaded.
"""

import os
import site
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

CARD = "modiff_kernels/models/cifar10_small16/README.md"
IN_WHEEL = (CARD, "py.typed", "evaluation/report.html", "_lib/libmodiff_cpu.so", ".dist-info/licenses/LICENSE")
IN_SDIST = (CARD, "CHANGELOG.md", "CMakeLists.txt", "cpu/ops.cpp", "docs/ops.md", "tests/conftest.py", "sdxl.py")
USE = """
import pathlib, sys, torch, modiff_kernels as mk
from modiff_kernels import ops
assert pathlib.Path(mk.__file__).is_relative_to(sys.prefix), mk.__file__
torch.set_num_threads(1)
pipe = mk.load_shipped()
pipe.set_progress_bar_config(disable=True)
handle = mk.accelerate(pipe, mk.ModiffConfig(weight_bits=8, act_bits=4))
pipe(num_inference_steps=3, generator=torch.manual_seed(0))
assert ops.dispatch.why_unavailable("cpu") is None, ops.dispatch.why_unavailable("cpu")
print(handle.explain().splitlines()[0])
"""


def main(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert "-py3-none-manylinux" in wheel.name, f"{wheel.name}: make it with `make wheel`"
    with tarfile.open(sdist) as files:
        contents = ((zipfile.ZipFile(wheel).namelist(), IN_WHEEL), (files.getnames(), IN_SDIST))
    absent = [name for names, needed in contents for name in needed if not any(n.endswith(name) for n in names)]
    assert not absent, f"{wheel.name} or {sdist.name} lacks {', '.join(absent)}"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, symlinks=True)
        python, own = f"{folder}/bin/python", next(Path(folder).glob("lib/python3*/site-packages"))
        pip = (sys.executable, "-m", "pip", f"--python={python}", "--quiet", "--disable-pip-version-check", "install")
        (own / "behind.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MODIFF_"))}
        for command in (
            (*pip, "--no-deps", "--no-index", "--ignore-installed", str(wheel.resolve())),
            (*pip, "--no-index", "modiff-kernels[diffusers]"),  # as errors advise: of what is installed, no index asked
            (python, "-c", USE),
            (f"{folder}/bin/modiff", "sample", "--steps", "2", "--images", "1", "--out", "a.png", "--quiet"),
        ):
            subprocess.run(command, cwd=folder, env=clean, check=True)
    print(f"check_wheel: {wheel.name} works in a fresh environment")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
