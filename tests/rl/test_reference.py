"""The frozen policy of the KL: its weights are the file's own pages, which the system may drop whenever it wants the room."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.rl.reference import Reference
from dsv2.rl.rollout import Rollout
from dsv2.rl.update import pad, without_graph

STATUS = Path("/proc/self/status")
SHAPE = {
    "vocab_size": 2**17, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "first_k_dense_replace": 1,
}  # fmt: skip


def resident() -> dict[str, int]:
    """Bytes of this process that lie in memory: its own (RssAnon), and pages of files (RssFile)."""
    rows = (line.split() for line in STATUS.read_text().splitlines() if line.startswith(("RssAnon", "RssFile")))
    return {name.rstrip(":"): 1024 * int(kib) for name, kib, _ in rows}


@pytest.mark.skipif(not STATUS.exists() or "RssAnon" not in STATUS.read_text(), reason="the system does not say what lies in memory")
def test_a_reference_takes_no_memory_that_the_system_cannot_take_back(tmp_path: Path) -> None:
    policy = Transformer(preset("nano", **SHAPE))
    initialise(policy, 0)
    head = policy.lm_head.weight.nbytes
    rollout = Rollout((1, 2, 3), (4, 5), (0.0, 0.0), (True, True), "", (0, 0), "length", 0, 0, {})
    pieces = pad([rollout], micro_tokens=100, replay=False)
    reference = Reference(tmp_path, policy)
    reference.keep(policy, 0)
    expected = without_graph(policy, pieces, nullcontext())
    before = resident()
    for _ in range(2):
        assert without_graph(reference.at(0), pieces, nullcontext())[0].equal(expected[0])
    grown = {name: value - before[name] for name, value in resident().items()}
    print(f"head {head / 1e6:.1f} MB; " + ", ".join(f"{name} {value / 1e6:+.1f} MB" for name, value in grown.items()))
    assert grown["RssFile"] > 0.9 * head, "it was read"
    assert grown["RssAnon"] < 0.1 * head
