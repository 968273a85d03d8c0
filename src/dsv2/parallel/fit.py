"""Traffic and utilisation fitted to the published throughput: one mix and one utilisation for both models. Works without torch.

The paper gives no length distribution, batch or latency limit. What it gives is three figures (section 3.2.3; the two rates are read off
figure 1(b), spec 7): about 55.5K generated tokens/s for V2 and 9.65K for DeepSeek 67B, ratio 5.76, and more than 100K prompt tokens/s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

from dsv2.parallel.serving import ServePlan, Traffic

GENERATED, YARDSTICK_GENERATED, RATIO = 55.5e3, 9.65e3, 5.76
LEAST_GENERATED, LEAST_PROMPT = 50e3, 100e3
PROMPT_PER_OUTPUT = 2.0  # assumed, no figure says it; the paper's >100K prompt beside >50K generated tokens suggested it
STEP = 50  # tokens; of the grid of prompt lengths

Planner = Callable[[Traffic, float], tuple[ServePlan, ServePlan]]


@dataclass(frozen=True, slots=True)
class Fit:
    """The mix and utilisation that come closest.

    Args:
        traffic: mean lengths.
        utilisation: share of the roofline, in whole percent.
        error: root mean square of the two log ratios to the published rates.
    """

    traffic: Traffic
    utilisation: float
    error: float


def fit_traffic(plan: Planner, longest: int = 8000) -> Fit | None:
    """Find the mean prompt and the utilisation that bring both models closest to their published rates.

    Args:
        plan: (traffic, utilisation) -> plans of the model and of DeepSeek 67B.
        longest: prompt tokens tried, in steps of ``STEP``.

    Returns:
        The best point of the grid at which the model generates > 50K and reads > 100K tokens/s; None where there is none.
    """
    best: Fit | None = None
    for prompt in range(STEP, longest + 1, STEP):
        traffic = Traffic(prompt, prompt / PROMPT_PER_OUTPUT)
        ours, theirs = plan(traffic, 1.0)
        if not (ours.fits and theirs.fits):
            continue
        for hundredth in range(5, 101):
            share = hundredth / 100  # rates are proportional to the utilisation
            generated, other = share * ours.generated_per_second, share * theirs.generated_per_second
            if generated < LEAST_GENERATED or share * ours.prompt_per_second < LEAST_PROMPT:
                continue
            error = ((log(generated / GENERATED) ** 2 + log(other / YARDSTICK_GENERATED) ** 2) / 2) ** 0.5
            if best is None or error < best.error:
                best = Fit(traffic, share, error)
    return best
