"""Fixtures for all tests: seeds, poisoned buffers, a fresh dispatcher, places. GPU tests run where there is one."""

import hashlib
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # `@triton.jit` decides at import: without a GPU, kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

from modiff_kernels.ops import dispatch

torch.set_num_threads(1)  # enough for small networks, and steady on a busy machine


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` are no part of a run without a GPU."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        config.stash[LEFT_OUT] = len(gpu)


LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter, config):
    if LEFT_OUT in config.stash:
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} tests for a GPU left out: torch sees no CUDA device")


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty():
    """Fill every uninitialised tensor, also those made in C++: NaN for floats, the largest value for integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_dispatch():
    """`dispatch` without choices or warnings from earlier tests, and cleaned again afterwards."""
    dispatch.reset()
    yield dispatch
    dispatch.reset()


@pytest.fixture(scope="session")
def compiler():
    """Name of the C++ compiler."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        pytest.skip(f"the C++ compiler {name!r} was not found")
    return name


@pytest.fixture(scope="session")
def maps(tmp_path_factory, compiler):
    """The functions of csrc that tests/backends/cuda/emulator/maps.cpp compiles into a Python module."""
    from tests.backends.cuda.emulation import compile_module

    pybind11 = pytest.importorskip("pybind11", reason="pybind11, of the extra `test`, was not found")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Python.h was not found: the headers of this Python (python3-dev on Debian and Ubuntu) are missing")
    return compile_module(compiler, tmp_path_factory.mktemp("maps"), pybind11.get_include())


@pytest.fixture(scope="session")
def compiled(pytestconfig, tmp_path_factory, compiler):
    """A folder for programs compiled of csrc and tests/backends/cuda/emulator, kept until a source changes."""
    from tests.backends.cuda import emulation

    sources = [p for f in (emulation.ROOT / "csrc", emulation.EMULATOR) for p in sorted(f.rglob("*")) if p.is_file()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + compiler.encode()).hexdigest()[:16]
    cache = getattr(pytestconfig, "cache", None)  # none with -p no:cacheprovider
    folder = (cache.mkdir("emulator") if cache else tmp_path_factory.mktemp("emulator")) / digest
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def emulators(compiled, compiler):
    """The CUDA kernels on the host, by name: "quantize", "product" (sm_80), "hopper" (sm_90). A sanitizer's complaint
    fails the test whose call it ends."""
    from tests.backends.cuda import emulation

    running = {}

    def start(name):
        if name not in running:
            program = compiled / name
            if not program.exists():
                source, new = emulation.EMULATOR / f"{name}.cpp", program.with_suffix(".new")
                emulation.compile_source(compiler, source, new, *emulation.SANITIZED)
                new.rename(program)
            running[name] = emulation.PROGRAMS[name](program)
        return running[name]

    yield start
    for program in running.values():
        program.close()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where Triton kernels run: its interpreter or a GPU; the one that this process does not have is skipped."""
    from modiff_kernels.backends.triton.launch import INTERPRETED

    if (request.param == "interpreter") != INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 interprets the kernels, without it they are compiled for the GPU")
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def stand_in(request):
    """For `Place.entered`: by name, what plays the GPU."""

    def of(name):
        if name == "interpreter":  # chosen when the kernels are imported
            return {}
        from tests.backends.cuda.emulation import stand_ins

        emulators = request.getfixturevalue("emulators")
        product = emulators("product" if name == "sm80" else "hopper")
        product.other = emulators("product")
        return stand_ins(emulators("quantize"), product)

    return of


def pytest_generate_tests(metafunc):
    """A test with a `place` runs at every one that has code for the `OP` of its module, or at those it lists."""
    if "place" in metafunc.fixturenames:
        from tests.places import places

        names = getattr(metafunc.module, "PLACES", None)
        metafunc.parametrize("place", places(metafunc.module.OP, names), indirect=True)


@pytest.fixture
def place(request, stand_in, poisoned_empty):
    """A place, entered; whatever is allocated while the test runs is poisoned."""
    with request.param.entered(stand_in) as entered:
        yield entered


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory):
    """A pipeline of a class-conditional transformer on latents, with random weights."""
    import diffusers

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    dit = diffusers.DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, norm_num_groups=4)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    folder = tmp_path_factory.mktemp("dit")
    diffusers.DiTPipeline(dit.eval(), vae.eval(), diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder
