"""Steps, validation, checkpoints, metrics; stop anywhere and resume exactly.

What a stage adds is its data, its recipe and its callables; the loop knows no stage. State between two steps is weights, moments and
one integer of consumed samples, all in the newest step folder. Metrics written after it are cut away on resume, and written again,
equal but for the times.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from dsv2.checkpoint.layout import TrainingState, load_guard, load_training, load_weights, save_checkpoint
from dsv2.checkpoint.manifest import verify_manifest
from dsv2.checkpoint.steps import checkpoints, remove_old
from dsv2.config import Section
from dsv2.data.batch import Batch
from dsv2.data.loader import Loader
from dsv2.errors import CheckpointError, Dsv2Error
from dsv2.metrics import MetricsLog
from dsv2.model.transformer import Transformer
from dsv2.progress import bar, console
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.diverged import save_batch
from dsv2.train.dropping import DroppingSection, step_dropping
from dsv2.train.guard import GuardSection, GuardState, Spike, after_rollback, after_step, find_spike
from dsv2.train.losses import BalanceSection, Objective
from dsv2.train.optimizer import OptimizerSection, optimizer_tensors, restore_optimizer
from dsv2.train.profiler import profiled
from dsv2.train.schedule import BatchSize, LearningRate, learning_rate, steps_of
from dsv2.train.step import StepResult, TrainingDiverged, train_step
from dsv2.train.validation import DomainLoss

Sample = tuple[str, str]  # prompt, text that followed
# Of PaceSection, when a run is resumed, as the samples: no step depends on them, but where a guard rolls back to is the newest checkpoint.
MAY_CHANGE = ("loader_workers", "profile_steps", "validate_every", "sample_every", "checkpoint_every", "keep")
_LARGE_LOAD = 2048  # layers x experts: above it, every train line of V2 would have 70 KB
_LARGE_LOAD_EVERY = 100  # steps


class PaceSection(Section):
    """How exactly and how often; how long a run is, each stage says in its own way."""

    seq_len: int = Field(gt=0, description="tokens per sequence")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of initial weights and data order")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of matrix products, weights and moments stay fp32; auto: bf16 where the processor has it"
    )
    recompute: bool = Field(default=False, description="compute blocks again in the backward pass: less memory, same gradients")
    deterministic: bool = Field(default=True, description="refuse operations that may not repeat bit for bit")
    loader_workers: int = Field(default=1, ge=0, description="threads that make batches ahead, one batch each; 0: none; same results")
    profile_steps: int = Field(default=0, ge=0, description="steps to profile, from this process's third on; trace.json and a table")
    validate_every: int = Field(default=100, gt=0, description="steps between validations")
    sample_every: int = Field(default=100, gt=0, description="steps between samples, where the stage draws any")
    checkpoint_every: int = Field(default=100, gt=0, description="steps between checkpoints")
    keep: int = Field(default=2, gt=0, description="newest checkpoints to keep")


class RunSection(PaceSection):
    """How long, how exactly and how often."""

    tokens: int = Field(gt=0, description="token budget of the run")


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """Everything that shapes the steps, resolved."""

    run: RunSection
    batch: BatchSize
    learning_rate: LearningRate
    optimizer: OptimizerSection
    balance: BalanceSection
    autocast: torch.dtype | None
    dropping: DroppingSection = DroppingSection()
    guard: GuardSection = GuardSection()

    def steps(self) -> list[tuple[int, int]]:
        """Return (consumed sequences before, sequences) of each step."""
        return list(steps_of(self.batch, self.run.seq_len, self.run.tokens))


def resume_from(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, keep: int) -> TrainingState | None:
    """Fill model and optimiser from a run's newest checkpoint, and delete older than the newest ``keep``, but not the one
    to roll back to; None where there is none yet.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    if not checkpoints(folder):
        return None
    remove_old(folder, keep, spared=_newest_calm(folder))
    return _restore(checkpoints(folder)[-1], model, optimizer)


