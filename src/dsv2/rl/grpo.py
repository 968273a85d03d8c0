"""GRPO: sample groups of answers, score them, learn from what is above its group's mean; no critic (section 4.2; spec 6.2).

RUN/rollouts.jsonl        every rollout, with rewards and advantage
RUN/left-out.json         prompts whose own solution would not be paid
RUN/alarm.jsonl           the rollouts of a step at which engine and trainer disagreed, where one did
RUN/reference-N.safetensors  the policy that the KL holds to; the rest as in every run (train/run_folder.py)

A step is a function of weights, moments and the number of prompts consumed: rollouts draw from seeds made of run, step and place. A run
that was killed anywhere goes on from its newest checkpoint and ends with the same weights and rollouts, bit for bit.
"""

import re
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from dsv2.checkpoint.layout import TrainingState, save_checkpoint
from dsv2.checkpoint.steps import checkpoints, remove_old
from dsv2.engine.llm import LLM
from dsv2.errors import DataError
from dsv2.files import clear_leftovers, sole_use
from dsv2.model.accounting import count_parameters
from dsv2.model.transformer import Transformer
from dsv2.progress import bar, say
from dsv2.rl.batch import Batch
from dsv2.rl.evaluate import evaluate
from dsv2.rl.grpo_recipe import GrpoRecipe, objective_of
from dsv2.rl.grpo_shown import ALARM, RunLog, on_the_bar, print_plan, print_sample, write_alarm
from dsv2.rl.objective import Objective, overlong_penalty
from dsv2.rl.prompts import Prompts, open_prompts
from dsv2.rl.reference import Reference
from dsv2.rl.reward import Rewards, Scores
from dsv2.rl.reward_needs import given_sections, judges_of, require_judges, rewards_of
from dsv2.rl.rollout import Rollout, draw
from dsv2.rl.supervision import advantages_of, require_supervision
from dsv2.rl.tools import tool_named
from dsv2.rl.untestable import LEFT_OUT, without_untestable
from dsv2.rl.update import Agreement, LogProbsDiffer, Padded, UpdateResult, agreement, over_updates, pad, teaching, update, without_graph
from dsv2.train.loop import resume_from
from dsv2.train.memory import require_training_memory
from dsv2.train.optimizer import make_optimizer, optimizer_tensors
from dsv2.train.precision import autocast_dtype, require_determinism
from dsv2.train.run_folder import RECIPE, Grounds, begin_run, load_stage_recipe, require_resume, settled_recipe
from dsv2.train.schedule import learning_rate
from dsv2.train.start import Start, begin_weights, open_start, start_hash

