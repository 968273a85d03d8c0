"""What the trainer makes of rollouts: the engine's log-probabilities, a gradient that cutting does not change, an alarm that rings."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dsv2.engine.llm import LLM
from dsv2.engine.request import Output, TokenLogprob
from dsv2.model.router import RouterStats
from dsv2.model.transformer import Transformer
from dsv2.rl import update as update_file
from dsv2.rl.objective import Objective
from dsv2.rl.rollout import Rollout, _Draft, draw
from dsv2.rl.tools import Calculator
from dsv2.rl.update import LogProbsDiffer, UpdateResult, agreement, log_probs, over_updates, pad, teaching, update, without_graph
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
    assert max(1 - found.ratio_min, found.ratio_max - 1) == pytest.approx(found.largest, rel=1e-3)


def test_every_token_goes_to_the_experts_of_its_rollout(llm: LLM, policy: Transformer) -> None:
    """Experts that no router would choose: what a padded batch says is what the model says of each rollout alone, sent there."""
    rollouts = [replace(r, experts=(r.experts + 1) % 8) for r in drawn(llm)]
    apart = 0.0
    for piece in pad(rollouts, micro_tokens=10_000, replay=True):
        found = log_probs(policy, piece)[0]
        own_choice = log_probs(policy, replace(piece, experts=None))[0]
        apart = max(apart, (found - own_choice).abs().max().item())
        for row, r in zip(found, (rollouts[i] for i in piece.rows.tolist()), strict=True):
            read = torch.tensor([[*r.prompt_tokens, *r.tokens[:-1]]])
            hidden = policy(read, experts=torch.from_numpy(r.experts.astype(np.int64)).transpose(0, 1)[:, None]).hidden
            alone = policy.logits(hidden)[0, len(r.prompt_tokens) - 1 :].log_softmax(-1)
            torch.testing.assert_close(row[: len(r.tokens)], alone[range(len(r.tokens)), list(r.tokens)], rtol=0, atol=1e-5)
    assert apart > 1e-2, "they matter"


def test_a_single_token_rings_the_alarm(llm: LLM, policy: Transformer) -> None:
    rollouts = drawn(llm)
    pieces = pad(rollouts, micro_tokens=10_000, replay=True)
    trainer = without_graph(policy, pieces, nullcontext())
    tokens = sum(int(piece.mask.sum()) for piece in pieces)
    trainer[0][0, 1] += 1.0
    assert tokens > 110
    agreement(rollouts, pieces, trainer, alarm=0.0101, step=1)
    with pytest.raises(LogProbsDiffer, match=r"the engine drew token 1 of .* 1 here"):
        agreement(rollouts, pieces, trainer, alarm=0.0099, step=1)


def test_stale_rollouts_ring_the_alarm_and_nothing_is_learned(llm: LLM, policy: Transformer) -> None:
    rollouts = drawn(llm)
    with torch.no_grad():
        policy.model.layers[1].self_attn.o_proj.weight += 0.01  # the engine sampled before this
    before = [parameter.clone() for parameter in policy.parameters()]
    pieces = pad(rollouts, micro_tokens=1000, replay=True)
    with pytest.raises(LogProbsDiffer, match=r"step 7: the engine drew token \d+ of rollout \d of group \d .* allowed are 1e-05"):
        learn(policy, rollouts, pieces, alarm=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize(("of_tokens", "expert"), [(False, 0.0), (True, 0.0), (False, 0.1)])
def test_a_step_is_the_same_however_the_batch_is_cut(llm: LLM, policy: Transformer, of_tokens: bool, expert: float) -> None:
    rollouts = drawn(llm)
    moved = []
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    values = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)) if of_tokens else torch.linspace(-1, 1, 9)
    for micro_tokens in (1, 100, 10_000):
        policy.load_state_dict(start)
        pieces = pad(rollouts, micro_tokens=micro_tokens, replay=True)
        learn(policy, rollouts, pieces, values, alarm=1e-5, balance=BalanceSection(expert=expert))
        moved.append(torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(moved[0], moved[2], rtol=0, atol=2e-6)
    assert (
        moved[0] - torch.cat([value.flatten() for name, value in start.items() if name in dict(policy.named_parameters())])
    ).abs().max() > 1e-4


@pytest.mark.parametrize("scope", ["sequence", "micro-batch"])
def test_padding_is_no_load(policy: Transformer, scope: str) -> None:
    draws, losses = torch.Generator().manual_seed(0), []
    affinity, experts = torch.rand(2, 6, 8, generator=draws), torch.randint(0, 8, (2, 6, 2), generator=draws)
    for padding in (0, 7):
        affinity[1, 4:], experts[1, 4:] = affinity[1, 4:] + padding, padding
        stats = (RouterStats(1, affinity.clone(), experts.clone()),)
        losses.append(update_file._balance(stats, torch.tensor([6, 4]), BalanceSection(expert=1.0, scope=scope), policy.config))
    assert losses[0] == losses[1] > 0
    whole = update_file._balance(stats, torch.tensor([6, 6]), BalanceSection(expert=1.0, scope=scope), policy.config)
    assert whole != losses[0]


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


def test_what_has_no_gradient_goes_forward_only(llm: LLM, policy: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of equal rewards without KL: its rollouts count, are compared with the engine's, and cost no backward pass."""
    rollouts, passes, forward = drawn(llm), [], log_probs

    def watched(model: Transformer, piece: object, **options: object) -> object:
        passes.append((piece.rows.tolist(), torch.is_grad_enabled()))
        return forward(model, piece, **options)

    values = torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    learn(policy, rollouts, pad(rollouts, micro_tokens=10_000, replay=True), values, alarm=1e-5)
    expected = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.load_state_dict(start)
    teaches = teaching(values, replace_kl(Objective()), NO_BALANCE)
    monkeypatch.setattr(update_file, "log_probs", watched)
    learn(policy, rollouts, pad(rollouts, micro_tokens=10_000, replay=True, teaching=teaches), values, alarm=1e-5)
    assert {row for rows, graph in passes for row in rows if graph} == {3, 4} and sum(len(rows) for rows, _ in passes) == 9
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6)
    assert not torch.equal(policy.lm_head.weight, start["lm_head.weight"])
    for objective, balance in ((Objective(), NO_BALANCE), (replace_kl(Objective()), BalanceSection(device=0.1, expert=0.0))):
        assert all(teaching(values, objective, balance))
    assert all(teaching(0 * values, replace_kl(Objective()), NO_BALANCE))


