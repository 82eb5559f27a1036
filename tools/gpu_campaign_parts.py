"""The parts of tools/gpu_campaign.py, in the order in which they matter, with their time limits on an H200."""

from __future__ import annotations

import dataclasses

NETWORKS = ("sd15", "sdxl", "ldm8_churches", "ddpm_cifar10")


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of the campaign.

    command: words in which {python}, {work} (the campaign's folder) and {budget} (seconds it may use) are filled in.
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
        "gpu_tests",
        "all tests that need a GPU; in 14 processes, as Triton compiles some 1500 forms for them",
        _pytest("-n", "14", "--maxfail", "60", "tests/backends", "tests/integrations/test_graphs_on_gpu.py"),
        360,
    ),
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
)

SETS = {"all": tuple(part.name for part in PARTS)}
"""Parts by what they are for; what a part needs comes along."""

WHEELS = ("diffusers==0.42.1",)
"""What parts import beside torch, triton and the package's own dependencies."""
