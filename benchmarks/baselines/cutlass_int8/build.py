"""Compile the int8 kernels of CUTLASS that `python -m benchmarks layers` takes as a baseline.

    pip download --no-deps nvidia-cutlass==4.2.0     a wheel, which is a zip file: unpack it somewhere
    python -m benchmarks.baselines.cutlass_int8.build --cutlass FOLDER [--jobs 16]

FOLDER holds CUTLASS's `include`, or is the unpacked wheel. Needs nvcc and no GPU; a kernel of sm_90 takes about a
minute of one core and 3.5 GB. One library per kernel, named after a hash of its source and flags: what is there is not
compiled again, so that the folder can be carried to another machine."""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent
FOLDER = SOURCES.parents[2] / "build" / "cutlass_int8"
VERSION = "4.2.0"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-arch=sm_90a", "-shared", "-Xcompiler", "-fPIC")
"""NDEBUG: its assertions are calls, before which ptxas waits for every wgmma (warning C7510)."""
WITHIN_WHEEL = "cutlass_library/source"


class Kernel(NamedTuple):
    """One kernel: the source beside this file without its suffix, its tile, and what else it is compiled with."""

    source: str
    tile: tuple[int, int, int]
    macros: tuple[tuple[str, int | str], ...]

    @property
    def name(self) -> str:
        rest = [f"c{value}" if key == "CLUSTER_M" else str(value) for key, value in self.macros]
        return "-".join([self.source, "x".join(map(str, self.tile)), *rest])

    def library(self, folder: Path = FOLDER) -> Path:
        """Where it is built: another file whenever source or flags change."""
        sources = [(SOURCES / name).read_text() for name in (f"{self.source}.cu", "entry.h")]
        text = [*sources, *FLAGS, *self.defines(), VERSION]
        return folder / f"{self.name}-{hashlib.sha256(chr(0).join(text).encode()).hexdigest()[:10]}.so"

    def defines(self) -> list[str]:
        sides = [f"-DTILE_{letter}={side}" for letter, side in zip("MNK", self.tile)]
        return sides + [f"-D{key}={value}" for key, value in self.macros]


def _kernel(source: str, tile: tuple[int, int, int], **macros: int | str) -> Kernel:
    return Kernel(source, tile, tuple(macros.items()))


PERSISTENT, STREAM_K = "PersistentScheduler", "StreamKScheduler"
KERNELS = (
    # The largest tiles that two consumer warpgroups hold, with the multicast of a cluster: compute-bound shapes.
    _kernel("gemm_sm90", (128, 256, 128), CLUSTER_M=2, SCHEDULE="Cooperative", SCHEDULER=PERSISTENT),
    _kernel("gemm_sm90", (256, 128, 128), CLUSTER_M=2, SCHEDULE="Cooperative", SCHEDULER=PERSISTENT),
    _kernel("gemm_sm90", (128, 128, 128), CLUSTER_M=2, SCHEDULE="Pingpong", SCHEDULER=PERSISTENT),
    _kernel("gemm_sm90", (128, 128, 128), CLUSTER_M=1, SCHEDULE="Cooperative", SCHEDULER=PERSISTENT),
    # Less than a wave: smaller tiles, and K dealt out between blocks.
    _kernel("gemm_sm90", (64, 128, 128), CLUSTER_M=1, SCHEDULE="Pingpong", SCHEDULER=PERSISTENT),
    _kernel("gemm_sm90", (128, 128, 128), CLUSTER_M=1, SCHEDULE="Cooperative", SCHEDULER=STREAM_K),
    # One consumer warpgroup: 128 x 128 sums are all its registers.
    _kernel("conv_sm90", (128, 128, 128), CLUSTER_M=1),
    _kernel("conv_sm90", (128, 128, 128), CLUSTER_M=2),
    _kernel("conv_sm90", (128, 64, 128), CLUSTER_M=1),
    _kernel("conv_sm90", (64, 128, 128), CLUSTER_M=1),
    _kernel("conv_sm80", (256, 128, 64), WARP_M=64, WARP_N=64, STAGES=3),
    _kernel("conv_sm80", (128, 256, 64), WARP_M=64, WARP_N=64, STAGES=3),
    _kernel("conv_sm80", (128, 128, 64), WARP_M=64, WARP_N=64, STAGES=4),
    _kernel("conv_sm80", (128, 64, 64), WARP_M=64, WARP_N=32, STAGES=5),
    _kernel("conv_sm80", (64, 64, 64), WARP_M=32, WARP_N=32, STAGES=6),
)


def headers(folder: Path | None) -> Path | None:
    """The folder of `include/cutlass`, in `folder` or in an installed nvidia-cutlass; None if there is none."""
    places = [folder, folder / WITHIN_WHEEL] if folder else []
    spec = find_spec("cutlass_library")
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "source")
    return next((place for place in places if (place / "include" / "cutlass" / "cutlass.h").is_file()), None)


def command(kernel: Kernel, cutlass: Path, output: Path) -> list[str]:
    includes = [f"-I{cutlass / 'include'}", f"-I{cutlass / 'tools' / 'util' / 'include'}"]
    return ["nvcc", *FLAGS, *includes, *kernel.defines(), str(SOURCES / f"{kernel.source}.cu"), "-o", str(output)]


def build(kernels: Sequence[Kernel], cutlass: Path, folder: Path = FOLDER, jobs: int = 1) -> dict[Kernel, str]:
    """Compiles what is missing in `folder`, `jobs` at a time. Returns the messages of kernels that do not compile."""
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(kernel: Kernel) -> str | None:
        library = kernel.library(folder)
        if library.exists():
            return None
        part = library.with_suffix(".part")
        done = subprocess.run(command(kernel, cutlass, part), capture_output=True, text=True)
        if done.returncode != 0:
            return done.stderr.strip() or done.stdout.strip()
        os.replace(part, library)  # a library is whole or absent, also when this is interrupted
        print(f"built {library.name}", flush=True)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        messages = dict(zip(kernels, pool.map(compiled, kernels)))
    return {kernel: message for kernel, message in messages.items() if message is not None}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cutlass", type=Path, help="CUTLASS's folder (default: the package nvidia-cutlass)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the libraries (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (%(default)s)")
    args = parser.parse_args(argv)
    cutlass = headers(args.cutlass)
    if cutlass is None or shutil.which("nvcc") is None:
        print("cutlass_int8: needs nvcc on PATH, and CUTLASS's include folder: give --cutlass FOLDER", file=sys.stderr)
        return 2
    failed = build(KERNELS, cutlass, args.folder, args.jobs)
    for kernel, message in failed.items():
        print(f"cutlass_int8: {kernel.name} does not compile:\n{message}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
