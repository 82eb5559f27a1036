"""Learning codes, weight scales and biases of all layers at once, towards the output of the float network.

Distillation on the float sampler's own states, as in quantisation-aware training without data (EfficientDM, He et al.,
ICLR 2024): codes by straight-through rounding, from those of another weight method, the mean squared error of the
UNet's output as the loss. Unlike layer-wise objectives it lets layers make up for each other's errors.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modiff_kernels.calibration import reconstruction
from modiff_kernels.calibration.data import CalibrationData
from modiff_kernels.calibration.fake import fake_quantized
from modiff_kernels.calibration.methods import Job, batches_of
from modiff_kernels.quant.calibrated import CalibratedLayer


def learn_network(
    job: Job,
    data: CalibrationData,
    layers: Mapping[str, CalibratedLayer],
    names: Sequence[str] = ("variable", "weight_scale", "bias"),
) -> dict[str, CalibratedLayer]:
    """The layers after `network_iterations` steps on the parameters `names` of all FakeLayers, activations float."""
    options = job.options

    def compute() -> dict[str, CalibratedLayer]:
        with torch.no_grad():
            target = torch.cat([output_at(job.unet, data, points) for points in batches_of(job, data, "targets")])
        with fake_quantized(job.unet, layers, job.config.mode, None, "straight_through") as fakes:
            reconstruction.learn(
                fakes.values(),
                names,
                lambda points: (output_at(job.unet, data, points) - target[points]).square().mean(),
                len(data),
                iterations=job.bar(range(options.network_iterations), "network"),
                total=options.network_iterations,
                batch=options.learn_batch,
                lr=options.network_lr,
                generator=job.workspace.generator("network"),
            )
            return {path: fake.result() for path, fake in fakes.items()}

    return job.layers_once("network", layers, compute)


def output_at(unet: nn.Module, data: CalibrationData, points: Tensor) -> Tensor:
    """The UNet's output at `points` (int64) of the data."""
    args, kwargs = data.arguments(points)
    return unet(*args, **kwargs, return_dict=False)[0]
