"""One unattended run on a bare GPU machine: build, GPU tests and benchmarks, the most important first.

    python tools/gpu_campaign.py --set first --seconds 480 --carried build/carry --out out
    python tools/gpu_campaign.py --list

Needs a CUDA build of torch with triton, nvcc, CMake and ninja; CUDA's tools are sought on PATH and in its usual folder.
What the machine lacks comes in a folder that tools/gpu_carry.py fills (`--carried`): wheels, as there may be no
network, Triton's cache, and compiled libraries, in whose place new ones are built if they do not load or are of other
sources.

Every part has a time limit, and the whole never takes longer than `--seconds`: a part that would not fit is cut short
or not begun. It is asked to end first, so that tests print what failed. Benchmarks append rows to benchmarks/results as
they go. State, logs and summary are kept in `--work`; the same command again goes on with the parts that have not
passed. `--out` gets the summary and, packed, every result file that the campaign changed, with paths from the root of
the repository: `unzip -o results-1.zip` there puts them in place.

Where the sources have no .git, MODIFF_COMMIT tells the rows their commit (ENVS.md).

Exit code 0: every part passed. 1: some failed. 2: bad input, or no GPU. 3: none failed, but time was over first."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.gpu_campaign_parts import PARTS, SETS, Part

ROOT = Path(__file__).resolve().parent.parent

RESULTS = "benchmarks/results/**/*"
"""Where parts write, beside the working folder: a pattern from the root of the repository."""

NOT_FINISHED = 3
"""Exit code of a part that ended in its time with work left: it goes on when the campaign does."""
PASSED, FAILED, STOPPED, SKIPPED, WAITING = "passed", "failed", "stopped", "skipped", "not reached"
LEAST_SECONDS = 10  # a part is not begun with less
TAIL_SECONDS = 8  # kept for packing the results
GRACE_SECONDS = 3  # between a request to end and the next, and the end
LONGEST_ANSWER = 90  # seconds that torch may take to find the GPU
TOOLS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")  # where CUDA's are, if not on PATH
LOG_TAIL = 30  # lines of a failed part in the summary
TEST_SECONDS = 90  # after which a test is given up
JOBS = max((os.cpu_count() or 1) - 2, 2)
LIBRARIES = ROOT / "modiff_kernels" / "_lib"
CACHE = Path("/tmp/modiff_triton_cache")  # Triton's, at the same place everywhere: it holds its own paths
CACHE_ARCHIVE = "triton_cache.tar.xz"


@dataclasses.dataclass
class Outcome:
    """What became of a part: status, seconds it took, exit code of its command, and why it was not run."""

    status: str = WAITING
    seconds: float = 0.0
    returncode: int | None = None
    reason: str = ""


class Campaign:
    """Runs parts within a deadline and keeps their outcomes in `work`/campaign.json."""

    def __init__(
        self,
        parts: Sequence[Part],
        work: Path,
        seconds: float,
        variables: dict[str, str] | None = None,
        slower: float = 1,
    ) -> None:
        self.parts, self.work, self.slower = list(parts), work, slower
        self.deadline = time.monotonic() + seconds - TAIL_SECONDS
        self.variables = variables or {}
        self.logs = work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.state_file = work / "campaign.json"
        self.outcomes = {part.name: Outcome() for part in self.parts}
        self.started = time.time()
        if self.state_file.exists():
            kept = json.loads(self.state_file.read_text())
            self.started = kept["started"]
            for name, outcome in kept["parts"].items():
                self.outcomes[name] = Outcome(**outcome)

    def run(self, on_part: Callable[[], None] = lambda: None) -> None:
        """Run every part that has not passed, in order; `on_part` is called after each."""
        for part in self.parts:
            outcome = self.outcomes[part.name]
            if outcome.status == PASSED and not part.every_time:
                continue
            self.outcomes[part.name] = self._skipped(part) or self._executed(part)
            self._save()
            on_part()

    def _skipped(self, part: Part) -> Outcome | None:
        """Why `part` cannot be run now, if so."""
        missing = [need for need in part.needs if self.outcomes.get(need, Outcome()).status != PASSED]
        if missing:
            return Outcome(SKIPPED, reason=f"needs {', '.join(missing)}")
        for program in filter(None, (part.program, part.command[0])):
            if program != "{python}" and shutil.which(program) is None:
                return Outcome(SKIPPED, reason=f"{program} was not found on the PATH")
        if self.deadline - time.monotonic() < LEAST_SECONDS:
            return Outcome(WAITING, reason="no time left")
        return None

    def _executed(self, part: Part) -> Outcome:
        limit = min(part.seconds * self.slower, self.deadline - time.monotonic())
        budget = max(limit - 2 * GRACE_SECONDS - part.margin_seconds, 1)
        values = {"python": sys.executable, "work": self.work, "budget": int(budget), "jobs": JOBS}
        values |= {"test_seconds": TEST_SECONDS * self.slower}
        command = [word.format(**values) for word in part.command]
        print(f"campaign: {part.name}, at most {limit:.0f} s: {' '.join(command)}", flush=True)
        begun = time.monotonic()
        with (self.logs / f"{part.name}.log").open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            returncode = _run(command, log, limit, {**self.variables, **dict(part.variables)})
        seconds = time.monotonic() - begun
        if returncode is None:
            outcome = Outcome(STOPPED, seconds, reason=f"stopped after {seconds:.0f} s")
        elif returncode == NOT_FINISHED:
            outcome = Outcome(STOPPED, seconds, returncode, "its time was over first")
        else:
            outcome = Outcome(PASSED if returncode == 0 else FAILED, seconds, returncode)
        print(f"campaign: {part.name} {outcome.status} in {seconds:.0f} s", flush=True)
        return outcome

    def _save(self) -> None:
        parts = {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()}
        scratch = self.state_file.with_suffix(".tmp")
        scratch.write_text(json.dumps({"started": self.started, "parts": parts}, indent=1))
        scratch.replace(self.state_file)

    def exit_code(self) -> int:
        statuses = {self.outcomes[part.name].status for part in self.parts}
        if statuses & {FAILED, SKIPPED}:
            return 1
        return 3 if statuses & {STOPPED, WAITING} else 0

    def summary(self) -> str:
        """Markdown: a table of the parts, and the end of the log of each that failed or was stopped."""
        lines = ["| part | status | seconds | exit code | |", "|---|---|---|---|---|"]
        tails = []
        for part in self.parts:
            outcome = self.outcomes[part.name]
            code = "" if outcome.returncode is None else str(outcome.returncode)
            lines.append(f"| {part.name} | {outcome.status} | {outcome.seconds:.0f} | {code} | {outcome.reason} |")
            log = self.logs / f"{part.name}.log"
            if outcome.status in (FAILED, STOPPED) and log.exists():
                end = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
                tails += [f"\n{part.name}, end of its log:\n", "```", *end, "```"]
        return "\n".join([*lines, *tails]) + "\n"


def _run(command: list[str], log, seconds: float, variables: dict[str, str]) -> int | None:
    """Exit code of `command`, or None if it was stopped after `seconds`, with every process it has started."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)
    try:
        return process.wait(timeout=max(seconds - 2 * GRACE_SECONDS, 1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End the process group of `process`, asking first: at an interrupt pytest tells its failures, at SIGTERM none."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
    process.wait()


def pack(work: Path, since: float, out: Path, most_bytes: int) -> list[str]:
    """Write what lies below `work`, and files of RESULTS written after `since` (seconds of time.time), into
    `out`/results-1.zip, -2, ... of at most `most_bytes` each, the paths those from the root of the repository; returns
    what is larger than that."""
    found = {path for path in ROOT.glob(RESULTS) if path.stat().st_mtime >= since}
    found |= {path for path in work.rglob("*") if "site" not in path.relative_to(work).parts[:1]}
    for old in out.glob("results-*.zip"):
        old.unlink()
    left_out, sizes = [], [0]
    for path in sorted(path for path in found if path.is_file()):
        packed = len(zlib.compress(path.read_bytes())) + 1024  # and its two headers
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        if packed > most_bytes:
            left_out.append(f"{name}: {packed >> 20} MiB, an archive has at most {most_bytes >> 20}")
            continue
        if sizes[-1] + packed > most_bytes:
            sizes.append(0)
        sizes[-1] += packed
        with zipfile.ZipFile(out / f"results-{len(sizes)}.zip", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, name)
    return left_out


def unpack(carried: Path, target: Path) -> dict[str, str]:
    """Put what was carried in its place, wheels into `target`, without a network. The variables that parts need."""
    variables = {"TRITON_CACHE_DIR": str(CACHE), "TRITON_STORE_BINARY_ONLY": "1"}
    LIBRARIES.mkdir(exist_ok=True)
    for library in carried.glob("*.so"):
        shutil.copy(library, LIBRARIES)
    if (archive := carried / CACHE_ARCHIVE).exists():
        shutil.unpack_archive(archive, CACHE)
    for wheel in carried.glob("*.whl"):  # of Python alone: to unpack one is to install it
        try:
            shutil.unpack_archive(wheel, target, "zip")
        except shutil.ReadError as error:  # it costs the parts that need it alone
            print(f"gpu_campaign: {wheel.name} is left out: {error}", file=sys.stderr, flush=True)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
    return variables


def find_tools() -> None:
    """Put the folders of CUDA's tools behind PATH, for the parts too."""
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders, *TOOLS])


