"""The parts of tools/gpu_campaign.py, in the order in which they matter, with their time limits on an H200."""

from __future__ import annotations

import dataclasses

NETWORKS = ("sd15", "sdxl", "ldm8_churches", "ddpm_cifar10")
LAYERS = ("--network", *NETWORKS, "--batch", "1", "2", "8", "16", "64")
BOUNDED = ("--record", "--skip-recorded", "--budget", "{budget}")


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of the campaign.

    command: words in which {python}, {work} (the campaign's folder), {budget} (seconds it may use), {minutes} (the
    same) and {data} (--data; without it the part is not run) are filled in.
    seconds: after which it is stopped; a command with {budget} ends itself `margin_seconds` before.
    needs: parts that must have passed. every_time: run again although it has passed, since what it makes is no result.
    program: one that must be on the PATH.
    """

    name: str
    purpose: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ("build",)
    every_time: bool = False
    program: str | None = None
    margin_seconds: int = 20
    variables: tuple[tuple[str, str], ...] = ()


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("{python}", "-m", "pytest", "-p", "no:cacheprovider", "-v", "--tb=short", "-m", "gpu", *arguments)


def _quality(model: tuple[str, ...], report: str) -> tuple[str, ...]:
    """The study of pictures: float images and codes are kept outside of {work}, they are too large to bring back."""
    words = ("{python}", "benchmarks/quality.py", "--data", "{data}", *model, "--device", "cuda", "--dtype", "float16")
    words += ("--batch", "128", "--times", "--cuda-graphs", "--compile", "--quiet", "--resume", "--budget", "{budget}")
    return (*words, "--keep", "build/quality", "--json", f"benchmarks/results/{report}.json")


def _training(preset: str, batch: int, out: str) -> tuple[str, ...]:
    words = ("{python}", "examples/train_ddpm.py", "--data", "{data}", "--out", out, "--preset", preset, "--quiet")
    words += ("--batch-size", str(batch), "--lr", "4e-4", "--ema", "0.9995", "--minutes", "{minutes}", "--resume")
    return (*words, "--device", "cuda", "--checkpoint-dir", f"build/checkpoints/{preset}")


def _sanitized(tool: str, *arguments: str) -> tuple[str, ...]:
    only_ours = () if tool == "memcheck" else ("--kernel-name", "kns=modiff")
    watched = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *only_ours)
    return (*watched, "{python}", "tools/sanitize_kernels.py", *arguments)


UNCACHED = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # every tensor is an allocation whose ends are watched


def _bounded(script: str, *arguments: str) -> tuple[str, ...]:
    """A benchmark on the GPU that ends itself and, the next time, goes on with what it has not recorded."""
    return ("{python}", f"benchmarks/{script}", *arguments, "--device", "cuda", "--budget", "{budget}", "--quiet")


def _steps(network: str, *batches: str) -> tuple[str, ...]:
    few = ("--calls", "8", "--rounds", "3", "--record", "--skip-recorded")
    return _bounded("bench_unet_step.py", "--network", network, "--batch", *batches, *few)


def _runs(network: str, *images: str) -> tuple[str, ...]:
    few = ("--rounds", "3", "--record", "--skip-recorded")
    return _bounded("bench_sampling.py", "--network", network, "--images", *images, *few)


PARTS = (
    Part("environment", "GPU, driver, versions", ("nvidia-smi",), 20, needs=()),
    Part(
        "build",
        "compiled kernels for this CPU and GPU",
        ("{python}", "setup.py", "build_ext", "--inplace"),
        240,
        needs=(),
        every_time=True,
        variables=(("MODIFF_CUDA", "ON"),),
    ),
    Part("doctor", "which backends run, and why others do not", ("{python}", "-m", "modiff_kernels", "doctor"), 60),
    Part(
        "families",
        "every family of kernels once, against the reference",
        ("{python}", "tools/sanitize_kernels.py"),
        150,
    ),
    Part(
        "smoke_cuda",
        "layers of UNets through the wgmma kernels",
        _pytest("tests/backends/cuda/test_hopper_on_gpu.py"),
        90,
    ),
    Part(
        "gpu_tests",
        "all tests that need a GPU; in 14 processes, as Triton compiles some 1500 forms for them",
        _pytest("-n", "14", "--maxfail", "60", "tests/backends", "tests/integrations/test_graphs_on_gpu.py"),
        360,
    ),
    Part(
        "memcheck",
        "the families under compute-sanitizer: addresses",
        _sanitized("memcheck"),
        120,
        needs=("build", "families"),
        program="compute-sanitizer",
        variables=UNCACHED,
    ),
    Part(
        "racecheck",
        "the same: races in shared memory",
        _sanitized("racecheck", "--backend", "cuda"),
        120,
        needs=("build", "families"),
        program="compute-sanitizer",
        variables=UNCACHED,
    ),
    Part(
        "initcheck",
        "the same: reads of memory that nothing has written",
        _sanitized("initcheck", "--backend", "cuda", "--match", "quantize"),
        90,
        needs=("build", "families"),
        program="compute-sanitizer",
        variables=UNCACHED,
    ),
    Part(
        "machine",
        "rates of copies and products, as rows",
        ("{python}", "benchmarks/bench_machine.py", "--device", "cuda", "--record"),
        60,
    ),
    Part(
        "cutlass",
        "CUTLASS's int8 kernels, a rival; what is carried in build/cutlass_int8 is not compiled again",
        ("{python}", "-m", "benchmarks.cutlass_int8.build"),
        240,
        needs=(),
        every_time=True,
        program="nvcc",
    ),
    Part(
        "tune_cuda",
        "tiles of the CUDA products, measured",
        ("{python}", "tools/tune_cuda.py", *LAYERS, *BOUNDED),
        240,
        needs=("build", "smoke_cuda"),
    ),
    Part(
        "tune_triton",
        "tiles of the Triton products, measured",
        ("{python}", "tools/tune_triton.py", *LAYERS, *BOUNDED),
        240,
    ),
    Part(
        "products",
        "single layers beside cuDNN, cuBLAS and CUTLASS",
        ("{python}", "benchmarks/bench_products.py", *LAYERS, *BOUNDED),
        420,
    ),
    Part(
        "ncu",
        "counters of the products furthest from their bound",
        ("{python}", "tools/ncu_worst.py", "--budget", "{budget}"),
        180,
        program="ncu",
    ),
    Part(
        "passes",
        "fused passes beside inductor's, and the bandwidth they reach",
        (
            *("{python}", "benchmarks/bench_passes.py", "--network", "sd15", "--network", "ddpm_cifar10"),
            *("--batch", "2", "16", "--device", "cuda", "--seconds", "0.05", "--record", "--quiet"),
        ),
        240,
    ),
    Part(
        "plans_sd15",
        "layer plans of Stable Diffusion 1.5",
        _bounded("make_plans.py", "--network", "sd15", "--batch", "2", "16", "--rounds", "2", "--skip-existing"),
        150,
    ),
    Part("steps_sd15", "whole steps of Stable Diffusion 1.5", _steps("sd15", "16", "2", "8", "1", "64"), 420),
    Part("runs_sd15", "whole runs of Stable Diffusion 1.5", _runs("sd15", "8", "1"), 420),
    Part(
        "profile_sd15",
        "what takes the time of its steps",
        (*_steps("sd15", "16", "2"), "--profile", "--rows", "float-compile-graphs,modulated-w8a8"),
        120,
    ),
    Part("steps_sdxl", "whole steps of Stable Diffusion XL", _steps("sdxl", "8", "2", "1", "16", "64"), 540),
    Part("runs_sdxl", "whole runs of Stable Diffusion XL", _runs("sdxl", "4", "1"), 540),
    Part("steps_ddpm", "whole steps of DDPM", _steps("ddpm_cifar10", "64", "8", "1", "2", "16"), 240),
    Part("runs_ddpm", "whole runs of DDPM", _runs("ddpm_cifar10", "64", "1"), 180),
    Part("runs_shipped", "whole runs of the shipped model, which is trained", _runs("cifar10_small16", "64", "8"), 120),
    Part("steps_ldm8", "whole steps of LDM-8", _steps("ldm8_churches", "8", "64", "1", "2", "16"), 240),
    Part(
        "plans",
        "layer plans of all networks",
        _bounded(
            "make_plans.py",
            *("--network", "sd15", "sdxl", "ddpm_cifar10", "ldm8_churches"),
            *("--batch", "1", "2", "8", "16", "64", "--rounds", "2", "--skip-existing"),
        ),
        540,
    ),
    Part(
        "quality_small16",
        "pictures of the shipped model in every configuration",
        _quality((), "quality_small16_gpu"),
        420,
        margin_seconds=45,
    ),
    Part(
        "quality_features",
        "a classifier of 32x32 images, for Fréchet distances",
        (
            *("{python}", "benchmarks/feature_network.py", "--data", "{data}", "--size", "32", "--width", "64"),
            *("--epochs", "40", "--batch-size", "512", "--minutes", "{minutes}", "--device", "cuda", "--quiet"),
        ),
        180,
        needs=(),
        margin_seconds=40,
    ),
    Part(
        "quality_train_ddpm",
        "the 35.7 M DDPM UNet, to be studied where it was trained",
        _training("ddpm_cifar10", 256, "build/ddpm_cifar10"),
        570,
        needs=(),
        margin_seconds=70,
    ),
    Part(
        "quality_ddpm",
        "its pictures in every configuration",
        _quality(("--model", "build/ddpm_cifar10"), "quality_ddpm_cifar10"),
        570,
        needs=("build", "quality_features", "quality_train_ddpm"),
        margin_seconds=60,
    ),
    Part(
        "quality_train_base32",
        "a model of 9 M parameters for 32x32 images, small enough to ship",
        _training("base32", 256, "{work}/base32"),
        570,
        needs=(),
        margin_seconds=70,
    ),
)

CHECKS = ("environment", "build", "doctor", "families", "smoke_cuda", "gpu_tests", "memcheck", "racecheck", "initcheck")
SETS = {
    "all": tuple(part.name for part in PARTS),
    "quality": tuple(part.name for part in PARTS if part.name.startswith("quality")),
    "checks": CHECKS,
    "kernels": ("machine", "cutlass", "tune_cuda", "tune_triton", "products", "ncu", "passes"),
    "sampling": tuple(part.name for part in PARTS if part.name.startswith(("plans", "steps", "runs", "profile"))),
}
"""Parts by what they are for; what a part needs comes along."""

WHEELS = ("diffusers==0.42.1", "torchao==0.18.0", "DeepCache==0.1.1", "nvidia-cutlass==4.2.0.0")
"""What parts import beside torch, triton and the package's own dependencies."""
