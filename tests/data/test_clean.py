import json
import unicodedata

import pytest

from dsv2.data.clean import Drop, code_kind, judge_code, judge_contentious, judge_general, repeated_share, visible_text
from dsv2.data.language import language_of
from dsv2.data.reading import DIGIT, IDEOGRAPH, LETTER, gram_hashes, read
from dsv2.data.recipe import CodeRules, ContentiousRules, GeneralRules

RULES = GeneralRules()
ENGLISH = (
    "The river rises in the hills to the north and runs for forty miles through farms and woods before it meets the sea. "
    "In spring the water stands high, and boats of every size carry grain to the mills. Children fish from the old stone bridge, "
    "while their parents sell bread, cheese and apples at a market that has been held each Saturday since anyone can remember."
)
CHINESE = (
    "这条河发源于北方的山地，流经农田和树林四十里，最后汇入大海。春天水位很高，大小船只把粮食运往磨坊。"
    "孩子们在古老的石桥上钓鱼，父母则在集市上出售面包、奶酪和苹果，这个集市自古以来每逢周六举行。"
)
HINDI = (
    "यह नदी उत्तर की पहाड़ियों से निकलती है और चालीस मील तक खेतों तथा जंगलों से होकर बहती हुई अंत में समुद्र में मिल जाती है। "
    "वसंत में पानी ऊँचा रहता है, और छोटी बड़ी नावें चक्कियों तक अनाज पहुँचाती हैं। बच्चे पुराने पत्थर के पुल से मछली पकड़ते हैं, "
    "जबकि उनके माता पिता बाज़ार में रोटी, पनीर और सेब बेचते हैं, जो हर शनिवार को लगता है।"
)


def rule(drop: Drop | None) -> str | None:
    return drop.rule if drop else None


# Reading ----------------------------------------------------------------------------------------------------------------------------------


def test_words_are_runs_of_letters_and_single_han_characters():
    reading = read("Été_1, x2中文ok かな\n\nEND\n")
    words = [reading.text[a : a + n] for a, n in zip(reading.word_starts, reading.word_lens, strict=True)]
    assert words == ["Été_1", "x2", "中", "文", "ok", "か", "な", "END"]
    assert reading.ideograph_words().tolist() == [False, False, True, True, False, True, True, False]
    assert reading.lines() == ["Été_1, x2中文ok かな", "", "END"]
    assert (reading.count(DIGIT), reading.count(IDEOGRAPH)) == (2, 4)
    assert reading.count(LETTER) == 3 + 1 + 2 + 2 + 2 + 3, "an underscore is part of a word, and no letter"


def test_vowel_signs_and_accents_belong_to_the_word_they_stand_on():
    def words(text):
        reading = read(text)
        return [text[a : a + n] for a, n in zip(reading.word_starts.tolist(), reading.word_lens.tolist(), strict=True)]

    assert words("हिन्दी में लिखा") == ["हिन्दी", "में", "लिखा"]
    assert words(unicodedata.normalize("NFD", "Tiếng Việt")) == [unicodedata.normalize("NFD", word) for word in ("Tiếng", "Việt")]
    assert words("か\u3099き") == ["か\u3099", "き"]
    assert words("\u0301 \u2764\ufe0f ok") == ["ok"], "a mark that stands on no letter is no word"


@pytest.mark.parametrize("text", ["", "\n", " ", "...", "\U0001f600\U0010ffff", "a\n"])
def test_texts_with_next_to_nothing_are_read(text):
    reading = read(text)
    assert len(reading.word_starts) == len(reading.word_lens) == len(reading.word_hashes) == (1 if "a" in text else 0)
    assert reading.lines() == text.removesuffix("\n").split("\n")
    assert repeated_share(reading, 10) == 0.0


def test_hashes_know_the_order_of_letters_and_words_but_no_case():
    def hashes(text, length=1):
        return gram_hashes(read(text).word_hashes, length).tolist()

    assert hashes("Abc") == hashes("aBC") != hashes("acb")
    assert hashes("one two three", 2) == [*hashes("one, two", 2), *hashes("TWO... three", 2)]
    assert hashes("one two", 2) != hashes("two one", 2)
    assert hashes("one two", 3) == []
    assert len(set(hashes(" ".join(str(n) for n in range(20_000))))) == 20_000


# General rules ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, f"{ENGLISH}\n\n{CHINESE}", HINDI], ids=["en", "zh", "both", "hi"])
def test_sound_text_passes(text):
    assert judge_general(read(text), RULES) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("too short", "general.length"),
        ("太短了", "general.length"),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2, "general.mean_word_len"),
        ("unbrokenlinesofletters%s " * 30 % tuple("abcdefghijklmnopqrstuvwxyzabcd"), "general.mean_word_len"),
        (" ".join(f"word{n} 12345 {n} {n * 7919} +-*/ (=) [{n}]" for n in range(30)), "general.letters"),
        (ENGLISH.replace(" ", " # "), "general.symbols"),
        ("\n".join(f"- {sentence}" for sentence in ENGLISH.split(" ")), "general.bullets"),
        (ENGLISH + "\n" + "\n".join(f"read more about {word} …" for word in ("rivers", "hills", "mills")), "general.ellipses"),
        ("\n".join([ENGLISH[:40]] * 3 + [ENGLISH, ENGLISH[60:110]]), "general.repeated_lines"),
        ("\n".join([CHINESE, CHINESE]), "general.repeated_lines"),
        (" ".join(f"{word} buy now" for word in ENGLISH.split()), "general.top_gram"),
        (f"{ENGLISH} {ENGLISH} The end.", "general.repeated_grams"),
        (f"{CHINESE}{CHINESE}完了。", "general.repeated_grams"),
    ],
)
def test_a_flaw_is_named(text, name):
    drop = judge_general(read(text), RULES)
    assert rule(drop) == name
    assert any(character.isdigit() for character in drop.why), "the value that was seen"