def selected(names: Sequence[str], set_name: str) -> list[Part]:
    """Parts of the set, or those named, with everything they need, in the order of PARTS."""
    wanted = set(names or SETS[set_name])
    if unknown := wanted - {part.name for part in PARTS}:
        raise SystemExit(f"gpu_campaign: part {min(unknown)!r} is unknown; --list shows them")
    for part in reversed(PARTS):  # needs stand before what needs them
        if part.name in wanted:
            wanted |= set(part.needs)
    return [part for part in PARTS if part.name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=480, help="the whole ends within (%(default)s)")
    add("--set", default="first", choices=SETS, help="parts by what they are for (%(default)s)")
    add("--part", action="append", default=[], help="instead: a part by name, may be given several times")
    add("--work", type=Path, default=ROOT / "build" / "gpu_campaign", help="state and logs (%(default)s)")
    add("--out", type=Path, help="folder that gets summary and results")
    add("--archive-mb", type=float, default=15, help="most MiB of one archive in --out (%(default)s)")
    add("--carried", type=Path, help="folder that tools/gpu_carry.py has filled")
    add("--slower", type=float, default=1, help="more time for each part, in a rehearsal (%(default)s)")
    add("--list", action="store_true", help="show sets and parts, and end")
    args = parser.parse_args(argv)
    if args.list:
        print(*(f"{name}: {', '.join(parts)}" for name, parts in SETS.items()), sep="\n")
        print(*(f"{part.name:25} {part.seconds:4} s  {part.purpose}" for part in PARTS), sep="\n")
        return 0
    begun = time.monotonic()
    find_tools()
    parts = selected(args.part, args.set)
    if args.carried is not None and not args.carried.is_dir():
        parser.error(f"--carried {args.carried}: there is no such folder")
    if args.seconds < LEAST_SECONDS + TAIL_SECONDS:
        parser.error(f"--seconds {args.seconds:g} is too little, at least {LEAST_SECONDS + TAIL_SECONDS}")
    reason = why_no_gpu()
    if reason is not None:
        print(f"gpu_campaign: {reason}; nothing was run", file=sys.stderr)
        return 2
    work = args.work.resolve()
    variables = unpack(args.carried, work / "site") if args.carried else {}
    campaign = Campaign(parts, work, args.seconds - (time.monotonic() - begun), variables, args.slower)

    def keep() -> None:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            left_out = pack(work, campaign.started, args.out, int(args.archive_mb * (1 << 20)))
            notes = "".join(f"\nleft out: {line}" for line in left_out)
            (args.out / "campaign.md").write_text(campaign.summary() + notes)

    campaign.run(on_part=keep)
    print(campaign.summary())
    return campaign.exit_code()


def why_no_gpu() -> str | None:
    """Why nothing can be measured here, or None. Asked in a process of its own: a CUDA context would stay here."""
    code = "import torch; assert torch.cuda.is_available(), f'torch {torch.__version__} sees no CUDA device'"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONGEST_ANSWER)
    except subprocess.TimeoutExpired:
        return f"torch did not answer within {LONGEST_ANSWER} s"
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1].removeprefix("AssertionError: ")


if __name__ == "__main__":
    sys.exit(main())
