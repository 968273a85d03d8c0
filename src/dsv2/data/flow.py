"""Documents through any number of processes to token shards: clean in parallel, decide duplicates in order, encode in parallel, write.

    read --> pieces --> clean (processes) --> decide (here, in order) --> encode (processes) --> shards (here, in order)

All four go on at once and a few pieces are on their way at any time, so that memory does not grow with the corpus but for the index of
duplicates. Only the order of the sources has a say in the result, not the number of processes.
"""

import hashlib
import json
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dsv2.data.contamination import Benchmarks, benchmark_files, benchmark_grams
from dsv2.data.decompress import import_extra
from dsv2.data.documents import Document, in_pieces
from dsv2.data.duplicates import PURPOSE, Index
from dsv2.data.pieces import Cleaned, Encoded, Job, Workbench
from dsv2.data.recipe import ContaminationRules, PrepareRecipe
from dsv2.data.shards import ShardWriter
from dsv2.data.tally import Tally
from dsv2.errors import DataError
from dsv2.files import atomic_file, atomic_write_json, disk_errors, sha256_of
from dsv2.progress import console

PIECE_CHARACTERS = 1 << 20
AHEAD = 3  # pieces on their way for each process and step

T = TypeVar("T")
R = TypeVar("R")
Run = Callable[[Callable[[Workbench, Any], Any], Iterable[Any]], Iterator[Any]]


def require_extras(recipe: PrepareRecipe) -> None:
    """Refuse to begin without the packages that the rules need.

    Raises:
        MissingExtra: one is not installed.
    """
    if recipe.duplicates.near:
        import_extra("datasketch", PURPOSE)
    if recipe.encoding.enabled:
        import_extra("ftfy", "mending broken encodings")
    if recipe.language.enabled:
        import_extra("py3langid", "telling languages")


def work_folder(out: Path) -> Path:
    """Return where finished pieces lie until ``out`` is written."""
    return out.with_name(f"{out.name}.work")


def hash_benchmarks(folder: Path, rules: ContaminationRules, work: Path) -> tuple[Path, str, dict[str, int]]:
    """Hash the grams of a folder of benchmarks into the work folder, unless they are there; warn when there is none.

    Returns:
        The file, its hash, and how many ``texts`` the benchmarks have and how many are ``too_short`` to be found.

    Raises:
        DataError: the folder holds no benchmark, or a damaged one.
    """
    files = benchmark_files(folder)
    key = hashlib.sha256(rules.model_dump_json().encode() + b"".join(bytes.fromhex(sha256_of(file)) for file in files)).hexdigest()
    path = work / f"benchmarks-{key[:40]}.npy"
    counts_path = path.with_suffix(".json")
    if not (path.is_file() and counts_path.is_file()):
        hashed = benchmark_grams(files, rules)
        with atomic_file(path, clear=False) as temporary:
            Benchmarks.of(hashed.grams).save(temporary)
        atomic_write_json(counts_path, {"texts": hashed.num_texts, "too_short": hashed.num_short})
    counts: dict[str, int] = json.loads(counts_path.read_text(encoding="utf-8"))
    if counts["texts"] == counts["too_short"]:
        wanted = f"{rules.words} words or {rules.ideographs} Han characters"
        warning = f"WARNING: {folder} keeps no document out: none of its {counts['texts']} texts holds a run of {wanted}"
        console().print(f"{warning}; contamination.words and contamination.ideographs set how many", markup=False, soft_wrap=True)
    return path, key, counts


def flow(documents: Iterable[Document], job: Job, writer: ShardWriter, tally: Tally, workers: int) -> None:
    """Write the documents that stay as shards, and count what happened.

    Args:
        documents: read once.
        job: rules, tokenizer, work folder.
        writer: entered already.
        tally: what is counted into.
        workers: processes beside this one; 1: this one alone.

    Raises:
        DataError: a process died.
    """
    index = Index(job.recipe.duplicates)
    decided: deque[tuple[Cleaned, list[bool]]] = deque()

    def decide(cleaned: Iterable[Cleaned]) -> Iterator[tuple[str, list[str], list[bool]]]:
        for piece in cleaned:
            with tally.timed("decide duplicates"):
                stays = _decide(piece, index, tally)
            decided.append((piece, stays))
            yield piece.key, [item.domain for item in piece.kept], stays

    with _workers(job, workers) as run:
        for encoded in run(_encode, decide(run(_clean, tally.watched(in_pieces(documents, PIECE_CHARACTERS))))):
            piece, stays = decided.popleft()
            with tally.timed("write shards"):
                _write(piece, stays, encoded, writer, tally)


def _clean(bench: Workbench, documents: list[Document]) -> Cleaned:
    return bench.clean(documents)


def _encode(bench: Workbench, piece: tuple[str, list[str], list[bool]]) -> Encoded:
    return bench.encode(*piece)


def _decide(piece: Cleaned, index: Index, tally: Tally) -> list[bool]:
    """Return which documents of a piece are no duplicates; the index and the tally learn of all."""
    tally.cleaned(piece)
    signatures = iter(piece.signatures)
    stays = []
    for item in piece.kept:
        drop = index.add(item.place, bytes.fromhex(item.digest), next(signatures) if item.signed else None)
        stays.append(drop is None)
        if drop is not None:
            tally.duplicate(item, drop)
    return stays


def _write(piece: Cleaned, stays: list[bool], encoded: Encoded, writer: ShardWriter, tally: Tally) -> None:
    documents = [item for item, stay in zip(piece.kept, stays, strict=True) if stay]
    ends = np.cumsum(encoded.lens, dtype=np.int64)
    for item, end, length in zip(documents, ends.tolist(), encoded.lens, strict=True):
        writer.add(item.domain, encoded.ids[end - length : end].astype(np.int64), item.num_bytes)
        tally.written(item, length)
    tally.encoded(encoded)


# Processes --------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _workers(job: Job, workers: int) -> Iterator[Run]:
    """Give a function that maps a step over pieces, in order, in other processes or in this one."""
    if workers == 1:
        bench = Workbench(job)
        yield lambda step, items: (step(bench, item) for item in items)
        return
    # Not fork: this process may have threads of a library, whose locks a child would inherit locked.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(job,)) as pool:
        try:
            yield lambda step, items: _ordered(pool, step, items, AHEAD * workers)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ordered(pool: ProcessPoolExecutor, step: Callable[[Workbench, T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield the results in the order of the items; a few items are taken ahead of the result that is asked for."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_do, step, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process ended by itself", hint="memory may be short: use fewer --workers, and run again") from error


_bench: Workbench | None = None


def _start(job: Job) -> None:
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _bench = Workbench(job)


def _do(step: Callable[[Workbench, T], R], item: T) -> R:
    assert _bench is not None
    return step(_bench, item)


@contextmanager
def working_in(out: Path) -> Iterator[Path]:
    """Give the work folder of ``out``, and remove it when the block ends well.

    Raises:
        DataError: it cannot be made.
    """
    work = work_folder(out)
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    yield work
    shutil.rmtree(work, ignore_errors=True)