def test_a_threshold_moves_the_border():
    text = f"{ENGLISH} {ENGLISH} The end."
    assert repeated_share(read(text), 10) == pytest.approx(0.5, abs=0.03)
    assert judge_general(read(text), GeneralRules(max_repeated_grams=0.6)) is None


@pytest.mark.parametrize(("text", "name"), [("### ###", "general.symbols"), ("!?", None), (" \n", None), ("", None)])
def test_texts_without_a_word_are_judged_where_the_rules_let_them_come_so_far(text, name):
    assert rule(judge_general(read(text), GeneralRules(min_words=0, min_letter_share=0))) == name


# Code: section 9.1 of the specification ---------------------------------------------------------------------------------------------------

LINE = "x = compute(first, second)  # plain\n"
CODE = CodeRules()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (LINE * 3, None),
        (("a" * 100 + "\n") * 5, None),
        (("a" * 101 + "\n") * 5, "code.mean_line"),
        ("a" * 1000 + "\n" + LINE * 20, None),
        ("a" * 1001 + "\n" + LINE * 20, "code.max_line"),
        ("a" * 25 + "1" * 74 + "\n", None),
        ("a" * 24 + "1" * 75 + "\n", "code.letters"),
        ("a" * 24 + "_" * 75 + "\n", "code.letters"),
        ('<?xml version="1.0"?>\n' + "<name>value</name>\n" * 5, "code.xml"),
        ("text\n" * 20 + '<?xml version="1.0"?>\n', None),
        ('<?xml version="1.0"?>\n<xsl:stylesheet version="1.0">\n' + "<name>value</name>\n" * 5, None),
    ],
)
def test_code_rules_at_their_borders(text, name):
    assert rule(judge_code(read(text), CODE)) == name


@pytest.mark.parametrize(
    ("visible", "markup", "name"),
    [(100, 200, None), (99, 0, "code.html"), (400, 1400, None), (400, 1700, "code.html")],
)
def test_html_needs_visible_text(visible, markup, name):
    body = ("words " * 8 + "ends\n") * (visible // 53 + 1)
    body = body[: visible - 1] + "x"
    script = "\n".join("let x = 'never seen';" for _ in range(markup // 22))
    text = f"<!DOCTYPE html>\n<html><script>{script}</script>\n<body>{body}</body></html>\n"
    assert len(visible_text(text)) == visible
    assert rule(judge_code(read(text), CODE)) == name


def test_a_head_that_is_never_closed_ends_where_the_body_begins():
    head = "<!DOCTYPE html>\n<html><head><meta charset=utf-8><title>no</title><style>p {}</style>"
    assert visible_text(f"{head}\n<p>one</p> <p>two</p>") == visible_text(f"{head}</head><body>one two") == "one two"


@pytest.mark.parametrize(("length", "name"), [(49, "code.json"), (50, None), (5000, None), (5001, "code.json")])
def test_json_has_a_length(length, name):
    text = json.dumps(["word"] * (length // 10), indent=0)
    text = text[:-1] + "\n" * (length - len(text)) + "]"
    assert len(text) == length
    assert rule(judge_code(read(text), CODE)) == name
    assert rule(judge_code(read(text), CODE, path="a/b.json")) == name
    assert rule(judge_code(read(text), CODE, path="a/b.yml")) == (name and "code.yaml")
    assert rule(judge_code(read(text), CODE, path="a/b.py")) is None


def test_the_kind_of_a_file():
    assert code_kind("<!-- x -->\n<HTML>") == "html"
    assert code_kind("{not json}") == ""
    assert code_kind("---\nkey: 1\n") == "yaml"
    assert code_kind("anything", "page.HTM") == "html"
    assert code_kind("<html>", "page.py") == ""
    assert code_kind("[" * 100_000 + "]" * 100_000) == ""  # deeper than the parser goes


# Contentious content, language ------------------------------------------------------------------------------------------------------------


def test_contentious_content_needs_several_terms_and_many():
    rules = ContentiousRules()
    assert rule(judge_contentious(read("The death penalty and abortion divide the parties."), rules)) == "contentious.terms"
    assert rule(judge_contentious(read("关于死刑和堕胎的争论"), rules)) == "contentious.terms"
    assert judge_contentious(read("abortion abortion abortion"), rules) is None
    assert judge_contentious(read("Abortion, the death penalty. " + ENGLISH * 20), rules) is None
    assert judge_contentious(read("the segregations of an aborted euthanasist"), rules) is None
    assert judge_contentious(read(ENGLISH), ContentiousRules(terms=())) is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (CHINESE, "zh"),
        ("これは川についての短い文章です。子供たちは橋の上で釣りをします。", "ja"),
        ("이 강은 북쪽의 산에서 시작하여 바다로 흐른다. 아이들은 다리에서 낚시를 한다.", "ko"),
        ("Der Fluss entspringt in den Bergen im Norden und fließt durch Felder und Wälder, bevor er das Meer erreicht.", "de"),
        ("Река берёт начало в горах на севере и течёт через поля и леса, прежде чем впадает в море.", "ru"),
        ("La rivière prend sa source dans les collines du nord et traverse des champs avant de rejoindre la mer.", "fr"),
        ("12 + 3 = 15", "unknown"),
    ],
)
def test_languages(text, language):
    assert language_of(read(text)) == language
