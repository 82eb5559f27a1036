"""The command line `modiff`: compare, sample, calibrate, explain, doctor."""

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from modiff_kernels.cli.arguments import build_parser, check
from modiff_kernels.evaluation import UserError

INSTALL = "pip install 'modiff-kernels[all]' installs what the commands need"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `modiff` with `argv` (default: that of the process) and return its exit code.

    0: done; 1: `doctor` found a backend that disagrees with the reference; 2: bad input, or a file that cannot be read
    or written, one line on stderr says what; 130: interrupted; 141: nobody reads the output any more."""
    name = "modiff"
    try:
        try:
            args = build_parser().parse_args(argv)
            args.argv, name = list(sys.argv[1:] if argv is None else argv), f"modiff {args.command}"
            with _warnings_as_lines(name, getattr(args, "quiet", False)):
                check(args)
                return importlib.import_module(f"modiff_kernels.cli.{args.command}").run(args)
        finally:
            print(end="", flush=True)
    except (UserError, OSError, ImportError) as error:
        unread = isinstance(error, BrokenPipeError)
        advice = f"; {INSTALL}" if isinstance(error, ImportError) else ""
        if not unread:
            print(f"{name}: error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        try:
            print(end="", flush=True)
        except OSError:  # what stdout does not take goes nowhere: Python would try it again at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if unread else 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _warnings_as_lines(name: str, quiet: bool) -> Iterator[None]:
    """Shows warnings, and those that the package logs, above the progress bars in a line each; with `quiet` none."""

    def show(message: Any, *unused: Any, **unused_too: Any) -> None:
        tqdm.write(f"{name}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    handler = logging.Handler(logging.ERROR if quiet else logging.WARNING)
    handler.emit = lambda record: show(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("modiff_kernels")
    with warnings.catch_warnings(), contextlib.ExitStack() as undo:
        logger.addHandler(handler)
        undo.callback(logger.removeHandler, handler)
        warnings.showwarning = show
        if quiet:
            warnings.simplefilter("ignore")
        yield
