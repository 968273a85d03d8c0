"""A tour that is killed with SIGKILL at random moments ends with the weights, metrics and samples of one that ran in peace."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv2.files import sha256_of
from dsv2.metrics import read_metrics

RUNS = ("pretrain", "sft", "grpo")


def start_tour(out: Path, size: str, threads: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "dsv2", "tour", "--size", size, "--out", str(out), "--threads", str(threads)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def run_to_the_end(out: Path, size: str, threads: int) -> None:
    process = start_tour(out, size, threads)
    _, messages = process.communicate(timeout=3600)
    assert process.returncode == 0, messages.decode()


def result_of(out: Path) -> dict:
    """Everything that must be equal: weights and moments of every kept checkpoint, metrics without times, rollouts, what the model says."""
    files = sorted(out.glob("*/step-*/**/*.safetensors"))
    metrics = {run: [timeless(line) for line in read_metrics(out / run / "metrics.jsonl")] for run in RUNS}
    return {
        "tensors": {str(file.relative_to(out)): sha256_of(file) for file in files},
        "metrics": metrics,
        "rollouts": (out / "grpo" / "rollouts.jsonl").read_text(),
        **{name: (out / f"{name}.json").read_text() for name in ("validation", "samples", "chat")},
    }


def timeless(line: dict) -> dict:
    return {key: value for key, value in line.items() if not key.endswith(("_s", "step_time"))}


def progress_of(out: Path) -> str:
    """Where a tour stands: finished legs, newest checkpoint."""
    legs = json.loads((out / "tour.json").read_text())["legs"] if (out / "tour.json").exists() else {}
    steps = [max((int(path.name[5:]) for path in (out / run).glob("step-*")), default=0) for run in RUNS]
    return f"{len(legs)} legs, steps {steps}"


def kill_at_random(out: Path, size: str, threads: int, kills: int, seed: int) -> list[str]:
    """Start the tour again and again and kill it, by turns at any moment of its first seconds and just after it got ahead."""
    moments = random.Random(seed)
    hit = []
    for number in range(kills):
        before = progress_of(out)
        process = start_tour(out, size, threads)
        if number % 2:
            while progress_of(out) == before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0.0, 0.5))
        else:
            time.sleep(moments.uniform(0.5, 4.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"the tour was faster than kill {number}: {hit}"
        hit.append(progress_of(out))
    return hit


def compare(tmp_path: Path, size: str, threads: int, kills: int) -> None:
    run_to_the_end(tmp_path / "peace", size, threads)
    hit = kill_at_random(tmp_path / "killed", size, threads, kills, seed=7)
    run_to_the_end(tmp_path / "killed", size, threads)
    print("kills after:", *hit, sep="\n  ")
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "peace")
    assert len(set(hit)) > 1, hit  # the kills fell at different places of the river
    assert not list((tmp_path / "killed").glob("*/.step-*"))


def test_four_kills(tmp_path):
    compare(tmp_path, "smoke", threads=1, kills=4)


@pytest.mark.slow
def test_twelve_kills_with_two_threads(tmp_path):
    compare(tmp_path, "smoke", threads=2, kills=12)
