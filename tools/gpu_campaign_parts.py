"""The parts of tools/gpu_campaign.py, in the order in which they matter, with their time limits on an H200."""

from __future__ import annotations

import dataclasses

NETWORKS = ("sd15", "sdxl", "ldm8_churches", "ddpm_cifar10")


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
        "machine",
        "rates of copies and products, as rows",
        ("{python}", "benchmarks/bench_machine.py", "--device", "cuda", "--record"),
        60,
    ),
    Part(
        "smoke_cuda",
        "layers of UNets through the wgmma kernels",
        _pytest("tests/backends/cuda/test_hopper_on_gpu.py"),
        90,
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

SETS = {
    "all": tuple(part.name for part in PARTS),
    "quality": tuple(part.name for part in PARTS if part.name.startswith("quality")),
}
"""Parts by what they are for; what a part needs comes along."""

WHEELS = ("diffusers==0.42.1",)
"""What parts import beside torch, triton and the package's own dependencies."""
