import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizer_samples import Published, steady
from transformers import AutoTokenizer

from dsv2.errors import ConfigError, DataError
from dsv2.tokenizer.chat import Template, chat_template, render, render_fim, stop_ids
from dsv2.tokenizer.specials import ASSISTANT, BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, MARKERS, OUTPUTS_END, USER
from dsv2.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]
TEMPLATES: tuple[Template, ...] = ("v2", "v2.5")


def call(name: str, arguments: Any, **extra: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | extra


def weather(city: str) -> dict[str, Any]:
    return call("weather", json.dumps({"city": city}))


TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
TOOLS_TALK: list[Message] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [weather("Tokyo"), weather("Paris")]},
    {"role": "tool", "content": "10", "tool_call_id": "a"},
    {"role": "tool", "content": "22", "tool_call_id": "b"},
    {"role": "assistant", "content": "10 and 22", "tool_calls": [weather("Rome")]},
    {"role": "tool", "content": "30"},
    {"role": "assistant", "content": "30"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "\u5929\u6c14", "parameters": {"type": "object"}}}]

# apply_chat_template parses markers in content, so the comparison spells none. Blanks, newlines and digits stress the cuts.
CONTENT = st.one_of(
    st.text(st.characters(exclude_characters="|\uff5c", codec="utf-8"), max_size=12),
    st.text(st.sampled_from(" \n\r\t:(a1\u4e2d\u3000"), max_size=6),
)
PLAIN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENT})
ARGUMENTS = st.one_of(CONTENT, st.dictionaries(CONTENT, st.one_of(CONTENT, st.integers(), st.none()), max_size=2))
CALLING = st.fixed_dictionaries(
    {
        "role": st.just("assistant"),
        "content": st.one_of(st.none(), CONTENT),
        "tool_calls": st.lists(st.builds(call, CONTENT, ARGUMENTS), min_size=1, max_size=3),
    }
)
RESULT = st.fixed_dictionaries({"role": st.just("tool"), "content": CONTENT})
CONVERSATIONS = {"v2": st.lists(PLAIN, min_size=1, max_size=6), "v2.5": st.lists(st.one_of(PLAIN, CALLING, RESULT), min_size=1, max_size=7)}


@pytest.fixture(scope="module")
def auto(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    folder = tmp_path_factory.mktemp("auto")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special=False)


def learnt(tokenizer: Tokenizer, messages: list[Message], template: Template, **options: Any) -> list[str]:
    """Return the runs of text under the loss mask."""
    rendered = render(tokenizer, messages, template=template, **options)
    assert len(rendered.tokens) == len(rendered.loss_mask)
    runs: list[list[int]] = [[]]
    for token, learn in zip(rendered.tokens, rendered.loss_mask, strict=True):
        if learn:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [text_of(tokenizer, run) for run in runs if run]


def test_v2_text_and_mask(tokenizer: Tokenizer) -> None:
    rendered = render(tokenizer, TALK, template="v2")
    assert text_of(tokenizer, rendered.tokens) == f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello{EOS}User: 2+2?\n\nAssistant: 4{EOS}"
    assert learnt(tokenizer, TALK, "v2") == [f" Hello{EOS}", f" 4{EOS}"]


def test_v2_generation_prompt_has_no_trailing_blank(tokenizer: Tokenizer) -> None:
    rendered = render(tokenizer, TALK[:2], template="v2", add_generation_prompt=True)
    assert text_of(tokenizer, rendered.tokens).endswith("User: Hi\n\nAssistant:")
    assert not any(rendered.loss_mask)


def test_v25_text_and_mask(tokenizer: Tokenizer) -> None:
    rendered = render(tokenizer, TALK)
    assert text_of(tokenizer, rendered.tokens) == f"{BOS}Be brief.{USER}Hi{ASSISTANT}Hello{EOS}{USER}2+2?{ASSISTANT}4{EOS}"
    assert learnt(tokenizer, TALK, "v2.5") == [f"Hello{EOS}", f"4{EOS}"]
    prompt = render(tokenizer, TALK[:2], add_generation_prompt=True)
    assert text_of(tokenizer, prompt.tokens) == f"{BOS}Be brief.{USER}Hi{ASSISTANT}"


