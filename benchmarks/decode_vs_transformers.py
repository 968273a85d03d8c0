"""Greedy decoding of one request: dsv2's engine and transformers' DeepseekV2ForCausalLM, same weights, same prompt, one run.

    python benchmarks/decode_vs_transformers.py                    # the tour's shape, random weights
    python benchmarks/decode_vs_transformers.py --checkpoint tour  # a tour's own model
    python benchmarks/decode_vs_transformers.py --quick

Both sides: fp32, eager, a bare loop that feeds back the likeliest token (transformers without ``generate``, which would be slower
still). Sides alternate; medians over rounds are compared. The tokens must be the same. Prints ``ratio NAME VALUE``: above 1, dsv2 is
faster.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does: huge pages for large tensors, for both sides

import torch


def transformers_twin(model):
    """transformers' model with the same weights."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    fields = {name: value for name, value in model.config.to_dict().items() if name not in ("architectures", "model_type", "torch_dtype")}
    twin = DeepseekV2ForCausalLM(DeepseekV2Config(**fields)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.inference_mode()
def decode_transformers(twin, prompt: list[int], num_tokens: int, _tokenizer) -> tuple[list[int], float]:
    from transformers import DynamicCache

    cache = DynamicCache(config=twin.config)
    logits = twin(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits
    tokens = [int(logits[0, -1].argmax())]
    start = time.perf_counter()
    while len(tokens) < num_tokens:
        logits = twin(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens, (num_tokens - 1) / (time.perf_counter() - start)


def decode_dsv2(model, prompt: list[int], num_tokens: int, tokenizer) -> tuple[list[int], float]:
    from dsv2.engine.engine import Engine
    from dsv2.engine.request import Request, SamplingParams

    engine = Engine(model, tokenizer, max_batch=1)
    engine.add(Request("r", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)))
    tokens = [token for output in engine.step() for token in output.tokens]
    start = time.perf_counter()
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.tokens]
    return tokens, (num_tokens - 1) / (time.perf_counter() - start)


def random_model():
    """The tour's shape with random weights, and a tokenizer of that size."""
    from dsv2.assets import corpus_path
    from dsv2.data.documents import read_documents
    from dsv2.model.init import initialise
    from dsv2.model.transformer import Transformer
    from dsv2.presets import preset
    from dsv2.tokenizer.train import train_tokenizer

    texts = [document.text for document in read_documents([corpus_path("train")])][:100]
    tokenizer = train_tokenizer(texts, vocab_size=4096)
    model = Transformer(preset("tour", bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, initializer_range=0.05))
    initialise(model, 0)
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint, run or tour; without it random weights")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.rounds = 32, 1
    torch.set_num_threads(arguments.threads)
    if arguments.checkpoint:
        from dsv2.checkpoint.huggingface import load_model
        from dsv2.checkpoint.steps import latest_checkpoint
        from dsv2.tokenizer.tokenizer import Tokenizer

        folder = latest_checkpoint(arguments.checkpoint)
        model, tokenizer = load_model(folder), Tokenizer.load(folder)
    else:
        model, tokenizer = random_model()
    prompt = tokenizer.encode("It was a fine morning, and the river ran through the town as it had always done.")
    sides = {"dsv2": (decode_dsv2, model), "transformers": (decode_transformers, transformers_twin(model))}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {}
    for side, (decode, subject) in sides.items():
        decode(subject, prompt, 16, tokenizer)  # warm-up
        speeds[side].clear()
    for round_ in range(arguments.rounds):
        for side, (decode, subject) in sides.items():
            tokens[side], speed = decode(subject, prompt, arguments.tokens, tokenizer)
            speeds[side].append(speed)
            print(f"round {round_ + 1} {side}: {speed:,.1f} tokens/s", flush=True)
    same = sum(a == b for a, b in zip(tokens["dsv2"], tokens["transformers"], strict=True))
    print(f"{same} of {arguments.tokens} tokens agree; {arguments.threads} threads, prompt of {len(prompt)} tokens")
    if same < arguments.tokens:
        raise SystemExit("the two sides wrote different tokens: not the same model, or a near-tie")
    print(f"ratio decode_batch1 {statistics.median(speeds['dsv2']) / statistics.median(speeds['transformers']):.3f}")


if __name__ == "__main__":
    main()
