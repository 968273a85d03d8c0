"""A run under fire: `dsv2 pretrain` killed with SIGKILL at 30 random moments, out of disk space once, its number of loader workers changed.

Its final weights, moments and metrics must be those of a run left in peace, bit for bit. Everything that has state is on: ramped batches, a
mixture of two stages, device losses, token dropping, the guard against spikes, which skips some steps.

The full disk is a real one where a tmpfs may be mounted (by root): the run lies on it, and a ballast file takes all but 1 MB, less than a
checkpoint, then all of it. Elsewhere a limit on the size of files (RLIMIT_FSIZE) stands for it: the same writes fail, with EFBIG.
"""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dsv2.assets import corpus_path
from dsv2.checkpoint.manifest import verify_manifest
from dsv2.checkpoint.steps import checkpoints
from dsv2.data.documents import read_documents
from dsv2.data.prepare import prepare
from dsv2.files import sha256_of
from dsv2.metrics import read_metrics
from dsv2.tokenizer.train import train_tokenizer

pytestmark = pytest.mark.slow

KILLS = 30
VALIDATE_EVERY, CHECKPOINT_EVERY, KEEP = 3, 2, 2
RECIPE = f"""
[model]
preset = "tour"
[model.overrides]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 3
num_attention_heads = 2
kv_lora_rank = 16
n_routed_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 128
n_group = 4
topk_group = 2
topk_method = "group_limited_greedy"
max_position_embeddings = 64
[run]
tokens = 40_960
seq_len = 32
precision = "fp32"
validate_every = {VALIDATE_EVERY}
checkpoint_every = {CHECKPOINT_EVERY}
keep = {KEEP}
[batch]
sequences = 8
initial_sequences = 4
ramp_tokens = 8192
micro_sequences = 4
[learning_rate]
peak = 4e-3
warmup_steps = 4
[balance]
expert = 0.01
device = 0.01
communication = 0.01
[dropping]
capacity_factor = 1.0
protected_share = 0.25
[guard]
sigma = 2.0
window = 16
rollback_after = 50
[[mixture.stages]]
tokens = 32_000
weights = {{ en = 3, code = 1 }}
[[mixture.stages]]
weights = {{ en = 3, code = 1, math = 0.3 }}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with recipe.toml and data/: the held-out part of the shipped corpus to train on, the beginnings of four texts to score."""
    folder = tmp_path_factory.mktemp("fire")
    (folder / "recipe.toml").write_text(RECIPE)
    documents = list(read_documents([corpus_path("validation")]))
    tokenizer = train_tokenizer([document.text for document in documents], vocab_size=512)
    tokenizer.save(folder / "data/tokenizer")
    prepare(documents, tokenizer, folder / "data/train")
    first = {document.domain: replace(document, text=document.text[:400]) for document in reversed(documents)}
    prepare(first.values(), tokenizer, folder / "data/validation")
    return folder


# The disk ---------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """Where the run lies, and how to leave so and so many bytes of room on it."""

    folder: Path
    is_real: bool
    limit: int | None = None  # of the size of a file, where the disk is not real

    @contextmanager
    def with_room(self, size: int) -> Iterator[None]:
        ballast = self.folder / "ballast"
        if self.is_real:
            free = os.statvfs(self.folder)
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - size, 1))
        else:
            self.limit = size
        yield
        self.limit = None
        ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    is_real = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield Disk(folder, is_real)
    finally:
        if is_real:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


# The run ----------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of ``dsv2 pretrain`` that is started again and again."""

    inputs: Path
    out: Path
    messages: Path  # stderr of the process that was started last
    disk: Disk | None = None
    workers: int = 1

    def start(self, **pipes: int) -> subprocess.Popen:
        resume = ["--resume"] if (self.out / "recipe.toml").exists() else []
        files = ["--data", str(self.inputs / "data"), "--out", str(self.out)]
        command = ["pretrain", str(self.inputs / "recipe.toml"), f"run.loader_workers={self.workers}", *files, *resume]
        limit = self.disk.limit if self.disk else None
        with self.messages.open("wb") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "dsv2", *command],
                stderr=pipes.get("stderr", stderr),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            )

    def finish(self) -> tuple[int, str]:
        """Run to the end; return exit code and messages."""
        process = self.start(stderr=subprocess.PIPE)
        _, messages = process.communicate(timeout=1800)
        return process.returncode, messages.decode()

    def has_begun(self) -> bool:
        """The plan was printed: start-up is over."""
        return "precision" in self.messages.read_text(errors="replace")

    def writing(self) -> set[str]:
        """Names of step folders that are being written, or were when the process died."""
        return {name for name in os.listdir(self.out) if re.fullmatch(r"\.step-.*\.tmp", name)} if self.out.exists() else set()

    def newest(self) -> int:
        return max((int(path.name[5:]) for path in checkpoints(self.out)), default=0)

    def lines(self) -> list[dict]:
        return read_metrics(self.out / "metrics.jsonl") if (self.out / "metrics.jsonl").exists() else []

    def where_killed(self, stale: set[str]) -> str:
        """Tell from what a killed process left behind what it was doing; ``stale`` was there before it began."""
        if not self.has_begun():
            return "start-up"
        steps, lines = list(self.out.glob("step-*")), self.lines()
        if self.writing() - stale or list(self.out.glob(".step-*.old")) or len(steps) > KEEP + 1:  # amid spikes one more is kept
            return "writing a checkpoint"
        if lines and lines[-1]["kind"] == "train" and lines[-1]["step"] % VALIDATE_EVERY == 0:
            return "validation"
        return "training"

    def result(self) -> tuple[dict, list]:
        """Everything that must be equal: weights and moments of the kept checkpoints, metrics without times."""
        tensors = {str(file.relative_to(self.out)): sha256_of(file) for file in sorted(self.out.glob("step-*/**/*.safetensors"))}
        return tensors, [{key: value for key, value in line.items() if key not in ("tokens_per_s", "elapsed_s")} for line in self.lines()]


