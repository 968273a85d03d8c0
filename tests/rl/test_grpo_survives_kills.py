"""`dsv2 grpo` killed with SIGKILL at random moments ends with the weights, rollouts and metrics of a run left in peace, bit for bit.

What has state is on: groups drawn anew, so that prompts are not consumed evenly; a reference that is refreshed; a reward model that pays;
two updates a batch; old checkpoints removed.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.checkpoint.manifest import verify_manifest
from dsv2.checkpoint.steps import checkpoints
from dsv2.files import sha256_of
from dsv2.metrics import read_metrics
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.rl.reward_model import RewardModel
from dsv2.tokenizer.tokenizer import Tokenizer

KILLS, STEPS, CHECKPOINT_EVERY, GROUP_SIZE = 10, 44, 2, 4
RECIPE = f"""
[model]
start = "{{folder}}/start"
[task]
name = "arithmetic"
held_out = 8
samples = 2
[[reward]]
name = "format"
pattern = "[^eat]*"
[[reward]]
name = "model"
folder = "{{folder}}/reward"
only_with = "format"
[objective]
drop_equal_groups = true
[run]
steps = {STEPS}
seq_len = 96
validate_every = 4
checkpoint_every = {CHECKPOINT_EVERY}
keep = 2
[rollout]
prompts = 16
group_size = {GROUP_SIZE}
max_tokens = 12
max_batch = 32
[update]
updates = 2
micro_tokens = 1000
[reference]
refresh_every = 3
[learning_rate]
peak = 1e-3
warmup_steps = 2
"""


@dataclass
class Run:
    """A run of ``dsv2 grpo`` that is started again and again."""

    recipe: Path
    out: Path
    messages: Path  # stderr of the process that was started last

    def start(self) -> subprocess.Popen:
        resume = ["--resume"] if (self.out / "recipe.toml").exists() else []
        command = [sys.executable, "-m", "dsv2", "grpo", str(self.recipe), "--out", str(self.out), *resume]
        with self.messages.open("wb") as stderr:
            return subprocess.Popen(command, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def finish(self) -> None:
        assert self.start().wait(timeout=600) == 0, self.messages.read_text()

    def has_begun(self) -> bool:
        """The plan was printed: start-up is over."""
        return "products" in self.messages.read_text(errors="replace")

    def hidden(self) -> set[str]:
        """Names of what is being written, or was when the process died."""
        return {name for name in os.listdir(self.out) if name.startswith(".")} if self.out.exists() else set()

    def newest(self) -> int:
        return max((int(path.name.removeprefix("step-")) for path in checkpoints(self.out)), default=0)

    def size(self) -> int:
        rollouts = self.out / "rollouts.jsonl"
        return rollouts.stat().st_size if rollouts.exists() else 0

    def lines(self, name: str) -> list[dict]:
        return read_metrics(self.out / name) if (self.out / name).exists() else []

    def where_killed(self, stale: set[str]) -> str:
        """Tell from what a killed process left behind what it was doing; ``stale`` was there before it began."""
        new = self.hidden() - stale
        if not self.has_begun():
            return "start-up"
        if any(name.startswith(".step-") for name in new):
            return "writing a checkpoint"
        if any(name.startswith(".reference-") for name in new):
            return "writing a reference"
        steps = [line for line in self.lines("metrics.jsonl") if line["kind"] == "grpo"]
        if steps:
            drawn = steps[-1]["consumed_prompts"] - (steps[-2]["consumed_prompts"] if len(steps) > 1 else 0)
            written = sum(line["step"] == steps[-1]["step"] for line in self.lines("rollouts.jsonl"))
            if written < drawn * GROUP_SIZE:
                return "writing rollouts"
        return "sampling, learning or evaluating"

    def result(self) -> tuple[dict[str, str], bytes, list[dict]]:
        """Everything that must be equal: weights, moments and references, rollouts, metrics without times."""
        files = sorted([*self.out.glob("step-*/**/*.safetensors"), *self.out.glob("reference-*")])
        timeless = [{k: v for k, v in line.items() if not k.endswith(("_s", "step_time"))} for line in self.lines("metrics.jsonl")]
        return {str(file.relative_to(self.out)): sha256_of(file) for file in files}, (self.out / "rollouts.jsonl").read_bytes(), timeless


def wait(process: subprocess.Popen, until: Callable[[], bool], seconds: float = 300.0) -> bool:
    """Wait until something is so, the process ends or the time is over; look without a pause, since some of it lasts a millisecond."""
    end = time.perf_counter() + seconds
    while not (found := until()) and process.poll() is None and time.perf_counter() < end:
        pass
    return found


@dataclass
class Measured:
    """How long parts of the undisturbed run take, in seconds, and how many bytes of rollouts a step writes."""

    start_up: float
    checkpoint: float
    step: float
    rollouts: float


def is_writing(run: Run, what: str, stale: Collection[str] = ()) -> bool:
    return any(name.startswith(f".{what}-") and name.endswith(".tmp") for name in run.hidden() if name not in stale)


def in_peace(run: Run) -> Measured:
    began = time.perf_counter()
    process = run.start()
    wait(process, run.has_begun)
    start_up = time.perf_counter() - began
    wait(process, lambda: is_writing(run, "step"))
    writing = time.perf_counter()
    wait(process, lambda: not is_writing(run, "step"))
    checkpoint = time.perf_counter() - writing
    assert process.wait(timeout=600) == 0, run.messages.read_text()
    return Measured(start_up, checkpoint, (time.perf_counter() - began - start_up) / STEPS, run.size() / STEPS)


def wait_for_the_moment(process: subprocess.Popen, run: Run, took: Measured, moments: random.Random, number: int) -> None:
    """Wait for a random moment, by turns aimed at what takes too little time to be hit by chance."""
    if number % 5 == 0:  # anywhere in start-up
        wait(process, lambda: False, moments.uniform(0, took.start_up))
        return
    wait(process, lambda: run.has_begun() and run.newest() >= number * STEPS // (KILLS + 2))
    stale, before = run.hidden(), run.newest()
    if number % 5 == 1:  # anywhere in the next steps
        wait(process, lambda: run.newest() >= before + 4, moments.uniform(0, 4 * took.step))
    elif number % 5 == 2:  # while the rollouts of one of the next two steps are written
        wanted = run.size() + moments.uniform(0, 2 * took.rollouts)
        wait(process, lambda: run.size() > wanted)
    elif number % 5 == 3:  # while a checkpoint is written or just after it
        wait(process, lambda: is_writing(run, "step", stale))
        wait(process, lambda: False, moments.uniform(0, took.checkpoint))
    else:  # while a reference is
        wait(process, lambda: is_writing(run, "reference", stale))


def kill_once(run: Run, took: Measured, moments: random.Random, number: int) -> str:
    """Start the run, kill it at a random moment, see that nothing is half there, and tell what the kill hit."""
    stale = run.hidden()
    process = run.start()
    wait_for_the_moment(process, run, took, moments, number)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"the run was faster than kill {number}: {run.messages.read_text()}"
    for path in checkpoints(run.out):
        verify_manifest(path)
    return run.where_killed(stale)


@pytest.fixture
def recipe(policy: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The recipe's file, with the models that it names beside it."""
    save_checkpoint(tmp_path / "start", policy, tokenizer)
    reward = RewardModel(policy.config)
    initialise(reward, seed=5)
    save_checkpoint(tmp_path / "reward", reward, tokenizer)
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(folder=tmp_path))
    return file


@pytest.mark.slow
def test_ten_kills_change_nothing(recipe: Path, tmp_path: Path) -> None:
    peace = Run(recipe, tmp_path / "peace", tmp_path / "peace.txt")
    took, moments = in_peace(peace), random.Random(6)
    run, hit = Run(recipe, tmp_path / "killed", tmp_path / "killed.txt"), Counter[str]()
    for number in range(KILLS):
        where = kill_once(run, took, moments, number)
        print(f"kill {number + 1}: {where}, newest checkpoint {run.newest()}")
        hit[where] += 1
    run.finish()
    print(f"undisturbed: {took}; {dict(hit)}")
    assert run.result() == peace.result()
    consumed = [line["consumed_prompts"] for line in peace.lines("metrics.jsonl") if line["kind"] == "grpo"]
    assert len(consumed) == STEPS and consumed[-1] > 16 * STEPS, "some groups were drawn anew"
    assert not run.hidden()
    assert {"start-up", "writing a checkpoint", "writing rollouts"} <= hit.keys()
