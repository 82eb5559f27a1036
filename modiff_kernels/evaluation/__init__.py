"""Fidelity metrics and reports."""

from modiff_kernels.evaluation.metrics import frechet_distance, psnr, sqnr, ssim
from modiff_kernels.evaluation.report import image_grid, markdown_table, text_table, to_json

__all__ = ["frechet_distance", "image_grid", "markdown_table", "psnr", "sqnr", "ssim", "text_table", "to_json"]