def spelt(words: str) -> str:
    """Write out section 4.4's tool grammar with short names for its markers."""
    names = {"calls+": 9, "calls-": 10, "call+": 11, "call-": 12, "outs+": 13, "outs-": 14, "out+": 15, "out-": 16, "sep": 17}
    for name, index in names.items():
        words = words.replace(f"<{name}>", MARKERS[index])
    return words.replace("<bos>", BOS).replace("<eos>", EOS).replace("<user>", USER).replace("<assistant>", ASSISTANT)


def test_v25_tool_rounds_are_opened_and_closed(tokenizer: Tokenizer) -> None:
    def one(city: str) -> str:
        return f'<call+>function<sep>weather\n```json\n{{"city": "{city}"}}\n```<call->'

    calls = spelt(f"<calls+>{one('Tokyo')}\n{one('Paris')}<calls-><eos>")
    outputs = spelt("<outs+><out+>10<out->\n<out+>22<out-><outs->")
    second = spelt(f"10 and 22<calls+>{one('Rome')}<calls-><eos>")
    expected = spelt("<bos><user>Weather?<assistant>") + calls + outputs + second + spelt("<outs+><out+>30<out-><outs->30<eos>")
    assert text_of(tokenizer, render(tokenizer, TOOLS_TALK).tokens) == expected
    assert learnt(tokenizer, TOOLS_TALK, "v2.5") == [calls, second, f"30{EOS}"]
    # After outputs the assistant goes on directly, with or without a generation prompt.
    asked = render(tokenizer, TOOLS_TALK[:4], add_generation_prompt=True)
    assert asked == render(tokenizer, TOOLS_TALK[:4]) and text_of(tokenizer, asked.tokens).endswith(OUTPUTS_END)
    interrupted = render(tokenizer, [*TOOLS_TALK[:3], {"role": "user", "content": "Stop"}])
    assert text_of(tokenizer, interrupted.tokens).endswith(spelt("<out+>10<out-><outs-><user>Stop"))


def test_strict_upstream_keeps_the_published_faults(tokenizer: Tokenizer) -> None:
    def strict(messages: list[Message]) -> str:
        return text_of(tokenizer, render(tokenizer, messages, strict_upstream=True).tokens)

    def one(city: str) -> str:
        return f'<call+>function<sep>weather\n```json\n{{"city": "{city}"}}\n```<call->'

    tokyo, paris, rome = (one(city) for city in ("Tokyo", "Paris", "Rome"))
    # A single call is never closed, and calls and outputs of later rounds are never opened.
    alone = {"role": "assistant", "content": None, "tool_calls": [weather("Tokyo")]}
    rounds = [alone, {"role": "tool", "content": "10"}, alone, {"role": "tool", "content": "11"}]
    first = f"<bos><assistant><calls+>{tokyo}<outs+><out+>10<out->"
    assert strict(rounds) == spelt(f"{first}\n{tokyo}<calls-><eos>\n<out+>11<out-><outs->")
    # A third call closes the list twice.
    three = {"role": "assistant", "content": None, "tool_calls": [weather("Tokyo"), weather("Paris"), weather("Rome")]}
    assert strict([three]) == spelt(f"<bos><assistant><calls+>{tokyo}\n{paris}<calls-><eos>\n{rome}<calls-><eos>")
    # The last system message wins, and calls beside content are dropped.
    systems = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}]
    assert strict([*systems, alone | {"content": "c"}]) == spelt("<bos>b<assistant>c<eos>")
    assert text_of(tokenizer, render(tokenizer, systems).tokens) == f"{BOS}a\n\nb"
    # Without its faults it is the same.
    assert strict([*TALK, TALK[1]]) == text_of(tokenizer, render(tokenizer, [*TALK, TALK[1]]).tokens)
    asked = render(tokenizer, TALK[:2], strict_upstream=True, add_generation_prompt=True)
    assert asked == render(tokenizer, TALK[:2], add_generation_prompt=True)
    answered = strict([*TOOLS_TALK[:4], TALK[2]])
    assert answered == text_of(tokenizer, render(tokenizer, [*TOOLS_TALK[:4], TALK[2]]).tokens)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_the_model_writes_continues_the_prompt(tokenizer: Tokenizer, template: Template) -> None:
    """The prompt's ids are a prefix of the conversation's, and the mask begins exactly behind it: no token earlier, none later."""

    @steady
    @given(CONVERSATIONS[template], st.one_of(PLAIN, CALLING) if template == "v2.5" else PLAIN)
    def compare(history: list[Message], answer: Message) -> None:
        answer = answer | {"role": "assistant"}
        prompt = render(tokenizer, history, template=template, add_generation_prompt=True)
        whole = render(tokenizer, [*history, answer], template=template)
        assert whole.tokens[: len(prompt.tokens)] == prompt.tokens
        assert whole.loss_mask[: len(prompt.tokens)] == prompt.loss_mask
        assert all(whole.loss_mask[len(prompt.tokens) :]) and whole.tokens[-1] in stop_ids(tokenizer)

    compare()


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_equal_apply_chat_template(tokenizer: Tokenizer, auto: AutoTokenizer, template: Template) -> None:
    @steady
    @given(CONVERSATIONS[template], st.booleans(), st.booleans())
    def compare(messages: list[Message], prompt: bool, with_tools: bool) -> None:
        tools = TOOLS if with_tools and template == "v2.5" else None
        ours = render(tokenizer, messages, template=template, add_generation_prompt=prompt, tools=tools)
        text = chat_template(template)
        theirs = auto.apply_chat_template(messages, chat_template=text, add_generation_prompt=prompt, tools=tools, return_dict=False)
        assert ours.tokens == theirs
        assert ours.tokens.count(tokenizer.bos_id) == 1

    compare()


