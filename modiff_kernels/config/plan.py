"""`LayerPlan`: how every layer, or fused block, of a UNet is computed, and what that was decided on."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from modiff_kernels.config.check import read_json, text_table
from modiff_kernels.quant.spec import ACT_BITS

FLOAT, QUANTIZED, MODULATED, CONSTANT = "float", "quantized", "modulated", "constant"
BITS: dict[str, tuple[Any, ...]] = {FLOAT: (None,), QUANTIZED: ACT_BITS, MODULATED: ACT_BITS}
SOURCES = ("given", "estimated", "measured")


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a unit is computed: "float", or "quantized" or "modulated" with `act_bits`."""

    kind: str
    act_bits: int | None = None

    def __post_init__(self) -> None:
        if self.act_bits not in BITS.get(self.kind, ()):
            allowed = "float, or quantized or modulated with 3, 4, 7 or 8 bits, such as 'modulated 4'"
            raise ValueError(f"LayerPlan: mode {str(self)!r} is not allowed; give {allowed}")

    def __str__(self) -> str:
        return self.kind if self.act_bits is None else f"{self.kind} {self.act_bits}"

    @classmethod
    def parse(cls, text: "str | Mode") -> "Mode":
        """Read what `str(mode)` writes; ValueError on anything else."""
        kind, _, bits = str(text).partition(" ")
        act_bits: Any = int(bits) if bits.isdecimal() else bits or None
        return cls(kind, act_bits)


FLOAT_MODE = Mode(FLOAT)


@dataclasses.dataclass(frozen=True)
class ModeCost:
    """What one unit costs in one mode (None: not measured): time of a call, within the whole step; SQNR of the unit's
    output against float, None for float itself; bytes of x_hat and y_hat; bytes that a call moves by the cost model."""

    mode: Mode
    time_us: float | None = None
    sqnr_db: float | None = None
    state_bytes: int = 0
    moved_bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class UnitPlan:
    """The mode of one unit, a layer or block at `path`. layers: paths of those it holds; none for all below `path`.
    costs: of the modes that were compared. reason: why this mode."""

    path: str
    mode: Mode
    layers: tuple[str, ...] = ()
    costs: tuple[ModeCost, ...] = ()
    reason: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"LayerPlan: path {self.path!r} is not allowed; give a module path such as 'mid_block'")
        for cost in self.costs:
            for name in ("time_us", "sqnr_db", "state_bytes", "moved_bytes"):
                value = getattr(cost, name)
                if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                    raise ValueError(f"LayerPlan: {name}={value!r} of {self.path!r} is no number")

    def cost(self, mode: Mode) -> ModeCost | None:
        """The cost in `mode`, or None where it was not compared."""
        return next((cost for cost in self.costs if cost.mode == mode), None)

    def holds(self, layer: str) -> bool:
        """Whether the layer at this path belongs to the unit."""
        return layer in self.layers if self.layers else f"{layer}.".startswith(f"{self.path}.")


