"""Fill a folder with what a bare GPU machine lacks, rehearse the campaign there without a GPU, and say how to begin it.

    .venv/bin/python tools/gpu_carry.py --python python3.12                  an hour, as Triton compiles 3400 forms
    .venv/bin/python tools/gpu_carry.py --python python3.12 --part step_sd15_float --seconds 240     something else

From a clean checkout, with the environment of `make setup`. In `build/bare` an environment like the machine's is
made: Python (--python), torch for CUDA, triton. The sources of HEAD go to a folder without .git, the carried files
beside them, and the command that is printed at the end runs there, on a GPU that the CPU plays (stand_in_gpu.py): tests
and benchmarks do all but kernels. Parts have more time there, and what Triton compiled for them is carried, too. A
second rehearsal, with the time that there will be, shows that every part ends by its clock (--slower 1).

`build/carry` holds the libraries, wheels and Triton's cache, which grows with every change of its kernels: remove it
then. `build/rehearsal/out` has what the campaign gave."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modiff_kernels.backends import cpu, cuda, source_hash  # noqa: E402
from tools import stand_in_gpu  # noqa: E402
from tools.gpu_campaign import CACHE, CACHE_ARCHIVE, LIBRARIES, selected  # noqa: E402
from tools.gpu_campaign_parts import DIFFUSERS, MORE_WHEELS, SETS  # noqa: E402

BUILD = ROOT / "build"
CARRY, BARE, REHEARSAL = BUILD / "carry", BUILD / "bare", BUILD / "rehearsal"
MOST_BYTES = 64 << 20
"""Of the sources and what is carried, together."""
PACKAGES = ROOT / "tools" / "gpu_machine.txt"
PROGRAMS = {
    "nvidia-smi": "echo no GPU: this is a rehearsal",
    "compute-sanitizer": 'while [ "${1##*/python*}" ]; do shift; done; exec "$@"',
}
"""Of CUDA, played by a shell."""


def run(*command: object, **options: object) -> None:
    done = subprocess.run(list(map(str, command)), check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"gpu_carry: {shlex.join(map(str, command))} failed with exit code {done.returncode}")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def bare_python(python: str) -> Path:
    """The Python of an environment like that of the machine, made if it is not there."""
    own, made = BARE / "bin" / "python", BARE / "made"
    wanted = f"{python}\n{PACKAGES.read_text()}"
    if not made.exists() or made.read_text() != wanted:
        print(f"gpu_carry: making {BARE}, several GB", flush=True)
        shutil.rmtree(BARE, ignore_errors=True)
        run(python, "-m", "venv", BARE)
        run(own, "-m", "pip", "install", "--quiet", "-r", PACKAGES)
        made.write_text(wanted)
    return own


def fill(wheels: set[str]) -> None:
    """The folder to be carried, but for Triton's cache, which stays if it is there."""
    for backend in (cpu, cuda):
        info = backend.build_info()
        if isinstance(info, str) or info["sources"] != source_hash():
            raise SystemExit(f"gpu_carry: the library of {backend.__name__} is not of these sources; run make setup")
    CARRY.mkdir(parents=True, exist_ok=True)
    for library in LIBRARIES.glob("*.so"):
        shutil.copy(library, CARRY)
    for old in CARRY.glob("*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", CARRY, *wheels)


def rehearse(python: Path, commit: str, command: Sequence[str]) -> int:
    """Run `command` in the sources of HEAD without .git, on a GPU that the CPU plays; its exit code."""
    tree, played = REHEARSAL / "tree", REHEARSAL / "played"
    shutil.rmtree(REHEARSAL, ignore_errors=True)
    for folder in (tree, played):
        folder.mkdir(parents=True)
    archive = REHEARSAL / "tree.tar"
    run("git", "archive", "--output", archive, "HEAD", cwd=ROOT)
    with tarfile.open(archive) as sources:
        sources.extractall(tree, filter="data")
    archive.unlink()
    shutil.copytree(CARRY, tree / CARRY.relative_to(ROOT))
    shutil.rmtree(CACHE, ignore_errors=True)  # as there, only what is carried is in it
    stand_in_gpu.write(played)
    for name, text in PROGRAMS.items():
        (played / name).write_text(f"#!/bin/sh\n{text}\n")
        (played / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "TMPDIR")}
    own = {"PATH": f"{played}:{python.parent}:{os.defpath}", "PYTHONPATH": f"{played}:{tree}", "MODIFF_COMMIT": commit}
    done = subprocess.run([str(python), *command], cwd=tree, env={**kept, **own}, check=False)
    return done.returncode


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--python", default="python3.12", help="like that of the machine (%(default)s)")
    add("--set", default="first", choices=SETS, help="of the campaign (%(default)s)")
    add("--part", action="append", default=[], help="instead: a part by name, may be given several times")
    add("--seconds", type=int, default=480, help="that the campaign will have (%(default)s)")
    add("--slower", type=float, default=12, help="times as long has the rehearsal (%(default)s)")
    add("--no-rehearsal", action="store_true", help="only fill the folder")
    args = parser.parse_args(argv)
    if output("git", "status", "--porcelain"):
        parser.error("there are local changes; what will run there is what HEAD has, so commit them")
    commit = output("git", "rev-parse", "--short=12", "HEAD")
    parts = selected(args.part, args.set)
    fill({DIFFUSERS, *(MORE_WHEELS[part.name] for part in parts if part.name in MORE_WHEELS)})
    chosen = [word for name in args.part for word in ("--part", name)] or ["--set", args.set]
    command = ["tools/gpu_campaign.py", *chosen, "--carried", str(CARRY.relative_to(ROOT))]
    code = 0
    if not args.no_rehearsal:
        more = ["--seconds", str(args.seconds * args.slower), "--slower", str(args.slower)]
        more += ["--out", str(REHEARSAL / "out")]
        code = rehearse(bare_python(args.python), commit, [*command, *more])
        if CACHE.is_dir():
            archive = CARRY / CACHE_ARCHIVE
            with tarfile.open(archive, "w:xz") as packed:  # half of what gzip makes
                for child in sorted(CACHE.iterdir()):
                    packed.add(child, child.name)
    sizes = {path.name: path.stat().st_size for path in sorted(CARRY.iterdir())}
    tracked = sum((ROOT / name).stat().st_size for name in output("git", "ls-files").splitlines())
    for name, size in {"sources": tracked, **sizes}.items():
        print(f"{size / (1 << 20):6.1f} MiB  {name}")
    if tracked + sum(sizes.values()) > MOST_BYTES:
        print(f"gpu_carry: that is more than {MOST_BYTES >> 20} MiB", file=sys.stderr)
    print(f"Carry {CARRY.relative_to(ROOT)} with the sources of {commit}, and run there:\n")
    print(f"MODIFF_COMMIT={commit} python3 {shlex.join(command)} --seconds {args.seconds} --out out")
    return code


if __name__ == "__main__":
    sys.exit(main())