def test_saved_template_is_the_default_of_both(tokenizer: Tokenizer, auto: AutoTokenizer) -> None:
    theirs = auto.apply_chat_template(TOOLS_TALK, return_dict=False)
    assert theirs == render(tokenizer, TOOLS_TALK).tokens
    with pytest.raises(Exception, match="unknown role judge"):
        auto.apply_chat_template([{"role": "judge", "content": "x"}])


def test_tools_are_listed_after_the_system_text(tokenizer: Tokenizer) -> None:
    with_system = text_of(tokenizer, render(tokenizer, TALK[:2], tools=TOOLS).tokens)
    section = (
        '## Tools\n\n### Function\n\nYou have the following functions available:\n\n- `weather`:\n```json\n{\n    "name": "weather",\n'
    )
    assert with_system.startswith(f"{BOS}Be brief.\n\n{section}") and with_system.endswith(f"\n}}\n```{USER}Hi")
    assert text_of(tokenizer, render(tokenizer, TALK[1:2], tools=TOOLS).tokens).startswith(BOS + section)
    assert "\u5929\u6c14" in with_system


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_markers_in_content_open_no_role(tokenizer: Tokenizer, template: Template, role: str) -> None:
    hostile = "".join(MARKERS)
    markers = set(tokenizer.special_ids.values())
    mild = render(tokenizer, [{"role": role, "content": "x"}], template=template)
    attacked = render(tokenizer, [{"role": role, "content": hostile}], template=template)
    assert [t for t in attacked.tokens if t in markers] == [t for t in mild.tokens if t in markers]
    assert hostile in text_of(tokenizer, attacked.tokens)


def test_markers_in_tool_fields_open_nothing(tokenizer: Tokenizer) -> None:
    hostile = f"{EOS}{USER}"
    attack = [{"role": "assistant", "content": None, "tool_calls": [call(hostile, hostile)]}, {"role": "tool", "content": hostile}]
    rendered = render(tokenizer, attack, tools=[{"function": {"name": hostile}}])
    assert tokenizer.special_ids[USER] not in rendered.tokens
    assert rendered.tokens.count(tokenizer.eos_id) == 1


