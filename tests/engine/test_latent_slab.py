import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.engine.slab import LatentSlab
from dsv2.presets import preset

LAYERS, LATENT, ROPE = 2, 3, 2


def make(max_batch: int = 4, max_len: int = 700) -> LatentSlab:
    return LatentSlab(LAYERS, max_batch, max_len, LATENT, ROPE, torch.float32)


def new_entries(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, LATENT, generator=generator), torch.randn(batch, tokens, ROPE, generator=generator)


def test_a_token_takes_exactly_the_latent_and_the_rotary_key() -> None:
    config = preset("v2-lite")
    slab = LatentSlab(config.num_hidden_layers, 2, 512, config.kv_lora_rank, config.qk_rope_head_dim, torch.bfloat16)
    slab.reserve(2, 512)
    assert slab.entries.untyped_storage().nbytes() == 27 * (512 + 64) * 2 * (2 * 512)  # layers x numbers x bytes x tokens
    assert slab.bytes_per_token == 27 * (512 + 64) * 2


def test_memory_follows_need_up_to_the_limits() -> None:
    slab = make(max_batch=3, max_len=700)
    assert slab.entries.numel() == 0
    slab.reserve(1, 5)
    assert slab.entries.shape[1:3] == (1, 256)
    slab.reserve(3, 300)
    assert slab.entries.shape[1:3] == (3, 512)
    slab.reserve(2, 690)
    assert slab.entries.shape[1:3] == (3, 700)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_rows_give_back_what_was_appended(data: st.DataObject) -> None:
    """Any order of appends over neighbouring rows, moves and growth, against a list per row."""
    slab = make()
    kept: list[list[torch.Tensor]] = [[torch.zeros(0, LATENT + ROPE)] * LAYERS for _ in range(4)]
    for turn in range(data.draw(st.integers(1, 6))):
        first = data.draw(st.integers(0, 3))
        rows = range(first, data.draw(st.integers(first + 1, 4)))
        new_len = data.draw(st.sampled_from([1, 1, 2, 130]))
        starts = [len(kept[row][0]) for row in rows]
        if max(starts) + new_len > 700:
            continue
        slab.reserve(rows.stop, max(starts) + new_len)
        view = slab.view(rows, starts, new_len)
        for layer in range(LAYERS):
            latent, rope = new_entries(len(rows), new_len, seed=10 * turn + layer)
            all_latent, all_rope = view.append(layer, latent, rope)
            for i, row in enumerate(rows):
                kept[row][layer] = torch.cat((kept[row][layer], torch.cat((latent[i], rope[i]), dim=-1)))
                own = len(kept[row][layer])
                assert torch.equal(torch.cat((all_latent[i], all_rope[i]), dim=-1)[:own], kept[row][layer])
                assert all_latent.shape[1] == max(starts) + new_len
        seen = torch.tensor([[[entry <= start + s for entry in range(max(starts) + new_len)] for s in range(new_len)] for start in starts])
        alike = len(set(starts)) == 1
        assert (view.visible is None) == (alike and (starts[0] == 0 or new_len == 1))  # a mask costs time
        if view.visible is not None:
            assert torch.equal(view.visible, seen)
        else:  # what the shapes say: causal from empty rows, or everything
            assert torch.equal(seen, torch.ones_like(seen).tril()) if not any(starts) else bool(seen.all())
        if data.draw(st.booleans()):
            source, target = data.draw(st.permutations(range(rows.stop)))[:2] if rows.stop > 1 else (0, 0)
            slab.move(source, target, len(kept[source][0]))
            kept[target] = list(kept[source])


def test_places_that_no_token_has_filled_hold_numbers() -> None:
    slab = make()
    slab.reserve(2, 10)
    for row, value in ((0, 1.0), (1, float("nan"))):
        slab.view(range(row, row + 1), [0], 9).append(0, torch.full((1, 9, LATENT), value), torch.full((1, 9, ROPE), value))
    slab.clear(1)
    latent, rope = slab.view(range(2), [9, 0], 1).append(0, *new_entries(2, 1, seed=0))
    assert torch.isfinite(latent).all() and torch.isfinite(rope).all()


def test_entries_may_be_kept_in_a_smaller_dtype() -> None:
    slab = LatentSlab(1, 2, 16, LATENT, ROPE, torch.bfloat16)
    slab.reserve(2, 4)
    for starts in ([0, 0], [1, 2]):
        latent, rope = new_entries(2, 1, seed=1)
        all_latent, all_rope = slab.view(range(2), starts, 1).append(0, latent, rope)
        assert all_latent.dtype == all_rope.dtype == torch.float32
        assert torch.equal(all_latent[0, starts[0]], latent[0, 0].bfloat16().float())
