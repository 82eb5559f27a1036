"""Rules of the tree: which way imports point, where torch headers may stand, what imports and builds cost and need."""

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

# From low to high: a part imports only parts of a lower level; parts of one level do not import each other.
TIERS = (
    ("models", "metrics", "log", "_version"),
    ("quant",),
    ("backends", "config"),
    ("ops",),
    ("nn",),
    ("planning", "calibration"),
    ("integrations",),
    ("",),  # the face of the package
    ("evaluation",),
    ("cli",),
    ("__main__",),
)
LEVELS = {part: level for level, parts in enumerate(TIERS) for part in parts}
# Reading a tensor on the host waits for the device in the middle of a step; the text of an error may.
HOT_PARTS = ("nn", "ops", "integrations", "backends/triton", "backends/cuda")
HOST_READS = {"item", "cpu", "tolist", "numpy"}
BINDING_FILES = {"csrc/cpu/ops.cpp", "csrc/cuda/ops.cpp"}
TORCH_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.MULTILINE)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name below the package, "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below the package, "" for the package itself) of all imports of the package's own modules:
    those of functions and those for types count like any other."""
    package = ["modiff_kernels", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            below = stem.removeprefix("modiff_kernels").lstrip(".")
            parts = [(alias.name, is_module(f"{below}.{alias.name}".lstrip("."))) for alias in node.names]
            names = [f"{stem}.{part}" if whole_module else stem for part, whole_module in parts]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "modiff_kernels":
                yield node.lineno, name.removeprefix("modiff_kernels").lstrip(".")


def test_imports_point_one_way():
    parts, wrong = {module_name(path).split(".")[0] for path in sources(PACKAGE)}, []
    assert parts <= set(LEVELS), f"give these a level in {Path(__file__).name}: {sorted(parts - set(LEVELS))}"
    for path in sources(PACKAGE):
        own = module_name(path).split(".")[0]
        for line, imported in sorted(set(imports(path))):
            other = imported.split(".")[0]
            if other != own and LEVELS.get(other, 99) >= LEVELS.get(own, 99):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: imports {imported or 'the package itself'}")
    assert not wrong, "imports must point from a higher part to a lower one (LEVELS):\n" + "\n".join(wrong)


def rings(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        found, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - found
            found |= new
            todo += new
        reach[start] = found
    return sorted({tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in graph if a in reach[a]})


def test_no_ring_between_modules():
    graph = {module_name(path): {name for _, name in imports(path)} for path in sources(PACKAGE)}
    found = ["\n  ".join(f"{a} -> {', '.join(sorted(graph[a] & set(ring)))}" for a in ring) for ring in rings(graph)]
    assert not found, "these modules import each other, in functions or for types too:\n  " + "\n\n  ".join(found)
    assert rings({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]


def test_backends_import_reference_and_nothing_else_beside_it():
    wrong = []
    for path in sources(PACKAGE / "backends"):
        importer = module_name(path).split(".")
        for line, imported in imports(path):
            parts = imported.split(".")
            own = parts[:2] == importer[:2] or imported in ("backends", "backends.reference")
            if not own and parts[0] != "quant":
                wrong.append(f"{path.relative_to(ROOT)}:{line}: imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_two_stems_stand_everywhere():
    """`git grep -l quantize` and `git grep -l product` are whole stories."""
    from modiff_kernels.backends import BACKENDS
    from modiff_kernels.ops import schema

    for stem in ("quantize", "product"):
        assert hasattr(schema, stem)
        places = {f"csrc/{part}": f"{stem}*" for part in ("cpu", "cuda/common" if stem == "quantize" else "cuda/sm80")}
        places["csrc/cuda/sm90"] = "product*"
        for folder, pattern in places.items():
            assert list((ROOT / folder).glob(pattern)), f"no {pattern} in {folder}"
        for name in BACKENDS:
            path = PACKAGE / "backends" / name
            if path.is_dir():
                assert list(path.glob(f"{stem}*.py")), f"no {stem}*.py in {path}"
            else:
                text = path.with_suffix(".py").read_text()
                assert re.search(rf"^def {stem}\(|^from .reference import .*\b{stem}\b", text, re.MULTILINE), path


def test_package_face_imports_nothing_but_the_registration():
    """When it is imported; what it has is imported at its first use."""
    top = ast.parse((PACKAGE / "__init__.py").read_text()).body
    names = {node.module for node in top if isinstance(node, ast.ImportFrom) and not node.level}
    names |= {f"modiff_kernels.{node.module}" for node in top if isinstance(node, ast.ImportFrom) and node.level}
    own = {name for name in names if name.startswith("modiff_kernels")}
    assert own <= {"modiff_kernels._version", "modiff_kernels.integrations", "modiff_kernels.integrations.registration"}
    top = ast.parse((PACKAGE / "integrations" / "registration.py").read_text()).body
    names = {node.module for node in top if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_torch_headers_stand_in_binding_files_only():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    found = {path.relative_to(ROOT).as_posix() for path in files if TORCH_INCLUDE.search(path.read_text())}
    assert found <= BINDING_FILES, f"only {sorted(BINDING_FILES)} may include torch headers, found in {found}"


def test_hot_parts_do_not_read_the_device():
    wrong = []
    for part in HOT_PARTS:
        for path in sources(PACKAGE / part):
            tree = ast.parse(path.read_text(), str(path))
            raised = {child for node in ast.walk(tree) if isinstance(node, ast.Raise) for child in ast.walk(node)}
            for node in ast.walk(tree):
                name = getattr(node.func, "attr", None) if isinstance(node, ast.Call) else None
                if name in HOST_READS and node not in raised:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: .{name}()")
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


def test_runs_without_optional_parts_and_compiled_library(tmp_path: Path):
    """As after an install with MODIFF_SKIP_BUILD=1."""
    left_out = shutil.ignore_patterns("_lib", "*.safetensors", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "modiff_kernels", ignore=left_out)
    parts = [name for name in ("config", "quant", "ops", "backends.reference", "nn", "cli") if is_module(name)]
    code = (
        "import importlib, sys\n"
        "for name in ('diffusers', 'transformers', 'triton', 'skimage', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "import modiff_kernels\n"
        f"assert modiff_kernels.__file__.startswith({str(tmp_path)!r}), modiff_kernels.__file__\n"
        f"for part in {parts!r}:\n"
        "    importlib.import_module('modiff_kernels.' + part)\n"
        "import torch\n"
        "from modiff_kernels import ops\n"
        "x, x_hat = torch.tensor([[1.0, -2.0, 0.5, 3.0]]), torch.zeros(1, 4)\n"
        "codes, scale, absmax = ops.quantize(x, x_hat=x_hat, granularity='per_tensor')\n"
        "torch.testing.assert_close(x_hat, scale * codes)\n"
        "assert absmax.tolist() == [3.0]\n"
        "from modiff_kernels.cli import main\n"
        "assert main(['sample']) == main(['compare']) == 2  # one line says what to install\n"
    )
    run_python(code, tmp_path, PYTHONPATH=str(tmp_path))


NO_TORCH = """
import importlib.util, setuptools.build_meta as build, sysconfig
find_spec, get_path = importlib.util.find_spec, sysconfig.get_path
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find_spec(name, *more)
sysconfig.get_path = lambda key, *more, **named: "/none" if key.endswith("lib") else get_path(key, *more, **named)
"""
KERNELS = "import runpy, sys; sys.argv[1:] = ['build_ext']; runpy.run_path('setup.py')"
SDIST = "assert not build.get_requires_for_build_sdist(); print(build.build_sdist('.'))"
WHEEL = "import setuptools.build_meta as build; print(build.build_wheel('.'))"
ALONE = "the Python part alone is built, without the fast kernels: "
BUILDS = {  # code, variables, and the end of its output and errors; sys.executable is a compiler that nobody calls
    "sdist": (NO_TORCH + SDIST, {}, "tar.gz"),
    "no torch": (NO_TORCH + WHEEL, {"CXX": sys.executable, "PATH": "/none"}, f"{ALONE}no torch .*py3-none-any.whl"),
    "no compiler": (WHEEL, {"CXX": "/none"}, f"{ALONE}no C.. compiler /none: install .*py3-none-any.whl"),
    "not wanted": (WHEEL, {"MODIFF_SKIP_BUILD": "1"}, f"{ALONE}MODIFF_SKIP_BUILD=1\n.*py3-none-any.whl"),
    "demanded": (WHEEL, {"CXX": "/none", "MODIFF_SKIP_BUILD": "0"}, "cannot be compiled: no C.. compiler /none: .*"),
    "broken": (KERNELS, {"CXX": "false"}, "could not be built, see above; MODIFF_SKIP_BUILD=1 .*"),
}


@pytest.mark.parametrize("what", BUILDS)
def test_builds_without_torch_and_without_a_compiler(tmp_path, what):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.24)\nproject(none LANGUAGES CXX)\n")
    code, variables, last = BUILDS[what]
    env = {"MODIFF_SKIP_BUILD": "", "PATH": os.environ["PATH"], **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    output = done.stderr + done.stdout
    assert re.search(f"{last}$", output.strip(), re.DOTALL), output
    assert "Traceback" not in output


def test_messages_name_extras_that_the_package_has():
    """An installed package brings its own extras, so that no index needs to have it."""
    texts = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    extras = set(re.findall(r"pip install 'modiff-kernels\[(\w+)\]'", texts))
    assert extras == {"all", "diffusers", "triton"}
    assert not re.search(r"pip install (?!'modiff-kernels\[)", texts)
    assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


def test_import_is_fast_and_does_not_load_torch():
    assert run_python("import sys, modiff_kernels; print('torch' in sys.modules)", ROOT) == "False"
    code = "import torch, time\nt = time.perf_counter()\nimport modiff_kernels\nprint(time.perf_counter() - t)"
    measured: list[float] = []
    while len(measured) < 3 and min(measured, default=1.0) >= 0.3:  # a busy machine gets three tries
        measured.append(float(run_python(code, ROOT)))
    assert min(measured) < 0.3, f"modiff_kernels and its layers take {measured} s to import over torch"


def test_public_names_are_listed_and_unknown_ones_refused():
    import modiff_kernels as mk

    assert set(mk.__all__) <= set(dir(mk))
    for name in mk.__all__:
        assert getattr(mk, name) is not None
    entries = set(re.findall(r"^::: modiff_kernels\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert entries == set(mk.__all__) - {"__version__"}, "docs/api.md has an entry for every public name"
    with pytest.raises(AttributeError, match=r"public names: .*ModiffConfig"):
        mk.no_such_name  # noqa: B018 (the access is what is tested)
