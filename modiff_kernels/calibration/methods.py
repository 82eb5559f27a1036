"""The methods by name, with their options."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from modiff_kernels.calibration.accuquant import AccuQuantOptions, accuquant
from modiff_kernels.calibration.job import Job, Layers, Options
from modiff_kernels.calibration.qdiffusion import QDiffusionOptions, qdiffusion
from modiff_kernels.calibration.sampling_aware import SamplingAwareOptions, sampling_aware
from modiff_kernels.calibration.static import StaticOptions, static


@dataclasses.dataclass(frozen=True)
class Method:
    """A method by name. options: class of its options. defaults: values of options that differ from the class's."""

    run: Callable[[Job], Layers]
    options: type[Options]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


METHODS = {
    "minmax": Method(static, StaticOptions, {"scale_search": "minmax"}),
    "mse": Method(static, StaticOptions),
    "percentile": Method(static, StaticOptions, {"scale_search": "percentile"}),
    "ndtc": Method(static, StaticOptions, {"time_steps": "ndtc"}),
    "distill": Method(static, StaticOptions, {"network_iterations": 1200}),
    "qdiffusion": Method(qdiffusion, QDiffusionOptions),
    "accuquant": Method(accuquant, AccuQuantOptions, {"network_iterations": 600}),
    "sampling_aware": Method(sampling_aware, SamplingAwareOptions),
}
