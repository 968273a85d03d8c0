"""What a run of GRPO writes down and prints: its plan, metrics, every rollout, a sample now and then."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dsv2.engine.llm import LLM
from dsv2.files import atomic_write
from dsv2.metrics import MetricsLog
from dsv2.progress import console, table
from dsv2.rl.batch import Batch
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.objective import Objective
from dsv2.rl.prompts import Prompts
from dsv2.rl.reward import Rewards
from dsv2.rl.rollout import Rollout
from dsv2.rl.step_metrics import rollout_metrics
from dsv2.rl.supervision import shown_advantage
from dsv2.rl.update import Agreement, Padded, UpdateResult
from dsv2.train.plan import describe_rate
from dsv2.train.run_folder import METRICS

ROLLOUTS = "rollouts.jsonl"
ALARM = "alarm.jsonl"


class RunLog:
    """The files of a run that grow by lines, cut back to the step that it goes on from.

    Args:
        out: folder of the run.
        step: steps done.
        group_size: answers to a prompt.
        tensorboard: write metrics for TensorBoard as well.
    """

    def __init__(self, out: Path, step: int, *, group_size: int, tensorboard: bool) -> None:
        self._metrics, self._rollouts = MetricsLog(out / METRICS, tensorboard=tensorboard), MetricsLog(out / ROLLOUTS)
        self._group_size = group_size
        for log in (self._metrics, self._rollouts):
            log.cut_back(step or -1)  # the evaluation before the first step is made again, too

    def close(self) -> None:
        """Close them."""
        self._metrics.close()
        self._rollouts.close()

    def step(
        self,
        step: int,
        batch: Batch,
        learned: UpdateResult | None,
        agreed: Agreement | None,
        *,
        num_tokens: int,
        rate: float,
        step_s: float,
        elapsed_s: float,
    ) -> None:
        """Write a step and its rollouts.

        Args:
            step: its number, from 1.
            batch: that it drew.
            learned: what its updates did, see ``over_updates``; None: there was nothing to learn from.
            agreed: how far the engine was from the trainer.
            num_tokens: of all rollouts of the run so far, with their prompts.
            rate: learning rate.
            step_s: that it took, seconds.
            elapsed_s: that all steps of the run took.
        """
        line = rollout_metrics(batch.drawn, batch.scores, self._group_size)
        if learned is not None and agreed is not None:
            line |= {
                "loss": learned.loss, "kl": learned.kl, "kl_loss": learned.kl_loss, "entropy": learned.entropy,
                "grad_norm": learned.grad_norm, "clip_ratio/low_mean": learned.clipped_low, "clip_ratio/high_mean": learned.clipped_high,
                "clip_ratio/region_mean": learned.clipped_low + learned.clipped_high, "clip_ratio/low_min": learned.clipped_low_min,
                "clip_ratio/high_max": learned.clipped_high_max, "ratio_max": learned.ratio_max,
                "sampling/sampling_logp_difference/max": agreed.largest, "sampling/sampling_logp_difference/mean": agreed.mean,
                "sampling/importance_sampling_ratio/min": agreed.ratio_min, "sampling/importance_sampling_ratio/mean": agreed.ratio_mean,
                "sampling/importance_sampling_ratio/max": agreed.ratio_max,
            }  # fmt: skip
            if learned.weight_mean is not None:  # as they weigh the loss, cut or dropped, which is what TRL shows
                line |= {
                    "sampling/importance_sampling_ratio/min": learned.weight_min,
                    "sampling/importance_sampling_ratio/mean": learned.weight_mean,
                    "sampling/importance_sampling_ratio/max": learned.weight_max,
                    "sampling/importance_weight/capped": learned.weight_capped,
                }
        self._metrics.write(
            step, "grpo", **line, num_tokens=num_tokens, learned_from=len(batch.kept), consumed_prompts=batch.consumed, lr=rate,
            rollouts_per_s=round(batch.rollouts_per_s, 2), rollout_s=round(batch.seconds, 3), step_time=round(step_s, 3),
            elapsed_s=round(elapsed_s, 3),
        )  # fmt: skip
        learned_from = set(batch.kept)
        for i, rollout in enumerate(batch.drawn):
            steps = batch.scores.steps[i] if batch.scores.steps else None
            self._rollouts.write(
                step, "rollout", **rollout.as_dict(), reward=batch.scores.total[i], rewards=batch.scores.of(i),
                **shown_advantage(batch.advantages[i], len(rollout.tokens), steps), learned=i in learned_from,
            )  # fmt: skip

    def evaluation(self, step: int, found: Mapping[str, float | None], num_prompts: int, *, elapsed_s: float) -> None:
        """Write and print what ``evaluate`` found after a step."""
        self._metrics.write(step, "evaluation", elapsed_s=round(elapsed_s, 3), **found)
        shown = [f"{name} {value:.3f}" for name, value in found.items() if isinstance(value, float)]
        shown += [f"{found['unscored']} of {found['answers']} answers without a score"] if found["unscored"] else []
        console().print(f"step {step}, {num_prompts} held-out prompts: {', '.join(shown)}", markup=False, soft_wrap=True)


def write_alarm(file: Path, step: int, rollouts: Sequence[Rollout], pieces: Sequence[Padded], trainer: Sequence[torch.Tensor]) -> None:
    """Write the rollouts of a step whose log-probabilities differ too much, as JSON lines: ids, and what both sides say of each token.

    Args:
        file: replaced if it is there.
        step: they are of.
        rollouts: of the step that are learned from.
        pieces: of them.
        trainer: log-probabilities of each piece.

    Raises:
        DataError: the disk is full or may not be written.
    """
    lines = []
    for piece, logp in zip(pieces, trainer, strict=True):
        for row, own in zip(piece.rows.tolist(), logp, strict=True):
            rollout = rollouts[row]
            line = {"step": step} | rollout.as_dict() | {
                "prompt_tokens": rollout.prompt_tokens, "tokens": rollout.tokens, "mask": rollout.mask,
                "engine_logprobs": rollout.logprobs, "trainer_logprobs": own[: len(rollout.tokens)].tolist(),
            }  # fmt: skip
            lines.append((row, json.dumps(line, ensure_ascii=False) + "\n"))
    atomic_write(file, "".join(line for _, line in sorted(lines)))


def print_plan(recipe: GrpoRecipe, objective: Objective, rewards: Rewards, policy: str, prompts: Prompts, llm: LLM, step: int) -> None:
    """Print what a run is about to do, and after which step it goes on."""
    section = recipe.rollout
    left_out = f"; {prompts.left_out:,} left out, whose own solutions fail" if prompts.left_out else ""
    rows = [
        ("policy", policy),
        ("prompts", f"{len(prompts):,} to learn from, {len(prompts.held_out):,} held out{left_out}"),
        ("a step", f"{section.prompts} prompts x {section.group_size} answers of at most {section.max_tokens} tokens"),
        ("rewards", ", ".join(map(str, rewards.parts))),
        ("objective", f"{recipe.supervision} supervision, {objective}"),
        ("updates", f"{recipe.update.updates} a batch, learning rate {describe_rate(recipe.learning_rate)}"),
        ("engine", f"{llm.engine.cache}; up to {section.max_batch} answers at once"),
        ("steps", f"{recipe.run.steps:,} on the CPU; {recipe.run.precision} products, {torch.get_num_threads()} threads"),
    ]
    table("plan", ("what", "value"), rows)
    if step:
        console().print(f"resuming after step {step} of {recipe.run.steps}")


def print_sample(step: int, batch: Batch) -> None:
    """Print a rollout of a step."""
    first, earned = batch.drawn[0], batch.scores.total[0]
    shown = f"step {step}, {first.example['messages'][-1]['content']!r}: {first.text!r}, reward {earned}"
    console().print(shown[:400], markup=False, soft_wrap=True)


def on_the_bar(batch: Batch, learned: UpdateResult | None) -> dict[str, object]:
    """Return what the progress bar says of a step."""
    known = [reward for reward in batch.scores.total if reward is not None]
    lengths = [len(rollout.tokens) for rollout in batch.drawn]
    shown: dict[str, object] = {"reward": sum(known) / max(1, len(known)), "length": sum(lengths) / len(lengths)}
    if learned is not None and learned.kl is not None:
        shown["kl"] = learned.kl
    return shown | {"rollouts_per_s": batch.rollouts_per_s}
