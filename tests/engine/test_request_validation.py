import math
from typing import Any

import numpy as np
import pytest

from dsv2.engine.request import Request, SamplingParams
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
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.message.startswith(field)
    assert repr(value) in caught.value.message or isinstance(value, tuple)


def test_edges_of_the_allowed_ranges() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1e-9, max_tokens=1, seed=-(2**63), logprobs=0)
    SamplingParams(temperature=1e9, top_k=10**9, top_p=1, max_tokens=10**9, seed=2**63 - 1, logprobs=20)


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
