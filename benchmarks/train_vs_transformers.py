"""Training steps of dsv2 and of transformers' DeepseekV2ForCausalLM, same shape, same tokens, one run.

    python benchmarks/train_vs_transformers.py --shape nano            # 15M parameters
    python benchmarks/train_vs_transformers.py --shape small           # 550M
    python benchmarks/train_vs_transformers.py --quick

Both sides: fp32 or bf16 autocast, forward + backward + fused AdamW, the same batches of the shipped corpus in the same order, initial
weights from dsv2. transformers has no balance loss, so dsv2 runs without one here. Each side has its own process, so that peak memory is
its own; sides alternate and medians are compared. Prints one line ``ratio NAME VALUE`` per comparison: above 1, dsv2 is better.
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

SHAPES = {"nano": (8, 512, 8), "small": (2, 512, 3)}  # sequences, tokens, timed steps
PEAK_FP32_SIZE = 2048


def make_side(side: str, shape: str, seed: int):
    import torch

    from dsv2.kernels import linear_cross_entropy
    from dsv2.model.init import initialise
    from dsv2.model.transformer import Transformer
    from dsv2.presets import preset

    config = preset(shape, bos_token_id=0, eos_token_id=1)
    ours = Transformer(config)
    initialise(ours, seed)
    if side == "dsv2":

        def loss(tokens):
            hidden = ours(tokens).hidden[:, :-1]
            return linear_cross_entropy(hidden.flatten(0, 1), ours.lm_head.weight, tokens[:, 1:].flatten(), -100) / tokens[:, 1:].numel()

        return ours, loss
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    fields = {name: value for name, value in config.to_dict().items() if name not in ("architectures", "model_type", "torch_dtype")}
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**fields)).train()
    theirs.config.use_cache = False
    theirs.load_state_dict(ours.state_dict())
    del ours
    torch.manual_seed(seed)
    return theirs, lambda tokens: theirs(input_ids=tokens, labels=tokens, use_cache=False).loss


def run_side(side: str, shape: str, tokens: str, steps: int, seconds: float, precision: str, threads: int) -> dict:
    """Time ``steps`` steps after one warm-up, then go on until ``seconds`` have passed and report the loss there."""
    import numpy
    import torch

    torch.set_num_threads(threads)
    if side == "dsv2":  # as its training stage does
        from dsv2.train.memory import keep_freed_memory

        keep_freed_memory()
    model, loss_of = make_side(side, shape, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch, length, _ = SHAPES[shape]
    corpus = torch.from_numpy(numpy.load(tokens))
    generator = torch.Generator().manual_seed(1)

    def next_batch():
        starts = torch.randint(0, len(corpus) - length, (batch,), generator=generator)
        return torch.stack([corpus[start : start + length] for start in starts.tolist()])

    times, losses, began = [], [], None
    while len(times) < steps + 1 or (seconds and time.perf_counter() - began < seconds):
        rows = next_batch()
        start = time.perf_counter()
        began = began or start
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    per_step = statistics.median(times[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens_per_s": batch * length / per_step, "first_loss": losses[0], "loss": losses[-1], "steps": len(losses), "peak_mib": peak}


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


def matrix_rate(threads: int) -> float:
    """Return this machine's fp32 matrix rate, GFLOP/s: the best of some products, since other work only ever lowers it."""
    import torch

    torch.set_num_threads(threads)
    a = torch.randn(PEAK_FP32_SIZE, PEAK_FP32_SIZE)
    a @ a
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * PEAK_FP32_SIZE**3 / min(times) / 1e9


def in_process(side: str, arguments: argparse.Namespace, tokens: str, steps: int, seconds: float) -> dict:
    command = [
        sys.executable, __file__, "--side", side, "--shape", arguments.shape, "--steps", str(steps), "--seconds", str(seconds),
        "--precision", arguments.precision, "--threads", str(arguments.threads), "--tokens", tokens,
    ]  # fmt: skip
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}  # as the command line does: huge pages for large tensors, for both sides
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="times that the sides alternate")
    parser.add_argument("--steps", type=int, default=0, help="timed steps per round; 0: by shape")
    parser.add_argument("--seconds", type=float, default=30.0, help="wall time after which the losses are compared")
    parser.add_argument("--quick", action="store_true", help="one round, few steps")
    parser.add_argument("--side", choices=("dsv2", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = arguments.steps or SHAPES[arguments.shape][2]
    if arguments.side:
        row = run_side(arguments.side, arguments.shape, arguments.tokens, steps, arguments.seconds, arguments.precision, arguments.threads)
        print(json.dumps(row))
        return
    if arguments.quick:
        arguments.rounds, steps, arguments.seconds = 1, 2, 0.0
    from dsv2.model.accounting import count_parameters, training_flops_per_token
    from dsv2.presets import preset

    rate = matrix_rate(arguments.threads)
    results: dict[str, list[dict]] = {"dsv2": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        tokens = f"{folder}/tokens.npy"
        save_corpus(preset(arguments.shape).vocab_size, tokens)
        for round_ in range(arguments.rounds):
            for side, rows in results.items():
                row = in_process(side, arguments, tokens, steps, arguments.seconds)
                rows.append(row)
                print(f"round {round_ + 1} {side}: " + ", ".join(f"{name} {value:,.3f}" for name, value in row.items()), flush=True)
    middle = {side: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for side, rows in results.items()}
    first = [rows[0]["first_loss"] for rows in results.values()]
    if abs(first[0] - first[1]) > (1e-4 if arguments.precision == "fp32" else 2e-2):
        raise SystemExit(f"the two sides are not the same model: first losses {first}")
    config = preset(arguments.shape)
    length = SHAPES[arguments.shape][1]
    flops = training_flops_per_token(config, length)
    print(f"{arguments.shape}, {arguments.precision}: {count_parameters(config).total:,} parameters, {flops / 1e6:.1f} MFLOP per token")
    print(f"this machine's fp32 matrix rate: {rate:.0f} GFLOP/s")
    for side, row in middle.items():
        share = row["tokens_per_s"] * flops / 1e9 / rate
        speed = f"{row['tokens_per_s']:,.0f} tokens/s, {share:.0%} of that rate"
        print(f"{side}: {speed}, {row['peak_mib']:,.0f} MiB, loss {row['loss']:.3f} after {row['steps']:.0f} steps")
    ours, theirs = middle["dsv2"], middle["transformers"]
    name = f"train_{arguments.shape}_{arguments.precision}"
    print(f"ratio {name}_tokens_per_s {ours['tokens_per_s'] / theirs['tokens_per_s']:.3f}")
    print(f"ratio {name}_peak_memory {theirs['peak_mib'] / ours['peak_mib']:.3f}")
    if arguments.seconds:
        print(f"ratio {name}_loss_at_equal_wall_time {theirs['loss'] / ours['loss']:.3f}")


if __name__ == "__main__":
    main()
