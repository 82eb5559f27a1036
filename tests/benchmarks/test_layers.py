"""Single layers: the arithmetic of their bounds, what is refused, and rows out of known times."""

import pytest
import torch

from benchmarks import layers as products
from benchmarks.bounds import Machine
from benchmarks.layers import Check, Form, Problem, ProductCase, Tensors
from benchmarks.runner import Entrant
from benchmarks.shapes import Layer
from modiff_kernels.ops import dispatch

CPU = torch.device("cpu")
CONV, LINEAR = Layer("conv", 32, 24, 6, 7, 3, 2, 1), Layer("linear", 32, 24, 18, 1, 1)
BACKENDS = ["cpu"] if dispatch.why_unavailable("cpu") is None else []
FORMS = [*(Form(form, name) for form in products.OUR_FORMS for name in BACKENDS), Form("float32", "torch")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.key)
@pytest.mark.parametrize("layer", [CONV, LINEAR], ids=str)
def test_every_form_is_right_and_a_wrong_one_is_refused(layer, form):
    with torch.inference_mode():
        tensors = Tensors(layer, 3, 8, CPU)
        call = tensors.call(form.op, form.backend)
        assert Check(form.op, tensors).sqnr_db(call) >= 100
        call = Tensors(layer, 3, 8, CPU).call(form.op, form.backend)

        def wrong():
            out = call().clone()
            out[-1] += 1
            return out

        tensors = Tensors(layer, 3, 8, CPU)
        with pytest.raises(AssertionError, match=form.op):
            Check(form.op, tensors).sqnr_db(wrong)


def test_a_state_that_is_not_the_reference_s_is_refused():
    with torch.inference_mode():
        tensors = Tensors(LINEAR, 2, 8, CPU)
        check = Check("product", tensors)
        call = tensors.call("product", "cpu")

        def forgets_the_state():
            before = tensors.y_hat.clone()
            out = call()
            tensors.y_hat.copy_(before)
            return out

        with pytest.raises(AssertionError, match="y_hat is not that of the reference"):
            check.sqnr_db(forgets_the_state)


def test_bounds_and_rows_of_known_times():
    machine = Machine(1e12, 2e12, 1e9)
    inputs, outputs, weights = 54 * 32, 54 * 24, 24 * 32
    moved = inputs + weights + 6 * outputs
    assert products.bytes_moved("product", LINEAR, 3, 8) == moved
    assert products.bound_us("product", LINEAR, 3, 8, machine) == pytest.approx(1e-3 * moved), "bound by memory"
    slow = Machine(1e6, 2e6, 1e12)
    assert products.bound_us("product", LINEAR, 3, 8, slow) == pytest.approx(2 * outputs * 32 / 2.0)
    case = ProductCase(Problem(LINEAR, 3), 8, CPU, "no such device", 1, None)
    case.peaks = machine
    entrant = Entrant(Form("product", "cpu"), sqnr_db=150.0, times=[2e-6, 4e-6, 3e-6], more={"backend": "cpu"})
    rows = {row["metric"]: row for row in case.rows(entrant)}
    assert (rows["time"]["p50"], rows["time"]["unit"]) == (3.0, "us")
    assert rows["rate"]["p50"] == pytest.approx(2 * outputs * 32 / 3e-6 / 1e12)
    percent = products.bound_us("product", LINEAR, 3, 8, machine, 4) / 3.0 * 100
    assert rows["of_bound"]["p50"] == pytest.approx(percent)
