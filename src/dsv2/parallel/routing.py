"""How many devices a token's experts are on: exact expectations under uniform routing, with and without the limit of section 2.2.2.

Why the limit costs so little: rank all experts by affinity. The groups kept are those of the first M different labels in that order, so
a token reaches min(M, D) groups, D being the groups of its K_r experts without the limit. Works without torch.
"""

from functools import cache
from math import comb

from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig


def expected_distinct(bins: int, per_bin: int, draws: int) -> float:
    """Return how many of ``bins`` equal bins hold at least one of ``draws`` items drawn without replacement, on average.

    Args:
        bins: number of bins.
        per_bin: items in each.
        draws: items drawn.

    Returns:
        bins * (1 - C(bins*per_bin - per_bin, draws) / C(bins*per_bin, draws)).
    """
    total = bins * per_bin
    return bins * (1 - comb(total - per_bin, draws) / comb(total, draws))


@cache
def group_counts(groups: int, per_group: int, limit: int, draws: int) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Return the distribution of how many chosen experts each reached group holds, groups ranked by their highest affinity.

    Args:
        groups: D, groups in all.
        per_group: experts in each.
        limit: M, groups a token may reach.
        draws: K_r, experts chosen.

    Returns:
        Pairs (counts of the reached groups, descending; probability), for independent and equally distributed affinities.
    """
    states: dict[tuple[int, ...], float] = {(): 1.0}
    for drawn in range(draws):
        following: dict[tuple[int, ...], float] = {}
        for counts, probability in states.items():
            # Once M groups are known the rest of the order is uniform over what is left in them.
            left = (limit if len(counts) == limit else groups) * per_group - drawn
            moves = [((*counts[:i], count + 1, *counts[i + 1 :]), per_group - count) for i, count in enumerate(counts) if count < per_group]
            if len(counts) < limit:
                moves.append(((*counts, 1), (groups - len(counts)) * per_group))
            for counts_then, ways in moves:
                key = tuple(sorted(counts_then, reverse=True))
                following[key] = following.get(key, 0.0) + probability * ways / left
        states = following
    return tuple(states.items())


def expected_devices(config: ModelConfig, devices: int, *, limited: bool = True) -> float:
    """Return on how many devices the routed experts of a token are, on average, under uniform routing.

    Args:
        config: the model; its groups decide where the routing is device-limited.
        devices: ranks that share the experts in equal contiguous parts.
        limited: False: what the count would be without the limit.

    Returns:
        Between 1 and the smaller of K_r and ``devices``; 0 for a model without routed experts.

    Raises:
        ConfigError: the experts do not split over the devices, or groups and devices cut across each other.
    """
    experts, draws = config.n_routed_experts, config.num_experts_per_tok
    if experts is None or draws is None:
        return 0.0
    if devices == 1:
        return 1.0
    check_expert_parallel(config, devices)
    free = not limited or config.topk_method == "greedy" or config.topk_group == config.n_group
    return _expected_devices(experts, draws, config.n_group, 0 if free else config.topk_group, devices)


@cache
def _expected_devices(experts: int, draws: int, groups: int, limit: int, devices: int) -> float:
    per_device = experts // devices
    if not limit:
        return expected_distinct(devices, per_device, draws)
    mean = 0.0
    for counts, probability in group_counts(groups, experts // groups, limit, draws):
        if devices <= groups:  # a device holds whole groups
            held = groups // devices
            reached = devices * (1 - comb(groups - held, len(counts)) / comb(groups, len(counts)))
        else:  # a group lies on several devices
            reached = sum(expected_distinct(devices // groups, per_device, count) for count in counts)
        mean += probability * reached
    return mean


def check_expert_parallel(config: ModelConfig, devices: int) -> None:
    """Refuse a number of devices that does not cut experts and groups cleanly.

    Args:
        config: the model.
        devices: ranks that share the experts.

    Raises:
        ConfigError: see above; the message names sizes that work.
    """
    experts, groups = config.n_routed_experts or 1, config.n_group
    if devices == 1:
        return
    if config.n_routed_experts is None:
        raise ConfigError(f"ep = {devices}, but the model has no routed experts", hint="use ep=1")
    limited = config.topk_method == "group_limited_greedy"
    fits = [n for n in range(1, experts + 1) if experts % n == 0 and (not limited or n % groups == 0 or groups % n == 0)]
    if devices not in fits:
        cut = f" in {groups} groups" if limited else ""
        raise ConfigError(
            f"ep = {devices} does not cut {experts} routed experts{cut} into equal parts", hint=f"use ep = {', '.join(map(str, fits))}"
        )


def experts_touched(config: ModelConfig, tokens: float) -> float:
    """Return how many routed experts of a layer are used by a batch, on average, under uniform routing: N (1 - (1 - K/N)^b).

    Args:
        config: the model.
        tokens: b, tokens that pass the layer together.

    Returns:
        Experts whose weights are read once for the batch.
    """
    experts, draws = config.n_routed_experts, config.num_experts_per_tok
    if experts is None or draws is None:
        return 0.0
    return float(experts * (1 - (1 - draws / experts) ** tokens))
