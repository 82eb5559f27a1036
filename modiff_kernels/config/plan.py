"""`LayerPlan`: how every layer, or fused block, of a UNet is computed, and what that was decided on."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

FLOAT, QUANTIZED, MODULATED, CONSTANT = "float", "quantized", "modulated", "constant"
KINDS = (FLOAT, QUANTIZED, MODULATED, CONSTANT)
WITHOUT_BITS = (FLOAT, CONSTANT)
ACT_BITS = (3, 4, 8)
SOURCES = ("given", "roofline", "measured")
ALLOWED_MODES = "float, constant, or quantized or modulated with 3, 4 or 8 bits, such as 'modulated 4'"


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a unit is computed: "float", "constant" (once a run), or "quantized" or "modulated" with `act_bits`."""

    kind: str
    act_bits: int | None = None

    def __post_init__(self) -> None:
        bits = (None,) if self.kind in WITHOUT_BITS else ACT_BITS
        if self.kind not in KINDS or self.act_bits not in bits or isinstance(self.act_bits, bool):
            raise ValueError(f"LayerPlan: mode {self} is not allowed; give {ALLOWED_MODES}")

    def __str__(self) -> str:
        return self.kind if self.act_bits is None else f"{self.kind} {self.act_bits}"

    @classmethod
    def parse(cls, text: "str | Mode") -> "Mode":
        """Read what `str(mode)` writes; ValueError on anything else."""
        if isinstance(text, Mode):
            return text
        kind, _, bits = text.partition(" ") if isinstance(text, str) else ("", "", "")
        if bits and bits not in map(str, ACT_BITS):
            kind = ""
        if kind not in KINDS:
            raise ValueError(f"LayerPlan: mode {text!r} is not allowed; give {ALLOWED_MODES}")
        return cls(kind, int(bits) if bits else None)


FLOAT_MODE = Mode(FLOAT)


@dataclasses.dataclass(frozen=True)
class ModeCost:
    """What one unit costs in one mode. None: not measured.

    time_us: of a call, within the whole step. sqnr_db: of the unit's output against float, None for float itself.
    state_bytes: x_hat and y_hat.
    """

    mode: Mode
    time_us: float | None = None
    sqnr_db: float | None = None
    state_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class UnitPlan:
    """The mode of one unit.

    path: of a layer or block. layers: paths of the layers it holds; none for all below `path`. costs: of the modes that
    were compared. reason: why this mode.
    """

    path: str
    mode: Mode
    layers: tuple[str, ...] = ()
    costs: tuple[ModeCost, ...] = ()
    reason: str = ""

    def cost(self, mode: Mode) -> ModeCost | None:
        """The cost in `mode`, or None where it was not compared."""
        return next((cost for cost in self.costs if cost.mode == mode), None)

    def holds(self, layer: str) -> bool:
        """Whether the layer at this path belongs to the unit."""
        if self.layers:
            return layer in self.layers
        return layer == self.path or layer.startswith(f"{self.path}.")


