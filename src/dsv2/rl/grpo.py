"""GRPO: sample groups of answers, score them, learn from what is above its group's mean; no critic (section 4.2; spec 6.2).

RUN/rollouts.jsonl        every rollout, with rewards and advantage
RUN/reference-N.safetensors  the policy that the KL holds to; the rest as in every run (train/run_folder.py)

A step is a function of weights, moments and the number of prompts consumed: rollouts draw from seeds made of run, step and place. A run
that was killed anywhere goes on from its newest checkpoint and ends with the same weights and rollouts, bit for bit.
"""

import re
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsv2.checkpoint.layout import TrainingState, save_checkpoint
from dsv2.checkpoint.steps import checkpoints, remove_old
from dsv2.engine.llm import LLM
from dsv2.errors import DataError
from dsv2.files import clear_leftovers, sole_use
from dsv2.model.accounting import count_parameters
from dsv2.model.transformer import Transformer
from dsv2.progress import MetricsLog, bar, console, say, table
from dsv2.rl.evaluate import evaluate
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.objective import PRESETS, Objective, overlong_penalty
from dsv2.rl.prompts import Prompts, open_prompts
from dsv2.rl.reference import Reference
from dsv2.rl.reward import Rewards, Scores, open_rewards
from dsv2.rl.reward_needs import require_wanted, reward_models
from dsv2.rl.rollout import Rollout, draw
from dsv2.rl.step_metrics import rollout_metrics
from dsv2.rl.supervision import advantages_of, require_supervision, shown_advantage
from dsv2.rl.tools import tool_named
from dsv2.rl.update import Agreement, UpdateResult, agreement, pad, teaching, update, without_graph
from dsv2.train.loop import resume_from
from dsv2.train.memory import require_training_memory
from dsv2.train.optimizer import make_optimizer, optimizer_tensors
from dsv2.train.plan import describe_rate
from dsv2.train.precision import autocast_dtype, require_determinism
from dsv2.train.run_folder import METRICS, begin_run, load_stage_recipe, require_resume, settled_recipe
from dsv2.train.schedule import learning_rate
from dsv2.train.start import Start, begin_weights, open_start, start_hash

ROLLOUTS = "rollouts.jsonl"
_UNHURRIED_S = 1e6  # of an engine step: with a bound in seconds, which prompts share a step would depend on the clock
_ALARM = {"fp32": 1e-5, "bf16": 0.05}  # of the mean difference, nats


def run(
    target: str, overrides: Sequence[str] = (), *, out: Path, data: Sequence[Path] = (), resume: bool = False, tensorboard: bool = False
) -> None:
    """Stage of ``dsv2 grpo``.

    Args:
        target: a recipe's name or file; or a model, which then has the recipe "default".
        overrides: of the recipe.
        out: the run's folder.
        data: files of prompts; none for a task that makes its own.
        resume: go on with the run in ``out``.
        tensorboard: write metrics for TensorBoard as well.

    Raises:
        ConfigError: a wrong recipe, or a run folder that exists and may not be continued.
        CheckpointError: there is no such model.
        DataError: missing or malformed prompts.
    """
    recipe = load_stage_recipe(target, GrpoRecipe, "grpo", overrides)
    require_resume(out, resume)
    recipe, start = open_start(recipe)
    prompts = open_prompts(recipe, start.tokenizer, data)
    for line in prompts.report:
        say(f"prompts: {line}")
    train(recipe, start, prompts, out, tensorboard=tensorboard)


