"""What recompute saves: the memory of a step beyond weights, with and without it, each in a process of its own."""

import os
import subprocess
import sys

import pytest

STEP = """
import resource, sys, time
import torch
from dsv2.data.batch import Batch
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.train.losses import BalanceSection, batch_losses
from dsv2.train.memory import keep_freed_memory

recompute = sys.argv[1] == "1"
torch.set_num_threads(1)
model = Transformer(preset("nano", num_hidden_layers=16, vocab_size=1024))
initialise(model, 0)
for p in model.parameters():
    p.grad = torch.zeros_like(p)
tokens = torch.randint(0, 1024, (4, 512))
batch = Batch(tokens, tokens, torch.arange(512).expand(4, 512), torch.zeros_like(tokens))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
losses = batch_losses(model, batch, BalanceSection(), recompute=recompute)
(losses.nll / tokens.numel() + losses.balance).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - began)
"""


@pytest.mark.slow
def test_recompute_takes_less_than_a_third_of_the_memory():
    results = []
    for recompute in ("0", "1"):
        command = [sys.executable, "-c", STEP, recompute]
        result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
        results.append([float(part) for part in result.stdout.split()])
    (plain_kb, plain_s), (recomputed_kb, recomputed_s) = results
    print(f"{plain_kb / 1024:.0f} MB in {plain_s:.2f} s; recompute {recomputed_kb / 1024:.0f} MB in {recomputed_s:.2f} s")
    assert recomputed_kb < plain_kb / 3