@dataclasses.dataclass(frozen=True)
class PlanKey:
    """What a plan was made for; another machine, model, shape, configuration or version asks for another plan.

    device: name, with the number of threads on a CPU. model: hash of the UNet's configuration and of the shapes and
    dtypes of its weights (not of their values). shape: of the UNet's sample, batch first. config: hash of the
    ModiffConfig, and of the loss and state that were allowed. versions: of modiff_kernels and torch.
    """

    device: str
    model: str
    shape: tuple[int, ...]
    config: str
    versions: str

    @property
    def digest(self) -> str:
        """A short name for all but the shape."""
        return digest([self.device, self.model, self.config, self.versions])


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A whole plan as it was measured: time of a UNet call, PSNR of the pictures (None: equal to float), state."""

    name: str
    step_us: float
    psnr_db: float | None
    state_bytes: int = 0

    def __str__(self) -> str:
        psnr = "equal to float" if self.psnr_db is None else f"{self.psnr_db:.1f} dB"
        return f"{self.name}: {self.step_us / 1e3:.2f} ms a call, {psnr}, state {self.state_bytes / 1e6:.1f} MB"


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """A mode for every unit of a UNet. Immutable; impossible values raise ValueError.

    units: layers of no unit take the mode of the ModiffConfig; where units overlap, the longest path decides.
    key: what it was made for, None for a plan written by hand. source: "given", "roofline" (estimated) or "measured".
    candidates: whole plans that were timed against each other. summary: the decision in a sentence or two. max_loss_db:
    how far the PSNR was allowed to fall below that of the best single mode.
    """

    units: tuple[UnitPlan, ...]
    key: PlanKey | None = None
    source: str = "given"
    candidates: tuple[Candidate, ...] = ()
    summary: str = ""
    max_loss_db: float | None = None

    def __post_init__(self) -> None:
        paths = [unit.path for unit in self.units]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"LayerPlan: {', '.join(map(repr, twice))} is there twice; give every unit one mode")
        if "" in paths:
            raise ValueError("LayerPlan: a unit has the path ''; give module paths such as 'mid_block.resnets.0'")
        if self.source not in SOURCES:
            raise ValueError(f"LayerPlan: source={self.source!r} is not allowed; give one of {', '.join(SOURCES)}")

    @classmethod
    def of(cls, modes: "Mapping[str, str | Mode]") -> "LayerPlan":
        """A plan from module paths and modes, such as {"mid_block": "float", "up_blocks.0": "quantized 8"}."""
        return cls(tuple(UnitPlan(path, Mode.parse(mode)) for path, mode in modes.items()))

    @property
    def is_float(self) -> bool:
        """Whether every unit is float."""
        return bool(self.units) and all(unit.mode == FLOAT_MODE for unit in self.units)

    @property
    def state_bytes(self) -> int:
        """Bytes of x_hat and y_hat at the shape of `key`, as far as they are known."""
        costs = [unit.cost(unit.mode) for unit in self.units]
        return sum(cost.state_bytes for cost in costs if cost is not None)

    def unit_of(self, layer: str) -> UnitPlan | None:
        """The unit that decides about the layer at this path, or None."""
        units = [unit for unit in self.units if unit.holds(layer)]
        return max(units, key=lambda unit: (bool(unit.layers), len(unit.path)), default=None)

    def check(self, replaceable: Collection[str], reasons: Mapping[str, str], constant: Collection[str] = ()) -> None:
        """Raise ValueError unless the plan fits a UNet.

        replaceable: paths of its layers that have a low-bit form. reasons: why the others have none, by path. constant:
        layers that are known to read the same tensor in a whole run.
        """
        for unit in self.units:
            held = [layer for layer in replaceable if unit.holds(layer)]
            left = [layer for layer in reasons if unit.holds(layer)]
            unknown = [layer for layer in unit.layers if layer not in replaceable and layer not in reasons]
            if unknown or not (held or left):
                raise ValueError(
                    f"plan: {unknown[0] if unknown else unit.path!r} is no Linear, Conv2d or block with such layers in "
                    "this UNet; make a plan for this model with make_plan() or `modiff calibrate --plan`"
                )
            if unit.mode == FLOAT_MODE:
                continue
            refused = [layer for layer in left if layer in unit.layers] or ([] if held else left)
            if refused:
                raise ValueError(
                    f"plan: {unit.path!r} cannot be {unit.mode}: {refused[0]} stays float "
                    f"({reasons[refused[0]]}); give 'float'"
                )
            changing = [layer for layer in held if unit.mode.kind == CONSTANT and layer not in constant]
            if changing:
                raise ValueError(
                    f"plan: {unit.path!r} cannot be constant: nothing says that the input of {changing[0]} stays the "
                    "same in a run; give another mode"
                )

    def to_json(self) -> str:
        """The plan as a JSON object; `from_json` gives an equal one back."""
        return json.dumps(dataclasses.asdict(self, dict_factory=_json_value), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "LayerPlan":
        """Read what `to_json` wrote; ValueError on anything else. "units" may also be an object of paths and modes."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"LayerPlan: the text is not JSON ({error}); give what to_json() returns") from error
        if not isinstance(values, Mapping) or not isinstance(values.get("units"), (list, Mapping)):
            raise ValueError("LayerPlan: the text is no object with 'units'; give what to_json() returns")
        if isinstance(values["units"], Mapping):
            return cls.of(values["units"])
        try:
            key = values.get("key")
            return cls(
                tuple(_unit(unit) for unit in values["units"]),
                None if key is None else PlanKey(**{**key, "shape": tuple(key["shape"])}),
                values.get("source", "given"),
                tuple(Candidate(**candidate) for candidate in values.get("candidates", ())),
                values.get("summary", ""),
                values.get("max_loss_db"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"LayerPlan: not a plan as to_json() writes it ({error!r})") from error

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of cells: for each unit its mode, the time of every mode, speed-up, SQNR, state, reason."""
        modes = list(dict.fromkeys(cost.mode for unit in self.units for cost in unit.costs))
        header = ("unit", "mode", *(f"{mode} us" for mode in modes), "speed-up", "SQNR dB", "state kB", "reason")
        rows = []
        for unit in self.units:
            times = {cost.mode: cost.time_us for cost in unit.costs}
            chosen, own, plain = unit.cost(unit.mode), times.get(unit.mode), times.get(FLOAT_MODE)
            cells = [_shown(times.get(mode), ".0f") for mode in modes]
            cells.append(_shown(plain / own if own and plain else None, ".2f", "x"))
            cells.append(_shown(chosen.sqnr_db if chosen else None, ".1f"))
            cells.append(_shown(chosen.state_bytes / 1e3 if chosen else None, ".1f"))
            rows.append((unit.path, str(unit.mode), *cells, unit.reason))
        return header, rows


def digest(values: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def noise_of(sqnr_db: float | None) -> float:
    """Power of the error over that of the signal; None is exact."""
    return 0.0 if sqnr_db is None else 10.0 ** (-sqnr_db / 10)


def _json_value(fields: Sequence[tuple[str, Any]]) -> Any:
    """The fields of one dataclass; a mode as its text."""
    values = dict(fields)
    return str(Mode(**values)) if values.keys() == {"kind", "act_bits"} else values


def _unit(values: Mapping[str, Any]) -> UnitPlan:
    costs: Sequence[Mapping[str, Any]] = values.get("costs", ())
    for cost in costs:
        for name in ("time_us", "sqnr_db", "state_bytes"):
            if cost.get(name) is not None and not _is_number(cost[name]):
                raise ValueError(f"LayerPlan: {name}={cost[name]!r} of {values['path']!r} is no number")
    if not isinstance(values["path"], str):
        raise ValueError(f"LayerPlan: path {values['path']!r} is not allowed; give a module path")
    return UnitPlan(
        values["path"],
        Mode.parse(values["mode"]),
        tuple(values.get("layers", ())),
        tuple(ModeCost(**{**cost, "mode": Mode.parse(cost["mode"])}) for cost in costs),
        values.get("reason", ""),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