_UNHURRIED_S = 1e6  # of an engine step: with a bound in seconds, which prompts share a step would depend on the clock
# Of the mean difference, nats. In fp32 it is 1e-6 (docs/decisions.md); in bf16 0.001 to 0.017 was measured (docs/grpo.md).
_ALARM = {"fp32": 1e-5, "bf16": 0.05}


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
        rewards: what is rewarded, where the recipe names nothing. A run goes on only with the same labels, weights and scales; their
            functions it cannot compare.

    Raises:
        ConfigError: the recipe names no rewards and none are given, or both; it does not fit the machine or the run in ``out``, or another
            process trains there.
        DataError: prompts lack what a reward judges by, or no rollout of a step has a score.
        LogProbsDiffer: engine and trainer do not agree.
    """
    with sole_use(out), closing(_Run(recipe, start, prompts, out, tensorboard, rewards)) as begun:
        return begun.train()


class _Run:
    def __init__(self, recipe: GrpoRecipe, start: Start, prompts: Prompts, out: Path, tensorboard: bool, rewards: Rewards | None) -> None:
        device = torch.device("cpu")  # also where there is a GPU: the engine's native step is on the CPU, and reads the trainer's weights
        require_training_memory(16 * count_parameters(start.config).total, hint="choose a smaller model")
        grounds = Grounds(prompts.fingerprint, device, start_hash(start.folder), judges_of(recipe.reward), given_sections(rewards))
        self.recipe = recipe = settled_recipe(recipe, out, grounds)
        require_determinism(recipe.run.deterministic)
        self.objective = objective_of(recipe)
        self.start, self.out, self.tokenizer = start, out, start.tokenizer
        self.rewards = rewards_of(recipe, self.tokenizer, rewards)
        require_judges(self.rewards, [*prompts.take(0, len(prompts)), *prompts.held_out])
        require_supervision(recipe.supervision, self.rewards, self.objective)
        self.prompts = without_untestable(
            prompts,
            self.rewards,
            out,
            begun=(out / RECIPE).exists(),
            check=recipe.task.check_solutions,
            max_refused=recipe.task.max_refused,
        )
        self.model = Transformer(start.config)
        if not checkpoints(out):
            begin_weights(self.model, str(start.folder), recipe.run.seed)
        self.autocast = autocast_dtype(recipe.run.precision)
        self.optimizer = make_optimizer(self.model, recipe.optimizer, products=self.autocast)
        begin_run(recipe, out, grounds)
        clear_leftovers(out, "|".join(map(re.escape, (LEFT_OUT, ALARM))))
        state = resume_from(out, self.model, self.optimizer, recipe.run.keep)
        self.step, self.consumed, self.elapsed = (state.step, state.consumed_samples, state.elapsed_s) if state else (0, 0, 0.0)
        self.num_tokens = state.num_tokens if state else 0
        self.log = RunLog(out, self.step, group_size=recipe.rollout.group_size, tensorboard=tensorboard)
        self.reference = Reference(out, self.model)
        self.llm = LLM(
            self.model, tokenizer=self.tokenizer, max_batch=recipe.rollout.max_batch, max_len=recipe.run.seq_len,
            cache_gb=recipe.rollout.cache_gb, max_step_s=_UNHURRIED_S,
        )  # fmt: skip
        self.replay = recipe.rollout.replay and start.config.num_moe_layers > 0
        self.tool = tool_named(recipe.rollout.tool)

    def close(self) -> None:
        self.llm.close()
        self.log.close()

    def train(self) -> Transformer:
        run = self.recipe.run
        policy = f"{self.start.folder}: {count_parameters(self.start.config).total:,} parameters"
        print_plan(self.recipe, self.objective, self.rewards, policy, self.prompts, self.llm, self.step)
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
                self.num_tokens += batch.num_tokens
                step_s = time.perf_counter() - began
                self.elapsed += step_s
                self.log.step(
                    self.step, batch, learned, agreed,
                    num_tokens=self.num_tokens, rate=rate, step_s=step_s, elapsed_s=self.elapsed,
                )  # fmt: skip
                progress.advance(1, **on_the_bar(batch, learned))
                last = self.step == run.steps
                if last or self.step % run.sample_every == 0:
                    print_sample(self.step, batch)
                if last or self.step % run.validate_every == 0:
                    self._evaluate()
                if last or self.step % run.checkpoint_every == 0:
                    moments = optimizer_tensors(self.model, self.optimizer)
                    state = TrainingState(self.step, self.consumed, self.elapsed, moments, num_tokens=self.num_tokens)
                    save_checkpoint(self.out / f"step-{self.step}", self.model, self.tokenizer, training=state)
                    remove_old(self.out, run.keep)
                    self.reference.remove_before(self._reference_step(int(checkpoints(self.out)[0].name.removeprefix("step-"))))
        return self.model

    def _evaluate(self) -> None:
        if not self.prompts.held_out:
            return
        recipe = self.recipe
        self.llm.weights_changed()
        found = evaluate(
            self.llm, self.prompts.held_out, self.rewards, samples=recipe.task.samples, max_tokens=recipe.rollout.max_tokens,
            seed=f"{recipe.run.seed} evaluation", tool=self.tool,
        )  # fmt: skip
        self.log.evaluation(self.step, found, len(self.prompts.held_out), elapsed_s=self.elapsed)

    # one step: sample, learn -----------------------------------------------------------------------------------------------------------

    def _sample(self) -> Batch:
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
        return Batch(drawn, scores, torch.cat(found), kept, consumed, time.perf_counter() - began)

    def _with_penalty(self, scores: Scores, rollouts: Sequence[Rollout]) -> Scores:
        if self.objective.overlong != "penalty":
            return scores
        limit, buffer = self.recipe.rollout.max_tokens, self.objective.overlong_buffer
        return scores.with_penalty([overlong_penalty(len(rollout.tokens), limit, buffer) for rollout in rollouts])

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

    def _learn(self, batch: Batch) -> tuple[UpdateResult | None, Agreement | None, float]:
        """Update the policy on a batch; nothing is done where all of its rollouts were dropped or left out."""
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
        results: list[UpdateResult] = []
        old, agreed = None, None  # of the first update
        for _ in range(recipe.update.updates):
            result, seen, found = update(
                self.model, self.optimizer, pieces, own, self.objective, lr=rate,
                clip_norm=recipe.optimizer.clip_norm, balance=recipe.balance, autocast=autocast, old=old, reference=reference,
                recompute=recipe.run.recompute,
                check=None if results else lambda seen: self._agreement(rollouts, pieces, seen),
            )  # fmt: skip
            results.append(result)
            old, agreed = old or seen, agreed or found
        self.llm.weights_changed()
        return over_updates(results), agreed, rate

    def _agreement(self, rollouts: Sequence[Rollout], pieces: Sequence[Padded], seen: Sequence[torch.Tensor]) -> Agreement:
        """Compare the engine's log-probabilities with the trainer's; rollouts that ring the alarm are written down before the run ends."""
        alarm = self.recipe.rollout.alarm or _ALARM[self.recipe.run.precision]
        try:
            return agreement(rollouts, pieces, seen, alarm=alarm, step=self.step + 1)
        except LogProbsDiffer as error:
            write_alarm(self.out / ALARM, self.step + 1, rollouts, pieces, seen)
            kept = f"{self.out / ALARM} has the rollouts of this step with both log-probabilities"
            raise LogProbsDiffer(error.message, hint=f"{error.hint}; {kept}") from None

    def _reference_step(self, step: int | None = None) -> int:
        """Return the step whose policy is the reference of the step after ``step``, of the run's next one if that is None."""
        every, done = self.recipe.reference.refresh_every, self.step if step is None else step
        return done // every * every if every else 0
