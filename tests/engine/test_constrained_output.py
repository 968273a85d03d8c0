"""Answers drawn from random logits keep to their constraint; what cannot be compiled ends its own request alone."""

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance")

from dsv2.engine import constrain
from dsv2.engine.constrain import Grammar, GrammarCompiler
from dsv2.engine.engine import Engine
from dsv2.engine.request import Constraint, Request, SamplingParams
from dsv2.engine.sampler import SamplerState, sample
from dsv2.errors import MissingExtra, RequestError
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.specials import EOT, USER
from dsv2.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, time_limit_s=60)


def answer(
    tokenizer: Tokenizer, grammar: Grammar, seed: int, most: int = 400, draft: Callable[[list[int]], list[int]] | None = None
) -> str:
    """Return a text drawn from random logits until the end of sentence; everything else is as likely as it."""
    params = SamplingParams(temperature=1.0, seed=seed)
    state = SamplerState(params, (), seed=seed, end_ids=(tokenizer.eos_id,), matcher=grammar.matcher())
    tokens: list[int] = []
    while len(tokens) < most:
        proposed = draft(tokens) if draft else []
        rows = [np.random.default_rng([seed, len(tokens) + i]).standard_normal(tokenizer.vocab_size) for i in range(len(proposed) + 1)]
        (drawn,) = sample(np.array(rows, np.float32) * 3, [state], num_tokens=tokenizer.num_tokens, drafts=[proposed])
        assert drawn.error is None
        tokens += drawn.tokens
        assert not set(tokens) & (set(tokenizer.special_ids.values()) - {tokenizer.eos_id})
        if tokens[-1] == tokenizer.eos_id:
            return tokenizer.decode(tokens)
    raise AssertionError(f"no end within {most} tokens: {tokenizer.decode(tokens)}")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "kind": {"enum": ["river", "sea", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(12))
def test_an_answer_fits_its_schema(tokenizer: Tokenizer, compiler: GrammarCompiler, seed: int) -> None:
    person = json.loads(answer(tokenizer, compiler.compile(Constraint("json_schema", PERSON)), seed))  # type: ignore[arg-type]
    assert list(person) == ["name", "age", "kind", "tags"]
    assert isinstance(person["name"], str) and len(person["name"]) <= 8
    assert type(person["age"]) is int and 3 <= person["age"] <= 120
    assert person["kind"] in ("river", "sea", None)
    assert 1 <= len(person["tags"]) <= 3 and all(type(tag) is bool for tag in person["tags"])


@pytest.mark.parametrize(
    "pattern", ["[a-c]{2,9}", "(the|河流) (sea|hills)!?", "", "[0-9]{4}-[0-9]{2}", "a|bc|", "<｜User｜>", f"{re.escape(EOT)}x{{2}}"]
)
def test_an_answer_matches_its_regular_expression(tokenizer: Tokenizer, compiler: GrammarCompiler, pattern: str) -> None:
    grammar = compiler.compile(Constraint("regex", pattern))
    texts = {answer(tokenizer, grammar, seed) for seed in range(8)}
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert len(texts) > 1 or pattern in ("", "<｜User｜>", f"{re.escape(EOT)}x{{2}}")


def test_an_answer_follows_its_grammar(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Constraint("grammar", 'start: "(" start ")" | "()" | /[0-9]/'))
    for seed in range(8):
        text = answer(tokenizer, grammar, seed)
        opened = len(text) - len(text.lstrip("("))
        assert re.fullmatch(r"\(*(\d|\(\))\)*", text) and text.count("(") == text.count(")") and opened >= text.count(")") - 1


def test_any_object_is_an_object(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Constraint("json_object"))
    matcher = grammar.matcher()
    assert {tokenizer.token_bytes(int(i))[:1] for i in np.flatnonzero(matcher.allowed())} == {b"{"}
    for token in tokenizer.encode('{"river": [1, {"sea": null}], "a": "河\\n"}', add_bos=False):
        assert not matcher.allowed()[tokenizer.eos_id]  # the end is allowed only where the text is whole
        matcher.accept(token)
    assert np.flatnonzero(matcher.allowed()).tolist() == [tokenizer.eos_id]
    matcher.accept(tokenizer.eos_id)
    with pytest.raises(RequestError, match="no further token"):
        matcher.allowed()


def test_drafts_do_not_change_a_constrained_answer(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Constraint("json_schema", PERSON))  # type: ignore[arg-type]
    for seed in range(3):
        plain = answer(tokenizer, grammar, seed)
        truth = tokenizer.encode("", add_bos=False)
        said: list[int] = []
        answer(tokenizer, grammar, seed, draft=lambda tokens, said=said: said.extend(tokens[len(said) :]) or [])  # type: ignore[misc]
        truth = [*said, tokenizer.eos_id]

        def right_then_wrong(tokens: list[int], truth: list[int] = truth) -> list[int]:
            ahead = truth[len(tokens) : len(tokens) + 5]
            return [*ahead[:-1], tokenizer.bos_id, 5] if len(tokens) % 3 else ahead

        assert answer(tokenizer, grammar, seed, draft=right_then_wrong) == plain


def test_a_grammar_cannot_name_markers(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for name in (EOT, f"<[{tokenizer.special_ids[USER]}]>", f"<[{tokenizer.eos_id}]>"):
        with pytest.raises(RequestError, match="cannot be used"):
            compiler.compile(Constraint("grammar", f'start: "a" {name} "b"'))


def test_the_mask_itself_forbids_markers_and_an_early_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_probe", lambda *_: ("", 0))  # which refuses such grammars before
    compiler = GrammarCompiler(tokenizer, time_limit_s=60)
    with pytest.raises(RequestError, match="no further token"):
        compiler.compile(Constraint("grammar", f'start: {EOT} "a"'))
    matcher = compiler.compile(Constraint("grammar", f'start: "a" <[{tokenizer.eos_id}]> "b"')).matcher()
    matcher.accept(tokenizer.encode("a", add_bos=False)[0])
    with pytest.raises(RequestError, match="no further token"):
        matcher.allowed()


def test_what_is_not_allowed_is_not_accepted(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Constraint("regex", "ab")).matcher()
    a, b = tokenizer.encode("a", add_bos=False)[0], tokenizer.encode("b", add_bos=False)[0]
    for wrong in (b, tokenizer.eos_id, tokenizer.num_tokens, -1):
        with pytest.raises(RequestError, match=str(wrong)):
            matcher.accept(wrong)
    matcher.accept(a)
    assert np.flatnonzero(matcher.allowed()).tolist() == [b]


# Each step holds the next one twice: 2^30 copies.
DOUBLING = {
    "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": {"type": "string", "pattern": "a"}},
    "$ref": "#/$defs/d0",
}


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("json_schema", "{", "no JSON"),
        ("json_schema", "NaN", "no JSON"),
        ("json_schema", "[1]", "list, not an object"),
        ("json_schema", '{"type": "wurst"}', "wurst"),
        ("json_schema", '{"properties": {"a": {"frobnicate": 1}}}', "'frobnicate'"),
        ("json_schema", '{"anyOf": [{"items": [{"nullable": true}]}]}', "'nullable'"),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "'x-guidance'"),
        ("json_schema", '{"uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"if": {}, "then": {}}', "if"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"type": "string", "format": "wurst"}', "wurst"),
        ("json_schema", '{"$ref": "http://example.org/a"}', "example.org"),
        ("json_schema", '{"$ref": "#/nowhere"}', "nowhere"),
        ("json_schema", '{"$ref": "#"}', "no token"),
        ("json_schema", "true", "bool, not an object"),
        ("json_schema", '{"enum": []}', "cannot be used"),
        ("json_schema", nested(65), "64 levels"),
        ("json_schema", nested(5000), "JSON"),
        ("regex", "(", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "a$b", "cannot be used"),
        ("regex", "(" * 3000 + "a" + ")" * 3000, "cannot be used"),
        ("regex", "(((a{1000}){1000}){1000}){1000}", "too complex"),
        ("grammar", 'start: a{1000000}\na: b{1000}\nb: "x"{1000}', "too complex"),
        ("json_schema", '{"type": "integer", "multipleOf": 399989}', "at most 64 are allowed"),
        ("grammar", "start: foo", "foo"),
        ("grammar", "start: start", "no token"),
        ("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "deeply nested"),
        ("grammar", "\x00", "cannot be used"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_reason(compiler: GrammarCompiler, kind: Any, source: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(Constraint(kind, source))
    assert says in caught.value.message and caught.value.message.startswith("constraint: ") and len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a|b)*a(a|b){20}(a|b)*"), ("regex", "(a|aa|aaa|ab|ba){500}"), ("regex", ".*a.{900}"),
        ("json_schema", '{"type": "array", "items": {"$ref": "#"}}'), ("json_schema", '{"type": "string", "minLength": 1000000}'),
        ("json_schema", '{"type": "array", "items": {"type": "integer"}, "minItems": 1000000}'),
        ("grammar", 'start: e\ne: e e | "a" | "b" | ""'),
    ],
)  # fmt: skip
def test_a_hostile_constraint_is_served_or_ends_its_answer_alone(
    tokenizer: Tokenizer, compiler: GrammarCompiler, kind: Any, source: str
) -> None:
    state = SamplerState(
        SamplingParams(logit_bias={tokenizer.eos_id: -100}), (), seed=1, matcher=compiler.compile(Constraint(kind, source)).matcher()
    )
    for step in range(60):
        logits = np.random.default_rng(step).standard_normal((1, tokenizer.vocab_size)).astype(np.float32)
        (drawn,) = sample(logits, [state], num_tokens=tokenizer.num_tokens)
        if drawn.error is not None:
            assert "constraint" in drawn.error.message
            break


