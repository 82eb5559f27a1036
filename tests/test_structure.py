"""Rules of the tree: which way imports point, where torch headers may stand, what an import costs and needs."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modiff_kernels"

# A room imports only rooms of a lower level; rooms of one level do not import each other.
LEVELS = {
    "__main__": 8,
    "cli": 7,
    "evaluation": 6,
    "integrations": 5,
    "planning": 4,
    "calibration": 4,
    "nn": 3,
    "ops": 2,
    "backends": 1,
    "config": 1,
    "metrics": 0,
    "quant": 0,
    "models": 0,
    "tuned": 0,
}
# Reading a tensor on the host waits for the device in the middle of a step; the text of an error may.
HOT_ROOMS = ("nn", "ops", "integrations", "backends/triton", "backends/cuda")
HOST_READS = {"item", "cpu", "tolist", "numpy"}
BINDING_FILES = {"csrc/cpu/ops.cpp", "csrc/cuda/ops.cpp"}
TORCH_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.MULTILINE)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name below the package, "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def level(module: str) -> int | None:
    return LEVELS.get(module, LEVELS.get(module.split(".")[0]))


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below the package) of all imports of the package's own modules, type-only ones left out."""
    tree = ast.parse(path.read_text(), str(path))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    package = ["modiff_kernels", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            below = stem.removeprefix("modiff_kernels").lstrip(".")
            names = [
                f"{stem}.{alias.name}" if is_module(".".join(filter(None, [below, alias.name]))) else stem
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name.startswith("modiff_kernels."):
                yield node.lineno, name.removeprefix("modiff_kernels.")


def test_every_room_has_a_level():
    rooms = {module_name(path).split(".")[0] for path in sources(PACKAGE)} - {""}
    assert rooms <= set(LEVELS), f"give these rooms a level in {Path(__file__).name}: {sorted(rooms - set(LEVELS))}"


def test_imports_point_one_way():
    wrong = []
    for path in sources(PACKAGE):
        importer = module_name(path)
        if not importer:
            continue
        for line, imported in sorted(set(imports(path))):
            own, other = level(importer), level(imported)
            same_room = importer.split(".")[0] == imported.split(".")[0]
            if own is None or other is None or same_room or other < own:
                continue
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {importer} imports {imported}")
    assert not wrong, "imports must point from a higher room to a lower one (LEVELS):\n" + "\n".join(wrong)


def test_backends_do_not_import_each_other():
    wrong = []
    for path in sources(PACKAGE / "backends"):
        importer = module_name(path).split(".")
        for line, imported in imports(path):
            parts = imported.split(".")
            if len(importer) > 1 and parts[0] == "backends" and len(parts) > 1 and parts[1] != importer[1]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_package_face_imports_nothing_of_the_package_but_the_registration():
    assert [name for _, name in imports(PACKAGE / "__init__.py")] == ["integrations.registration"]
    top = ast.parse((PACKAGE / "integrations" / "registration.py").read_text()).body
    names = {node.module for node in top if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_torch_headers_stand_in_binding_files_only():
    wrong = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.is_file()
        and path.relative_to(ROOT).as_posix() not in BINDING_FILES
        and TORCH_INCLUDE.search(path.read_text())
    ]
    assert not wrong, f"only {sorted(BINDING_FILES)} may include torch headers, found in {wrong}"


def test_hot_rooms_do_not_read_the_device():
    wrong = []
    for room in HOT_ROOMS:
        for path in sources(PACKAGE / room):
            tree = ast.parse(path.read_text(), str(path))
            raised = {child for node in ast.walk(tree) if isinstance(node, ast.Raise) for child in ast.walk(node)}
            wrong += [
                f"{path.relative_to(ROOT)}:{node.lineno}: .{node.func.attr}()"
                for node in ast.walk(tree)
                if node not in raised
                and isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in HOST_READS
            ]
    assert not wrong, "these wait for the device inside a step:\n" + "\n".join(wrong)


def test_environment_variables_are_documented():
    read = re.compile(r"""(?:environ|getenv)\W[^\n]*?["'](MODIFF_\w+)["']""")
    files = [ROOT / "setup.py", *sources(PACKAGE), *sources(ROOT / "benchmarks")]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    used = {name for path in files for name in read.findall(path.read_text())}
    documented = set(re.findall(r"^\| `(MODIFF_\w+)`", (ROOT / "ENVS.md").read_text(), re.MULTILINE))
    assert used == documented, f"ENVS.md lists {sorted(documented)}, the code reads {sorted(used)}"


def run_python(code: str, cwd: Path, **env: str) -> str:
    """Output of `code` in a clean process; fails with its error text."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MODIFF_"))}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    """A copy of the package without compiled library and models, as after an install with MODIFF_SKIP_BUILD=1."""
    shutil.copytree(
        PACKAGE, tmp_path / "modiff_kernels", ignore=shutil.ignore_patterns("_lib", "*.safetensors", "__pycache__")
    )
    return tmp_path


BLOCK_OPTIONAL = """
import sys
for name in ("diffusers", "transformers", "triton", "skimage", "PIL"):
    sys.modules[name] = None
"""


def test_imports_without_optional_parts(bare_package: Path):
    rooms = [name for name in ("config", "quant", "ops", "backends.reference", "nn", "cli") if is_module(name)]
    code = BLOCK_OPTIONAL + (
        "import importlib, modiff_kernels\n"
        f"assert modiff_kernels.__file__.startswith({str(bare_package)!r}), modiff_kernels.__file__\n"
        f"for room in {rooms!r}:\n"
        "    importlib.import_module('modiff_kernels.' + room)\n"
    )
    run_python(code, bare_package, PYTHONPATH=str(bare_package))


def test_ops_run_without_compiled_library(bare_package: Path):
    code = BLOCK_OPTIONAL + (
        "import torch\n"
        "from modiff_kernels import ops\n"
        "x, x_hat = torch.tensor([[1.0, -2.0, 0.5, 3.0]]), torch.zeros(1, 4)\n"
        "codes, scale, absmax = ops.quantize_residual(x, x_hat, None, 8, 'per_tensor')\n"
        "torch.testing.assert_close(x_hat, scale * codes)\n"
        "assert absmax.tolist() == [3.0]\n"
    )
    run_python(code, bare_package, PYTHONPATH=str(bare_package))


def test_import_is_fast():
    code = (
        "import torch, time\nstart = time.perf_counter()\nimport modiff_kernels\nprint(time.perf_counter() - start)\n"
    )
    measured: list[float] = []
    while len(measured) < 3 and min(measured, default=1.0) >= 0.3:  # a busy machine gets three tries
        measured.append(float(run_python(code, ROOT)))
    assert min(measured) < 0.3, f"modiff_kernels and its layers take {measured} s to import over torch"


def test_import_does_not_load_torch():
    assert run_python("import sys, modiff_kernels; print('torch' in sys.modules)", ROOT) == "False"


def test_public_names_are_listed_and_unknown_ones_refused():
    import modiff_kernels as mk

    assert set(mk.__all__) <= set(dir(mk))
    for name in mk.__all__:
        assert getattr(mk, name) is not None
    with pytest.raises(AttributeError, match=r"public names: .*ModiffConfig"):
        mk.no_such_name  # noqa: B018 (the access is what is tested)
