"""What the command line and the benchmarks share: networks, configurations, fidelity, tables and images.

Nothing here loads torch: bad options of a command are answered at once."""

import contextlib
from collections.abc import Iterator

from modiff_kernels.config.check import text_table
from modiff_kernels.evaluation.table import command_line, markdown_table, to_json
from modiff_kernels.metrics import psnr, sqnr, ssim

__all__ = ["SCHEDULERS", "UserError", "command_line", "markdown_table", "psnr", "sqnr", "ssim", "text_table", "to_json"]
__all__ += ["user_errors"]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver++-karras": "DPMSolverMultistepScheduler",
    "dpmsolver++-lu": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}


class UserError(Exception):
    """Bad input: `modiff` reports it as one line, exit code 2."""


@contextlib.contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Makes a UserError, whose text begins with `prefix`, of what the package refuses inside."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{prefix}{error}") from error
