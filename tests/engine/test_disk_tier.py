"""Blocks on disk: found again as they were or not at all, whatever happens to the files; and the engine above them."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.engine.engine import Engine
from dsv2.engine.request import Request, SamplingParams
from dsv2.engine.tier import DiskTier
from dsv2.errors import ConfigError
from dsv2.model.config import ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

LAYERS, LAYER_BYTES, BLOCKS = 3, 100, 8
FILE_BYTES = 48 + LAYERS * LAYER_BYTES
KEYS = [bytes([number]) * 32 for number in range(40)]
OURS, OTHERS = "a1" * 32, "b2" * 32


class Memory:
    """Blocks of bytes, as a latent store has them."""

    def __init__(self) -> None:
        self.bytes = bytearray(LAYERS * BLOCKS * LAYER_BYTES)

    def views(self, block: int) -> list[memoryview]:
        starts = [(layer * BLOCKS + block) * LAYER_BYTES for layer in range(LAYERS)]
        return [memoryview(self.bytes)[start : start + LAYER_BYTES] for start in starts]

    def fill(self, block: int, seed: int) -> None:
        for layer, view in enumerate(self.views(block)):
            view[:] = bytes((seed * 31 + layer * 7 + place) % 256 for place in range(LAYER_BYTES))

    def holds(self, block: int, seed: int) -> bool:
        twin = Memory()
        twin.fill(block, seed)
        return twin.views(block) == self.views(block)


def tier(folder: Path, memory: Memory, *, blocks: int = 100, made_by: str | None = OURS) -> DiskTier:
    return DiskTier(folder, blocks * FILE_BYTES, memory.views, made_by)


def put(where: DiskTier, memory: Memory, *numbers: int) -> None:
    for number in numbers:
        memory.fill(0, number)
        where.store(KEYS[number], 0)


def get(where: DiskTier, memory: Memory, number: int) -> bool:
    """Load a block into another place; check what came."""
    memory.fill(3, 255)
    found = where.has(KEYS[number]) and where.load(KEYS[number], 3)
    assert not found or memory.holds(3, number)
    return found


def file_of(folder: Path, number: int, made_by: str = OURS) -> Path:
    return folder / made_by / f"{KEYS[number].hex()}.latents"


def total(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_what_was_stored_is_found_by_who_computes_the_same(tmp_path: Path) -> None:
    memory = Memory()
    put(tier(tmp_path / "new" / "cache", memory), memory, 1, 2)
    again = tier(tmp_path / "new" / "cache", memory)
    assert get(again, memory, 1) and get(again, memory, 2) and not get(again, memory, 3)
    assert not get(tier(tmp_path / "new" / "cache", memory, made_by=OTHERS), memory, 1)
    assert file_of(tmp_path / "new" / "cache", 1).stat().st_mode & 0o077 == 0  # latents tell what was asked


def test_weights_without_a_name_leave_nothing_behind(tmp_path: Path) -> None:
    memory = Memory()
    one, two = tier(tmp_path, memory, made_by=None), tier(tmp_path, memory, made_by=None)
    put(one, memory, 1)
    assert get(one, memory, 1) and not get(two, memory, 1)
    one.clear()
    assert not get(one, memory, 1) and total(tmp_path) == 0
    put(one, memory, 2)
    one.close(lambda: pytest.fail("nobody could find it"))
    assert list(tmp_path.iterdir()) == []


def test_changed_weights_find_nothing_but_leave_others_theirs(tmp_path: Path) -> None:
    memory = Memory()
    one, two = tier(tmp_path, memory), tier(tmp_path, memory)
    put(one, memory, 1)
    one.clear()
    assert not get(one, memory, 1) and get(two, memory, 1)
    put(one, memory, 2)
    assert get(one, memory, 2) and not get(two, memory, 2)


def cut(file: Path, at: int, _: bytes) -> None:
    os.truncate(file, at % FILE_BYTES)


def flip(file: Path, at: int, _: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[at // 8 % FILE_BYTES] ^= 1 << at % 8
    file.write_bytes(data)


def replace(file: Path, _: int, data: bytes) -> None:
    file.write_bytes(data)


def pad(file: Path, at: int, data: bytes) -> None:
    file.write_bytes(file.read_bytes() + data[: 1 + at % 9])


def exchange(file: Path, *_: object) -> None:
    file.write_bytes((file.parent / f"{KEYS[2].hex()}.latents").read_bytes())


def adopt(file: Path, *_: object) -> None:
    file.write_bytes((file.parents[1] / OTHERS / file.name).read_bytes())


def link(file: Path, *_: object) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to(file.with_name("moved"))


def pipe(file: Path, *_: object) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path, *_: object) -> None:
    file.unlink()
    file.mkdir()


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([cut, flip, replace, pad, exchange, adopt, link, pipe, folder]),
    st.integers(0, 8 * FILE_BYTES - 1),
    st.binary(min_size=1, max_size=2 * FILE_BYTES) | st.binary(min_size=FILE_BYTES, max_size=FILE_BYTES),
)
def test_damage_is_a_block_that_is_not_there(
    tmp_path_factory: pytest.TempPathFactory, damage: Callable[[Path, int, bytes], None], at: int, data: bytes
) -> None:
    where, memory = tmp_path_factory.mktemp("cache"), Memory()
    used = tier(where, memory)
    put(used, memory, 1, 2)
    put(tier(where, memory, made_by=OTHERS), memory, 1)
    damage(file_of(where, 1), at, data)
    assert not used.load(KEYS[1], 3) and not get(used, memory, 1)
    put(used, memory, 1)  # no exception, and computed anew it may be stored again
    assert get(used, memory, 1) or damage is folder
    assert get(used, memory, 2)


def test_the_limit_holds_and_what_was_unused_for_longest_goes(tmp_path: Path) -> None:
    memory = Memory()
    used = tier(tmp_path, memory, blocks=4)
    put(used, memory, 1, 2, 3, 4)
    assert get(used, memory, 1)
    put(used, memory, 2)  # there already: it counts as used, and is not written
    put(used, memory, 5)
    assert [number for number in range(1, 6) if used.has(KEYS[number])] == [1, 2, 4, 5]
    put(tier(tmp_path, memory, blocks=4, made_by=OTHERS), memory, 6, 7)  # another model's blocks count, too
    assert total(tmp_path) == 4 * FILE_BYTES
    assert [number for number in range(1, 6) if used.has(KEYS[number])] == [2, 5]


def test_the_end_of_a_prefix_goes_before_its_beginning(tmp_path: Path) -> None:
    memory = Memory()
    used = tier(tmp_path, memory, blocks=5)
    put(used, memory, 13, 12, 11, 1, 2)
    for number in (11, 12, 13):  # read as a prefix is
        assert get(used, memory, number)
    put(used, memory, 3, 4, 5)
    assert [number for number in (1, 2, 11, 12, 13) if used.has(KEYS[number])] == [11, 12]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 39)), max_size=60))
def test_any_use_keeps_to_the_limit(tmp_path_factory: pytest.TempPathFactory, blocks: int, uses: list[tuple[bool, int]]) -> None:
    where, memory = tmp_path_factory.mktemp("cache"), Memory()
    used = tier(where, memory, blocks=blocks)
    for storing, number in uses:
        if storing:
            put(used, memory, number)
            assert get(used, memory, number)
        else:
            get(used, memory, number)
        assert total(where) <= blocks * FILE_BYTES


def test_a_full_disk_ends_storing_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = Memory()
    used = tier(tmp_path, memory)
    put(used, memory, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, limits[1]))  # a write in the middle of a file fails
    try:
        put(used, memory, 2, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert get(used, memory, 1) and not get(used, memory, 2) and total(tmp_path) == FILE_BYTES
    said = capsys.readouterr().err
    assert said.count("takes no more blocks") == 1 and str(tmp_path) in said.replace("\n", "")


def test_a_folder_that_vanishes_or_becomes_a_file_stops_nothing(tmp_path: Path) -> None:
    memory = Memory()
    used = tier(tmp_path / "cache", memory)
    put(used, memory, 1)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert not get(used, memory, 1)
    put(used, memory, 2)
    (tmp_path / "cache").write_text("a file")
    put(used, memory, 3)
    assert not get(used, memory, 3)
    used.clear()


def test_only_files_of_the_tier_are_ever_removed(tmp_path: Path) -> None:
    memory = Memory()
    foreign = [tmp_path / "thesis.latents", tmp_path / OURS / "notes.txt", tmp_path / "c3" / f"{KEYS[1].hex()}.latents"]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(9 * FILE_BYTES))
        os.utime(file, (0, 0))
    unfinished = file_of(tmp_path, 1).with_name(f".{KEYS[1].hex()}.latents.x1y2.tmp")
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (0, 0))
    used = tier(tmp_path, memory, blocks=2)
    put(used, memory, 1, 2, 3, 4)
    assert all(file.exists() for file in foreign) and not unfinished.exists()
    assert get(used, memory, 4)


def test_what_cannot_be_a_tier_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        tier(tmp_path / "file" / "cache", Memory())
    with pytest.raises(ConfigError, match="not even one block"):
        DiskTier(tmp_path, FILE_BYTES - 1, Memory().views, OURS)


WORKER = """
import random, sys
sys.path.insert(0, sys.argv[1])
from test_disk_tier import *
memory, chance = Memory(), random.Random(int(sys.argv[3]))
used = tier(Path(sys.argv[2]), memory, blocks=16)
hits = 0
for _ in range(600):
    number = chance.randrange(40)
    if get(used, memory, number):
        hits += 1
    else:
        put(used, memory, number)
