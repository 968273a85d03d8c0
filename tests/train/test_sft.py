"""Fine-tuning: packed samples give the losses that they give alone and no gradient to each other; a stopped run resumes bit for bit."""

import json

import pytest
import torch
from sft_runs import RECIPE, make_chats, make_start, run_sft, sft_recipe
from training_runs import require_equal, stopping_after

from dsv2.checkpoint.huggingface import load_model
from dsv2.checkpoint.layout import ADAPTER
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.cli import main
from dsv2.config import load_recipe
from dsv2.data.batch import collate
from dsv2.data.conversation_rows import ConversationRows
from dsv2.data.packing import IGNORE
from dsv2.errors import ConfigError, DataError
from dsv2.metrics import read_metrics
from dsv2.samples import answer_sampler
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.losses import token_nll
from dsv2.train.sft_data import open_conversations
from dsv2.train.sft_recipe import SftRecipe
from dsv2.train.start import open_start

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("start") / "model", corpus.tokenizer)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return make_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def packed(start, chats):
    """A model, a row of at least three samples, and its rows."""
    recipe, opened = open_start(sft_recipe(start))
    rows = open_conversations(recipe, opened.tokenizer, [chats]).rows
    index = max(range(len(rows)), key=lambda n: len(rows.members(n)))
    assert len(rows.members(index)) >= 3
    return load_model(start), rows, index


def test_a_packed_sample_has_the_loss_that_it_has_alone(packed):
    model, rows, index = packed
    batch = collate([rows.row(index)])
    hidden = model(batch.tokens, batch.positions, batch.document_ids).hidden
    for number, sample in enumerate(rows.members(index)):
        own = batch.labels.where(batch.document_ids == number, IGNORE)
        inside = token_nll(model, hidden, own) / (own != IGNORE).sum()
        ids, learn = torch.from_numpy(rows.samples.tokens[sample]).long()[None], torch.from_numpy(rows.samples.learn[sample])[None]
        logits = model.logits(model(ids[:, :-1]).hidden)
        alone = torch.nn.functional.cross_entropy(logits[learn[:, 1:]], ids[:, 1:][learn[:, 1:]])
        assert inside.item() == pytest.approx(alone.item(), abs=1e-5)


def test_no_gradient_flows_from_one_sample_to_another(packed):
    model, rows, index = packed
    batch = collate([rows.row(index)])
    embedded = model.model.embed_tokens(batch.tokens).detach().requires_grad_()
    real = torch.nn.functional.embedding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", lambda ids, table: embedded if ids is batch.tokens else real(ids, table))
        hidden = model(batch.tokens, batch.positions, batch.document_ids).hidden
    token_nll(model, hidden, batch.labels.where(batch.document_ids == 1, IGNORE)).backward()
    reached = embedded.grad.abs().sum(-1) > 0
    assert reached[batch.document_ids == 1].any()
    assert not reached[batch.document_ids != 1].any()


def test_the_mean_over_a_batch_is_of_the_assistants_tokens(packed, tmp_path):
    model, rows, _ = packed
    whole = collate([rows.row(index) for index in range(len(rows))])
    assert whole.num_labels == rows.samples.num_labels
    nll = token_nll(model, model(whole.tokens, whole.positions, whole.document_ids).hidden, whole.labels).item()
    unpacked = 0.0
    for ids, learn in zip(rows.samples.tokens, rows.samples.learn, strict=True):
        tokens, answered = torch.from_numpy(ids).long(), torch.from_numpy(learn)[1:]
        logits = model.logits(model(tokens[None, :-1]).hidden)[0]
        unpacked += torch.nn.functional.cross_entropy(logits[answered], tokens[1:][answered], reduction="sum").item()
    assert nll / rows.samples.num_labels == pytest.approx(unpacked / rows.samples.num_labels, abs=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_stopped_and_resumed_is_undisturbed(start, chats, tmp_path, monkeypatch, lora):
    recipe = sft_recipe(start, **({"lora": lora} if lora else {}))
    run_sft(recipe, chats, tmp_path / "peace")
    with stopping_after(5, monkeypatch):
        run_sft(recipe, chats, tmp_path / "stopped")
    run_sft(recipe, chats, tmp_path / "stopped")
    require_equal(tmp_path / "stopped", tmp_path / "peace")
    assert (latest_checkpoint(tmp_path / "peace") / ADAPTER).exists() == (lora is not None)


def test_it_learns_validates_and_answers(start, chats, tmp_path):
    recipe, opened = open_start(sft_recipe(start, run={"epochs": 4}, samples={"prompts": ["river"], "max_tokens": 8}))
    run_sft(recipe, chats, tmp_path, sample=answer_sampler(recipe, 64, opened.tokenizer))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    held = [line for line in lines if line["kind"] == "validation"]
    assert held[-1]["loss"]["chats"] < held[0]["loss"]["chats"]
    assert [line["prompt"] for line in lines if line["kind"] == "sample"][0] == "river"


def test_held_out_conversations_are_not_trained_on(start, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*turns, {"role": "user", "content": str(n)}, {"role": "assistant", "content": "c"}]} for n in range(50)]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    recipe, opened = open_start(sft_recipe(start, data={"validation_share": 0.3}))
    data = open_conversations(recipe, opened.tokenizer, [tmp_path / "twice.jsonl"])

    def texts(rows: ConversationRows) -> set[bytes]:
        return {tokens.tobytes() for tokens in rows.samples.tokens}

    held = texts(data.held_out["twice"].rows)
    assert 5 <= len(held) <= 25
    assert not held & texts(data.rows)
    assert len(held | texts(data.rows)) == 50