def _restore(checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> TrainingState:
    verify_manifest(checkpoint)
    load_weights(checkpoint, model)
    state = load_training(checkpoint)
    restore_optimizer(model, optimizer, state.optimizer)
    return state


def train(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    loader: Loader,
    plan: LoopPlan,
    folder: Path,
    *,
    metrics: MetricsLog,
    start: TrainingState | None = None,
    validate: Callable[[Transformer], Mapping[str, DomainLoss]] | None = None,
    sample: Callable[[Transformer], Sequence[Sample]] | None = None,
    objective: Objective | None = None,
    evaluate: Callable[[Transformer], Mapping[str, Any]] | None = None,
) -> None:
    """Run the steps that are left, and leave a checkpoint of the last.

    Args:
        model: on its device, weights filled.
        optimizer: with its moments where the run resumes.
        tokenizer: saved with each checkpoint.
        loader: the rank's batches.
        plan: what to do.
        folder: of the run; step-N folders go there.
        metrics: already cut back to the start.
        start: where the run stands; None: at its beginning.
        validate: held-out loss per domain.
        sample: texts to show; train/ stands upstream of the engine, so who calls brings it.
        objective: what is minimised; None: the cross-entropy of the labels and the balance losses.
        evaluate: other figures of held-out data than its loss; as often as ``validate``.

    Raises:
        CheckpointError: the checkpoint consumed another number of sequences than the plan says.
        Dsv2Error: training diverged.
    """
    steps = plan.steps()
    first = start.step if start else 0
    expected = sum(steps[first - 1]) if first else 0
    if start is not None and start.consumed_samples != expected:
        raise CheckpointError(f"step {first} consumed {start.consumed_samples} sequences; by this run's recipe it is {expected}")
    elapsed, seq_len = (start.elapsed_s if start else 0.0), plan.run.seq_len
    guard = GuardState.from_json(start.guard) if start else GuardState()
    sizes = dict(steps)
    with (
        closing(loader.batches(expected, lambda consumed: sizes.get(consumed, plan.batch.sequences))) as batches,
        bar(len(steps), "training", unit="steps", done=first) as progress,
        profiled(plan.run.profile_steps, len(steps) - first, folder) as profiler,
    ):
        for step, (consumed, size) in enumerate(steps[first:], start=first + 1):
            began = time.perf_counter()
            rate = learning_rate(plan.learning_rate, step=step - 1, tokens=consumed * seq_len, total_tokens=plan.run.tokens)
            here = _Place(step, consumed + loader.rank * (size // loader.world_size), folder)
            if loader.stage(consumed + size - 1) != loader.stage(max(0, consumed - 1)):
                guard = GuardState()  # other data on purpose: what came before says nothing about its loss
            result, spike = _step(model, optimizer, next(batches), plan, rate, guard, here, objective)
            guard = after_step(plan.guard, guard, loss=result.loss, grad_norm=result.grad_norm, skipped=result.skipped)
            if spike is not None:
                guard = _answer(spike, guard, model, optimizer, plan, metrics, here)
            step_s = time.perf_counter() - began
            elapsed += step_s
            consumed += size
            line = _train_line(result, rate, consumed, seq_len, size * seq_len / step_s, elapsed, model.config.n_group)
            if result.load is None or result.load.shares.numel() <= _LARGE_LOAD or step % _LARGE_LOAD_EVERY == 0:
                line["load"] = _shares(result)
            metrics.write(step, "train", **line, **result.figures)
            progress.advance(1, loss=result.loss, lr=rate, tokens_per_s=size * seq_len / step_s, **_busiest(result))
            last = step == len(steps)
            with profiler.between_steps():
                if validate is not None and (last or step % plan.run.validate_every == 0):
                    _write_validation(metrics, step, consumed * seq_len, elapsed, validate(model))
                if evaluate is not None and (last or step % plan.run.validate_every == 0):
                    metrics.write(step, "evaluation", tokens=consumed * seq_len, elapsed_s=round(elapsed, 3), **evaluate(model))
                if sample is not None and (last or step % plan.run.sample_every == 0):
                    for prompt, text in sample(model):
                        metrics.write(step, "sample", prompt=prompt, text=text)
                if last or step % plan.run.checkpoint_every == 0:
                    kept_guard = guard.to_json() if plan.guard.sigma is not None else {}
                    state = TrainingState(step, consumed, elapsed, optimizer_tensors(model, optimizer), kept_guard)
                    save_checkpoint(folder / f"step-{step}", model, tokenizer, training=state)
                    remove_old(folder, plan.run.keep, spared=_newest_calm(folder))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a run stands: the step being done, from 1, the global index of its first sequence here, the run's folder."""

    step: int
    first_sample: int
    folder: Path


def _step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    plan: LoopPlan,
    rate: float,
    guard: GuardState,
    here: _Place,
    objective: Objective | None,
) -> tuple[StepResult, Spike | None]:
    """Take one step; return what it did and what stood out, in which case nothing was updated."""
    spikes: list[Spike] = []

    def accept(loss: float, grad_norm: float) -> bool:
        spike = find_spike(plan.guard, guard, loss, grad_norm)
        spikes.extend([spike] if spike else [])
        return spike is None

    model.train()
    device, num_samples = next(model.parameters()).device, len(batch.tokens)
    dropping = step_dropping(plan.dropping, seed=plan.run.seed, first_sample=here.first_sample, num_samples=num_samples, device=device)
    try:
        result = train_step(
            model, optimizer, batch.to(device).split(plan.batch.micro_sequences), lr=rate, clip_norm=plan.optimizer.clip_norm,
            balance=plan.balance, autocast=plan.autocast, dropping=dropping, recompute=plan.run.recompute, accept=accept,
            objective=objective,
        )  # fmt: skip
    except TrainingDiverged as error:
        saved = save_batch(here.folder, batch, step=here.step, first_sample=here.first_sample, error=error.message)
        where = f"step {here.step}, samples {here.first_sample} to {here.first_sample + num_samples - 1}"
        raise TrainingDiverged(f"{error.message}; {where}; its batch is in {saved}", hint=error.hint) from error
    return result, spikes[0] if spikes else None


def _answer(
    spike: Spike,
    guard: GuardState,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    plan: LoopPlan,
    metrics: MetricsLog,
    here: _Place,
) -> GuardState:
    """Log a spike; after too many in a row, bring weights and moments of a checkpoint back and go on with the data that follow.

    The checkpoint is the newest that was not written amid spikes: such a one holds the weights that the run has now.

    Raises:
        Dsv2Error: there is no checkpoint to go back to, or the spikes went on after a rollback.
    """
    what = {"what": spike.what, "value": spike.value, "limit": spike.limit, "first_sample": here.first_sample, "in_a_row": guard.in_a_row}
    if guard.in_a_row < plan.guard.rollback_after:
        metrics.write(here.step, "spike", **what, action="skipped")
        message = f"step {here.step}: {spike.what} {spike.value:.4g} is a spike (limit {spike.limit:.4g}); this update is skipped"
        console().print(message, markup=False, soft_wrap=True)
        return guard
    problem = f"step {here.step}: {guard.in_a_row} spikes in a row; {spike.what} {spike.value:g}, limit {spike.limit:g}"
    calm = _newest_calm(here.folder)
    if guard.rolled_back or calm is None:
        reason = "and a checkpoint was restored already" if guard.rolled_back else "and no checkpoint from before them"
        raise Dsv2Error(f"{problem}, {reason}", hint="lower learning_rate.peak, or raise guard.sigma, in a new run")
    state = _restore(calm, model, optimizer)
    metrics.write(here.step, "spike", **what, action=f"rolled back to step {state.step}")
    console().print(f"{problem}: weights of step {state.step} restored", markup=False, soft_wrap=True)
    return after_rollback(GuardState.from_json(load_guard(calm)))


def _newest_calm(folder: Path) -> Path | None:
    """Return the newest checkpoint that was not written amid spikes."""
    return next((path for path in reversed(checkpoints(folder)) if not GuardState.from_json(load_guard(path)).in_a_row), None)


def _train_line(result: StepResult, rate: float, consumed: int, seq_len: int, speed: float, elapsed: float, n_group: int) -> dict[str, Any]:
    load = result.load
    return {
        "tokens": consumed * seq_len,
        "consumed_samples": consumed,
        "loss": result.loss,
        "balance_loss": result.balance_loss,
        "lr": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_s": round(speed, 1),
        "elapsed_s": round(elapsed, 3),
        **({"router": load.metrics(n_group)} if load else {}),
        **({"skipped": True} if result.skipped else {}),
    }


def _busiest(result: StepResult) -> dict[str, str]:
    """Return what the progress line says of the routers: load of the busiest expert of any layer over its layer's mean."""
    return {} if result.load is None else {"busiest expert": f"{result.load.max_over_mean:.2f}x mean"}


def _shares(result: StepResult) -> list[list[float]]:
    return [[round(share, 5) for share in layer] for layer in result.load.shares.tolist()] if result.load else []


def _write_validation(metrics: MetricsLog, step: int, tokens: int, elapsed: float, domains: Mapping[str, DomainLoss]) -> None:
    bits_per_byte = {name: domain.bits_per_byte for name, domain in domains.items()}
    experts = {name: domain.expert_shares for name, domain in domains.items() if domain.assignments}
    metrics.write(
        step,
        "validation",
        tokens=tokens,
        elapsed_s=round(elapsed, 3),
        bits_per_byte=bits_per_byte,
        loss={name: domain.loss for name, domain in domains.items()},
        **({"experts": experts} if experts else {}),
    )
    shown = ", ".join(f"{name} {value:.3f}" for name, value in bits_per_byte.items())
    console().print(f"step {step}: bits per byte of held-out text: {shown}", markup=False, soft_wrap=True)
