"""Training steps of dsv2 and of transformers' DeepseekV2ForCausalLM in its best mode: same shape, same tokens, one run.

    python benchmarks/train_vs_transformers.py --shape nano                      # 15M parameters, fp32
    python benchmarks/train_vs_transformers.py --shape small --precision bf16    # 550M
    python benchmarks/train_vs_transformers.py --quick                           # eager only, few steps

Both sides: forward, backward and fused AdamW on the same batches of the shipped corpus in the same order, initial weights from dsv2.
transformers has no balance loss, so dsv2 runs without one here. First modes of transformers run once each: experts as grouped_mm and
eager, and grouped_mm compiled; for bf16 also with weights and moments in bf16. batched_mm is left out: it copies each token's experts, 19
GB in small. Then dsv2 and the fastest of them alternate, and medians are compared. Each run has a process of its own, so that peak memory
is its own. dsv2's bf16 keeps weights and moments in fp32 (autocast); --precision all-bf16 compares with everything in bf16. dsv2 asks
glibc to keep freed memory, as its training stage does and transformers' does not, and transformers gets torch's huge pages.

The replay is the bare matrix products of one dsv2 step, recorded and run by themselves: what a step would take if nothing else cost time.
Prints one line ``ratio NAME VALUE`` per comparison: above 1, dsv2 is better.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

SHAPES = {"nano": (8, 512, 8), "small": (2, 512, 3)}  # sequences, tokens, timed steps
WARM_UP = 4  # steps: the first compiles or allocates; a virtual machine may hand out the memory of the next ones page by page, too


@dataclass(frozen=True)
class Mode:
    """How a side runs.

    Args:
        side: dsv2 or transformers.
        precision: fp32; bf16: products only (autocast); all-bf16: weights, gradients and moments, too.
        experts: transformers' implementation of the experts.
        compiled: through torch.compile.
    """

    side: str
    precision: str
    experts: str = ""
    compiled: bool = False

    @property
    def label(self) -> str:
        parts = (self.side, self.precision, self.experts, "compiled" if self.compiled else "")
        return " ".join(part for part in parts if part)


def peer_modes(precision: str, quick: bool) -> list[Mode]:
    precisions = ("fp32",) if precision == "fp32" else ("bf16", "all-bf16")
    modes = [Mode("transformers", p, experts) for p in precisions for experts in ("grouped_mm", "eager")]
    if quick:
        return modes[:1]
    return modes + [Mode("transformers", p, "grouped_mm", compiled=True) for p in precisions]


def make_side(mode: Mode, shape: str, seed: int):
    """Return the model and a function from tokens to its loss."""
    import torch

    from dsv2.kernels import linear_cross_entropy
    from dsv2.model.init import initialise
    from dsv2.model.transformer import Transformer
    from dsv2.presets import preset

    config = preset(shape, bos_token_id=0, eos_token_id=1)
    ours = Transformer(config)
    initialise(ours, seed)
    dtype = torch.bfloat16 if mode.precision == "all-bf16" else torch.float32
    if mode.side == "dsv2":
        ours.to(dtype)

        def loss(tokens):
            hidden = ours(tokens).hidden[:, :-1]
            return linear_cross_entropy(hidden.flatten(0, 1), ours.lm_head.weight, tokens[:, 1:].flatten(), -100) / tokens[:, 1:].numel()

        return ours, loss
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    fields = {name: value for name, value in config.to_dict().items() if name not in ("architectures", "model_type", "torch_dtype")}
    settings = DeepseekV2Config(**fields)
    settings._experts_implementation = mode.experts
    theirs = DeepseekV2ForCausalLM(settings).train()
    theirs.config.use_cache = False
    theirs.load_state_dict(ours.state_dict())
    del ours
    theirs.to(dtype)
    torch.manual_seed(seed)
    run = torch.compile(theirs) if mode.compiled else theirs
    return theirs, lambda tokens: run(input_ids=tokens, labels=tokens, use_cache=False).loss


def prepared(mode: Mode, shape: str, tokens: str):
    """Return a function that takes a training step on the next batch and returns the loss."""
    import numpy
    import torch

    model, loss_of = make_side(mode, shape, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if mode.side == "dsv2":  # as its training stage does
        from dsv2.train.memory import keep_freed_memory

        keep_freed_memory()
    batch, length, _ = SHAPES[shape]
    corpus = torch.from_numpy(numpy.load(tokens))
    generator = torch.Generator().manual_seed(1)

    def step() -> float:
        starts = torch.randint(0, len(corpus) - length, (batch,), generator=generator)
        rows = torch.stack([corpus[start : start + length] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.precision == "bf16"):
            loss = loss_of(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def run_mode(mode: Mode, shape: str, tokens: str, steps: int, seconds: float) -> dict:
    """Time ``steps`` steps after the warm-up, then go on until ``seconds`` have passed and report the loss there."""
    step = prepared(mode, shape, tokens)
    times, losses, began = [], [], time.perf_counter()
    while len(times) < steps + WARM_UP or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    batch, length, _ = SHAPES[shape]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = batch * length / statistics.median(times[WARM_UP:])
    return {"tokens_per_s": speed, "first_loss": losses[0], "loss": losses[-1], "steps": len(losses), "peak_mib": peak}


def run_replay(precision: str, shape: str, tokens: str) -> dict:
    """Record the products of a dsv2 step and run them bare."""
    import torch
    from matrix_products import matrix_rate, record, replay_seconds, total_flops

    step = prepared(Mode("dsv2", precision), shape, tokens)
    step()
    products = record(step)
    batch, length, _ = SHAPES[shape]
    return {
        "tokens_per_s": batch * length / replay_seconds(products),
        "flops_per_token": total_flops(products) / (batch * length),
        "matrix_gflops": matrix_rate(torch.float32 if precision == "fp32" else torch.bfloat16),
    }


def save_corpus(vocabulary: int, path: str) -> None:
    """Encode the shipped training text with a tokenizer of that size."""
    import numpy

    from dsv2.assets import corpus_path
    from dsv2.data.documents import read_documents
    from dsv2.tokenizer.train import train_tokenizer

    texts = [document.text for document in read_documents([corpus_path("train")])]
    tokenizer = train_tokenizer(texts, vocab_size=vocabulary)
    order = numpy.random.default_rng(0).permutation(len(texts))  # domains mixed
    encoded = tokenizer.encode_batch([texts[index] for index in order])
    numpy.save(path, numpy.concatenate([numpy.array(ids, dtype=numpy.int64) for ids in encoded]))


def in_process(arguments: argparse.Namespace, tokens: str, *, mode: Mode | None, steps: int, seconds: float) -> dict:
    """Run a mode, or the replay, in a process of its own."""
    task = {"mode": vars(mode) if mode else None, "tokens": tokens, "steps": steps, "seconds": seconds}
    command = [sys.executable, __file__, "--shape", arguments.shape, "--precision", arguments.precision]
    command += ["--threads", str(arguments.threads), "--task", json.dumps(task)]
    ours = mode is None or mode.side == "dsv2"
    # ours as its command line sets it; the peer, which frees memory every step, gets huge pages
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "0" if ours else "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    row = json.loads(done.stdout.splitlines()[-1])
    print(f"{mode.label if mode else 'replay'}: " + ", ".join(f"{name} {value:,.3f}" for name, value in row.items()), flush=True)
    return row


def do_task(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    task = json.loads(arguments.task)
    if task["mode"] is None:
        row = run_replay(arguments.precision, arguments.shape, task["tokens"])
    else:
        row = run_mode(Mode(**task["mode"]), arguments.shape, task["tokens"], task["steps"], task["seconds"])
    print(json.dumps(row))


def check_same_model(rows: list[dict], precision: str) -> None:
    first = [row["first_loss"] for row in rows]
    if max(first) - min(first) > (1e-4 if precision == "fp32" else 2e-2):
        raise SystemExit(f"the sides are not the same model: first losses {first}")


def measure(arguments: argparse.Namespace, tokens: str) -> None:
    """Find the peer's best mode, alternate with it, print the comparison."""
    steps = 2 if arguments.quick else SHAPES[arguments.shape][2]
    ours = Mode("dsv2", arguments.precision)
    tried = {
        mode: in_process(arguments, tokens, mode=mode, steps=steps, seconds=0) for mode in peer_modes(arguments.precision, arguments.quick)
    }
    check_same_model(list(tried.values()), arguments.precision)
    best = max(tried, key=lambda mode: tried[mode]["tokens_per_s"])
    rows: dict[Mode, list[dict]] = {ours: [], best: []}
    for _ in range(arguments.rounds):
        for mode, done in rows.items():
            done.append(in_process(arguments, tokens, mode=mode, steps=steps, seconds=arguments.seconds))
    replay = in_process(arguments, tokens, mode=None, steps=0, seconds=0)
    check_same_model([rows[ours][0], rows[best][0]], arguments.precision)
    middle = {mode: {name: statistics.median(row[name] for row in done) for name in done[0]} for mode, done in rows.items()}
    same = [mode for mode in tried if mode.precision == arguments.precision]
    rival = best if best in same else max(same, key=lambda mode: tried[mode]["tokens_per_s"])
    report(arguments, middle[ours], middle[best], best, tried[rival], rival, replay)