def train(
    recipe: GrpoRecipe, start: Start, prompts: Prompts, out: Path, *, tensorboard: bool = False, rewards: Rewards | None = None
) -> Transformer:
    """Train the policy, or go on training it; return it.

    Args:
        recipe: what to do.
        start: the policy that the run begins with.
        prompts: to answer.
        out: folder of the run.
        tensorboard: write metrics for TensorBoard as well.
        rewards: None: those that the recipe names.

    Raises:
        ConfigError: the recipe does not fit the machine or the run in ``out``, or another process trains there.
        DataError: prompts lack what a reward judges by, or no rollout of a step has a score.
        LogProbsDiffer: engine and trainer do not agree.
    """
    with sole_use(out), closing(_Run(recipe, start, prompts, out, tensorboard, rewards)) as begun:
        return begun.train()


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a step learns from: scored rollouts of groups that are not all equal, and where the prompts stand after them."""

    drawn: list[Rollout]
    scores: Scores
    advantages: torch.Tensor  # [rollouts], or [rollouts, tokens] under process supervision
    kept: list[int]  # rollouts to learn from
    consumed: int
    seconds: float


class _Run:
    def __init__(self, recipe: GrpoRecipe, start: Start, prompts: Prompts, out: Path, tensorboard: bool, rewards: Rewards | None) -> None:
        device = torch.device("cpu")  # also where there is a GPU: the engine's native step is on the CPU, and reads the trainer's weights
        require_training_memory(16 * count_parameters(start.config).total, hint="choose a smaller model")
        begins_from, judges = start_hash(start.folder), {} if rewards else reward_models(recipe.reward)
        recipe = recipe.model_copy(update={"objective": objective_of(recipe)})  # recipe.toml states every choice
        self.recipe = recipe = settled_recipe(recipe, prompts.fingerprint, out, device, begins_from, judges)
        require_determinism(recipe.run.deterministic)
        self.objective = recipe.objective
        self.start, self.prompts, self.out, self.tokenizer = start, prompts, out, start.tokenizer
        if rewards is None:
            require_wanted(recipe.reward, [*prompts.take(0, len(prompts)), *prompts.held_out])
        self.rewards = open_rewards(recipe.reward, self.tokenizer, recipe.run.seq_len) if rewards is None else rewards
        require_supervision(recipe.supervision, self.rewards, self.objective)
        self.model = Transformer(start.config)
        if not checkpoints(out):
            begin_weights(self.model, str(start.folder), recipe.run.seed)
        self.autocast = autocast_dtype(recipe.run.precision)
        self.optimizer = make_optimizer(self.model, recipe.optimizer, products=self.autocast)
        begin_run(recipe, prompts.fingerprint, out, device, begins_from, judges)
        clear_leftovers(out, re.escape(ROLLOUTS))
        state = resume_from(out, self.model, self.optimizer, recipe.run.keep)
        self.step, self.consumed, self.elapsed = (state.step, state.consumed_samples, state.elapsed_s) if state else (0, 0, 0.0)
        self.metrics, self.shown = MetricsLog(out / METRICS, tensorboard=tensorboard), MetricsLog(out / ROLLOUTS)
        for log in (self.metrics, self.shown):
            log.cut_back(self.step or -1)  # the evaluation before the first step is made again, too
        self.reference = Reference(out, self.model)
        self.llm = LLM(
            self.model, tokenizer=self.tokenizer, max_batch=recipe.rollout.max_batch, max_len=recipe.run.seq_len,
            cache_gb=recipe.rollout.cache_gb, max_step_s=_UNHURRIED_S,
        )  # fmt: skip
        self.replay = recipe.rollout.replay and start.config.num_moe_layers > 0
        self.tool = tool_named(recipe.rollout.tool)

    def close(self) -> None:
        self.llm.close()
        self.metrics.close()
        self.shown.close()

    def train(self) -> Transformer:
        run = self.recipe.run
        self._print_plan()
        if self.step == 0:
            self._evaluate()
        with bar(run.steps, "GRPO", unit="steps", done=self.step) as progress:
            while self.step < run.steps:
                began = time.perf_counter()
                if self.objective.kl_weight and self._reference_step() == self.step:
                    self.reference.keep(self.model, self.step)
                batch = self._sample()
                learned, agreed, rate = self._learn(batch)
                self.step, self.consumed = self.step + 1, batch.consumed
                step_s = time.perf_counter() - began
                self.elapsed += step_s
                self._write(batch, learned, agreed, rate, step_s)
                progress.advance(1, **_shown(batch, learned))
                last = self.step == run.steps
                if last or self.step % run.sample_every == 0:
                    self._show(batch)
                if last or self.step % run.validate_every == 0:
                    self._evaluate()
                if last or self.step % run.checkpoint_every == 0:
                    state = TrainingState(self.step, self.consumed, self.elapsed, optimizer_tensors(self.model, self.optimizer))
                    save_checkpoint(self.out / f"step-{self.step}", self.model, self.tokenizer, training=state)
                    remove_old(self.out, run.keep)
                    self.reference.remove_before(self._reference_step(int(checkpoints(self.out)[0].name.removeprefix("step-"))))
        return self.model

    # one step: sample, learn -----------------------------------------------------------------------------------------------------------

    def _sample(self) -> _Batch:
        """Draw and score this step's rollouts; groups with equal rewards are drawn anew where the objective says so."""
        began = time.perf_counter()
        section, size = self.recipe.rollout, self.recipe.rollout.group_size
        drawn: list[Rollout] = []
        kept: list[int] = []
        scores, found, consumed = Scores.empty(), [], self.consumed
        for round_number in range(section.most_rounds if self.objective.drop_equal_groups else 1):
            wanted = section.prompts - len(kept) // size
            new = draw(
                self.llm, self.prompts.take(consumed, wanted), group_size=size, max_tokens=section.max_tokens, tool=self.tool,
                seed=f"{self.recipe.run.seed} {self.step} {round_number}", record_experts=self.replay, first_group=len(drawn) // size,
            )  # fmt: skip
            consumed += wanted
            earned = self.rewards.score(new)
            scored = self._with_penalty(earned, new)
            found.append(self._advantages(scored, new, self.objective))
            differ = self._differ(earned, new)
            kept += [len(drawn) + i for i in range(len(new)) if differ[i // size] or not self.objective.drop_equal_groups]
            drawn, scores = drawn + new, scores + scored
            if len(kept) == section.prompts * size:
                break
        self._require_scores(scores)
        if self.objective.overlong == "mask":
            kept = [i for i in kept if not drawn[i].truncated]
        return _Batch(drawn, scores, torch.cat(found), kept, consumed, time.perf_counter() - began)

    def _with_penalty(self, scores: Scores, rollouts: Sequence[Rollout]) -> Scores:
        if self.objective.overlong != "penalty":
            return scores
        limit, buffer = self.recipe.rollout.max_tokens, self.objective.overlong_buffer
        return scores.with_part("overlong", [overlong_penalty(len(rollout.tokens), limit, buffer) for rollout in rollouts])

    def _advantages(self, scores: Scores, rollouts: Sequence[Rollout], objective: Objective) -> torch.Tensor:
        section = self.recipe.rollout
        return advantages_of(
            self.recipe.supervision, scores, rollouts, objective, group_size=section.group_size, max_tokens=section.max_tokens
        )

    def _differ(self, earned: Scores, rollouts: Sequence[Rollout]) -> list[bool]:
        """Tell in which groups rewards differ; the length penalty is none of them: DAPO's eq 11 is about right answers and wrong ones."""
        centred = self._advantages(earned, rollouts, self.objective.model_copy(update={"advantage": "mean"}))
        found: list[bool] = (centred.view(len(rollouts) // self.recipe.rollout.group_size, -1) != 0).any(dim=1).tolist()
        return found

    def _require_scores(self, scores: Scores) -> None:
        """Refuse a step from which nothing can be learned.

        Raises:
            DataError: no rollout has a score.
        """
        if all(earned is None for earned in scores.total):
            reasons = "; ".join(f"reward {label!r}: {reason}" for label, reason in self.rewards.reasons.items())
            raise DataError(
                f"step {self.step + 1}: none of its {len(scores.total)} rollouts has a score: {reasons}",
                hint="mend the reward, or give prompts that it can judge",
            )

    def _learn(self, batch: _Batch) -> tuple[UpdateResult | None, Agreement | None, float]:
        """Update the policy on a batch; nothing is done where no group has anything to teach."""
        recipe = self.recipe
        rate = learning_rate(recipe.learning_rate, step=self.step, tokens=self.step, total_tokens=recipe.run.steps)
        rollouts = [batch.drawn[i] for i in batch.kept]
        if not rollouts:
            return None, None, rate
        own = batch.advantages[batch.kept]
        learned_from = teaching(own, self.objective, recipe.balance)
        pieces = pad(rollouts, micro_tokens=recipe.update.micro_tokens, replay=self.replay, teaching=learned_from)
        autocast = torch.autocast("cpu", dtype=self.autocast) if self.autocast else nullcontext()
        reference = None
        if self.objective.kl_weight:  # its routers choose for themselves: with the policy's experts it would be neither of the two models
            routed_anew = [replace(piece, experts=None) for piece in pieces]
            reference = without_graph(self.reference.at(self._reference_step()), routed_anew, autocast)
        old = without_graph(self.model, pieces, autocast) if recipe.update.updates > 1 else None
        alarm = recipe.rollout.alarm or _ALARM[recipe.run.precision]
        agreed = agreement(rollouts, pieces, old, alarm=alarm, step=self.step + 1) if old is not None else None
        learned = None
        for _ in range(recipe.update.updates):
            learned, seen = update(
                self.model, self.optimizer, pieces, own, self.objective, lr=rate,
                clip_norm=recipe.optimizer.clip_norm, balance=recipe.balance, autocast=autocast, old=old, reference=reference,
                recompute=recipe.run.recompute,
                check=None if agreed else lambda seen: agreement(rollouts, pieces, seen, alarm=alarm, step=self.step + 1),
            )  # fmt: skip
            agreed = agreed or seen
        self.llm.weights_changed()
        return learned, agreed, rate

    def _reference_step(self, step: int | None = None) -> int:
        """Return the step whose policy is the reference of the step after ``step``, of the run's next one if that is None."""
        every, done = self.recipe.reference.refresh_every, self.step if step is None else step
        return done // every * every if every else 0

    # what people see -------------------------------------------------------------------------------------------------------------------

    def _write(self, batch: _Batch, learned: UpdateResult | None, agreed: Agreement | None, rate: float, step_s: float) -> None:
        line = rollout_metrics(batch.drawn, batch.scores, self.recipe.rollout.group_size)
        if learned is not None and agreed is not None:
            line |= {
                "loss": learned.loss, "kl": learned.kl, "entropy": learned.entropy, "grad_norm": learned.grad_norm,
                "clip_ratio/low_mean": learned.clipped_low, "clip_ratio/high_mean": learned.clipped_high,
                "clip_ratio/region_mean": learned.clipped_low + learned.clipped_high, "ratio_max": learned.ratio_max,
                "sampling/sampling_logp_difference/max": agreed.largest, "sampling/sampling_logp_difference/mean": agreed.mean,
                "sampling/importance_sampling_ratio/mean": agreed.ratio_mean,
            }  # fmt: skip
        self.metrics.write(
            self.step, "grpo", **line, learned_from=len(batch.kept), consumed_prompts=batch.consumed, lr=rate,
            rollouts_per_s=round(len(batch.drawn) / batch.seconds, 2), rollout_s=round(batch.seconds, 3), step_time=round(step_s, 3),
            elapsed_s=round(self.elapsed, 3),
        )  # fmt: skip
        learned_from = set(batch.kept)
        for i, rollout in enumerate(batch.drawn):
            rewards = {name: values[i] for name, values in batch.scores.parts.items()}
            steps = batch.scores.steps[i] if batch.scores.steps else None
            self.shown.write(
                self.step, "rollout", **rollout.as_dict(), reward=batch.scores.total[i], rewards=rewards,
                **shown_advantage(batch.advantages[i], len(rollout.tokens), steps), learned=i in learned_from,
            )  # fmt: skip

    def _show(self, batch: _Batch) -> None:
        """Print a rollout of the step."""
        first, earned = batch.drawn[0], batch.scores.total[0]
        shown = f"step {self.step}, {first.example['messages'][-1]['content']!r}: {first.text!r}, reward {earned}"
        console().print(shown[:400], markup=False, soft_wrap=True)

    def _evaluate(self) -> None:
        if not self.prompts.held_out:
            return
        recipe = self.recipe
        self.llm.weights_changed()
        found = evaluate(
            self.llm, self.prompts.held_out, self.rewards, samples=recipe.task.samples, max_tokens=recipe.rollout.max_tokens,
            seed=f"{recipe.run.seed} evaluation", tool=self.tool,
        )  # fmt: skip
        self.metrics.write(self.step, "evaluation", elapsed_s=round(self.elapsed, 3), **found)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if isinstance(value, float))
        console().print(f"step {self.step}, {len(self.prompts.held_out)} held-out prompts: {shown}", markup=False, soft_wrap=True)

    def _print_plan(self) -> None:
        recipe, config = self.recipe, self.start.config
        section = recipe.rollout
        rows = [
            ("policy", f"{self.start.folder}: {count_parameters(config).total:,} parameters"),
            ("prompts", f"{len(self.prompts):,} to learn from, {len(self.prompts.held_out):,} held out"),
            ("a step", f"{section.prompts} prompts x {section.group_size} answers of at most {section.max_tokens} tokens"),
            ("rewards", ", ".join(f"{part.shown_as} x {part.weight:g}" for part in recipe.reward)),
            ("objective", f"{recipe.supervision} supervision, {self.objective}"),
            ("updates", f"{recipe.update.updates} a batch, learning rate {describe_rate(recipe.learning_rate)}"),
            ("engine", f"{self.llm.engine.cache}; up to {section.max_batch} answers at once"),
            ("steps", f"{recipe.run.steps:,} on the CPU; {recipe.run.precision} products, {torch.get_num_threads()} threads"),
        ]
        table("plan", ("what", "value"), rows)
        if self.step:
            console().print(f"resuming after step {self.step} of {recipe.run.steps}")


def objective_of(recipe: GrpoRecipe) -> Objective:
    """Return the recipe's objective: its paper's, but for what [objective] states.

    What depends on the longest answer is fitted to it unless it is stated: Dr. GRPO's constant, and the buffer of DAPO's penalty, a fifth.

    Raises:
        ConfigError: the buffer of the penalty is longer than an answer may be, or empty.
    """
    longest, stated = recipe.rollout.max_tokens, recipe.objective.model_fields_set
    chosen = PRESETS[recipe.preset] if recipe.preset else Objective()
    chosen = chosen.model_copy(update={name: getattr(recipe.objective, name) for name in stated})
    if chosen.normalise == "constant" and chosen.constant_len is None:
        chosen = chosen.model_copy(update={"constant_len": longest})
    if chosen.overlong == "penalty" and "overlong_buffer" not in stated:
        chosen = chosen.model_copy(update={"overlong_buffer": max(1, longest // 5)})
    if chosen.overlong == "penalty":
        overlong_penalty(0, longest, chosen.overlong_buffer)  # refuses now what no step could score
    return chosen


def _shown(batch: _Batch, learned: UpdateResult | None) -> dict[str, object]:
    known = [reward for reward in batch.scores.total if reward is not None]
    lengths = [len(rollout.tokens) for rollout in batch.drawn]
    shown: dict[str, object] = {"reward": sum(known) / max(1, len(known)), "length": sum(lengths) / len(lengths)}
    if learned is not None and learned.kl is not None:
        shown["kl"] = learned.kl
    return shown | {"rollouts_per_s": len(batch.drawn) / batch.seconds}
