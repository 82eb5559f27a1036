"""What the command line and the benchmarks share: networks, configurations, fidelity, tables and images.

Nothing here loads torch: bad options of a command are answered at once.
"""

from modiff_kernels.evaluation.table import command_line, markdown_table, text_table, to_json
from modiff_kernels.metrics import frechet_distance, psnr, sqnr, ssim

__all__ = ["SCHEDULERS", "UserError", "command_line", "frechet_distance", "markdown_table", "psnr", "sqnr", "ssim"]
__all__ += ["text_table", "to_json"]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class UserError(Exception):
    """Bad input: `modiff` reports it as one line, exit code 2."""
