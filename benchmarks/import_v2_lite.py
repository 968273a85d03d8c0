"""A full-size V2-Lite checkpoint, written as bf16 shards and imported as an int8 model: time, speed, and the most memory it took.

    python benchmarks/import_v2_lite.py --at FOLDER [--layers 13] [--keep]

Weights are random, out of a streaming source. Writing takes 31.4 GB of disk; where less than 40 GB are free, 13 of the 27 layers are used.
Each step is a process of its own, so that its peak memory is its own. Prints ``ratio NAME VALUE`` lines.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

NEEDED_BYTES = 40_000_000_000
EMPTY_PROCESS_BYTES = 300_000_000  # Python and torch, about


def config(layers: int):
    from dsv2.presets import preset

    return preset("v2-lite", num_hidden_layers=layers)


def write(folder: Path, layers: int) -> None:
    from dsv2.checkpoint.huggingface import write_model
    from dsv2.checkpoint.source import RandomSource
    from dsv2.machine import peak_memory, require_disk
    from dsv2.model.accounting import count_parameters

    num_bytes = 2 * count_parameters(config(layers)).total
    require_disk(num_bytes, folder)
    folder.mkdir(parents=True)
    started = monotonic()
    write_model(folder, RandomSource(config(layers)))
    seconds = monotonic() - started
    print(f"written: {num_bytes / 1e9:.2f} GB in {seconds:.0f} s, {num_bytes / 1e9 / seconds:.2f} GB/s", end=", ")
    print(f"peak memory {peak_memory() / 1e9:.2f} GB")


def read(folder: Path) -> None:
    import torch

    from dsv2.checkpoint.huggingface import load_model
    from dsv2.machine import peak_memory

    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    started = monotonic()
    model = load_model(folder, dtype=torch.int8)
    seconds = monotonic() - started
    peak, held = peak_memory(), sum(parameter.nbytes for parameter in model.parameters())
    experts = model.model.layers[-1].mlp.experts
    stack = 2 * (experts.gate_up_proj.numel() + experts.down_proj.numel())  # as bf16, in which it was read
    print(f"imported as int8: {on_disk / 1e9:.2f} GB in {seconds:.0f} s, {on_disk / 1e9 / seconds:.2f} GB/s")
    print(f"model {held / 1e9:.2f} GB, one layer's expert stack in bf16 {stack / 1e9:.2f} GB, peak memory {peak / 1e9:.2f} GB")
    print(f"ratio peak_over_model {peak / held:.3f}")
    print(f"ratio extra_over_expert_stack {(peak - held - EMPTY_PROCESS_BYTES) / stack:.3f}")
    started = monotonic()
    with torch.inference_mode():
        logits = model.logits(model(torch.arange(8)[None]).hidden)
    assert torch.isfinite(logits).all()
    print(f"8 tokens through it: {monotonic() - started:.1f} s, logits finite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=Path, required=True, help="folder to write and read; must not exist")
    parser.add_argument("--layers", type=int, help="of V2-Lite's 27; without it by the free disk")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument("--step", choices=["write", "read"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layers = arguments.layers or (27 if shutil.disk_usage(arguments.at.absolute().parent).free >= NEEDED_BYTES else 13)
    if arguments.step == "write":
        write(arguments.at, layers)
    elif arguments.step == "read":
        read(arguments.at)
    else:
        if arguments.at.exists():
            sys.exit(f"{arguments.at} exists; choose a folder to be made")
        print(f"V2-Lite with {layers} of 27 layers, random weights")
        try:
            for step in ("write", "read"):
                command = [sys.executable, __file__, "--at", str(arguments.at), "--layers", str(layers), "--step", step]
                subprocess.run(command, check=True, env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"})
        finally:
            if not arguments.keep:
                shutil.rmtree(arguments.at, ignore_errors=True)


if __name__ == "__main__":
    main()
