"""The command line `modiff`: compare, sample, calibrate, explain, doctor."""

import importlib
import sys
from collections.abc import Sequence

from modiff_kernels.cli.arguments import build_parser
from modiff_kernels.evaluation import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `modiff` with `argv` (default: that of the process) and return its exit code.

    0: done; 1: `doctor` found a backend that disagrees with the reference; 2: bad input, one line on stderr says what;
    130: interrupted.
    """
    args = build_parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return importlib.import_module(f"modiff_kernels.cli.{args.command}").run(args)
    except UserError as error:
        print(f"modiff {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"modiff {args.command}: interrupted", file=sys.stderr)
        return 130