# Peace and fire ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Durations:
    """Measured on the undisturbed run, in seconds."""

    start_up: float
    step: float  # with its share of validation and checkpoints
    checkpoint: float


def in_peace(run: Run) -> Durations:
    """Run to the end and watch how long the parts take."""
    began, start_up, looks, hits = time.perf_counter(), 0.0, 0, 0
    process = run.start()
    while process.poll() is None:
        if not start_up and run.has_begun():
            start_up = time.perf_counter() - began
        elif start_up:
            looks += 1
            hits += bool(run.writing())
        time.sleep(0.001)
    assert process.returncode == 0, run.messages.read_text()
    step = (time.perf_counter() - began - start_up) / run.newest()
    return Durations(start_up, step, step * CHECKPOINT_EVERY * hits / looks)


def wait(process: subprocess.Popen, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not until() and process.poll() is None:
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.001)


def pause(process: subprocess.Popen, run: Run, seconds: float, step: int) -> None:
    """Wait so long, or until the run reaches a step: it must last for all kills on a machine that is faster than it was in peace."""
    end = time.perf_counter() + seconds
    wait(process, lambda: time.perf_counter() >= end or run.newest() >= step)


def wait_for_the_moment(process: subprocess.Popen, run: Run, took: Durations, moments: random.Random, number: int) -> None:
    """Wait for a random moment, by turns aimed at what takes too little time to be hit often by chance."""
    before, seen = run.newest(), run.writing()
    if number % 5 == 0:  # anywhere in start-up
        pause(process, run, moments.uniform(0, took.start_up), before + 4)
        return
    wait(process, run.has_begun)
    if number % 5 == 1:  # anywhere in the first ten steps
        step = before + moments.randrange(10)
        wait(process, lambda: step == before or any(line["step"] >= step for line in run.lines()))
        pause(process, run, moments.uniform(0, took.step), before + 10)
    elif number % 5 == 2:  # in validation or just after it
        step = (before // VALIDATE_EVERY + moments.randrange(1, 4)) * VALIDATE_EVERY
        wait(process, lambda: any(line["step"] >= step for line in run.lines()))
        pause(process, run, moments.uniform(0, 0.5 * took.step), before + 10)
    else:  # while a checkpoint is written or just after it
        wanted = len(seen) + moments.randrange(1, 4)

        def is_written() -> bool:
            seen.update(run.writing())
            return len(seen) >= wanted

        wait(process, is_written)
        pause(process, run, moments.uniform(0, 0.6 * took.checkpoint), before + 10)


def kill_once(run: Run, took: Durations, moments: random.Random, number: int) -> str:
    """Start the run, kill it at a random moment, see that nothing is half there, and tell what the kill hit."""
    stale, before = run.writing(), run.newest()
    process = run.start()
    wait_for_the_moment(process, run, took, moments, number)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"the run was faster than kill {number}: {run.messages.read_text()}"
    for path in run.out.glob("step-*"):
        verify_manifest(path)
    assert run.newest() >= before
    return run.where_killed(stale)


def run_out_of_space(run: Run, disk: Disk) -> None:
    """Less room than a checkpoint takes, then none at all: the run stops with a clear message each time, and loses nothing."""
    process = run.start()
    wait(process, run.has_begun)
    process.terminate()  # not killed: what it and those before it left is cleared away, or else that would be the room
    assert process.wait() == 143
    assert not run.writing()
    before = run.newest()
    for room in (1_000_000, 100):
        lines = run.lines()
        with disk.with_room(room):
            code, messages = run.finish()
        assert code == 2, messages
        says = "the disk is full: could not write " if disk.is_real else "larger than a file may be here"
        assert "error: " in messages and says in messages, messages
        assert "hint: " in messages and "--resume" in messages, messages
        assert "Traceback" not in messages
        assert not run.writing()
        for path in run.out.glob("step-*"):
            verify_manifest(path)
        assert run.newest() >= before
        assert [line for line in run.lines() if line["step"] <= before] == [line for line in lines if line["step"] <= before]


def test_thirty_kills_a_full_disk_and_other_numbers_of_workers_change_nothing(inputs, tmp_path, disk):
    began = time.perf_counter()
    peace = Run(inputs, tmp_path / "peace", tmp_path / "peace.txt")
    took = in_peace(peace)

    run, moments, hit = Run(inputs, disk.folder / "run", tmp_path / "fire.txt", disk), random.Random(4), Counter()
    for number in range(KILLS):
        run.workers = (1, 3, 0)[number * 3 // KILLS]
        if number == KILLS // 2:
            run_out_of_space(run, disk)
        where = kill_once(run, took, moments, number)
        print(f"kill {number + 1}: {where}, newest checkpoint {run.newest()}")
        hit[where] += 1
    run.workers = 2
    code, messages = run.finish()
    assert code == 0, messages

    print(f"{KILLS} kills: {dict(hit)}; {'a full tmpfs' if disk.is_real else 'a limit on file sizes'}; {peace.newest()} steps")
    print(f"undisturbed: start-up {took.start_up:.2f} s, step {took.step * 1e3:.0f} ms, checkpoint {took.checkpoint * 1e3:.0f} ms")
    print(f"in all {time.perf_counter() - began:.0f} s")
    assert run.result() == peace.result()
    assert any(line.get("skipped") for line in peace.lines())  # the guard had something to remember
    assert not [path.name for path in run.out.iterdir() if path.name.startswith(".")]
    assert hit["writing a checkpoint"] >= KILLS // 6
    assert len(hit) == 4, hit
