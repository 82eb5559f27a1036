"""Read the machine code of a CUDA library, without a GPU, and check it against rules.

python tools/sass_report.py LIBRARY [RULES] [--arch sm_80 sm_90a] [--match TEXT]

Prints a row per kernel and architecture: registers, stack, shared memory, counted instructions. Exit code 1 if a rule
is broken, or applies to no kernel. RULES (default: sass_rules.json beside this file) is a list of objects:

  why          what the rule protects; printed when it is broken
  arch         regular expression of a whole architecture, such as "sm_90a"
  kernel       regular expression, found anywhere in the demangled name
  must         instructions that occur (regular expressions from the beginning, such as "LDG\\.E\\.128")
  never        instructions that do not occur
  registers, stack_bytes, shared_bytes     largest value allowed
  registers_exactly                        the only value allowed
  kernels      how many of an architecture the rule applies to, if that is known
  most         how often instructions may occur: {regular expression: count}
  region       "loop X": the smallest loop around each instruction X; "stretch X": every run of code without
               unconditional jumps that has an X; "before X": what may run before an X. Of each region:
  clocks       the most that it may take by `clocks_of`, with `warps` (default 1) of it on a scheduler; with `tensor`,
               the clocks of an IMMA, the most of a pass of a loop among many
  region_must, region_never     instructions that occur in it, and those that do not

--clocks prints the regions of such rules as a table instead, and the share of the peak that they add up to.

The disassemblers come with triton, or are those on PATH."""

import argparse
import bisect
import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

RULES = Path(__file__).with_name("sass_rules.json")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)(?: (?:U?P\w+, )?0x([0-9a-f]+) ;)?")
COUNTED = ("IGMMA", "IMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG", "LDL", "STL", "CALL")
LIMITS = ("registers", "stack_bytes", "shared_bytes")
REGION = ("region", "clocks", "warps", "tensor", "region_must", "region_never")
KEYS = {"why", "arch", "kernel", "must", "never", "kernels", "registers_exactly", "most", *LIMITS, *REGION}
# `tensor` of rules: clocks that an m16n8k32 of bytes or m16n8k64 of nibbles has a scheduler's tensor core, after the
# dense peaks of NVIDIA's whitepapers. A100: 624e12 operations on int8 a second, 108 multiprocessors, 1.41 GHz, so 512
# products a clock and scheduler: 8, which is also what ptxas lets a warp stall behind an IMMA. GA102 (RTX 3090: 284e12,
# 82, 1.695 GHz) and AD102 (RTX 4090: 661e12, 128, 2.52 GHz): 16. int4 has twice the rate in all of them.
# Clocks from issue to result of what has no fixed latency: guesses, after published microbenchmarks of Hopper.
LATENCY = {"LDG": 300, "LDC": 30, "SYNCS": 30, "LDS": 30, "LDSM": 33, "S2R": 26, "S2UR": 26, "R2UR": 12, "UTMALDG": 20}
OTHER_LATENCY = 25
# What goes through the load and store unit: 128 bytes a clock for the four schedulers of a multiprocessor, so that an
# instruction of w bytes a thread takes w clocks of one scheduler's share.
MEMORY = re.compile(r"LDG|STG|LDS|STS|LDSM|STSM|LDGSTS")
WIDTHS = {"M88.4": 16, ".128": 16, ".64": 8, "16": 2, "8": 1}


class Instruction(NamedTuple):
    """`jump`: where to, -1 if it is none; `control`: stall, scoreboards, as the machine code has them (16 bits)."""

    address: int
    opcode: str
    guarded: bool
    jump: int
    control: int

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def share(self) -> int:
        """Clocks of a scheduler's share of the load and store unit."""
        if not MEMORY.fullmatch(self.name):
            return 0
        return next((clocks for mark, clocks in WIDTHS.items() if mark in self.opcode), 4)