def test_weights_correct_a_sampler_that_was_another(llm: LLM, policy: Transformer) -> None:
    """Drawn at half the probability that the trainer finds: a weight of 2, cut at 1.5, or left out above it."""
    rollouts = [replace(r, logprobs=tuple(p - math.log(2) for p in r.logprobs)) for r in drawn(llm)]
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    moved, shown = [], []
    for correction in ("none", "truncate", "mask"):
        policy.load_state_dict(start)
        objective = Objective(kl_weight=0.0, correction=correction, correction_cap=1.5)
        result = learn(policy, rollouts, pad(rollouts, micro_tokens=200, replay=True), objective=objective, clip_norm=1e9)
        shown.append((result.weight_min, result.weight_mean, result.weight_max, result.weight_capped))
        moved.append(policy.lm_head.weight.detach() - start["lm_head.weight"])
    assert moved[0].abs().max() > 1e-4 and not moved[2].any()
    torch.testing.assert_close(moved[1], 1.5 * moved[0], rtol=0, atol=2e-6)
    assert shown == [(None,) * 4, (1.5, 1.5, 1.5, 1.0), (0.0, 0.0, 0.0, 1.0)]


def test_a_second_update_goes_by_the_log_probabilities_that_the_first_began_with(llm: LLM, policy: Transformer) -> None:
    rollouts = drawn(llm)
    pieces = pad(rollouts, micro_tokens=200, replay=True)
    before = without_graph(policy, pieces, nullcontext())
    options = {"lr": 0.1, "clip_norm": 1.0, "balance": NO_BALANCE, "autocast": nullcontext()}
    optimizer, values = torch.optim.SGD(policy.parameters()), torch.linspace(-1, 1, 9)
    step = partial(update, policy, optimizer, pieces, values, replace_kl(Objective()), **options)
    first, seen, _ = step()
    for found, expected in zip(seen, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    moved = [(now - then).exp().amax().item() for now, then in zip(without_graph(policy, pieces, nullcontext()), before, strict=True)]
    second, _, _ = step(old=seen)
    assert first.ratio_max == 1 < 1.001 < max(moved) == pytest.approx(second.ratio_max, rel=1e-5)
    both = over_updates([first, second])
    assert both.ratio_max == second.ratio_max and both.grad_norm == max(first.grad_norm, second.grad_norm) and both.kl is None
    assert both.loss == (first.loss + second.loss) / 2 != second.loss and both.entropy == (first.entropy + second.entropy) / 2
    assert over_updates([second]) == second


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_the_kl_of_a_token_is_the_same_for_each_objective(llm: LLM, policy: Transformer, micro_tokens: int) -> None:
    """A reference 0.1 nats above the policy at every token: the figure is k3 of that, the loss has that of an output, or of a sum."""
    rollouts = drawn(llm)
    pieces = pad(rollouts, micro_tokens=micro_tokens, replay=True)
    above = [logp + 0.1 for logp in without_graph(policy, pieces, nullcontext())]
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    k3 = math.expm1(0.1) - 0.1
    lengths = [len(r.tokens) for r in rollouts]
    for objective, in_loss in (
        (Objective(), k3),
        (Objective(ratio="output"), sum(math.expm1(0.1 * length) - 0.1 * length for length in lengths) / 9),
        (Objective(normalise="constant", constant_len=50), k3 * sum(lengths) / 50 / 9),
    ):
        policy.load_state_dict(start)
        result = learn(policy, rollouts, pieces, objective=objective, reference=above)
        assert result.kl == pytest.approx(k3, rel=1e-3) and result.kl_loss == pytest.approx(in_loss, rel=1e-3)


def test_shares_of_outputs_weigh_each_output_alike(llm: LLM, policy: Transformer) -> None:
    rollouts = drawn(llm)
    rollouts[4] = replace(rollouts[4], **{name: getattr(rollouts[4], name)[:2] for name in ("tokens", "logprobs", "mask")},
                          experts=rollouts[4].experts[: len(rollouts[4].prompt_tokens) + 1])  # fmt: skip
    pieces = pad(rollouts, micro_tokens=1, replay=True)
    old = [logp - 1.0 for logp in without_graph(policy, pieces, nullcontext())]
    values = torch.full((9,), -0.1)
    values[4] = 1.0
    result = learn(policy, rollouts, pieces, values, objective=Objective(kl_weight=0.0, ratio="output"), old=old)
    assert result.clipped_high == pytest.approx(1 / 9) and result.kl is None


def test_a_prompt_is_read_once_for_all_answers_of_its_group(llm: LLM, policy: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, generate = [], llm.generate

    def watched(*arguments: object, **options: object) -> list[Output]:
        outputs.extend(generate(*arguments, **options))
        return outputs

    monkeypatch.setattr(llm, "generate", watched)
    long = {"messages": [{"role": "user", "content": "The answer is 46. 34? " * 6}]}
    rollouts = draw(llm, [long], group_size=3, max_tokens=8, seed="0", record_experts=True)
    assert len(rollouts[0].prompt_tokens) > 64, "of blocks of 64 tokens"
    assert [output.cached_tokens for output in outputs] == [0, 64, 64]
    pieces = pad(rollouts, micro_tokens=10_000, replay=True)
    assert agreement(rollouts, pieces, without_graph(policy, pieces, nullcontext()), alarm=1e-5, step=1).largest <= 1e-5
    assert len({r.tokens for r in rollouts}) == 3


def test_rollouts_repeat_with_their_seed_whatever_shares_the_batch(llm: LLM) -> None:
    all_three = drawn(llm)
    alone = draw(llm, QUESTIONS[1:2], group_size=2, max_tokens=20, seed="0", first_group=1)
    assert [r.tokens for r in alone] == [r.tokens for r in all_three[3:5]]
    assert [r.tokens for r in drawn(llm, seed="1")] != [r.tokens for r in all_three]
    assert {(r.group, r.index) for r in all_three} == {(group, index) for group in range(3) for index in range(3)}


def test_what_a_tool_writes_is_forced_and_left_out_of_the_mask(llm: LLM, policy: Transformer) -> None:
    class Parrot(Calculator):
        call = "[eat]"

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


def test_nothing_but_a_call_ends_a_turn(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked sums are full of "=": with a calculator at hand they are drawn as without one, all at once."""
    plain, asked, generate = drawn(llm, seed="3"), [], llm.generate

    def watched(prompts: list, *arguments: object, **options: object) -> list[Output]:
        asked.append(len(prompts))
        return generate(prompts, *arguments, **options)

    monkeypatch.setattr(llm, "generate", watched)
    rollouts = drawn(llm, seed="3", tool=Calculator())
    assert any("=" in r.text[:-1] for r in plain), "the seed is to draw one"
    assert asked == [3] and [r.tokens for r in rollouts] == [r.tokens for r in plain] and all(all(r.mask) for r in rollouts)


def test_tokens_keep_the_experts_that_they_were_drawn_through(llm: LLM) -> None:
    """Behind a tool's turn everything is read again; what that says of earlier tokens is not what they were drawn through."""

    class Mute(Calculator):
        def answer(self, text: str) -> str:
            return ""

    draft = _Draft((1, 2, 3), {}, 0, 0)
    for tokens, reason, read, expert in (((5, 6), "stop", 4, 0), ((7, 8), "length", 6, 1)):
        logprobs = tuple(TokenLogprob(token, -1.0) for token in tokens)
        draft.add(Output("r", tokens, "", reason, logprobs, 3, experts=np.full((read, 1, 2), expert)), (), 9, Mute(), llm)
    assert draft.finished(llm).experts[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1]


def test_the_calculator_answers_calls_and_nothing_else() -> None:
    answer = Calculator().answer
    assert answer("so <<12+34=") == "46>>" and answer("<<(2-5)*4/6=") == "-2>>" and answer("<<1/3=") == "1/3>>"
    assert answer("x =") == "" and answer("<<1/0=") == "?>>" and answer("<<1+=") == "?>>" and answer("<<2**9=") == "?>>"


def learn(
    policy: Transformer,
    rollouts: list[Rollout],
    pieces: list,
    values: torch.Tensor | None = None,
    *,
    alarm: float | None = None,
    objective: Objective | None = None,
    balance: BalanceSection = NO_BALANCE,
    clip_norm: float = 1.0,
    old: list[torch.Tensor] | None = None,
    reference: list[torch.Tensor] | None = None,
) -> UpdateResult:
    optimizer = torch.optim.SGD(policy.parameters())
    if values is None:
        values = torch.linspace(-1, 1, len(rollouts))
    return update(
        policy, optimizer, pieces, values, objective or replace_kl(Objective()), lr=0.1, clip_norm=clip_norm, balance=balance,
        autocast=nullcontext(), old=old, reference=reference,
        check=lambda seen: agreement(rollouts, pieces, seen, alarm=alarm, step=7),
    )[0]  # fmt: skip


def replace_kl(objective: Objective) -> Objective:
    return objective.model_copy(update={"kl_weight": 0.0})
