"""Decoding and reading prompts: dsv2's engine beside llama.cpp and transformers, same shapes, random weights, one run.

    python benchmarks/decode_vs_peers.py --at FOLDER --llama BIN                  # everything, an hour at most
    python benchmarks/decode_vs_peers.py --at FOLDER --llama BIN --quick          # 20 minutes: batch 1 and 8, short prompts, 4.5 bits
    python benchmarks/decode_vs_peers.py --at FOLDER --shapes nano,small          # without llama.cpp

Shapes: nano (15M parameters) and small (0.55B, 0.15B at work), both with q_lora_rank, without which llama.cpp does not load them; lite6,
six layers of V2-Lite's shapes, beside transformers only; lite, all 27 of them, in few bits, beside llama.cpp only. Two threads for all.
Ours in bf16 is compared with llama.cpp in BF16, 8.5 bits with Q8_0, 4.5 with Q4_0. BIN holds llama-bench and llama-batched-bench of an
unpatched build; the fastest of its ways to load a file is looked for on nano and small, and lite takes small's. Files are exported by
dsv2, made from a streaming source one case at a time and removed afterwards (--keep: not, and used again). What that takes on the disk is
checked before work starts.

Every figure is taken on a quiet machine: disturbed ones are taken again, and thrown away when that does not help (quiet_machine.py). The
roof of a decoding step is the larger of two times: its bytes at the rate at which huge pages are read right before and after (experts: the
distinct ones of these very steps), its products at the rate of a large one (engine_side.py). dsv2 and llama.cpp take turns.
A virtual machine's memory may be twice as fast a minute later, so a ratio is of figures that met the same rate; llama.cpp is timed once
more for one, and where none was met the tables say so.

Prints a table per shape, the bars with what was reached, and a line ``ratio NAME VALUE`` for each: above 1, dsv2 is better.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from engine_peers import LlamaCpp, PeerFailed, measure_transformers
from peer_cases import KINDS, SCHEMES, SHAPES, Case, plan, show_plan
from peer_tables import LLAMA, OURS, TRANSFORMERS, Figures, judge, show_bars, show_case, show_memory

THREADS = 2
TRIES_FOR_RATE = 2  # of a peer, until memory is as fast as it was for one of dsv2's figures
DEFAULT_LOADING = "read, huge pages"  # of llama.cpp, unless small says better


# Tasks: each a process of its own ---------------------------------------------------------------------------------------------------


def in_process(do: str, **task: Any) -> dict:
    """Do a task in a process of its own; return what it found.

    Raises:
        PeerFailed: it ended with an error, whose last line is the message.
    """
    command = [sys.executable, __file__, "--task", json.dumps({"do": do} | task)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"})
    if done.returncode:
        raise PeerFailed(f"{do}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def do_task(task: dict) -> dict:
    import torch

    torch.set_num_threads(THREADS)
    do = task.pop("do")
    if do == OURS:
        from engine_side import measure

        return measure(task)
    return measure_transformers(task) if do == TRANSFORMERS else make(do, Case(**task["case"]), Path(task["to"]))


def make(what: str, case: Case, to: Path) -> dict:
    """Write a tokenizer, or a case's model for one of the sides."""
    from dsv2.checkpoint.source import RandomSource

    started = time.perf_counter()
    if what == "tokenizer":
        from dsv2.assets import corpus_path
        from dsv2.data.documents import read_documents
        from dsv2.tokenizer.train import train_tokenizer

        train_tokenizer([document.text for document in read_documents([corpus_path("validation")])], vocab_size=4096).save(to)
    elif what == "gguf":
        from dsv2.checkpoint.gguf import export_gguf

        export_gguf(RandomSource(case.config), to, kind=KINDS[case.width], tokenizer=None, name=case.label)  # type: ignore[arg-type]
    else:
        from dsv2.checkpoint.huggingface import write_model
        from dsv2.engine.quantize import pack_folder
        from dsv2.files import atomic_folder

        with atomic_folder(to) as folder:
            if what == "packed":
                pack_folder(RandomSource(case.config), folder, SCHEMES[case.width])  # type: ignore[arg-type]
            else:
                write_model(folder, RandomSource(case.config))
    return {"seconds": time.perf_counter() - started}


# A run ------------------------------------------------------------------------------------------------------------------------------