def clocks_of(code: Sequence[Instruction], warps: int = 1, tensor: int = 0) -> int:
    """Of `warps` warps of a scheduler that run `code` in order, branches not taken: a model. An instruction is issued
    when its stall and scoreboards allow it, one a clock; memory is a queue; results come after LATENCY. An IMMA has the
    scheduler's tensor core for `tensor` clocks."""
    at, ready, clock, queue, free = [0] * warps, [0] * warps, 0, 0, 0
    boards = [[0] * 6 for _ in range(warps)]

    def earliest(w: int) -> int:
        waits = code[at[w]].control >> 11
        busy = free if code[at[w]].name == "IMMA" else 0
        return max([ready[w], busy, *(boards[w][i] for i in range(6) if waits >> i & 1)])

    while left := [w for w in range(warps) if at[w] < len(code)]:
        w = min(left, key=earliest)
        start, now = max(clock, earliest(w)), code[at[w]]
        latency, done = LATENCY.get(now.name, OTHER_LATENCY), start
        if now.name == "IMMA":
            free = start + tensor
        if now.share:
            done = queue = max(queue, start) + now.share
        for board, after in ((now.control >> 5 & 7, latency), (now.control >> 8 & 7, min(latency, 20))):
            if board < 6:
                boards[w][board] = max(boards[w][board], done + after)
        ready[w], clock = start + max(now.control & 15, 1), start + 1
        at[w] += 1
    return max([queue, *ready])


def clocks_by(rule: dict[str, Any], region: Sequence[Instruction]) -> int:
    """By a rule: of a region from its begin to its end, or (`tensor`) of a pass of a loop among many, in which warps
    drift apart, as none waits for another at a barrier here."""
    warps, tensor = rule.get("warps", 1), rule.get("tensor", 0)
    first = clocks_of(region, warps, tensor)
    return first if not tensor else (clocks_of([*region] * 9, warps, tensor) - first + 7) // 8


def regions(code: Sequence[Instruction], kind: str) -> list[Sequence[Instruction]]:
    """Those of a rule's `region`."""
    kind, pattern = kind.split(maxsplit=1)
    hits = [i for i, instruction in enumerate(code) if re.match(pattern, instruction.opcode)]
    if not hits:
        return []
    index = {instruction.address: i for i, instruction in enumerate(code)}
    if kind == "before":
        reached, to_do = set(hits), [0]
        while to_do:
            if (i := to_do.pop()) < len(code) and i not in reached:
                reached.add(i)
                goes_on = code[i].guarded or not re.fullmatch("BRA|(BRX|EXIT|RET).*", code[i].opcode)
                to_do += [index.get(code[i].jump, i), i + 1] if goes_on else [index.get(code[i].jump, i)]
        return [[code[i] for i in sorted(reached.difference(hits))]]
    if kind == "loop":
        loops = [(i - index[b.jump], index[b.jump], i) for i, b in enumerate(code) if index.get(b.jump, i + 1) <= i]
        around = [min((loop for loop in loops if loop[1] <= hit <= loop[2]), default=None) for hit in hits]
        return [code[loop[1] : loop[2] + 1] for loop in sorted({loop for loop in around if loop})]
    ends = [i for i, b in enumerate(code) if re.match("BRA|BRX|EXIT|RET", b.opcode) and not b.guarded]
    starts = sorted({ends[k - 1] + 1 if (k := bisect.bisect_left(ends, hit)) else 0 for hit in hits})
    return [code[start : ends[bisect.bisect_left(ends, start)]] for start in starts]


@dataclass
class Row:
    """What the machine code of one kernel on one architecture says; `opcodes` with their modifiers."""

    arch: str
    kernel: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    code: list[Instruction] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        totals: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            totals[opcode.split(".")[0]] += count
        counts = " ".join(f"{name} {totals[name]}" for name in COUNTED if totals[name])
        text = f"{self.arch:7s} {self.registers:3d} regs {self.stack_bytes:4d} B stack {self.shared_bytes:6d} B shared"
        return f"{text} {self.opcodes.total():5d} instr  {self.kernel}  [{counts}]"


def disassembler(name: str) -> str:
    """Path of cuobjdump or nvdisasm."""
    spec = find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"sass_report: {name} was not found; it comes with triton: pip install triton")
    return found


def lines(*command: str, folder: str | None = None) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise SystemExit(f"sass_report: {' '.join(command)} failed with exit code {process.returncode}")


def demangled(names: list[str]) -> list[str]:
    """C++ names where c++filt is there, without what all kernels share."""
    if shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    inner = [re.sub(r"^void modiff::(?:\w+::)*\w*kernel<(.*?) ?>\(.*\)$", r"\1", s) for s in done.stdout.splitlines()]
    return [re.sub(r"modiff::(cuda::)?(sm80::)?", "", name) for name in inner]


