"""ops/naive.py: the method in forty executable lines, and the numbers of a run by hand."""

import ast
import inspect
from fractions import Fraction

import torch

from modiff_kernels.ops import naive


def test_it_has_forty_lines():
    """Lines that hold code: no blank ones, comments and docstrings."""
    tree = ast.parse(inspect.getsource(naive))
    code = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)}
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    assert len(code - {node.lineno for node in strings}) <= 40


def test_a_run_by_hand():
    """One value through the equations in rational numbers: y = 3 x + 1, two calls, 4 bits."""
    x_hat, y_hat, wanted = Fraction(0), Fraction(1), []
    for x, widths in [(Fraction(7, 8), [8, 8]), (Fraction(-3, 5), [4])]:
        for bits in widths:
            residual = x - x_hat
            scale = abs(residual) / (2 ** (bits - 1) - Fraction(1, 2))
            rounded = round(residual / scale)  # of a Fraction: exact, half to even
            code = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, rounded))
            x_hat += scale * code
            y_hat += scale * code * 3
        wanted.append(float(y_hat))
        assert y_hat == 3 * x_hat + 1
    inputs = [torch.tensor([[7 / 8]], dtype=torch.double), torch.tensor([[-3 / 5]], dtype=torch.double)]
    got = naive.run(inputs, lambda x: 3 * x, 1.0, 4)
    # The largest residual lies at a tie, half a step above the largest code: in float64 it may fall to either side.
    step = 1.5 / 7.5 * 3
    assert abs(got[0].item() - wanted[0]) < 1e-3
    assert min(abs(got[1].item() - wanted[1] - side * step) for side in (-1, 0, 1)) < 1e-3


def test_results_do_not_share_memory_with_the_state():
    outputs = naive.run([torch.ones(1, 2).double(), torch.zeros(1, 2).double()], lambda x: x, 0.0, 8)
    assert outputs[0].data_ptr() != outputs[1].data_ptr()
    assert (outputs[0] - 1).abs().max() < 1e-4
