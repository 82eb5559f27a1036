"""python -m benchmarks COMMAND: layers, steps, runs, studies and tables; COMMAND --help says more.

Exit code 0: everything was measured. 1: something was wrong or could not be. 2: bad input. 3: --budget was spent first.
"""

import argparse
import importlib
import sys

from benchmarks.runner import FAILED, DeviceLost
from modiff_kernels.evaluation import UserError

COMMANDS = {
    "layers": "layers",
    "steps": "steps",
    "runs": "runs",
    "pipeline": "studies.pipeline",
    "traffic": "studies.traffic",
    "schedules": "studies.schedules",
    "quality": "studies.quality",
    "calibration": "studies.calibration",
    "tables": "tables",
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] not in COMMANDS:
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)}", file=sys.stdout if words[:1] == ["--help"] else sys.stderr)
        return 0 if words[:1] == ["--help"] else 2
    module = importlib.import_module(f"benchmarks.{COMMANDS[words[0]]}")
    about = {"description": module.__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {words[0]}", **about)
    module.add_arguments(parser)
    try:
        return module.main(parser.parse_args(words[1:]))
    except DeviceLost as lost:
        print(f"stopped: {lost} has lost the CUDA context; what was recorded is kept", file=sys.stderr)
        return FAILED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
