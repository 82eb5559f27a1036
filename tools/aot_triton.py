"""Compile the Triton kernels for sm_80 and sm_90 without a GPU and check their machine code.

python tools/aot_triton.py [--few] [--capability 80 90] [--match TEXT] [--json FILE]

Checked: int8 products became tensor core instructions (IGMMA on sm_90, IMMA on sm_80), nothing spills (no stack, no
local memory, no LDL or STL), and the shared memory fits. Prints a row per compiled form; exit code 1 if a check fails.
The disassemblers come with triton; its compile cache is not used."""

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import sass_report

if TYPE_CHECKING:
    from tools.triton_forms import Variant

PRODUCT_INSTRUCTION = {80: "IMMA", 90: "IGMMA"}
CUBIN = {80: "sm_80", 90: "sm_90a"}
COUNTED = ("IGMMA", "IMMA", "LDGSTS", "LDG", "STG", "LDSM", "LDL", "STL")


@dataclass
class Report:
    """What the machine code of one form says; `failures` are the broken rules.

    constants, types: of the kernel's parameters. ptx: how often each instruction of it occurs, with its modifiers.
    pendings: how many groups of wgmma its waits leave under way, each once."""

    name: str
    kernel: str
    capability: int
    warps: int
    constants: dict[str, str]
    types: dict[str, str]
    ptx: dict[str, int]
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    pendings: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = " ".join(f"{opcode} {count}" for opcode, count in self.counts.items())
        text = f"sm_{self.capability}  {self.registers:3d} regs  {self.shared_bytes:6d} B shared"
        text += f"  {self.instructions:5d} instr  {self.name}  [{counts}]"
        return text + "".join(f"\n       FAILED {failure}" for failure in self.failures)


@cache
def variants(capability: int, few: bool) -> list[tuple[str, "Variant"]]:
    """(name, variant) of all kernels of the backend. Not to be changed."""
    from tools.triton_forms import product_variants, quantize_variants

    found = product_variants(divmod(capability, 10), few)
    # The many forms of the quantising kernels: few are those that the other processor does not compile.
    turn = list(PRODUCT_INSTRUCTION).index(capability)
    for variant in quantize_variants()[turn :: len(PRODUCT_INSTRUCTION)] if few else quantize_variants():
        meta = "-".join(f"{key.lower()}{value}" for key, value in variant.constexprs.items() if key.isupper())
        types = "-".join(kind for kind in variant.signature.values() if kind.startswith("*"))
        found.append((f"{variant.kernel.__name__}-{meta}-{types}-warps{variant.options['num_warps']}", variant))
    return found


def compile_variant(name: str, variant: "Variant", capability: int) -> tuple[Report, bytes]:
    """Compile one form; a report without instructions, and the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))  # kernels ask for it
    names = list(variant.signature)
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs={(names.index(key),): value for key, value in variant.constexprs.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in variant.divisible},
    )
    compiled = triton.compile(source, target=target, options=variant.options)
    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = sass_report.resources(Path(file.name)).values()
    constants = {key: str(value) for key, value in variant.constexprs.items()}
    words = dict(Counter(re.findall(r"\b[a-z]\w*(?:\.\w+(?:::\w+)?)+", compiled.asm["ptx"])))
    warps, types = variant.options["num_warps"], variant.signature
    form = (name, variant.kernel.__name__, capability, warps, constants, types, words)
    report = Report(*form, code.registers, code.stack_bytes, compiled.metadata.shared)
    report.pendings = sorted({int(n) for n in re.findall(r"wgmma\.wait_group\S* (\d+)", compiled.asm["ptx"])})
    return report, sass_report.machine_code(cubin)[code.kernel]


def read_instructions(report: Report, opcodes: Counter[str]) -> Report:
    """The report with the instructions, and what is wrong with them."""
    counts: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        counts[opcode.split(".")[0]] += count
    report.instructions = counts.total()
    report.counts = {opcode: counts[opcode] for opcode in COUNTED if counts[opcode]}
    report.failures = broken_rules(report)
    return report


def broken_rules(report: Report) -> list[str]:
    from modiff_kernels.backends.triton.tiles import SHARED_MEMORY_BYTES

    failures = []
    wanted = PRODUCT_INSTRUCTION[report.capability]
    if report.kernel == "product_kernel" and not report.counts.get(wanted):
        failures.append(f"no {wanted}: the int8 product does not use the tensor cores as it should")
    if report.stack_bytes or report.counts.get("LDL") or report.counts.get("STL"):
        failures.append(f"spills: {report.stack_bytes} bytes of stack")
    limit = SHARED_MEMORY_BYTES[divmod(report.capability, 10)]
    if report.shared_bytes > limit:
        failures.append(f"{report.shared_bytes} bytes of shared memory, at most {limit} are there")
    return failures


def check(capabilities: Iterable[int], few: bool, match: str = "") -> Iterator[Report]:
    """Reports of all forms whose name contains `match`, in order; as many processes as there are cores compile them."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            for capability in capabilities:
                forms = [(capability, few, i) for i, (name, _) in enumerate(variants(capability, few)) if match in name]
                found = list(pool.map(_compile_form, forms, chunksize=4))
                read = sass_report.instructions([code for _, code in found], CUBIN[capability])
                yield from map(read_instructions, [report for report, _ in found], map(sass_report.opcodes, read))


def _compile_form(form: tuple[int, bool, int]) -> tuple[Report, bytes]:
    """Kernels cannot be sent to a process, but every process finds the same forms in the same order."""
    capability, few, index = form
    return compile_variant(*variants(capability, few)[index], capability)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, all_of_them = parser.add_argument, list(PRODUCT_INSTRUCTION)
    add("--capability", type=int, nargs="+", default=all_of_them, choices=all_of_them, help="(%(default)s)")
    add("--few", action="store_true", help="every form once, and every tile in the main ones")
    add("--match", default="", help="only forms whose name contains this")
    add("--json", type=Path, help="write the reports there")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    reports = []
    for report in check(args.capability, args.few, args.match):
        print(report, flush=True)
        reports.append(report)
    failed = sum(bool(report.failures) for report in reports)
    print(f"{len(reports)} forms compiled, {failed} failed")
    if args.json:
        args.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return int(failed > 0 or not reports)


if __name__ == "__main__":
    sys.exit(main())
