"""Validation counts which experts each domain's held-out tokens went to."""

from collections import Counter

import pytest
import torch
from training_runs import recipe

from dsv2.data.packing import IGNORE, Rows
from dsv2.metrics import read_metrics
from dsv2.model.transformer import Transformer
from dsv2.train.pretrain import checked_config, pretrain
from dsv2.train.start import begin_weights
from dsv2.train.validation import validate

pytestmark = pytest.mark.usefixtures("two_threads")


def test_counts_are_those_of_a_plain_loop_over_scored_tokens(corpus):
    config = checked_config(recipe(), corpus)
    model = Transformer(config)
    begin_weights(model, None, 0)
    counted = validate(model, corpus.validation, 32, batch_rows=3, autocast=None)
    for domain, result in counted.items():
        expected, rows = Counter(), Rows(corpus.validation, 32, domain)
        for row in (rows.row(index) for index in range(len(rows))):
            batch = [torch.from_numpy(values)[None] for values in (row.tokens, row.positions, row.document_ids)]
            with torch.no_grad():
                stats = model(*batch).router_stats[0]
            for chosen, label in zip(stats.experts[0].tolist(), row.labels.tolist(), strict=True):
                expected.update(chosen if label != IGNORE else [])
        assert result.assignments == (tuple(expected[expert] for expert in range(4)),)
        assert sum(result.assignments[0]) == result.num_labels * config.num_experts_per_tok
        assert sum(result.expert_shares[0]) == pytest.approx(1, abs=1e-4)


def test_a_run_writes_the_shares_and_the_time(corpus, tmp_path, capsys):
    pretrain(recipe(), corpus, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    times = {line["step"]: line["elapsed_s"] for line in lines if line["kind"] == "train"}
    validations = [line for line in lines if line["kind"] == "validation"]
    assert len(validations) >= 2
    for line in validations:
        assert {domain: [len(layer) for layer in layers] for domain, layers in line["experts"].items()} == {"a": [4], "b": [4]}
        assert line["elapsed_s"] == times[line["step"]]
    told = capsys.readouterr().err
    assert "bits per byte of held-out text: a " in told and "x mean" in told


def test_a_dense_model_has_no_experts_to_write(corpus, tmp_path):
    dense = recipe()
    overrides = {key: value for key, value in dense.model.overrides.items() if not key.startswith(("n_", "topk", "num_experts", "moe"))}
    parts = {"model": {"preset": "tour", "overrides": overrides | {"first_k_dense_replace": 2}}, "balance": {}}
    dense = type(dense).model_validate(dense.model_dump() | parts)
    pretrain(dense, corpus, tmp_path)
    assert all("experts" not in line and "router" not in line for line in read_metrics(tmp_path / "metrics.jsonl"))
