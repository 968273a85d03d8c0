import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsv2.engine.request import Constraint, Request, SamplingParams, require_fit
from dsv2.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("temperature", None), ("temperature", True),
        ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_k", None),
        ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan), ("top_p", False),
        ("max_tokens", 0), ("max_tokens", 2.0), ("max_tokens", "9"),
        ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 0.5), ("seed", False),
        ("stop", "END"), ("stop", ("a", "")), ("stop", (b"a",)), ("stop", 3),
        ("stop_token_ids", (-1,)), ("stop_token_ids", ("a",)), ("stop_token_ids", "12"), ("stop_token_ids", 5), ("stop_token_ids", (True,)),
        ("ignore_eos", 1), ("ignore_eos", None),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", True),
        ("stop", ("a",) * 17), ("stop", ("a" * 257,)), ("stop_token_ids", (1,) * 1025),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan), ("min_p", None),
        ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("frequency_penalty", math.inf), ("frequency_penalty", "1"),
        ("repetition_penalty", 0), ("repetition_penalty", 101), ("repetition_penalty", -1), ("repetition_penalty", True),
        ("logit_bias", {-1: 1.0}), ("logit_bias", {"a": 1.0}), ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}),
        ("logit_bias", 5), ("logit_bias", "12"), ("logit_bias", (1, 2)), ("logit_bias", ((1, 1), (1, 2))), ("logit_bias", {True: 1}),
        ("logit_bias", dict.fromkeys(range(1025), 0)),
        ("min_tokens", -1), ("min_tokens", 257), ("min_tokens", 1.0),
        ("include_stop", 1), ("include_stop", None), ("stop_regex", None), ("stop_regex", "("), ("stop_regex", "a*"),
        ("stop_regex", "a" * 257),
        ("prompt_logprobs", -1), ("prompt_logprobs", 21), ("prompt_logprobs", False),
        ("n", 0), ("n", 129), ("n", True), ("n", 1.0),
        ("constraint", "json"), ("constraint", {"type": "object"}),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.message.startswith(field)
    assert repr(value) in caught.value.message or isinstance(value, tuple | dict)


def test_edges_of_the_allowed_ranges() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1e-9, max_tokens=1, seed=-(2**63), logprobs=0)
    SamplingParams(temperature=1e9, top_k=10**9, top_p=1, max_tokens=10**9, seed=2**63 - 1, logprobs=20)
    SamplingParams(min_p=0, presence_penalty=-2, frequency_penalty=2, repetition_penalty=0.01, n=8, prompt_logprobs=0, min_tokens=256)
    SamplingParams(min_p=1, repetition_penalty=100, logit_bias=dict.fromkeys(range(1024), -100), stop=("a" * 256,) * 16, n=1)


def test_lists_and_numpy_numbers_become_plain_hashable_values() -> None:
    params = SamplingParams(top_k=np.int64(4), top_p=np.float32(0.5), stop=["a"], stop_token_ids=[np.int32(7)])  # type: ignore[arg-type]
    request = Request("r", np.array([1, 2]), params)  # type: ignore[arg-type]
    assert (params.top_k, params.top_p, params.stop, params.stop_token_ids, request.tokens) == (4, 0.5, ("a",), (7,), (1, 2))
    assert all(type(value) is int for value in (params.top_k, *params.stop_token_ids, *request.tokens))
    assert hash(request) == hash(Request("r", (1, 2), SamplingParams(top_k=4, top_p=0.5, stop=("a",), stop_token_ids=(7,))))


@pytest.mark.parametrize(
    ("request_id", "tokens", "named"), [("", (1,), "request_id"), (3, (1,), "request_id"), ("r", (), "'r'"), ("r", (1, -2), "tokens[1]")]
)
def test_a_request_needs_a_name_and_a_prompt_of_ids(request_id: Any, tokens: Any, named: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(request_id, tokens, SamplingParams())
    assert named in caught.value.message


def test_a_bias_may_be_a_mapping_or_pairs_and_is_kept_by_id() -> None:
    mapping = SamplingParams(logit_bias={7: 1, np.int64(3): np.float32(-0.5)})  # type: ignore[arg-type]
    assert mapping.logit_bias == ((3, -0.5), (7, 1.0)) == SamplingParams(logit_bias=((7, 1.0), (3, -0.5))).logit_bias
    assert all(type(token) is int and type(bias) is float for token, bias in mapping.logit_bias)
    assert replace(mapping, n=2).logit_bias == mapping.logit_bias and hash(mapping)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 1.5), ("priority", 101), ("priority", True), ("deadline_s", 0), ("deadline_s", -1), ("deadline_s", math.inf),
        ("deadline_s", "5"), ("cache_salt", 5), ("cache_salt", "a" * 257), ("record_experts", 1),
    ],
)  # fmt: skip
def test_a_wrong_value_of_a_request_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Request("r", (1,), SamplingParams(), **{field: value})
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("yaml", "a", "'yaml'"), ("regex", 5, "int"), ("regex", b"a", "bytes"), ("grammar", "", "empty"), ("json_schema", "", "empty"),
        ("regex", "a" * 8193, "8193"), ("json_schema", "a" * 65537, "65537"), ("json_object", "{}", "0"),
        ("json_schema", {"a": object()}, "no JSON"), ("json_schema", {"a": math.nan}, "no JSON"), ("regex", {"a": 1}, "dict"),
    ],
)  # fmt: skip
def test_a_constraint_is_checked_when_it_is_made(kind: Any, source: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        Constraint(kind, source)
    assert says in caught.value.message and caught.value.message.startswith("constraint")


def test_a_schema_may_be_a_mapping() -> None:
    constraint = Constraint("json_schema", {"type": "object"})  # type: ignore[arg-type]
    assert constraint == Constraint("json_schema", '{"type": "object"}') and hash(constraint)


@pytest.mark.parametrize("field", ["min_tokens", "ignore_eos"])
def test_nothing_beside_a_constraint_says_where_the_answer_may_end(field: str) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(constraint=Constraint("json_object"), **{field: field == "ignore_eos" or 3})


def test_prompt_logprobs_from_needs_prompt_logprobs_and_a_place_in_the_prompt() -> None:
    with pytest.raises(RequestError, match="prompt_logprobs_from = 3 without prompt_logprobs"):
        SamplingParams(prompt_logprobs_from=3)
    request = Request("r", (0, 1, 2), SamplingParams(prompt_logprobs=0, prompt_logprobs_from=3, max_tokens=1))
    with pytest.raises(RequestError, match="prompt_logprobs_from = 3 lies behind the prompt of 3 tokens"):
        require_fit(request, max_len=9, num_tokens=9)
