"""The parts of tools/gpu_campaign.py, in the order in which they matter, with their time limits on an H200."""

import dataclasses

BOUNDED = ("--device", "cuda", "--record", "--skip-recorded", "--budget", "{budget}", "--quiet")
"""Of a benchmark that ends itself and, the next time, goes on with what it has not recorded."""
TWELVE = ("--network", "sd15", "sdxl", "ddpm_cifar10", "--batch", "8", "16", "--most", "12")


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of the campaign.

    command: words in which {python}, {work} (the campaign's folder), {budget} (seconds it may use), {test_seconds} (and
    one test) and {jobs} (as many processes as there are processors but two) are filled in.
    seconds: after which it is stopped; a command with {budget} ends itself before, and has `margin_seconds` besides to
    begin and end. needs: parts that must have passed. every_time: run again although it has passed, since what it makes
    is no result. program: one that must be found."""

    name: str
    purpose: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ("build",)
    every_time: bool = False
    program: str | None = None
    margin_seconds: int = 8
    variables: tuple[tuple[str, str], ...] = ()


def _tests(name: str, purpose: str, seconds: int, *arguments: str) -> Part:
    """Tests that need a GPU, in many processes: a lost context costs one of them, a hanging test itself."""
    words = ("{python}", "-m", "pytest", "-p", "tools.pytest_gpu", "-v", "--tb=long", "-m", "gpu")
    kept = ("--failures", "{work}/failures.txt", "-n", "{jobs}", "--max-worker-restart", "60")
    kept += ("--test-seconds", "{test_seconds}")
    only = ("-k", "not emulated and not interpreter")  # they stand for the host as well
    return Part(name, purpose, (*words, *kept, *only, *arguments), seconds, variables=(("OMP_NUM_THREADS", "1"),))


def _bench(name: str, purpose: str, seconds: int, *arguments: str) -> Part:
    return Part(name, purpose, ("{python}", "-m", "benchmarks", *arguments, *BOUNDED), seconds)


def _products(name: str, seconds: int, purpose: str, *arguments: str) -> Part:
    return _bench(name, purpose, seconds, "layers", *TWELVE, *arguments)


def _steps(network: str, batch: str, kind: str, seconds: int, rows: str) -> Part:
    """kind: "float", "default" (what users get: plan, backends, graphs), or a backend, with all layers modulated."""
    by = ("--backend", kind if kind in ("cuda", "triton") else "auto")
    by += ("--plan", "auto") if kind == "default" else ()
    words = ("steps", "--network", network, "--batch", batch, *by, "--rows", rows)
    return _bench(f"step_{network}_{kind}", f"a step of {network}, {kind}", seconds, *words, "--calls", "8")


def _sanitized(tool: str, purpose: str, seconds: int, *arguments: str) -> Part:
    only_ours = () if tool == "memcheck" else ("--kernel-name", "kns=modiff")
    watched = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *only_ours)
    command = (*watched, "{python}", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *arguments)
    # Every tensor is an allocation whose ends are watched.
    variables = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Part(tool, purpose, command, seconds, program="compute-sanitizer", variables=variables)


BUILD = """import subprocess, sys
from modiff_kernels.backends import cpu, cuda, source_hash
found = [backend.unavailable() or backend.build_info() for backend in (cpu, cuda)]
print(*found, sep="\\n", flush=True)
good = all(isinstance(info, dict) and info["sources"] == source_hash() for info in found)
sys.exit(0 if good else subprocess.call([sys.executable, "setup.py", "build_ext", "--inplace"]))"""
FLOATS, GRAPHS = "float-channels_last,float-compile-default-graphs", "modulated-w8a8-graphs"
DEFAULT = "planned-w8-graphs"
CONTRACT, ON_GPU = "tests/contract", "tests/backends/cuda/test_on_gpu.py"
PARTS = (
    Part("environment", "GPU, driver, versions", ("nvidia-smi",), 20, needs=()),
    Part("build", "compiled kernels for this CPU and GPU, where none of these sources load", ("{python}", "-c", BUILD),
         120, needs=(), every_time=True, variables=(("MODIFF_CUDA", "ON"),)),
    _tests("tests_cuda", "tests of the CUDA kernels", 90, "tests/backends/cuda"),
    _tests("tests", "all other tests that need a GPU", 120, "tests", "--ignore", "tests/backends/cuda"),
    _products("products_cuda", 50, "twelve layers by cuda", "--backend", "cuda", "--rows", "product,modulate"),
    _products("products_torch", 40, "the same by cuDNN, cuBLAS and CUTLASS", "--rows", "bf16,int_mm,cutlass_int8"),
    _steps("ddpm_cifar10", "16", "default", 45, DEFAULT),
    _steps("ddpm_cifar10", "16", "float", 70, FLOATS),
    _steps("sd15", "8", "default", 60, DEFAULT),
    _steps("sd15", "8", "float", 120, FLOATS),
    _products("products_triton", 70, "twelve layers by triton", "--backend", "triton", "--rows", "product,modulate"),
    _steps("ddpm_cifar10", "16", "cuda", 45, GRAPHS),
    _steps("sd15", "8", "cuda", 60, GRAPHS),
    _steps("ddpm_cifar10", "16", "triton", 60, GRAPHS),
    _steps("sd15", "8", "triton", 90, GRAPHS),
    _bench("machine", "rates of copies and products, as rows", 30, "layers", "--machine"),
    _sanitized("memcheck", "the contract of cuda under compute-sanitizer: addresses", 60, CONTRACT, "-k", "cuda-gpu"),
    _sanitized("racecheck", "races in shared memory, in every tile of products", 60, ON_GPU, "-k", "every_tile"),
    # Tests of the contract fill all memory first.
    _sanitized("initcheck", "reads of memory that nothing has written", 60, ON_GPU, "-k", "cuda-per_"),
    Part("cutlass", "CUTLASS's int8 kernels, a baseline; what is carried in build/cutlass_int8 is not compiled again",
         ("{python}", "-m", "benchmarks.baselines.cutlass_int8.build"), 240, needs=(), every_time=True, program="nvcc"),
    _steps("sdxl", "8", "default", 120, DEFAULT),
    _steps("sdxl", "8", "float", 180, FLOATS),
    _bench("runs_sd15", "whole runs of sd15", 240, "runs", "--network", "sd15", "--images", "4", "--backend", "cuda"),
    _bench("runs_shipped", "whole runs of the shipped model, which is trained", 120, "runs", "--images", "64"),
)  # fmt: skip


def _until(first: str, last: str) -> tuple[str, ...]:
    names = [part.name for part in PARTS]
    return tuple(names[names.index(first) : names.index(last) + 1])


SETS = {
    "first": _until("environment", "machine"),
    "checks": ("tests_cuda", "tests", *_until("memcheck", "initcheck")),
    "kernels": ("products_cuda", "products_torch", "products_triton"),
    "sampling": _until("step_sdxl_default", "runs_shipped"),
    "all": _until(PARTS[0].name, PARTS[-1].name),
}
"""Parts by what they are for; what a part needs comes along."""

DIFFUSERS, DEEPCACHE = "diffusers==0.42.1", "DeepCache==0.1.1"
MORE_WHEELS = {"cutlass": "nvidia-cutlass==4.2.0.0", "runs_sd15": DEEPCACHE, "runs_shipped": DEEPCACHE}
"""What parts import beside torch, triton, diffusers and the package's own dependencies, by their names."""
