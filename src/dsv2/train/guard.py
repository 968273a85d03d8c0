"""The guard against loss spikes: updates that stand out are skipped, and many in a row roll the weights back.

A spike is a loss or gradient norm more than ``sigma`` standard deviations above its mean over the last ``window`` steps that were not
skipped; with a new stage of the mixture it begins anew. All of it is a pure function of the state, which checkpoints hold: a resumed run
judges as the undisturbed one does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import Field

from dsv2.config import Section
from dsv2.errors import CheckpointError


class GuardSection(Section):
    """When a step is a spike, and what then."""

    sigma: float | None = Field(default=None, gt=0, description="standard deviations above the mean that make a spike; absent: no guard")
    window: int = Field(default=128, ge=8, description="steps whose mean and deviation count; the guard judges from half of them on")
    rollback_after: int = Field(
        default=8, gt=0, description="spikes in a row after which weights and moments of the last checkpoint return"
    )


@dataclass(frozen=True, slots=True)
class Spike:
    """What stood out.

    Args:
        what: "loss" or "grad_norm".
        value: seen.
        limit: the largest that would have passed.
    """

    what: str
    value: float
    limit: float


@dataclass(frozen=True, slots=True)
class GuardState:
    """What the guard knows between two steps.

    Args:
        losses: of the last ``window`` steps that were not skipped, oldest first.
        grad_norms: theirs, before clipping.
        in_a_row: spikes since the last step that was not skipped, or since the rollback.
        rolled_back: no step has passed since the last rollback.
    """

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    in_a_row: int = 0
    rolled_back: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values; floats survive exactly."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "in_a_row": self.in_a_row,
            "rolled_back": self.rolled_back,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "GuardState":
        """Read what ``to_json`` gave; an empty mapping is a fresh state.

        Raises:
            CheckpointError: it is something else.
        """
        if not values:
            return cls()
        try:
            losses, norms = (tuple(float(value) for value in values[name]) for name in ("losses", "grad_norms"))
            if values.keys() != {field.name for field in fields(cls)} or len(losses) != len(norms):
                raise ValueError
            return cls(losses, norms, int(values["in_a_row"]), bool(values["rolled_back"]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError("the checkpoint's guard against spikes is damaged", hint="resume from another checkpoint") from None


def find_spike(section: GuardSection, state: GuardState, loss: float, grad_norm: float) -> Spike | None:
    """Return what stands out in a step, or None.

    Args:
        section: when a value is a spike.
        state: before the step.
        loss: of the step, finite.
        grad_norm: of the step before clipping, finite.
    """
    if section.sigma is None or len(state.losses) < section.window // 2:
        return None
    for what, value, past in (("loss", loss, state.losses), ("grad_norm", grad_norm, state.grad_norms)):
        limit = spike_limit(past, section.sigma)
        if value > limit:
            return Spike(what, value, limit)
    return None


def spike_limit(past: Sequence[float], sigma: float) -> float:
    """Return mean + sigma * standard deviation (of the population) of some values."""
    mean = math.fsum(past) / len(past)
    return mean + sigma * math.sqrt(math.fsum((value - mean) ** 2 for value in past) / len(past))


def after_step(section: GuardSection, state: GuardState, *, loss: float, grad_norm: float, skipped: bool) -> GuardState:
    """Return the state after a step; one that was skipped leaves mean and deviation as they were."""
    if section.sigma is None:
        return state
    if skipped:
        return GuardState(state.losses, state.grad_norms, state.in_a_row + 1, state.rolled_back)
    return GuardState((*state.losses, loss)[-section.window :], (*state.grad_norms, grad_norm)[-section.window :])


def after_rollback(restored: GuardState) -> GuardState:
    """Return the state after a rollback, from that of the restored checkpoint: its weights are judged by what came before them."""
    return GuardState(restored.losses, restored.grad_norms, 0, True)
