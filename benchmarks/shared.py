"""What benchmarks share with the command line `modiff`, imported in this place alone."""

from modiff_kernels.cli.arguments import METHODS, UserError, command_line
from modiff_kernels.cli.images import tensors_crc32
from modiff_kernels.cli.models import (
    Model,
    check_steps,
    choose_device,
    load_model,
    make_scheduler,
    quiet_libraries,
    sample_images,
    share_copy,
)
from modiff_kernels.cli.quantised import Quantised, config_of_row
from modiff_kernels.cli.rows import Row, build_rows, select_rows
from modiff_kernels.cli.table import HEADER as COMPARE_HEADER
from modiff_kernels.cli.table import table_cells as compare_cells

__all__ = [
    "COMPARE_HEADER",
    "METHODS",
    "Model",
    "Quantised",
    "Row",
    "UserError",
    "build_rows",
    "check_steps",
    "choose_device",
    "command_line",
    "compare_cells",
    "config_of_row",
    "load_model",
    "make_scheduler",
    "quiet_libraries",
    "sample_images",
    "select_rows",
    "share_copy",
    "tensors_crc32",
]