def test_every_keyword_that_passes_is_known_to_llguidance_or_says_nothing_about_a_value(compiler: GrammarCompiler) -> None:
    """llguidance takes an unknown keyword without a word, so what it takes must be what it is documented to implement."""
    implemented = set(
        "type enum const multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength minLength pattern format maxItems minItems"  # noqa: SIM905
        " maxProperties minProperties required $ref allOf anyOf oneOf items prefixItems additionalItems properties patternProperties"
        " additionalProperties $defs definitions".split()
    )
    silent = set("$anchor $id $schema $comment title description default examples deprecated readOnly writeOnly".split())  # noqa: SIM905
    for keyword in constrain._KEYWORDS - implemented - silent:
        with pytest.raises(RequestError, match=f"Unimplemented keys: .*{re.escape(keyword)}"):
            compiler.compile(Constraint("json_schema", json.dumps({keyword: True if keyword == "uniqueItems" else {}})))


def test_compiled_grammars_are_kept_up_to_a_number_and_a_size(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer, time_limit_s=60)
    monkeypatch.setattr(constrain, "MAX_CACHED", 2)
    first = compiler.compile(Constraint("regex", "a"))
    compiler.compile(Constraint("regex", "b"))
    assert compiler.compile(Constraint("regex", "a")) is first
    compiler.compile(Constraint("regex", "c"))
    assert [constraint.source for constraint in compiler._cache] == ["a", "c"]
    monkeypatch.setattr(constrain, "MAX_CACHED_BYTES", 1)
    assert isinstance(compiler.compile(Constraint("regex", "d")), Grammar)
    assert len(compiler._cache) == 0  # larger than all that may be kept


