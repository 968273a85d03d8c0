"""Rewards in units of their own spread, so that the weights of several weigh like with like (GDPO, arXiv 2601.05242, section 3.1).

The unit of a reward model that was trained on pairs says how sure it grew, not how much it should weigh: times ten, its scores order every
pair alike. Where its scores of one prompt lie beside those of another says nothing at all, as no pair compared them: hence deviations are
those of what is left without the group's mean, also where they are taken over a batch.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from dsv2.rl.objective import advantages

Scale = Literal["none", "group", "batch"]


def in_deviations(values: Sequence[float | None], groups: Sequence[int], scale: Scale) -> list[float | None]:
    """Return a reward's values less the mean of their group, in deviations.

    Args:
        values: of answers; None, without a score, stays None and counts nowhere.
        groups: the group that each answer is of, in any order.
        scale: "none": the values as they are; "group": in deviations of the group; "batch": in one for all, that of what all groups'
            values have left without the group's mean.

    Returns:
        0 in a group whose values are equal but for rounding.
    """
    if scale == "none" or not values:
        return list(values)
    rows = {group: row for row, group in enumerate(dict.fromkeys(groups))}
    taken = [0] * len(rows)
    places = []
    for group in groups:
        places.append((rows[group], taken[rows[group]]))
        taken[rows[group]] += 1
    table = torch.full((len(rows), max(taken)), torch.nan, dtype=torch.float64)
    for (row, column), value in zip(places, values, strict=True):
        table[row, column] = torch.nan if value is None else value
    found = advantages(table, "zscore" if scale == "group" else "mean")
    if scale == "batch" and found.any():
        found /= found[~table.isnan()].square().mean().sqrt()
    return [None if value is None else float(found[place]) for place, value in zip(places, values, strict=True)]
