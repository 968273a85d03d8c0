"""Exported GGUF files under llama.cpp (llama-cpp-python), beside our own model: tokens of texts, logits, greedy answers.

llama.cpp runs in a process of its own, because what it does not like it ends with abort().
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv2.assets import corpus_path
from dsv2.checkpoint.gguf import export_gguf
from dsv2.checkpoint.gguf_metadata import notices
from dsv2.checkpoint.source import ModelSource
from dsv2.data.documents import read_documents
from dsv2.data.loader import Loader
from dsv2.data.packing import Rows
from dsv2.data.prepare import prepare
from dsv2.data.shards import TokenShards
from dsv2.model import router
from dsv2.model.config import ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.specials import ASSISTANT, MARKERS
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import train_tokenizer
from dsv2.train.losses import BalanceSection
from dsv2.train.optimizer import OptimizerSection, make_optimizer
from dsv2.train.step import train_step

if find_spec("gguf") is None or find_spec("llama_cpp") is None:
    pytest.skip("needs gguf and llama-cpp-python", allow_module_level=True)

NUM_NEW = 32
GAP = 1e-3  # between our two best logits, below which another choice is rounding
PROMPTS = ["The ", "def main():\n", "人民", "Once upon a time there was a king who had", "1 + 2 = 3, 10"]
TEXTS = [
    *PROMPTS,
    "It's 12345 tests, isn't it?  Two  blanks,\ttab.\n\n\nThree lines. ",
    "中文和English混排，标点。「引号」！",
    "for i in range(10):\n    x[i] += 0x1F  # ½ ² ٣ ３\r\n",
    "naïve café Ünïcödé Straße ΑΒΓ абв עברית العربية हिन्दी १२३ 한국어 ひらがな 🙂👍🏽",
    " \n trailing blanks   ",
    "a user writes <｜User｜> and <|EOT|> and [PAD1000]",
]

# A small program, so that the tests' process never loads llama.cpp: job on stdin, logits to a file, the rest to stdout.
WORKER = """
import json, sys
import numpy as np, llama_cpp

answers = []
for job in json.load(sys.stdin):
    try:
        llama = llama_cpp.Llama(
            job["file"], n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
        )
    except ValueError:  # not loaded
        np.savez(job["file"] + ".npz")
        answers.append({"sequences": [], "texts": [], "template": None})
        continue
    prompts = [llama.tokenize(text.encode(), add_bos=True, special=False) for text in job["prompts"]]
    rows, sequences = [], []
    for tokens in [*job["sequences"], *prompts]:
        llama.reset()
        llama.eval(tokens)
        for _ in range(0 if tokens in job["sequences"] else job["num_new"]):
            tokens = [*tokens, int(np.argmax(llama.scores[llama.n_tokens - 1]))]
            llama.eval(tokens[-1:])
        rows.append(llama.scores[: llama.n_tokens].copy())
        sequences.append(tokens)
    np.savez(job["file"] + ".npz", *rows)
    answers.append({
        "sequences": sequences, "texts": [llama.tokenize(text.encode(), add_bos=True, special=False) for text in job["texts"]],
        "template": llama.metadata.get("tokenizer.chat_template"),
    })
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    """What llama.cpp made of a file: each sequence with the logits after all of its tokens, and the ids of the texts."""

    sequences: list[list[int]]
    logits: list[np.ndarray]
    texts: list[list[int]]
    template: str | None