def report(
    arguments: argparse.Namespace, ours: dict, theirs: dict, best: Mode, same_precision: dict, same_mode: Mode, replay: dict
) -> None:
    speed = ours["tokens_per_s"]
    rate = replay["flops_per_token"] * speed / 1e9
    print(f"\n{arguments.shape}, {arguments.precision}, {arguments.threads} threads; best peer: {best.label}")
    for side, row in (("dsv2", ours), ("peer", theirs)):
        outcome = f"loss {row['loss']:.3f} after {row['steps']:.0f} steps"
        print(f"{side}: {row['tokens_per_s']:,.0f} tokens/s, {row['peak_mib']:,.0f} MiB, {outcome}")
    print(f"dsv2's products: {replay['flops_per_token'] / 1e6:.1f} MFLOP per token, {rate:.0f} of {replay['matrix_gflops']:.0f} GFLOP/s "
          f"that large products reach: {rate / replay['matrix_gflops']:.0%}")  # fmt: skip
    print(f"replay of the bare products: {replay['tokens_per_s']:,.0f} tokens/s; dsv2 reaches {speed / replay['tokens_per_s']:.0%}")
    name = f"train_{arguments.shape}_{arguments.precision}"
    print(f"ratio {name}_tokens_per_s {speed / theirs['tokens_per_s']:.3f}")
    print(f"ratio {name}_peak_memory {same_precision['peak_mib'] / ours['peak_mib']:.3f}  ({same_mode.label})")
    if arguments.seconds:
        print(f"ratio {name}_loss_at_equal_wall_time {theirs['loss'] / ours['loss']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--precision", choices=("fp32", "bf16", "all-bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="times that dsv2 and the best peer alternate")
    parser.add_argument("--seconds", type=float, default=0.0, help="wall time after which the losses are compared; 0: not")
    parser.add_argument("--quick", action="store_true", help="one round, few steps, eager peer only")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        do_task(arguments)
        return
    if arguments.quick:
        arguments.rounds = 1
    from dsv2.presets import preset

    with tempfile.TemporaryDirectory() as folder:
        tokens = f"{folder}/tokens.npy"
        save_corpus(preset(arguments.shape).vocab_size, tokens)
        measure(arguments, tokens)


if __name__ == "__main__":
    main()