class Run:
    """All cases, one after the other.

    Args:
        arguments: of the command line.
        llama: llama.cpp's programs, if they are there.
    """

    def __init__(self, arguments: argparse.Namespace, llama: LlamaCpp | None) -> None:
        self._at, self._quick, self._keep, self._llama = arguments.at, arguments.quick, arguments.keep, llama
        self._batches = [1, 8] if arguments.quick else [1, 8, 32]
        self._loading: dict[str, str] = {}  # by width
        self._tokenizer = self._at / "tokenizer"
        self.notes: list[str] = []

    def make_tokenizer(self) -> None:
        if not self._tokenizer.exists():
            case = {"name": "nano", "width": "bf16", "llama": False, "transformers": False}
            in_process("tokenizer", case=case, to=str(self._tokenizer))

    def measure(self, case: Case) -> Figures:
        """Return all figures of a case; its files are removed unless they are to be kept."""
        figures = Figures(case.label)
        try:
            self._made(case, "packed")
            self._ours(case, figures, again=False)
            if case.llama and self._llama is not None:
                if not case.together:
                    self._ours(case, figures, again=True)
                    self._remove(case, "packed")
                self._made(case, "gguf")
                self._llama_cpp(case, figures)
                if case.together:
                    self._ours(case, figures, again=True)
                self._remove(case, "gguf")
            self._remove(case, "packed")
            if case.transformers:
                self._made(case, "checkpoint")
                self._transformers(case, figures)
        finally:
            for what in ("packed", "gguf", "checkpoint"):
                self._remove(case, what)
        return figures

    def _path(self, case: Case, what: str) -> Path:
        return self._at / f"{case.name}-{case.width}-{what}{'.gguf' if what == 'gguf' else ''}"

    def _made(self, case: Case, what: str) -> None:
        path = self._path(case, what)
        if not path.exists():
            seconds = in_process(what, case=vars(case), to=str(path))["seconds"]
            self._say(f"{case.label}: {what} written in {seconds:.0f} s")

    def _remove(self, case: Case, what: str) -> None:
        path = self._path(case, what)
        if self._keep:
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _depths(self, case: Case) -> list[int]:
        return [depth for depth in case.shape.depths if not self._quick or depth <= 8192]

    def _prefill(self, case: Case) -> list[int]:
        return [length for length in case.shape.prefill if not self._quick or length <= 512]

    def _ours(self, case: Case, figures: Figures, *, again: bool) -> None:
        """Time dsv2; after llama.cpp's turn once more what is compared with it and cheap."""
        folder = str(self._path(case, "packed"))
        batches = [1] if again and case.name == "lite" else self._batches
        new = 16 if case.name == "lite" else 24
        row = in_process(
            OURS, folder=folder, tokenizer=str(self._tokenizer), batches=batches, prefill=[] if again else self._prefill(case),
            depths=[] if again else self._depths(case), prompt=case.shape.prompt, new=new,
        )  # fmt: skip
        self._say(figures.add(OURS, row))

    def _llama_cpp(self, case: Case, figures: Figures) -> None:
        assert self._llama is not None
        file, lite = self._path(case, "gguf"), case.name == "lite"
        try:
            loading = self._best_loading(case, figures, file)
            for run in self._llama_runs(case, loading, lite=lite):
                for _ in range(TRIES_FOR_RATE):
                    found = run(file)
                    self._say(figures.add(LLAMA, {"figures": found}))
                    if all(figures.over(LLAMA, what)[1] for what in found if what.startswith("decode")):
                        break
        except PeerFailed as failure:
            self._note(f"{case.label}: llama.cpp failed: {failure}")

    def _best_loading(self, case: Case, figures: Figures, file: Path) -> str:
        assert self._llama is not None
        if case.name != "lite":  # which takes what was best for small
            tried = self._llama.try_loadings(file)
            best = max(tried, key=lambda loading: tried[loading]["value"])
            figures.add(LLAMA, {"figures": {"decode b1": tried[best]}})
            self._loading[case.width] = best
            speeds = ", ".join(f"{loading} {figure['value']:,.1f}" for loading, figure in tried.items())
            self._note(f"{case.label}, llama.cpp, decode b1 by how the file is loaded: {speeds}")
        return self._loading.get(case.width, DEFAULT_LOADING)

    def _llama_runs(self, case: Case, loading: str, *, lite: bool) -> Iterator[Callable[[Path], dict]]:
        """Yield what llama.cpp is timed at, as functions of a file that give figures."""
        llama, repeats = self._llama, "2" if lite or self._quick else "4"
        assert llama is not None
        repeats = repeats if case.name != "nano" else "20"
        yield lambda file: llama.single(file, loading, "-p", "512", "-n", "0", "-r", repeats)
        yield lambda file: llama.single(file, loading, "-p", "0", "-n", "32" if lite else "64", "-r", repeats)
        if 4096 in self._prefill(case):
            yield lambda file: llama.single(file, loading, "-p", "4096", "-n", "0", "-r", "1", "--no-warmup")
        batches = [batch for batch in self._batches if batch > 1 or not lite]
        yield lambda file: llama.together(file, loading, prompt=case.shape.prompt, new=16 if lite else 32, batches=batches)
        depths = [str(depth) for depth in self._depths(case) if depth]
        if case.width in case.shape.llama_depths:
            yield lambda file: llama.single(file, loading, "-p", "0", "-n", "24", "-r", "2", "--no-warmup", "-d", ",".join(depths))

    def _transformers(self, case: Case, figures: Figures) -> None:
        """Time its modes, each in a process of its own."""
        modes = [("grouped_mm", False), ("eager", False)]
        if case.name == "nano" and not self._quick:
            modes.append(("grouped_mm", True))
        for experts, compiled in modes:
            side = f"{TRANSFORMERS} {experts}{', compiled' if compiled else ''}"
            batches = self._batches[:2] if compiled or case.name == "lite6" else self._batches
            task = {
                "folder": str(self._path(case, "checkpoint")), "experts": experts, "compiled": compiled, "batches": batches,
                "prefill": [512] if compiled else self._prefill(case), "prompt": case.shape.prompt, "new": 16,
            }  # fmt: skip
            try:
                row = in_process(TRANSFORMERS, **task)
            except PeerFailed as failure:
                self._note(f"{case.label}: {side} failed: {failure}")
                continue
            self._say(figures.add(side, row))

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._say(text)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def machine(llama: LlamaCpp | None) -> dict[str, Any]:
    """Return what the figures were taken with."""
    from importlib.metadata import version

    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "date": date.today().isoformat(), "processor": processor or platform.processor(), "cores": os.cpu_count(), "threads": THREADS,
        "torch": version("torch"), "transformers": version("transformers"), "llama.cpp": llama.version if llama else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=Path, help="folder for models; made if it is not there")
    parser.add_argument("--llama", type=Path, help="folder with llama-bench and llama-batched-bench; without it llama.cpp is left out")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES), help=f"of {','.join(SHAPES)}")
    parser.add_argument(
        "--widths", type=lambda text: text.split(","), default=list(SCHEMES), help=f"of the weights, of {','.join(SCHEMES)}"
    )
    parser.add_argument("--quick", action="store_true", help="batch 1 and 8, prompts of 512, depth 8K, lite in 4.5 bits only")
    parser.add_argument("--keep", action="store_true", help="leave the models there, and use those that are")
    parser.add_argument("--json", type=Path, help="write all figures there, after every case")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(do_task(json.loads(arguments.task))))
        return
    if arguments.at is None:
        parser.error("--at names the folder for models")
    if unknown := (set(arguments.shapes) - set(SHAPES)) | (set(arguments.widths) - set(SCHEMES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; shapes: {', '.join(SHAPES)}; widths: {', '.join(SCHEMES)}")
    arguments.at.mkdir(parents=True, exist_ok=True)
    llama = LlamaCpp(arguments.llama, THREADS) if arguments.llama else None
    cases = plan(arguments)
    show_plan(cases, quick=arguments.quick)
    measure_all(arguments, cases, llama)


def measure_all(arguments: argparse.Namespace, cases: list[Case], llama: LlamaCpp | None) -> None:
    began, run = time.monotonic(), Run(arguments, llama)
    results: dict[str, Any] = {"machine": machine(llama), "quick": arguments.quick}
    run.make_tokenizer()
    found: dict[str, Figures] = {}
    for case in cases:
        found[case.label] = run.measure(case)
        bars = judge(found)
        results |= {"minutes": (time.monotonic() - began) / 60, "notes": run.notes, "bars": [vars(bar) for bar in bars]}
        results["cases"] = {label: figures.rows for label, figures in found.items()}
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    for figures in found.values():
        show_case(figures)
    show_memory(list(found.values()))
    show_bars(bars)
    print("\n" + "\n".join(run.notes))
    print(f"{results['minutes']:.0f} minutes")


if __name__ == "__main__":
    main()
