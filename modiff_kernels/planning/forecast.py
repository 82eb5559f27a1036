"""What a call returns in a step schedule: a linear form of the last computed outputs and of the sample it is given."""

from collections.abc import Sequence

from torch import Tensor

DEGREE = 2  # of the polynomial where nothing is fitted; lower where fewer outputs are known


def polynomial(nodes: Sequence[float], position: float) -> list[float]:
    """Weights of the values at `nodes` in the value at `position` of the polynomial through them (Lagrange)."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            weight *= 1.0 if other == node else (position - other) / (node - other)
        weights.append(weight)
    return weights


def combine(weights: Sequence[float], outputs: Sequence[Tensor], sample: Tensor | None = None) -> Tensor:
    """sum_k weights[k] outputs[k], plus weights[-1] sample where one is given: a new tensor, summed in float32, in the
    dtype of the outputs. Of a sample with more channels, such as those of a mask behind, the first ones count."""
    total = outputs[0].float() * weights[0]
    for weight, output in zip(weights[1:], outputs[1:]):
        total.add_(output.float(), alpha=weight)
    if sample is not None and weights[-1]:
        total.add_(sample[:, : total.shape[1]].float(), alpha=weights[-1])
    return total.to(outputs[0].dtype)