@dataclasses.dataclass(frozen=True)
class PlanKey:
    """What a plan was made for; another machine, model, shape, configuration or version asks for another plan.

    device: name, with the number of threads on a CPU. model: hash of the UNet's configuration and of the shapes and
    dtypes of its weights (not of their values). shape: of the UNet's sample, batch first. config: hash of the
    ModiffConfig, and of the loss and state that were allowed. versions: of modiff_kernels and torch."""

    device: str
    model: str
    shape: tuple[int, ...]
    config: str
    versions: str

    @property
    def digest(self) -> str:
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
    key: what it was made for, None for a plan written by hand. source: "given", "estimated" or "measured".
    candidates: whole plans that were timed against each other. summary: the decision in a sentence or two. max_loss_db:
    how far the PSNR was allowed to fall below that of the best single mode."""

    units: tuple[UnitPlan, ...]
    key: PlanKey | None = None
    source: str = "given"
    candidates: tuple[Candidate, ...] = ()
    summary: str = ""
    max_loss_db: float | None = None

    def __post_init__(self) -> None:
        paths = Counter(unit.path for unit in self.units)
        if twice := [path for path, count in paths.items() if count > 1]:
            raise ValueError(f"LayerPlan: {', '.join(map(repr, twice))} is there twice; give every unit one mode")
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
        return sum(cost.state_bytes for unit in self.units if (cost := unit.cost(unit.mode)) is not None)

    def unit_of(self, layer: str) -> UnitPlan | None:
        """The unit that decides about the layer at this path, or None."""
        units = [unit for unit in self.units if unit.holds(layer)]
        return max(units, key=lambda unit: (bool(unit.layers), len(unit.path)), default=None)

    def check(self, replaceable: Collection[str], reasons: Mapping[str, str]) -> None:
        """Raise ValueError unless the plan fits a UNet; one with a key names all of its layers. replaceable: paths of
        those with a low-bit form. reasons: why the others have none."""
        advice = "make one for it with make_plan() or `modiff calibrate --plan`"
        for unit in self.units:
            held = [layer for layer in replaceable if unit.holds(layer)]
            left = [layer for layer in reasons if unit.holds(layer)]
            unknown = [layer for layer in unit.layers if layer not in replaceable and layer not in reasons]
            if unknown or not (held or left):
                wrong = f"{(unknown or [unit.path])[0]!r} is no Linear, Conv2d or block with such layers in this UNet"
                raise ValueError(f"plan: {wrong}; {advice}")
            if unit.mode == FLOAT_MODE:
                continue
            if refused := [layer for layer in left if layer in unit.layers or not held]:
                why_not = f"{refused[0]} stays float ({reasons[refused[0]]}); give 'float'"
                raise ValueError(f"plan: {unit.path!r} cannot be {unit.mode}: {why_not}")
        unnamed = [] if self.key is None else [layer for layer in replaceable if self.unit_of(layer) is None]
        if unnamed:
            raise ValueError(f"plan: it is for a UNet, or skip_modules, without the layer {unnamed[0]!r}; {advice}")

    def to_json(self) -> str:
        """The plan as a JSON object; `from_json` gives an equal one back."""
        return json.dumps(dataclasses.asdict(self, dict_factory=_json_value), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "LayerPlan":
        """Read what `to_json` wrote; ValueError on anything else. "units" may also be an object of paths and modes."""
        values = read_json("LayerPlan", text)
        if not isinstance(values, dict) or not isinstance(values.get("units"), (list, dict)):
            raise ValueError("LayerPlan: the text is no object with 'units'; give what to_json() returns")
        units = values.pop("units")
        try:
            units = cls.of(units).units if isinstance(units, dict) else tuple(_unit(**unit) for unit in units)
            candidates = tuple(Candidate(**candidate) for candidate in values.pop("candidates", ()))
            if (key := values.pop("key", None)) is not None:
                key = PlanKey(**{**key, "shape": tuple(key["shape"])})
            return cls(units, key, candidates=candidates, **values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"LayerPlan: not a plan as to_json() writes it ({error!r})") from error

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of cells: of each unit its mode, times of all, what its own gives, and the reason."""
        modes = list(dict.fromkeys(cost.mode for unit in self.units for cost in unit.costs))
        times_of_modes = [f"{mode} us" for mode in modes]
        header = ("unit", "mode", *times_of_modes, "speed-up", "SQNR dB", "state kB", "moved kB", "reason")
        rows = []
        for unit in self.units:
            times = {cost.mode: cost.time_us for cost in unit.costs}
            chosen, own, plain = unit.cost(unit.mode), times.get(unit.mode), times.get(FLOAT_MODE)
            cells = [_shown(times.get(mode), ".0f") for mode in modes]
            cells.append(_shown(plain / own if own and plain else None, ".2f", "x"))
            cells.append(_shown(chosen.sqnr_db if chosen else None, ".1f"))
            cells.append(_shown(chosen.state_bytes / 1e3 if chosen else None, ".1f"))
            moved = None if chosen is None else chosen.moved_bytes
            cells.append(_shown(None if moved is None else moved / 1e3, ".1f"))
            rows.append((unit.path, str(unit.mode), *cells, unit.reason))
        return header, rows

    def describe(self) -> str:
        """The decision, the whole plans that were timed, and `table` as text."""
        lines = [f"plan ({self.source}): {self.summary or 'as given'}", *(f"  {each}" for each in self.candidates)]
        return "\n".join([*lines, text_table(*self.table(), left=("unit", "mode", "reason"))])


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def noise_of(sqnr_db: float | None) -> float:
    """Power of the error over that of the signal; None is exact."""
    return 0.0 if sqnr_db is None else 10.0 ** (-sqnr_db / 10)


def _json_value(fields: Iterable[tuple[str, Any]]) -> Any:
    values = dict(fields)
    return str(Mode(**values)) if values.keys() == {"kind", "act_bits"} else values


def _unit(mode: str, layers: Iterable[str] = (), costs: Iterable[Mapping[str, Any]] = (), **values: Any) -> UnitPlan:
    known = tuple(ModeCost(**{**cost, "mode": Mode.parse(cost["mode"])}) for cost in costs)
    return UnitPlan(mode=Mode.parse(mode), layers=tuple(layers), costs=known, **values)


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
