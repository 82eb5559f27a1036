"""What benchmarks share with the command line `modiff`, imported in this place alone."""

from modiff_kernels.cli.arguments import METHODS
from modiff_kernels.evaluation import UserError
from modiff_kernels.evaluation.configurations import Quantised, Row, build_rows, config_of_row
from modiff_kernels.evaluation.images import tensors_crc32
from modiff_kernels.evaluation.networks import (
    Model,
    check_steps,
    load_model,
    make_scheduler,
    quiet_libraries,
    sample_images,
    share_copy,
)
from modiff_kernels.evaluation.table import HEADER as COMPARE_HEADER
from modiff_kernels.evaluation.table import table_cells as compare_cells

__all__ = [
    "COMPARE_HEADER", "METHODS", "Model", "Quantised", "Row", "UserError", "build_rows", "check_steps", "compare_cells",
    "config_of_row", "load_model", "make_scheduler", "quiet_libraries", "sample_images", "share_copy", "tensors_crc32",
]  # fmt: skip
