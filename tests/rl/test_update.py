"""What the trainer makes of rollouts: the engine's log-probabilities, a gradient that cutting does not change, an alarm that rings."""

from contextlib import nullcontext

import pytest
import torch

from dsv2.engine.llm import LLM
from dsv2.model.transformer import Transformer
from dsv2.rl.objective import Objective
from dsv2.rl.rollout import Rollout, draw
from dsv2.rl.tools import Calculator
from dsv2.rl.update import LogProbsDiffer, agreement, log_probs, pad, update, without_graph
from dsv2.train.losses import BalanceSection

QUESTIONS = [
    {"messages": [{"role": "user", "content": text}], "answer": "46"} for text in ("What is 12 + 34?", "Hi", "The answer is 46. 34?")
]
NO_BALANCE = BalanceSection(expert=0.0)


def drawn(llm: LLM, seed: str = "0", **options: object) -> list[Rollout]:
    return draw(llm, QUESTIONS, group_size=3, max_tokens=20, seed=seed, record_experts=True, **options)


@pytest.mark.parametrize("replay", [True, False])
def test_engine_and_trainer_agree_on_every_token(llm: LLM, policy: Transformer, replay: bool) -> None:
    rollouts = drawn(llm)
    pieces = pad(rollouts, micro_tokens=100, replay=replay)
    assert len(pieces) > 1 and sorted(row for piece in pieces for row in piece.rows.tolist()) == list(range(9))
    found = agreement(rollouts, pieces, without_graph(policy, pieces, nullcontext()), alarm=1e-5, step=1)
    assert found.largest <= 1e-5 and abs(found.ratio_mean - 1) < 1e-5


def test_stale_rollouts_ring_the_alarm_and_nothing_is_learned(llm: LLM, policy: Transformer) -> None:
    rollouts = drawn(llm)
    with torch.no_grad():
        policy.model.layers[1].self_attn.o_proj.weight += 0.01  # the engine sampled before this
    before = [parameter.clone() for parameter in policy.parameters()]
    pieces = pad(rollouts, micro_tokens=1000, replay=True)
    with pytest.raises(LogProbsDiffer, match=r"step 7: the engine drew token \d+ of rollout \d of group \d .* allowed are 1e-05"):
        learn(policy, rollouts, pieces, alarm=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("of_tokens", [False, True])
def test_a_step_is_the_same_however_the_batch_is_cut(llm: LLM, policy: Transformer, of_tokens: bool) -> None:
    rollouts = drawn(llm)
    moved = []
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    values = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)) if of_tokens else torch.linspace(-1, 1, 9)
    for micro_tokens in (1, 100, 10_000):
        policy.load_state_dict(start)
        learn(policy, rollouts, pad(rollouts, micro_tokens=micro_tokens, replay=True), values, alarm=1e-5)
        moved.append(torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(moved[0], moved[2], rtol=0, atol=2e-6)
    assert (
        moved[0] - torch.cat([value.flatten() for name, value in start.items() if name in dict(policy.named_parameters())])
    ).abs().max() > 1e-4


def test_an_advantage_of_a_token_moves_that_token_alone(llm: LLM, policy: Transformer) -> None:
    """With advantage 1 at one token of one rollout, the step is that of the gradient of this token's log-probability."""
    rollouts = drawn(llm)
    row, token = 4, 2
    values = torch.zeros(9, 20)
    values[row, token] = 1.0
    pieces = pad(rollouts, micro_tokens=10_000, replay=True)
    place = next((piece, piece.rows.tolist().index(row)) for piece in pieces if row in piece.rows)
    wanted = torch.autograd.grad(log_probs(policy, place[0])[0][place[1], token], policy.lm_head.weight)[0]
    before = policy.lm_head.weight.detach().clone()
    learn(policy, rollouts, pieces, values, alarm=1e-5)
    moved = policy.lm_head.weight.detach() - before
    assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.9999


def test_rollouts_repeat_with_their_seed_whatever_shares_the_batch(llm: LLM) -> None:
    all_three = drawn(llm)
    alone = draw(llm, QUESTIONS[1:2], group_size=2, max_tokens=20, seed="0", first_group=1)
    assert [r.tokens for r in alone] == [r.tokens for r in all_three[3:5]]
    assert [r.tokens for r in drawn(llm, seed="1")] != [r.tokens for r in all_three]
    assert {(r.group, r.index) for r in all_three} == {(group, index) for group in range(3) for index in range(3)}


def test_what_a_tool_writes_is_forced_and_left_out_of_the_mask(llm: LLM, policy: Transformer) -> None:
    class Parrot(Calculator):
        stops = ("e", "a", "t")

        def answer(self, text: str) -> str:
            return " 46>>"

    rollouts = drawn(llm, tool=Parrot())
    forced = llm.tokenizer.encode(" 46>>", add_bos=False)
    called = [r for r in rollouts if not all(r.mask)]
    assert called
    for r in called:
        first = r.mask.index(False)
        assert list(r.tokens[first : first + len(forced)]) == forced and not any(r.mask[first : first + len(forced)])
    pieces = pad(rollouts, micro_tokens=10_000, replay=True)
    assert agreement(rollouts, pieces, without_graph(policy, pieces, nullcontext()), alarm=1e-5, step=1).largest <= 1e-5
    logp, entropy, _ = log_probs(policy, pieces[0])
    assert not logp[~pieces[0].mask].any() and not entropy[~pieces[0].mask].any()


def test_the_calculator_answers_calls_and_nothing_else() -> None:
    answer = Calculator().answer
    assert answer("so <<12+34=") == "46>>" and answer("<<(2-5)*4/6=") == "-2>>" and answer("<<1/3=") == "1/3>>"
    assert answer("x =") == "" and answer("<<1/0=") == "?>>" and answer("<<1+=") == "?>>" and answer("<<2**9=") == "?>>"


def learn(
    policy: Transformer, rollouts: list[Rollout], pieces: list, values: torch.Tensor | None = None, *, alarm: float
) -> None:  # fmt: skip
    optimizer = torch.optim.SGD(policy.parameters())
    if values is None:
        values = torch.linspace(-1, 1, len(rollouts))
    update(
        policy, optimizer, pieces, values, replace_kl(Objective()), lr=0.1, clip_norm=1.0, balance=NO_BALANCE, autocast=nullcontext(),
        check=lambda seen: agreement(rollouts, pieces, seen, alarm=alarm, step=7),
    )  # fmt: skip


def replace_kl(objective: Objective) -> Objective:
    return objective.model_copy(update={"kl_weight": 0.0})
