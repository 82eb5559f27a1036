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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RULES = Path(__file__).with_name("sass_rules.json")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
COUNTED = ("IGMMA", "IMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG", "LDL", "STL", "CALL")
LIMITS = ("registers", "stack_bytes", "shared_bytes")
KEYS = {"why", "arch", "kernel", "must", "never", "kernels", "registers_exactly", *LIMITS}


@dataclass
class Row:
    """What the machine code of one kernel on one architecture says; `opcodes` with their modifiers."""

    arch: str
    kernel: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)

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


def opcodes(codes: Sequence[bytes], arch: str) -> list[Counter[str]]:
    """Those of kernels, read in one call of nvdisasm, which takes longer to begin than for a kernel."""
    ends = list(itertools.accumulate(map(len, codes)))
    counts: list[Counter[str]] = [Counter() for _ in codes]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        for line in lines(disassembler("nvdisasm"), "-b", arch.replace("sm_", "SM"), file.name):
            if found := INSTRUCTION.match(line):
                counts[bisect.bisect_right(ends, int(found[1], 16))][found[2]] += 1
    return counts


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
            for kernel, found in zip(kernels, opcodes(list(kernels.values()), arch), strict=True):
                rows[arch, kernel].opcodes = found
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
    reasons = []
    by_arch = Counter(row.arch for row in hits)
    if not hits:
        reasons.append("applies to no kernel")
    for arch, count in by_arch.items():
        if count != rule.get("kernels", count):
            reasons.append(f"{arch}: applies to {count} kernels, {rule['kernels']} are expected")
    for row in hits:
        for pattern in rule.get("must", ()):
            if not any(re.match(pattern, opcode) for opcode in row.opcodes):
                reasons.append(f"{row.arch} {row.kernel}: no {pattern}")
        for pattern in rule.get("never", ()):
            if found := [opcode for opcode in row.opcodes if re.match(pattern, opcode)]:
                reasons.append(f"{row.arch} {row.kernel}: {', '.join(found)}")
        for limit in LIMITS:
            if getattr(row, limit) > rule.get(limit, sys.maxsize):
                reasons.append(f"{row.arch} {row.kernel}: {limit} {getattr(row, limit)}, at most {rule[limit]}")
        if row.registers != rule.get("registers_exactly", row.registers):
            reasons.append(f"{row.arch} {row.kernel}: registers {row.registers}, not {rule['registers_exactly']}")
    return reasons


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("rules", type=Path, nargs="?", default=RULES)
    parser.add_argument("--arch", nargs="+", help="only these architectures; reading all takes half a minute")
    parser.add_argument("--match", default="", help="print only kernels whose name contains this")
    args = parser.parse_args(arguments)
    if not args.library.is_file():
        parser.error(f"{args.library} is not a file; build the library first: python setup.py build_ext --inplace")
    rules = load_rules(args.rules)
    rows = report(args.library, args.arch)
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