def resources(library: Path) -> dict[tuple[str, str], Row]:
    """A row without opcodes for every architecture and kernel of a library or a cubin."""
    rows: dict[tuple[str, str], Row] = {}
    arch = function = ""
    for line in lines(disassembler("cuobjdump"), "-res-usage", str(library)):
        if found := re.search(r"\barch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            function = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            rows[arch, function] = Row(arch, function, registers, stack + local, shared)
    return rows


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """That of every kernel of an ELF file."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + 64 * i) for i in range(count)]
    found = {}
    for at, *_, start, size in headers:
        begin = headers[names][4] + at
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = cubin[start : start + size]
    return found


def instructions(codes: Sequence[bytes], arch: str) -> list[list[Instruction]]:
    """Those of kernels, read in one call of nvdisasm, which takes longer to begin than for a kernel."""
    ends = list(itertools.accumulate(map(len, codes)))
    found: list[list[Instruction]] = [[] for _ in codes]
    everything = b"".join(codes)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(everything)
        file.flush()
        for line in lines(disassembler("nvdisasm"), "-b", arch.replace("sm_", "SM"), file.name):
            if match := INSTRUCTION.match(line):
                at = int(match[1], 16)
                jump = int(match[4], 16) if match[4] and match[3].startswith("BRA") else -1
                control = int.from_bytes(everything[at + 8 : at + 16], "little") >> 41
                instruction = Instruction(at, match[3], match[2] is not None, jump, control & 0x1FFFF)
                found[bisect.bisect_right(ends, at)].append(instruction)
    return found


def opcodes(code: Iterable[Instruction]) -> Counter[str]:
    return Counter(instruction.opcode for instruction in code)


def report(library: Path, archs: list[str] | None = None) -> list[Row]:
    """A row for every kernel of `library` and architecture of `archs`; None: all of them."""
    rows = resources(library)
    code: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        list(lines(disassembler("cuobjdump"), "-xelf", "all", str(library.resolve()), folder=folder))
        for cubin in Path(folder).iterdir():
            code.setdefault(cubin.suffixes[-2][1:], {}).update(machine_code(cubin.read_bytes()))
    read = []
    for arch, kernels in code.items():
        if archs is None or arch in archs:
            for kernel, found in zip(kernels, instructions(list(kernels.values()), arch), strict=True):
                rows[arch, kernel].code, rows[arch, kernel].opcodes = found, opcodes(found)
                read.append(rows[arch, kernel])
    for row, name in zip(read, demangled([row.kernel for row in read]), strict=True):
        row.kernel = name
    return sorted(read, key=lambda row: (row.kernel, row.arch))


def load_rules(path: Path) -> list[dict[str, Any]]:
    """The rules of a file; ValueError for a key that is not known."""
    rules = json.loads(path.read_text())
    for rule in rules:
        if unknown := set(rule) - KEYS:
            raise ValueError(f"{path}: {', '.join(sorted(unknown))} is not known in a rule; known: {sorted(KEYS)}")
    return rules


def broken(rule: dict[str, Any], rows: list[Row]) -> list[str]:
    """How `rule` is broken, a line for each kernel and reason."""
    hits = [row for row in rows if re.fullmatch(rule["arch"], row.arch) and re.search(rule["kernel"], row.kernel)]
    reasons = [] if hits else ["applies to no kernel"]
    for arch, count in Counter(row.arch for row in hits).items():
        if count != rule.get("kernels", count):
            reasons.append(f"{arch}: applies to {count} kernels, {rule['kernels']} are expected")
    for row in hits:
        reasons += (f"{row.arch} {row.kernel}: {reason}" for reason in missing_or_not_allowed(rule, row.opcodes))
        for pattern, most in rule.get("most", {}).items():
            count = sum(n for opcode, n in row.opcodes.items() if re.fullmatch(pattern, opcode))
            if count > most:
                reasons.append(f"{row.arch} {row.kernel}: {count} times {pattern}, at most {most}")
        if "region" in rule:
            reasons += (f"{row.arch} {row.kernel}: {reason}" for reason in broken_regions(rule, row.code))
        for limit in LIMITS:
            if getattr(row, limit) > rule.get(limit, sys.maxsize):
                reasons.append(f"{row.arch} {row.kernel}: {limit} {getattr(row, limit)}, at most {rule[limit]}")
        if row.registers != rule.get("registers_exactly", row.registers):
            reasons.append(f"{row.arch} {row.kernel}: registers {row.registers}, not {rule['registers_exactly']}")
    return reasons


def missing_or_not_allowed(rule: dict[str, Any], found: Iterable[str], of: str = "") -> Iterator[str]:
    yield from (f"no {p}" for p in rule.get(f"{of}must", ()) if not any(re.match(p, o) for o in found))
    if names := sorted(o for o in found if any(re.match(p, o) for p in rule.get(f"{of}never", ()))):
        yield ", ".join(names)


def broken_regions(rule: dict[str, Any], code: Sequence[Instruction]) -> Iterator[str]:
    found = regions(code, rule["region"])
    if not found:
        yield f"no {rule['region']}"
    for region in found:
        clocks = clocks_by(rule, region)
        if clocks > rule.get("clocks", clocks):
            yield f"{rule['region']}: {clocks} clocks, at most {rule['clocks']}"
        yield from (f"{rule['region']}: {r}" for r in missing_or_not_allowed(rule, opcodes(region), "region_"))


# Rows, columns, channels and taps of layers in tiles of 256 x 160 on 132 multiprocessors, in two splits where both fit.
LAYERS = {
    "3 x 3, 640 @ 32, batch 8": (8 * 32 * 32, 640, 640, 9),
    "3 x 3, 320 @ 64, batch 8": (8 * 64 * 64, 320, 320, 9),
    "3 x 3, 1280 @ 16, batch 16": (16 * 16 * 16, 1280, 1280, 9),
    "3 x 3, 1280 @ 16, batch 8": (8 * 16 * 16, 1280, 1280, 9),
    "Linear 4096 x 1280 x 1280": (4096, 1280, 1280, 1),
}


def clock_table(rows: Sequence[Row], rules: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Regions of rules as Markdown, and what they add up to with 1500 clocks to fill the pipeline, without the launch.
    Memory: an H100's, 3.35 TB/s at 1.755 GHz, for codes, weight, y_hat twice, skip and out."""
    yield "| kernel | region | instructions | tensor cores | clocks | at most |\n|---|---|---:|---:|---:|---:|"
    epilogue = 0
    for rule in (r for r in rules if "clocks" in r):
        for row in (r for r in rows if re.fullmatch(rule["arch"], r.arch) and re.search(rule["kernel"], r.kernel)):
            found = [(clocks_by(rule, r), len(r), r) for r in regions(row.code, rule["region"])]
            clocks, instructions, code = max(found, default=(0, 0, []))
            busy = sum(i.name == "IMMA" for i in code) * rule.get("warps", 1) * rule.get("tensor", 0)
            if row.kernel.endswith("Product<8, 2, 160>") and "stretch" in rule["region"]:
                epilogue = clocks
            cells = [f"`{row.arch} {row.kernel}`", f"`{rule['region']}`", instructions, f"{busy:,}" if busy else ""]
            yield "| " + " | ".join(map(str, [*cells, f"{clocks:,}", f"{rule['clocks']:,}"])) + " |"
    yield "\n| layer | tiles, waves | clocks | share of the peak | memory's clocks |\n|---|---:|---:|---:|---:|"
    for name, (m, n, c, taps) in LAYERS.items():
        tiles = -(-m // 256) * -(-n // 160)
        splits, sent = (2, 5851) if tiles <= 66 else (1, 0)  # half of a tile's sums, 14 bytes a clock
        main, waves = taps * -(-c // 64) * 640 // splits + sent, -(-tiles * splits // 132)
        clocks, ideal = waves * (main + epilogue) + 1500, m * n * c * taps / 4096 / 132
        memory = (m * c + n * c * taps + 8 * m * n) / (3.35e12 / 1.755e9)
        yield f"| {name} | {tiles}, {waves} | {clocks:,} | {ideal / clocks:.0%} | {memory:,.0f} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("rules", type=Path, nargs="?", default=RULES)
    parser.add_argument("--arch", nargs="+", help="only these architectures; reading all takes half a minute")
    parser.add_argument("--match", default="", help="print only kernels whose name contains this")
    parser.add_argument("--clocks", action="store_true", help="print the table of regions alone")
    args = parser.parse_args(arguments)
    if not args.library.is_file():
        parser.error(f"{args.library} is not a file; build the library first: python setup.py build_ext --inplace")
    rules = load_rules(args.rules)
    rows = report(args.library, args.arch)
    if args.clocks:
        print(*clock_table(rows, rules), sep="\n")
        return 0
    for row in rows:
        if args.match in row.kernel:
            print(row)
    failed = 0
    for rule in rules:
        reasons = broken(rule, rows)
        failed += bool(reasons)
        if reasons:
            print(f"BROKEN {rule['why']}", *reasons, sep="\n       ")
    print(f"{len(rows)} kernels of all architectures, {len(rules)} rules, {failed} broken")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