assert used._storing
print(hits)
"""


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path)]
    workers = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(3)]
    hits = [int(worker.communicate()[0]) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers) and min(hits) > 50
    assert total(tmp_path) <= (16 + 2) * FILE_BYTES  # two of three may each have written one unseen


# The engine above it -----------------------------------------------------------------------------------------------------------------

PROMPT = tuple((7 * place * place + 3 * place) % 300 for place in range(700))


@pytest.fixture(scope="module")
def long_model(small_config: Callable[..., ModelConfig]) -> Transformer:
    model = Transformer(small_config(max_position_embeddings=1024))
    initialise(model, seed=5)
    return model


def ask(name: str = "r", length: int = 600, **fields: Any) -> Request:
    return Request(name, PROMPT[:length], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2), **fields)


def latents(engine: Engine) -> dict[bytes, bytes]:
    """Return the published blocks by key."""
    return {key: b"".join(engine._stack.views(block)) for key, block in engine._scheduler.pool._index.items()}


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("cache", ["fp32", "8"])
def test_a_later_engine_finds_the_same_latents_and_says_the_same(
    long_model: Transformer, tokenizer: Tokenizer, tmp_path: Path, backend: Any, cache: Any
) -> None:
    given: dict[str, Any] = {"backend": backend, "cache": cache, "disk_cache": tmp_path, "weights_id": "w"}
    engine = Engine(long_model, tokenizer, **given)
    (truth,), computed = engine.generate([ask()]), latents(engine)
    engine.close()
    again = Engine(long_model, tokenizer, **given)
    (output,) = again.generate([ask()])
    assert (truth.cached_tokens, output.cached_tokens) == (0, 576)
    assert output.tokens == truth.tokens and output.logprobs is not None and truth.logprobs is not None
    # in torch the rounding of the last tokens of the prompt varies with how many are computed at once
    if backend == "native":
        assert output.logprobs == truth.logprobs
    else:
        assert [entry.logprob for entry in output.logprobs] == pytest.approx([entry.logprob for entry in truth.logprobs], abs=1e-4)
    assert latents(again) == computed and len(computed) == 9
    for other in ({"weights_id": "v"}, {"cache": "bf16"}, {"backend": {"native": "torch", "torch": "native"}[backend]}):
        (output,) = Engine(long_model, tokenizer, **given | other).generate([ask()])
        assert output.cached_tokens == 0


def test_what_a_small_cache_loses_comes_back_from_disk(long_model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    gb = 641 * long_model.config.num_hidden_layers * 32 * 4 / 1e9  # one long request
    engine = Engine(long_model, tokenizer, cache_gb=gb, disk_cache=tmp_path)
    alone = [Engine(long_model, tokenizer, reuse=False).generate([ask(length=length)])[0] for length in (600, 590)]
    other = Request("o", PROMPT[::-1][:600], SamplingParams(max_tokens=2))
    for hit, length in ((0, 0), (576, 0), (576, 1)):
        (output,) = engine.generate([ask(length=(600, 590)[length])])
        assert output.cached_tokens == hit and (output.tokens, output.logprobs) == (alone[length].tokens, alone[length].logprobs)
        engine.generate([other])  # takes nearly all blocks
        engine._scheduler.check()
    (output,) = engine.generate([ask(cache_salt="somebody else's")])
    assert output.cached_tokens == 0
    engine.weights_changed()
    assert engine.generate([ask()])[0].cached_tokens == 0
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_recorded_experts_are_whole_in_a_later_engine(long_model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shapes = []
    for _ in range(2):
        engine = Engine(long_model, tokenizer, disk_cache=tmp_path, weights_id="w")
        (output,) = engine.generate([ask(record_experts=True)])
        assert output.experts is not None
        shapes.append(output.experts.shape)
        engine.close()
    assert shapes == [(607, 2, 2)] * 2


def test_a_damaged_folder_changes_no_text(long_model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(long_model, tokenizer, disk_cache=tmp_path, weights_id="w")
    (truth,) = engine.generate([ask()])
    engine.close()
    files = sorted(tmp_path.rglob("*.latents"), key=lambda file: file.stat().st_mtime_ns)
    flip(files[3], 12345, b"")  # the fourth from the end of nine
    again = Engine(long_model, tokenizer, disk_cache=tmp_path, weights_id="w")
    (output,) = again.generate([ask()])
    assert output.cached_tokens == 5 * 64 and output.tokens == truth.tokens


def test_a_disk_cache_that_could_not_be_used_is_refused(long_model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for options, says in (({"reuse": False}, "reuse"), ({"disk_cache_gb": 0}, "> 0"), ({"disk_cache_gb": 1e-6}, "not even one block")):
        with pytest.raises(ConfigError, match=says):
            Engine(long_model, tokenizer, disk_cache=tmp_path, **options)  # type: ignore[arg-type]
