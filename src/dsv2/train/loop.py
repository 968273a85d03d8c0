"""Steps, validation, checkpoints, metrics; stop anywhere and resume exactly.

What a stage adds is its data, its recipe and its callables; the loop knows no stage. State between two steps is weights, moments and
one integer of consumed samples, all in the newest step folder. Metrics written after it are cut away on resume, and written again,
equal but for the times.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from dsv2.checkpoint.folder import open_folder
from dsv2.checkpoint.huggingface import fill_model
from dsv2.checkpoint.layout import TrainingState, load_training, save_checkpoint
from dsv2.checkpoint.manifest import verify_manifest
from dsv2.checkpoint.source import FolderSource
from dsv2.checkpoint.steps import checkpoints, remove_old
from dsv2.config import Section
from dsv2.data.batch import Batch
from dsv2.data.loader import Loader
from dsv2.errors import CheckpointError
from dsv2.model.transformer import Transformer
from dsv2.progress import MetricsLog, bar
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.losses import BalanceSection
from dsv2.train.optimizer import AdamWSection, optimizer_tensors, restore_optimizer
from dsv2.train.schedule import BatchSize, LearningRate, learning_rate, steps_of
from dsv2.train.step import StepResult, train_step
from dsv2.train.validation import DomainLoss

Sample = tuple[str, str]  # prompt, text that followed


class RunSection(Section):
    """How long, how exactly and how often."""

    tokens: int = Field(gt=0, description="token budget of the run")
    seq_len: int = Field(gt=0, description="tokens per sequence")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of initial weights and data order")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of matrix products; auto: bf16 where the processor has it"
    )
    validate_every: int = Field(default=100, gt=0, description="steps between validations")
    sample_every: int = Field(default=100, gt=0, description="steps between samples, where the stage draws any")
    checkpoint_every: int = Field(default=100, gt=0, description="steps between checkpoints")
    keep: int = Field(default=2, gt=0, description="newest checkpoints to keep")


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """Everything that shapes the steps, resolved."""

    run: RunSection
    batch: BatchSize
    learning_rate: LearningRate
    optimizer: AdamWSection
    balance: BalanceSection
    autocast: torch.dtype | None

    def steps(self) -> list[tuple[int, int]]:
        """Return (consumed sequences before, sequences) of each step."""
        return list(steps_of(self.batch, self.run.seq_len, self.run.tokens))


def resume_from(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, keep: int) -> TrainingState | None:
    """Fill model and optimiser from a run's newest checkpoint, and delete older than the newest ``keep``; None where there is none yet.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    found = checkpoints(folder)
    if not found:
        return None
    remove_old(folder, keep)
    verify_manifest(found[-1])
    fill_model(model, FolderSource(open_folder(found[-1])))
    state = load_training(found[-1])
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
    sizes = dict(steps)
    batches = (
        loader.batches(steps[first][0], lambda consumed: sizes.get(consumed, plan.batch.sequences)) if first < len(steps) else iter(())
    )
    with bar(len(steps), "training", unit="steps", done=first) as progress:
        for step, (consumed, size) in enumerate(steps[first:], start=first + 1):
            began = time.perf_counter()
            tokens = consumed * seq_len
            rate = learning_rate(plan.learning_rate, step=step - 1, tokens=tokens, total_tokens=plan.run.tokens)
            result = _step(model, optimizer, next(batches), plan, rate)
            step_s = time.perf_counter() - began
            elapsed += step_s
            consumed += size
            metrics.write(step, "train", **_train_line(result, rate, consumed, seq_len, size * seq_len / step_s, elapsed))
            progress.advance(1, loss=result.loss, lr=rate, tokens_per_s=size * seq_len / step_s)
            last = step == len(steps)
            if validate is not None and (last or step % plan.run.validate_every == 0):
                _write_validation(metrics, step, consumed * seq_len, validate(model))
            if sample is not None and (last or step % plan.run.sample_every == 0):
                for prompt, text in sample(model):
                    metrics.write(step, "sample", prompt=prompt, text=text)
            if last or step % plan.run.checkpoint_every == 0:
                state = TrainingState(step, consumed, elapsed, optimizer_tensors(model, optimizer))
                save_checkpoint(folder / f"step-{step}", model, tokenizer, training=state)
                remove_old(folder, plan.run.keep)


def _step(model: Transformer, optimizer: torch.optim.Optimizer, batch: Batch, plan: LoopPlan, rate: float) -> StepResult:
    model.train()
    micro = batch.to(next(model.parameters()).device).split(plan.batch.micro_sequences)
    return train_step(model, optimizer, micro, lr=rate, clip_norm=plan.optimizer.clip_norm, balance=plan.balance, autocast=plan.autocast)


def _train_line(result: StepResult, rate: float, consumed: int, seq_len: int, speed: float, elapsed: float) -> dict[str, Any]:
    return {
        "tokens": consumed * seq_len,
        "consumed_samples": consumed,
        "loss": result.loss,
        "balance_loss": result.balance_loss,
        "lr": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_s": round(speed, 1),
        "elapsed_s": round(elapsed, 3),
        "load": [[round(share, 5) for share in layer] for layer in result.load.tolist()],
    }


def _write_validation(metrics: MetricsLog, step: int, tokens: int, domains: Mapping[str, DomainLoss]) -> None:
    metrics.write(
        step,
        "validation",
        tokens=tokens,
        bits_per_byte={name: domain.bits_per_byte for name, domain in domains.items()},
        loss={name: domain.loss for name, domain in domains.items()},
    )
