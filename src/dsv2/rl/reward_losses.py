"""What a reward model is trained on, point-wise or pair-wise (section 4.2 names both and writes neither). Pure functions; all [n], no mean.

Pair-wise: R. Bradley and M. Terry, 1952, as L. Ouyang et al., 2022 (InstructGPT), eq 1, train reward models with it. Centring:
J. Eisenstein et al., 2023 ("Helping or Herding?"): the loss leaves the sum of two rewards free, a small square ties it to 0.
Point-wise: logistic regression of right and wrong answers, as K. Cobbe et al., 2021, train verifiers; or least squares of given scores.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Rewards = Float[Tensor, " answers"]


def bradley_terry(chosen: Rewards, rejected: Rewards, *, centring: float = 0.0) -> Rewards:
    """Return -ln sigma(r_chosen - r_rejected) + centring (r_chosen + r_rejected)^2 of each pair, nats."""
    loss = -F.logsigmoid(chosen - rejected)
    return loss + centring * (chosen + rejected) ** 2 if centring else loss


def logistic(rewards: Rewards, labels: Rewards) -> Rewards:
    """Return the cross-entropy of sigma(r) with labels in [0, 1], nats."""
    return F.binary_cross_entropy_with_logits(rewards, labels, reduction="none")


def squared_error(rewards: Rewards, scores: Rewards) -> Rewards:
    """Return (r - score)^2."""
    return (rewards - scores) ** 2