def test_documents_that_are_too_long_are_no_refused_conversations(start, chats, tmp_path):
    for name, text in (("long", "def f(x): return x\n" * 200), ("short", "a = 1\n")):
        for number in range(30):
            (tmp_path / f"{name}-{number}.txt").write_text(f"{number}\n{text}")
    recipe, opened = open_start(sft_recipe(start, data={"fim_share": 0.2, "too_long": "cut"}))
    data = open_conversations(recipe, opened.tokenizer, [chats], fim_documents=[tmp_path])
    assert data.fim.used == round(0.2 * len(data.rows.samples)) and data.fim.too_long > 4  # 5 % of the conversations
    assert not data.reports["training"].refused


def test_validation_that_is_too_long_says_so_and_a_share_of_it_is_left_out(start, chats, tmp_path):
    long = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "b"}]
    long.write_text("".join(json.dumps({"messages": [{"role": "user", "content": str(n)}, *turns]}) + "\n" for n in range(50)))
    recipe, opened = open_start(sft_recipe(start, data={"too_long": "refuse", "validation_share": 0.2, "max_refused": 1}))
    assert list(open_conversations(recipe, opened.tokenizer, [chats, long]).held_out) == ["chats"]
    with pytest.raises(DataError, match="no conversation is left to validate on: .*longer than a row of 48 tokens"):
        open_conversations(recipe, opened.tokenizer, [chats], validation=[long])


def test_what_does_not_fit_is_said_before_anything_is_written(start, chats, tmp_path):
    with pytest.raises(ConfigError, match="run.seq_len = 128 exceeds the model's context of 64"):
        open_start(sft_recipe(start, run={"seq_len": 128}))
    with pytest.raises(ConfigError, match="a batch takes 512"):
        run_sft(sft_recipe(start, batch={"sequences": 512, "micro_sequences": 2}), chats, tmp_path / "run")
    with pytest.raises(ConfigError, match="'mlp.nothing' names no matrix"):
        run_sft(sft_recipe(start, lora={"rank": 2, "alpha": 2, "targets": ["mlp.nothing"]}), chats, tmp_path / "run")
    (tmp_path / "bad.jsonl").write_text(chats.read_text() + '{"text": "a"}\n' * 20)
    with pytest.raises(DataError, match=r"20 of 100 training rows are refused, more than data.max_refused = 0.05"):
        run_sft(sft_recipe(start), tmp_path / "bad.jsonl", tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_other_conversations_or_another_start_are_refused_on_resuming(corpus, start, chats, tmp_path):
    recipe = sft_recipe(start, run={"epochs": 0.5})
    run_sft(recipe, chats, tmp_path / "run")
    with pytest.raises(ConfigError, match="began with other data"):
        run_sft(recipe, make_chats(tmp_path / "more.jsonl", 81), tmp_path / "run")
    with pytest.raises(ConfigError, match="another recipe; different: model.start"):
        run_sft(sft_recipe(make_start(tmp_path / "other", corpus.tokenizer, 1), run={"epochs": 0.5}), chats, tmp_path / "run")


def test_a_recipe_without_a_length_has_the_models(start, chats, tmp_path):
    _, data = run_sft(sft_recipe(start, run={"seq_len": 0, "epochs": 0.5}), chats, tmp_path)
    assert data.rows.seq_len == 64
    assert load_recipe(str(tmp_path / "recipe.toml"), SftRecipe, folder="sft").run.seq_len == 64


def test_the_command_takes_a_model_or_a_recipe(start, chats, tmp_path, capsys):
    small = ["batch.sequences=4", "batch.micro_sequences=2", "run.epochs=0.5", "samples.prompts=[]", "run.precision=fp32"]
    small += ["data.template=v2", "data.too_long=cut"]
    given = ["--data", str(chats), "--out", str(tmp_path / "run")]
    assert main(["sft", str(start), *small, *given]) == 0
    assert "conversations: 80 as messages" in capsys.readouterr().err
    assert main(["sft", str(start), *small, *given]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["sft", str(start), *small, *given, "--resume"]) == 0
    resolved = load_recipe(str(tmp_path / "run" / "recipe.toml"), SftRecipe, folder="sft")
    assert resolved.run.seq_len == 64, "the model's context"
    assert Tokenizer.load(latest_checkpoint(tmp_path / "run")).template == "v2", "what it was trained with is what a chat reads"
    assert main(["sft", "tuor", *given]) == 2
    assert "did you mean 'tour'" in capsys.readouterr().err
    assert main(["sft", "tour", "--data", str(chats), "--out", str(tmp_path / "new")]) == 2
    assert "model.start is empty" in capsys.readouterr().err


def test_balance_losses_are_off_unless_asked_for(start):
    assert RECIPE.get("balance") is None
    assert sft_recipe(start).balance.expert == 0
    assert sft_recipe(start, balance={"scope": "micro-batch"}).balance.expert == 0