def under_llamacpp(jobs: list[dict[str, Any]]) -> list[Answer]:
    filled = [{"prompts": [], "sequences": [], "texts": [], "num_new": NUM_NEW} | job for job in jobs]
    done = subprocess.run([sys.executable, "-c", WORKER], input=json.dumps(filled), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = []
    for job, answer in zip(filled, json.loads(done.stdout), strict=True):
        with np.load(job["file"] + ".npz") as rows:
            answers.append(Answer(answer["sequences"], list(rows.values()), answer["texts"], answer["template"]))
    return answers


# Models -----------------------------------------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "max_position_embeddings": 256,
}  # fmt: skip
# As V2: compressed queries, scaled gates, YaRN that prompts and answers outgrow. Two groups of four hold the two best experts of any
# token, so that device-limited routing, which llama.cpp does otherwise, changes nothing.
YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 32, "mscale": 0.707, "mscale_all_dim": 0.707}
V2 = SHAPE | {
    "q_lora_rank": 48, "num_hidden_layers": 4, "rope_scaling": YARN, "routed_scaling_factor": 4.0, "initializer_range": 0.08,
    "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
}  # fmt: skip
# As V2-Lite: no query compression, which llama.cpp takes at 26 layers.
LITE = SHAPE | {"num_hidden_layers": 26, "n_routed_experts": 4, "initializer_range": 0.08}
# Not trained: the rest of what a config can say.
RANDOM = {
    "v2.5": V2 | {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "factor-one": V2 | {"rope_scaling": {**YARN, "factor": 1}},
    "gates-sum-to-one": V2 | {"norm_topk_prob": True},
    "dense": V2 | {"n_routed_experts": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "two-dense-layers": V2 | {"first_k_dense_replace": 2},
    "no-dense-layer": V2 | {"first_k_dense_replace": 0},
    "tied-head": V2 | {"tie_word_embeddings": True},
    "odd-widths": V2 | {"hidden_size": 50, "moe_intermediate_size": 20, "v_head_dim": 10, "kv_lora_rank": 24, "qk_nope_head_dim": 12},
    "other-base": V2 | {"rope_theta": 500.0, "n_shared_experts": 1},
    "lite": LITE | {"initializer_range": 0.05},
    "lite-yarn": LITE | {"rope_scaling": YARN, "num_hidden_layers": 27},
    "refused-lite": LITE | {"num_hidden_layers": 4},
    "refused-v2": V2 | {"num_hidden_layers": 27},
    "limited": V2 | {"topk_group": 1, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    documents = islice(read_documents([corpus_path("validation")]), 0, None, 4)
    return train_tokenizer((document.text for document in documents), vocab_size=SHAPE["vocab_size"])


def model_of(fields: Mapping[str, Any], tokenizer: Tokenizer) -> Transformer:
    model = Transformer(ModelConfig.from_dict({**fields, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}))
    initialise(model, seed=1)
    return model.eval()


@dataclass(frozen=True)
class Trained:
    """A model after some steps on the shipped text, enough for decided answers, and what llama.cpp says of its exports, by kind."""

    model: Transformer
    answers: dict[str, Answer]


def train(model: Transformer, loader: Loader, steps: int) -> None:
    with torch.no_grad():  # so that 26 layers learn as fast as 4
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.mul_(0.1)
    optimizer = make_optimizer(model.train(), OptimizerSection())
    for step in range(steps):
        rate = 2e-3 * min(1.0, (step + 1) / 20)
        batch = loader.batch(step * 8, 8)
        result = train_step(model, optimizer, [batch], lr=rate, clip_norm=1.0, balance=BalanceSection(), autocast=None)
    assert result.loss < 5.3  # knowing only how frequent tokens are gives 5.4
    model.eval()


@pytest.fixture(scope="module")
def trained(folder: Path, tokenizer: Tokenizer) -> Callable[[str], Trained]:
    """Return a function that gives the model of a shape, made on first use."""

    @cache
    def make(name: str) -> Trained:
        prepare(read_documents([corpus_path("validation")]), tokenizer, folder / f"{name}-text")
        model = model_of({"v2": V2, "lite": LITE}[name], tokenizer)
        train(model, Loader(Rows(TokenShards.open(folder / f"{name}-text"), 96), seed=0), steps=80)
        files = {kind: folder / f"{name}-{kind}.gguf" for kind in ("f32", "bf16", "q8_0", "q4_0")}
        for kind, file in files.items():
            export_gguf(ModelSource(model), file, kind=kind, tokenizer=tokenizer, name=name)
        found = under_llamacpp([{"file": str(file), "prompts": PROMPTS, "texts": TEXTS} for file in files.values()])
        return Trained(model, dict(zip(files, found, strict=True)))

    return make


@pytest.fixture(scope="module")
def answers(folder: Path, tokenizer: Tokenizer) -> dict[str, Answer]:
    """What llama.cpp makes of random tokens, for every shape of RANDOM."""
    jobs = []
    for name, fields in RANDOM.items():
        export_gguf(ModelSource(model_of(fields, tokenizer)), folder / f"{name}.gguf", kind="f32", tokenizer=None, name=name)
        jobs.append({"file": str(folder / f"{name}.gguf"), "sequences": [random_tokens()]})
    return dict(zip(RANDOM, under_llamacpp(jobs), strict=True))


def random_tokens() -> list[int]:
    return torch.randint(SHAPE["vocab_size"], (90,), generator=torch.Generator().manual_seed(5)).tolist()


@torch.no_grad()
def our_logits(model: Transformer, tokens: list[int]) -> np.ndarray:
    return model.logits(model(torch.tensor([tokens])).hidden)[0].numpy()


# Tests ------------------------------------------------------------------------------------------------------------------------------


# Without q_lora_rank llama.cpp wants 26 layers, whose training takes its time.
TRAINED = pytest.mark.parametrize("name", ["v2", pytest.param("lite", marks=pytest.mark.slow)])


def test_texts_have_the_same_ids(trained, tokenizer):
    assert trained("v2").answers["f32"].texts == [tokenizer.encode(text) for text in TEXTS]


def test_a_text_never_holds_a_marker(trained, tokenizer):
    markers = {tokenizer.special_ids[marker] for marker in MARKERS}
    assert not any(set(ids[1:]) & markers for ids in trained("v2").answers["f32"].texts)


def test_the_chat_template_arrives(trained):
    template = trained("v2").answers["f32"].template
    assert template is not None and ASSISTANT in template


@TRAINED
def test_greedy_answers_are_ours(trained, tokenizer, name):
    model, found = trained(name).model, trained(name).answers["f32"]
    for prompt, sequence in zip(PROMPTS, found.sequences, strict=True):
        start = len(tokenizer.encode(prompt))
        assert sequence[:start] == tokenizer.encode(prompt) and len(sequence) == start + NUM_NEW
        # causal: the row after each token is what we would have said there, as long as all before are ours
        for place, row in enumerate(our_logits(model, sequence)[start - 1 : -1], start):
            if row.argmax() != sequence[place]:
                second, best = np.sort(row)[-2:]
                assert best - second <= GAP, f"after {tokenizer.decode(sequence[:place])!r}"
                break


@TRAINED
def test_logits_of_trained_models(trained, name):
    model, found = trained(name).model, trained(name).answers["f32"]
    pairs = zip(found.sequences, found.logits, strict=True)
    worst = max(np.abs(theirs - our_logits(model, tokens)).max() for tokens, theirs in pairs)
    print(f"\n{name}: largest difference of a logit {worst:.1e}")
    assert worst < 1e-4


@TRAINED
@pytest.mark.parametrize(("kind", "least"), [("bf16", 0.9), ("q8_0", 0.9), ("q4_0", 0.5)])
def test_smaller_kinds_mostly_agree(trained, name, kind, least):
    model, found = trained(name).model, trained(name).answers[kind]
    pairs = zip(found.sequences, found.logits, strict=True)
    same = np.concatenate([theirs.argmax(-1) == our_logits(model, tokens).argmax(-1) for tokens, theirs in pairs]).mean()
    print(f"\n{name} {kind}: {same:.3f} of the best tokens are the same")
    assert same > least


def top_two_of_each_group(affinity: torch.Tensor, n_group: int, topk_group: int) -> torch.Tensor:
    """V3's rule: a group is worth the sum of its two highest affinities."""
    worth = affinity.unflatten(-1, (n_group, -1)).topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(topk_group, dim=-1).indices, True)
    return affinity.masked_fill(~kept.repeat_interleave(affinity.shape[-1] // n_group, dim=-1), -torch.inf)


@pytest.mark.parametrize("name", [name for name in RANDOM if name.startswith("refused")])
def test_what_is_said_to_be_refused_is_refused(answers, name):
    (line,) = notices(ModelConfig.from_dict(RANDOM[name]), with_text=False)
    assert "llama.cpp will refuse this file" in line and answers[name].logits == []


@pytest.mark.parametrize("name", [name for name in RANDOM if not name.startswith("refused")])
def test_logits_of_every_feature(answers, tokenizer, monkeypatch, name):
    """At 90 positions, of which YaRN calls 32 the original context."""
    theirs = answers[name].logits[0]
    if name == "limited":  # what the exporter warns of
        assert np.abs(theirs - our_logits(model_of(RANDOM[name], tokenizer), random_tokens())).max() > 1e-2
        monkeypatch.setattr(router, "limit_groups", top_two_of_each_group)
    ours = our_logits(model_of(RANDOM[name], tokenizer), random_tokens())
    worst = np.abs(theirs - ours).max()
    print(f"\n{name}: largest difference of a logit {worst:.1e} of {np.abs(ours).max():.2f}")
    assert worst < 1e-4
