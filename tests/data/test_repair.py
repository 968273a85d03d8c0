import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.data.recipe import EncodingRules, PersonalRules
from dsv2.data.repair import mask, mend

PERSONAL, ENCODING = PersonalRules(), EncodingRules()
SOUND = "Grüße aus Köln – “déjà vu” … naïve, señor; 中文文本。 ÄÖÜ €5 ½ ©"


@pytest.mark.parametrize(
    ("text", "masked", "kinds"),
    [
        ("write to Ann.Lee+x@mail.example.org!", "write to [email]!", {"email": 1}),
        ("<a@b.co>, c_d@e-f.info。", "<[email]>, [email]。", {"email": 2}),
        ("请联系zhang.san@qq.com或李四", "请联系[email]或李四", {"email": 1}),
        ("from 8.8.8.8 and 2001:4860:4860::8888.", "from [ip] and [ip].", {"ip": 2}),
        ("call +1 (415) 555-2671 or 415-555-2671", "call [phone] or [phone]", {"phone": 2}),
        ("(415) 555-2671; +44 20 7946 0958", "[phone]; [phone]", {"phone": 2}),
        ("手机13812345678，座机010-62345678", "手机[phone]，座机[phone]", {"phone": 2}),
        ("手机 138 1234 5678。", "手机 [phone]。", {"phone": 1}),
    ],
)
def test_personal_data_is_masked_and_counted(text, masked, kinds):
    assert mask(text, PERSONAL) == (masked, kinds)


@pytest.mark.parametrize(
    "text",
    [
        "@decorator def f(a@b)", "x @ y.z", "user@localhost", "git@github",  # no addresses
        "127.0.0.1 10.0.0.1 192.168.1.1 0.0.0.0 ::1 fe80::1 256.1.1.1", "version 1.2.3", "std::vector<a::b>", "12:30:45", "1.2.3.4.5",
        "1381234567890123", "0.13812345678", "2024-01-15", "a = 13812345678901", "ISBN 978-3-16-148410-0", "+1 and +2", "1,234,567,890",
        "3.14159265358979", "0x13812345678", "id-13812345678",
    ],
)  # fmt: skip
def test_what_only_looks_like_personal_data_stays(text):
    assert mask(text, PERSONAL) == (text, {})


def test_kinds_can_be_left_out():
    assert mask("a@b.co 8.8.8.8", PersonalRules(kinds=("ip",))) == ("a@b.co [ip]", {"ip": 1})


PARTS = [
    "a@b.co",
    "8.8.8.8",
    "+1 415 555 2671",
    "415-555-2671",
    "13812345678",
    " ",
    "-",
    ".",
    ":",
    "+",
    "@",
    "1",
    "x",
    "(",
    "中",
    "2001:db8::1",
]


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join))
def test_masking_twice_is_masking_once(text):
    masked, _ = mask(text, PERSONAL)
    assert mask(masked, PERSONAL) == (masked, {})


# Encodings --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["latin-1", "windows-1252"])
def test_utf8_that_was_read_as_something_else_is_mended(wrong):
    line = "L’été à Genève: naïve café, Größe"
    text, done, drop = mend(f"{SOUND}\n{line.encode().decode(wrong)}\n{SOUND}", ENCODING)
    assert text == f"{SOUND}\n{line}\n{SOUND}"
    assert done["mojibake"] == 1
    assert drop is None


def test_sound_text_is_left_alone():
    assert mend(SOUND, ENCODING) == (SOUND, {}, None)
    assert mend("plain ASCII\n\ttab\fpage\x1b[0m", ENCODING) == ("plain ASCII\n\ttab\fpage\x1b[0m", {}, None)


def test_line_ends_and_control_characters():
    assert mend("a\r\nb\rc\x00\x08d\x07\ufeff", ENCODING)[:2] == ("a\nb\nc\x08d", {"line ends": 1, "control characters": 3})


@pytest.mark.parametrize("lost", ["\ufffd", "\ue000", "锟斤拷"])
def test_lost_text_is_refused(lost):
    _, _, drop = mend("文本" * 50 + lost, ENCODING)
    assert drop is not None
    assert drop.rule == "encoding.lost"
    assert mend("文本" * 5000 + lost, ENCODING)[2] is None


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_mending_removes_no_letters_of_sound_text(text):
    mended, done, _ = mend(text, ENCODING)
    if not done:
        assert mended == text
    again, done_again, _ = mend(mended, ENCODING)
    assert again == mended or done_again["mojibake"]