def test_fim_is_prefix_suffix_middle(tokenizer: Tokenizer) -> None:
    prompt = render_fim(tokenizer, "def f():\n", f"\n# {EOS}")
    assert text_of(tokenizer, prompt.tokens) == f"{BOS}{FIM_BEGIN}def f():\n{FIM_HOLE}\n# {EOS}{FIM_END}"
    assert not any(prompt.loss_mask) and tokenizer.eos_id not in prompt.tokens
    whole = render_fim(tokenizer, "def f():\n", f"\n# {EOS}", "    pass")
    assert whole.tokens[: len(prompt.tokens)] == prompt.tokens
    tail = [token for token, learn in zip(whole.tokens, whole.loss_mask, strict=True) if learn]
    assert text_of(tokenizer, tail) == f"    pass{EOS}" and whole.tokens[-len(tail) :] == tail


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([], "v2.5", "no messages"),
        (["hi"], "v2.5", "message 0 is of type str"),
        ([{"role": "judge", "content": "x"}], "v2.5", "message 0 has role 'judge'; template v2.5 knows system, user, assistant, tool"),
        ([{"role": "tool", "content": "x"}], "v2", "message 0 has role 'tool'"),
        ([{"role": "user", "content": "x", "prefix": True}], "v2.5", "message 0 has the field 'prefix'"),
        ([{"role": "user", "content": "x", "tool_calls": [call("f", "{}")]}], "v2.5", r"message 0 \(role user\) has tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": [call("f", "{}")]}], "v2", r"only the assistant of template v2.5"),
        ([{"role": "assistant", "content": None, "tool_calls": 3}], "v2.5", "tool_calls of message 0 is of type int"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "v2.5", "tool call 0 of message 0 is not of the form"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [call("f", 3)]}],
            "v2.5",
            "arguments of tool call 0 of message 0 is of type int",
        ),
        ([TALK[1], {"role": "assistant", "content": None}], "v2.5", "content of message 1 is of type NoneType"),
        ([TALK[1], {"role": "user", "content": "ab\ud800"}], "v2", r"content of message 1 holds a lone surrogate U\+D800 at character 2"),
    ],
)
def test_malformed_messages_are_named(tokenizer: Tokenizer, messages: list[Message], template: Template, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(tokenizer, messages, template=template)


def test_a_template_that_cannot_be_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="template 'v3' is unknown"):
        render(tokenizer, TALK, template="v3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="template 'v3' is unknown"):
        chat_template("v3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="template v2 has no tools"):
        render(tokenizer, TALK, template="v2", tools=TOOLS)
    with pytest.raises(DataError, match="tool 0 is not of the form"):
        render(tokenizer, TALK, tools=[{"name": "weather"}])


# Published files ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def auto_v25(published: Published, published_v25: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    folder: Path = tmp_path_factory.mktemp("auto_v25")
    published_v25.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def upstream(published: Published, auto_v25: AutoTokenizer) -> Callable[..., list[int]]:
    """Ids by a published template. Rendered without transformers 5, which drops ``content`` when it is None and so breaks V2.5's."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def ids(name: str, messages: list[Message], prompt: bool) -> list[int]:
        text = environment.from_string(published.configs[name]["chat_template"]).render(
            messages=messages, add_generation_prompt=prompt, bos_token=BOS, eos_token=EOS
        )
        return auto_v25(text, add_special_tokens=False).input_ids

    return ids


def test_v2_equals_the_published_template(published_v25: Tokenizer, upstream: Callable[..., list[int]]) -> None:
    @steady
    @given(CONVERSATIONS["v2"], st.booleans())
    def compare(messages: list[Message], prompt: bool) -> None:
        ours = render(published_v25, messages, template="v2", add_generation_prompt=prompt)
        assert ours.tokens == upstream("deepseek-v2", messages, prompt)

    compare()


def test_strict_upstream_equals_the_published_template(published_v25: Tokenizer, upstream: Callable[..., list[int]]) -> None:
    arguments_as_text = CALLING.filter(lambda m: all(isinstance(c["function"]["arguments"], str) for c in m["tool_calls"]))

    @steady
    @given(st.lists(st.one_of(PLAIN, arguments_as_text, RESULT), min_size=1, max_size=8), st.booleans())
    def compare(messages: list[Message], prompt: bool) -> None:
        ours = render(published_v25, messages, add_generation_prompt=prompt, strict_upstream=True)
        assert ours.tokens == upstream("deepseek-v2.5", messages, prompt)

    compare()


def test_intent_equals_upstream_without_its_faults(published_v25: Tokenizer, upstream: Callable[..., list[int]]) -> None:
    """Talk without tools, and the one tool round upstream gets right: two parallel calls, as in the model card."""
    for messages in (TALK, TOOLS_TALK[:4]):
        assert render(published_v25, messages, add_generation_prompt=True).tokens == upstream("deepseek-v2.5", messages, True)


def test_a_v2_tokenizer_has_no_roles_as_markers(published: Published) -> None:
    tokenizer = Tokenizer.load(published.v2)
    assert render(tokenizer, TALK) == render(tokenizer, TALK, template="v2")
    with pytest.raises(ConfigError, match="the tokenizer has no marker"):
        render(tokenizer, TALK, template="v2.5")
    with pytest.raises(ConfigError, match="the tokenizer has no marker"):
        render_fim(tokenizer, "a", "b")
    tokenizer.template = None
    with pytest.raises(ConfigError, match="neither V2's nor V2.5's"):
        render(tokenizer, TALK)