def test_a_compilation_that_takes_too_long_is_given_up_and_others_go_on(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_probe", lambda *_: ("", 0))
    compiler = GrammarCompiler(tokenizer, time_limit_s=0.05)
    compiler.prepare()
    release, build = threading.Event(), compiler._build

    def stuck(constraint: Constraint, limit_s: float) -> Grammar:
        if constraint.source == "slow":
            release.wait()
        return build(constraint, 60)

    monkeypatch.setattr(compiler, "_build", stuck)
    slow = compiler.submit(Constraint("regex", "slow"))
    assert not slow.ready and compiler.submit(Constraint("regex", "slow")) is slow
    with pytest.raises(RequestError, match=r"within 0\.05 s"):
        slow.result()
    with pytest.raises(RequestError, match=r"within 0\.05 s"):
        compiler.compile(Constraint("regex", "slow"))
    compiler._time_limit_s = 60
    compiler.compile(Constraint("regex", "fast"))  # the second thread is free
    monkeypatch.setattr(constrain, "MAX_COMPILING", 1)
    waiting = [compiler.submit(Constraint("regex", f"w{i}")) for i in range(constrain.MAX_QUEUED)]
    with pytest.raises(RequestError, match="64 others"):
        compiler.submit(Constraint("regex", "one more"))
    release.set()
    assert all(isinstance(job.result(), Grammar) for job in waiting)
    assert isinstance(compiler.compile(Constraint("regex", "slow")), Grammar)


def test_what_takes_all_time_or_memory_is_ended_with_its_process(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = constrain._definition(Constraint("json_schema", DOUBLING))  # type: ignore[arg-type]
    assert constrain._probe(source, 0.01) == ("it was not compiled within 0.0 s", 0)
    monkeypatch.setattr(constrain, "MEMORY_LIMIT_BYTES", 2**29)
    assert "too much memory" in constrain._probe(source, 60)[0]


def test_without_llguidance_only_constraints_are_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingExtra, match="constrain"):
        GrammarCompiler(tokenizer).compile(Constraint("json_object"))


def test_the_engine_keeps_an_answer_to_its_form(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_batch=3)
    forms = [Constraint("regex", "[a-z]{3}(sea)?"), None, Constraint("regex", "a{9}")]
    requests = [
        Request(str(i), (0, 5), SamplingParams(temperature=1.5, seed=i, max_tokens=40, constraint=form)) for i, form in enumerate(forms)
    ]
    outputs = engine.generate(requests)
    assert re.fullmatch("[a-z]{3}(sea)?", outputs[0].text) and outputs[0].finish_reason == "stop"
    assert outputs[2].text == "a" * 9
    assert outputs[1] == engine.generate([requests[1]])[0]
    (bad,) = engine.generate([Request("bad", (0,), SamplingParams(max_tokens=3, constraint=Constraint("regex", "(")))])
    assert bad.finish_reason == "error" and bad.error is not None and "unclosed" in bad.error
    assert not engine.has_work


def test_a_constraint_that_fails_under_way_ends_its_request_alone(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrain, "_probe", lambda *_: ("", 0))  # which refuses this one before
    engine = Engine(model, tokenizer, max_batch=2)
    dead_end = Constraint("grammar", f'start: "ab" <[{tokenizer.eos_id}]> "c"')
    ill, well = engine.generate(
        [
            Request("ill", (0, 5), SamplingParams(max_tokens=20, seed=1, constraint=dead_end)),
            Request("well", (0, 5), SamplingParams(max_tokens=8, seed=1, ignore_eos=True)),
        ]
    )
    assert (ill.text, ill.finish_reason) == ("ab", "error") and ill.error is not None and "no further token" in ill.error
    assert (well.finish_reason, well.error, len(well.tokens)) == ("length", None, 8)


@pytest.mark.parametrize("n", [1, 3])
def test_a_constraint_without_its_package_ends_its_request_alone(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    def missing(tokenizer: Tokenizer) -> Any:
        raise MissingExtra("llguidance", "constrain", "a constraint")

    monkeypatch.setattr(constrain, "_read_vocabulary", missing)
    engine = Engine(model, tokenizer)
    bound = SamplingParams(max_tokens=3, n=n, constraint=Constraint("regex", "a"))
    *refused, free = engine.generate([Request("bound", (0,), bound), Request("free", (0,), SamplingParams(max_tokens=3, ignore_eos=True))])
    assert [(output.index, output.finish_reason) for output in refused] == [(index, "error") for index in range(n)]
    assert "needs llguidance" in str(refused[0].error) and free.finish_reason == "length" and not engine.has_work


def test_more_constraints_than_may_wait_join_one_after_the_other(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrain, "MAX_QUEUED", 1)
    monkeypatch.setattr(constrain, "_probe", lambda *_: ("", 0))
    engine = Engine(model, tokenizer)
    requests = [Request(str(i), (0,), SamplingParams(seed=i, max_tokens=9, constraint=Constraint("regex", f"{i}"))) for i in range(12)]
    assert [output.text for output in engine.generate(requests)] == [str(i) for i in range(12)]


def test_a_deadline_runs_while_a_constraint_is_compiled_and_its_own_time_does_not_run_before(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrain, "_probe", lambda *_: ("", 0))
    monkeypatch.setattr(constrain, "MAX_COMPILING", 1)
    engine = Engine(model, tokenizer)
    compiler, release = engine._grammars, threading.Event()
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda constraint, limit_s: release.wait() and build(constraint, limit_s))
    params = [SamplingParams(max_tokens=3, constraint=Constraint("regex", source)) for source in ("a", "b")]
    engine.add(Request("first", (0,), params[0]))
    compiler._time_limit_s = 0.05
    engine.add(Request("late", (0,), params[1], deadline_s=0.01))
    job = compiler.submit(Constraint("regex", "b"))
    while not (outputs := engine.step()):
        pass
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("late", "deadline")]
    job.wait(0.06)
    assert not job.ready  # its turn has not come
    job._limit_s = 60
    release.set()
    assert isinstance(job.result(), Grammar)


def test_a_request_that_nobody_can_compile_for_leaves_nothing_behind(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrain, "MAX_QUEUED", 0)
    engine = Engine(model, tokenizer)
    with pytest.raises(RequestError, match="wait to be compiled"):
        engine.add(Request("r", (0,), SamplingParams(max_tokens=3, constraint=Constraint("regex", "a"))))
    assert not engine.has_work and engine.abort("r") is None
