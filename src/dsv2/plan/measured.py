"""Measured GPU-hours turned into MFU; beside them DeepSeek 67B's, and what is saved."""

from dataclasses import dataclass
from typing import Any

from dsv2.model.config import ModelConfig
from dsv2.model.yardstick import DEEPSEEK_67B
from dsv2.parallel.hardware import Hardware
from dsv2.parallel.simulate import flops_per_token, mfu_from_gpu_hours
from dsv2.plan.options import TrainOptions
from dsv2.plan.sheet import Sheet, count, percent

NOMINAL_67B = 67.0e9  # what the name says; the shape has 67.425e9


@dataclass(frozen=True, slots=True)
class Cost:
    """One measured cost.

    Args:
        name: whose.
        hours: GPU-hours per 1e12 tokens.
        mfu: that they amount to, (6N alone, with causal attention).
        how: where the FLOP are from.
    """

    name: str
    hours: float
    mfu: tuple[float, float]
    how: str


@dataclass(frozen=True, slots=True)
class Costs:
    """The model's cost; DeepSeek 67B's counted from its shape and at its nominal size, where that is known."""

    model: Cost
    yardsticks: tuple[Cost, ...]

    @property
    def saving(self) -> float:
        """Share of the GPU-hours that the model needs less than the yardstick."""
        return 1 - self.model.hours / self.yardsticks[0].hours

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        values: dict[str, Any] = {"name": self.model.name, "gpu_hours_per_trillion": self.model.hours}
        values |= {"mfu_6n": self.model.mfu[0], "mfu_with_attention": self.model.mfu[1]}
        if self.yardsticks:
            other = self.yardsticks[0]
            values |= {"yardstick_gpu_hours_per_trillion": other.hours, "saving": self.saving}
            values |= {"yardstick_mfu_6n": other.mfu[0], "yardstick_mfu_with_attention": other.mfu[1]}
        return values


def measured_costs(config: ModelConfig, name: str, options: TrainOptions, hardware: Hardware) -> Costs:
    """Turn measured GPU-hours into MFU.

    Args:
        config: the model.
        name: whose hours they are.
        options: the hours and ``seq_len``.
        hardware: its bf16 peak.

    Returns:
        The model's cost, and the yardstick's where ``yardstick_gpu_hours`` is known.
    """
    seq_len = options.seq_len or 0

    def cost(name: str, hours: float, flops: tuple[float, float], how: str) -> Cost:
        six, whole = (mfu_from_gpu_hours(each, hours, hardware.bf16_flops) for each in flops)
        return Cost(name, hours, (six, whole), how)

    flops = flops_per_token(config, seq_len)
    own = cost(name, options.measured_gpu_hours or 0.0, flops, f"{flops[0] / 1e9:.1f} / {flops[1] / 1e9:.1f} GFLOP/token")
    hours = options.yardstick_gpu_hours
    if hours is None:
        return Costs(own, ())
    dense = 6.0 * DEEPSEEK_67B.parameters, DEEPSEEK_67B.training_flops_per_token(seq_len)
    nominal = 6 * NOMINAL_67B, 6 * NOMINAL_67B + dense[1] - dense[0]
    counted = cost("DeepSeek 67B", hours, dense, "67.425e9 parameters, counted from its shape")
    return Costs(own, (counted, cost("  at its nominal size", hours, nominal, "67.0e9 parameters")))


def measured_sheet(costs: Costs, hardware: Hardware) -> Sheet:
    """Say it as a table.

    Args:
        costs: what was measured.
        hardware: its bf16 peak.

    Returns:
        Rows of both models and the saving.
    """
    rows = [(cost.name, count(cost.hours), *(percent(mfu) for mfu in cost.mfu), cost.how) for cost in (costs.model, *costs.yardsticks)]
    if costs.yardsticks:
        how = f"1 - {count(costs.model.hours)} / {count(costs.yardsticks[0].hours)} (section 3.2.3)"
        rows.append(("saving", f"{100 * costs.saving:.3f} %", "", "", how))
    title = f"Measured cost as MFU: FLOP/token x 1e12 / (GPU-hours x 3600 x {hardware.bf16_flops / 1e12:,.4g} TFLOPS)"
    return Sheet(title, ("model", "GPU-hours/1T", "6 N", "with attention", "how"), rows)
