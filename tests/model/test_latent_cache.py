"""The two readings of MLA through the cache seam: whole = chunked = token by token, and what exactly is stored (P section 2.1)."""

import pytest
import torch

from reference import transformer
from reference.subject import ListCache, logits_in_chunks, our_model
from reference.tiny import CONFIGS, V2, random_state

TOKENS = torch.tensor([[0, 5, 17, 99, 5, 2, 64, 127, 3, 3], [1, 1, 80, 42, 7, 7, 9, 120, 0, 31]])
POSITIONS = torch.arange(4090, 4100).expand(2, -1)  # across the border of YaRN's original context


@pytest.mark.parametrize("name", ["lite", "v2", "v2.5", "unequal-mscale"])
@pytest.mark.parametrize("chunk_lens", [[10], [1] * 10, [4, 1, 1, 4], [7, 3], [2, 5, 1, 2]])
def test_any_chunking_gives_the_logits_of_the_whole(name, chunk_lens):
    config = CONFIGS[name]
    model = our_model(random_state(config), config)
    with torch.no_grad():
        whole = model.logits(model(TOKENS, positions=POSITIONS).hidden)
    chunked = logits_in_chunks(model, TOKENS, POSITIONS, chunk_lens, ListCache())
    assert torch.allclose(chunked, whole, rtol=0, atol=1e-10)


def test_token_by_token_in_float32_stays_within_1e_5():
    model = our_model(random_state(V2), V2, torch.float32)
    with torch.no_grad():
        whole = model.logits(model(TOKENS, positions=POSITIONS).hidden)
    chunked = logits_in_chunks(model, TOKENS, POSITIONS, [1] * 10, ListCache())
    assert torch.allclose(chunked, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lite", "v2", "large-eps"])
def test_cache_holds_the_normalised_latent_and_the_rotated_key_and_nothing_else(name):
    config = CONFIGS[name]
    state = random_state(config)
    cache = ListCache()
    logits_in_chunks(our_model(state, config), TOKENS, POSITIONS, [4, 1, 5], cache)
    assert sorted(cache.latents) == list(range(config["num_hidden_layers"]))
    numbers = sum(t.numel() for t in [*cache.latents.values(), *cache.k_ropes.values()])
    assert numbers == TOKENS.numel() * config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    for row in range(2):
        expected = transformer.forward(state, config, TOKENS[row].tolist(), POSITIONS[row].tolist())
        for layer in range(config["num_hidden_layers"]):
            assert torch.allclose(cache.latents[layer][row], expected.latents[layer], rtol=0, atol=1e-4)
            # fp32 angles at position 4100: 2.4e-4 rad.
            assert torch.allclose(cache.k_ropes[layer][row], expected.k_ropes[layer], rtol=0, atol=2e-3)


class RaggedCache(ListCache):
    """Rows of unequal length: row r has `old_lens[r]` real entries, then garbage, and its new entry right behind the real ones."""

    def __init__(self, rows, old_lens):
        super().__init__()
        self.old_lens = old_lens
        all_len = max(old_lens) + 1
        self.visible = torch.arange(all_len).expand(len(old_lens), 1, all_len) <= torch.tensor(old_lens).view(-1, 1, 1)
        for layer in rows[0].latents:
            self.latents[layer] = self._stack([row.latents[layer] for row in rows], all_len)
            self.k_ropes[layer] = self._stack([row.k_ropes[layer] for row in rows], all_len)

    @staticmethod
    def _stack(rows, all_len):
        stacked = torch.full((len(rows), all_len, rows[0].shape[-1]), 1e3, dtype=rows[0].dtype)
        for r, row in enumerate(rows):
            stacked[r, : row.shape[1]] = row[0]
        return stacked

    def append(self, layer, kv_latent, k_rope):
        for r, old_len in enumerate(self.old_lens):
            self.latents[layer][r, old_len] = kv_latent[r, 0]
            self.k_ropes[layer][r, old_len] = k_rope[r, 0]
        return self.latents[layer], self.k_ropes[layer]


def test_rows_of_unequal_length_decode_as_if_alone():
    model = our_model(random_state(V2), V2)
    old_lens = [2, 7, 4]
    prompts = [TOKENS[0, :n].unsqueeze(0) for n in old_lens]
    rows, alone = [ListCache() for _ in old_lens], []
    new = torch.tensor([[9], [10], [11]])
    for prompt, row in zip(prompts, rows, strict=True):
        logits_in_chunks(model, prompt, torch.arange(prompt.shape[1]).unsqueeze(0), [prompt.shape[1]], row)
    cache = RaggedCache(rows, old_lens)
    for r, row in enumerate(rows):
        alone.append(logits_in_chunks(model, new[r : r + 1], torch.tensor([[old_lens[r]]]), [1], row))
    with torch.no_grad():
        together = model.logits(model(new, positions=torch.tensor(old_lens).unsqueeze(1), cache=cache).hidden)
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-10)


def test_a_row_does_not_depend_on_its_neighbours():
    """Batched = alone: no token of one row may reach another, through attention or through the experts."""
    model = our_model(random_state(V2), V2)
    with torch.no_grad():
        both = model.logits(model(TOKENS).hidden)
        alone = model.logits(model(TOKENS[1:]).hidden)
    assert torch.allclose(both[1:], alone, rtol=0, atol=1e-12)
