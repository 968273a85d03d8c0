"""What decode_vs_peers.py measures: shapes, widths, what each takes on the disk and in time, and the plan of a run."""

import argparse
import shutil
import sys
from dataclasses import dataclass
from typing import Any

SCHEMES = {"4.5": "4", "8.5": "8", "bf16": "bf16"}  # width to dsv2's scheme
KINDS = {"4.5": "q4_0", "8.5": "q8_0", "bf16": "bf16"}  # and to the GGUF type it is compared with
BITS = {"4.5": 4.9, "8.5": 9.0, "bf16": 16.3}  # bits a weight of a file, at most, some weights being kept wider
SPARE_BYTES = 1_000_000_000  # of disk that stay free


@dataclass(frozen=True)
class Shape:
    """What is measured of a model.

    Args:
        preset: of its config.
        overrides: fields of it.
        widths: of the weights, with the minutes that each takes in a full run.
        llama: llama.cpp runs it.
        transformers: it does, in bf16.
        prompt: tokens of a prompt of the decoded requests.
        prefill: lengths of prompts that are timed.
        depths: tokens in the cache before a decoded one.
        llama_depths: widths at which llama.cpp is timed there, too.
    """

    preset: str
    overrides: dict[str, Any]
    widths: dict[str, float]
    llama: bool
    transformers: bool
    prompt: int = 128
    prefill: tuple[int, ...] = (512, 4096)
    depths: tuple[int, ...] = ()
    llama_depths: tuple[str, ...] = ()


LONG = {"max_position_embeddings": 32768}
SHAPES = {
    "nano": Shape("nano", LONG | {"q_lora_rank": 128}, {"bf16": 4}, llama=True, transformers=True, prefill=(512,)),
    "small": Shape(
        "small", LONG | {"q_lora_rank": 384}, {"bf16": 5, "8.5": 5, "4.5": 5}, llama=True, transformers=True, depths=(0, 8192, 16384),
        llama_depths=("8.5", "4.5"),
    ),
    "lite6": Shape("v2-lite", {"num_hidden_layers": 6}, {"bf16": 7}, llama=False, transformers=True),
    "lite": Shape("v2-lite", {}, {"4.5": 15, "8.5": 17}, llama=True, transformers=False, prompt=32, depths=(0, 8192, 16384)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A shape in one width.

    Args:
        name: of the shape.
        width: a key of SCHEMES.
        llama: llama.cpp runs beside.
        transformers: it does.
        together: both files fit on the disk, so that the sides can take turns.
    """

    name: str
    width: str
    llama: bool
    transformers: bool
    together: bool = True

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    @property
    def label(self) -> str:
        return f"{self.name} {self.width}"

    @property
    def config(self):
        from dsv2.presets import preset

        return preset(self.shape.preset, **self.shape.overrides)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file that is made for it."""
        from dsv2.engine.quantize import packed_bytes
        from dsv2.model.accounting import count_parameters

        total = count_parameters(self.config).total
        sizes = {"packed": packed_bytes(self.config, SCHEMES[self.width])}  # type: ignore[arg-type]
        if self.llama:
            sizes["gguf"] = int(total * BITS[self.width] / 8)
        if self.transformers:
            sizes["checkpoint"] = 2 * total
        return sizes

    def needed_bytes(self) -> int:
        sizes = self.sizes()
        return sum(sizes.values()) if self.together else max(sizes.values())


def plan(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that were asked for; leave if the disk is too small for one of them."""
    cases = []
    for name in arguments.shapes:
        shape = SHAPES[name]
        for width in shape.widths:
            few = arguments.quick and name == "lite" and width != "4.5"
            if few or width not in arguments.widths:
                continue
            peer = shape.transformers and width == "bf16"
            case = Case(name, width, llama=shape.llama and arguments.llama is not None, transformers=peer)
            free = shutil.disk_usage(arguments.at).free - SPARE_BYTES
            if case.needed_bytes() > free:
                case = Case(name, width, llama=case.llama, transformers=peer, together=False)
            if case.needed_bytes() > free:
                sys.exit(f"error: {case.label} takes {case.needed_bytes() / 1e9:.1f} GB in {arguments.at}, where {free / 1e9:.1f} GB may "
                         "be taken\nhint: choose another --at, fewer --shapes or --widths")  # fmt: skip
            cases.append(case)
    return cases


def show_plan(cases: list[Case], *, quick: bool) -> None:
    from dsv2.progress import table

    rows = []
    for case in cases:
        sides = "dsv2" + ", llama.cpp" * case.llama + ", transformers" * case.transformers
        order = "" if case.together or not case.llama else ", one file at a time"
        minutes = case.shape.widths[case.width] / (2 if quick else 1)
        rows.append((case.label, sides + order, f"{case.needed_bytes() / 1e9:.1f}", f"{minutes:.0f}"))
    total = sum(case.shape.widths[case.width] for case in cases) / (2 if quick else 1)
    rows.append(("all", "", f"{max(case.needed_bytes() for case in cases) / 1e9:.1f}", f"{total:.0f}"))
    table("plan", ("case", "sides", "disk, GB", "minutes"), rows, right=("disk, GB", "minutes"))
