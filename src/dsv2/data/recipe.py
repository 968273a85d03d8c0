"""The recipe of ``dsv2 prepare``: which rules are on, and their thresholds. Every rule is off until a recipe turns it on."""

from typing import Literal

from pydantic import Field

from dsv2.config import Section

PersonalKind = Literal["email", "ip", "phone"]


class EncodingRules(Section):
    """Text that was decoded wrongly: mended where that is certain, refused where it is lost."""

    enabled: bool = Field(default=False, description="Mend mojibake (with ftfy), CR LF and control characters; refuse what is lost.")
    max_lost_share: float = Field(default=0.001, ge=0, le=1, description="Of characters that are lost (U+FFFD, private use).")


class PersonalRules(Section):
    """Personal data, each replaced by its kind in brackets."""

    enabled: bool = Field(default=False, description="Replace personal data, such as an e-mail address by [email].")
    kinds: tuple[PersonalKind, ...] = Field(default=("email", "ip", "phone"), description="What is replaced; of email, ip, phone.")


class GeneralRules(Section):
    """Of natural language: Gopher's rules (Rae et al. 2021, A.1.1) with bounds that hold for Chinese, too."""

    enabled: bool = Field(default=False, description="Judge documents that are not code.")
    min_words: int = Field(default=20, ge=0, description="A Han character or kana is a word.")
    max_words: int = Field(default=1_000_000, ge=1, description="Of a document.")
    min_mean_word_len: float = Field(default=2.5, ge=0, description="Characters; where most words are no Han characters.")
    max_mean_word_len: float = Field(default=12.0, ge=0, description="Characters; where most words are no Han characters.")
    min_letter_share: float = Field(default=0.5, ge=0, le=1, description="Of the characters that are not blank.")
    max_symbols_per_word: float = Field(default=0.1, ge=0, description="# and ellipses.")
    max_bullet_lines: float = Field(default=0.9, ge=0, le=1, description="Share of lines that begin with a bullet.")
    max_ellipsis_lines: float = Field(default=0.3, ge=0, le=1, description="Share of lines that end in an ellipsis.")
    max_repeated_lines: float = Field(default=0.3, ge=0, le=1, description="Share of lines that stood there before.")
    max_repeated_line_chars: float = Field(default=0.2, ge=0, le=1, description="Share of characters in lines that stood there before.")
    max_top_grams: tuple[float, float, float] = Field(
        default=(0.20, 0.18, 0.16), description="Share of characters in the commonest run of 2, of 3 and of 4 words."
    )
    max_repeated_grams: float = Field(
        default=0.2, ge=0, le=1, description="Share of characters in runs of 10 words (20 in Chinese) that recur."
    )


class CodeRules(Section):
    """Of code: the rules of DeepSeek-Coder-V2 (2.1)."""

    enabled: bool = Field(default=False, description="Judge documents of the code domains.")
    domains: tuple[str, ...] = Field(default=("code*",), description="Which domains are code; * stands for anything.")
    max_mean_line: float = Field(default=100, ge=1, description="Characters.")
    max_line: int = Field(default=1000, ge=1, description="Characters.")
    min_letter_share: float = Field(default=0.25, ge=0, le=1, description="Of all characters.")
    min_html_share: float = Field(default=0.2, ge=0, le=1, description="Visible text, of an HTML file's characters.")
    min_html_chars: int = Field(default=100, ge=0, description="Visible text of an HTML file.")
    min_data_chars: int = Field(default=50, ge=0, description="Of a JSON or YAML file.")
    max_data_chars: int = Field(default=5000, ge=1, description="Of a JSON or YAML file.")


class LanguageRules(Section):
    """The language tag."""

    enabled: bool = Field(default=False, description="Tag each document, and count by language.")
    keep: tuple[str, ...] = Field(default=(), description="Languages kept, such as en and zh; empty: all. Code is always kept.")


class ContentiousRules(Section):
    """Content that is disputed between regions (DeepSeek-V2, appendix E); the paper says that it costs MMLU Humanity-Moral."""

    enabled: bool = Field(default=False, description="Drop documents that dwell on the terms.")
    terms: tuple[str, ...] = Field(
        default=(
            "abortion", "gun control", "gay marriage", "death penalty", "euthanasia", "segregation", "affirmative action", "pro-life",
            "critical race theory", "pro-choice", "堕胎", "枪支管制", "同性婚姻", "死刑", "安乐死", "种族隔离",
        ),
        description="Words and phrases, whatever their case. The paper's own list is not public: bring one for your purpose.",
    )  # fmt: skip
    min_distinct: int = Field(default=2, ge=1, description="Different terms in a document from which it is dropped.")
    min_per_thousand: float = Field(default=2.0, ge=0, description="Terms in 1000 words from which it is dropped.")


class DuplicateRules(Section):
    """Equal and nearly equal documents; the first in the order of the sources stays."""

    exact: bool = Field(default=False, description="Drop documents whose text is equal but for blanks and Unicode form.")
    near: bool = Field(default=False, description="Drop documents whose words are nearly equal, by MinHash (with datasketch).")
    threshold: float = Field(
        default=0.7, gt=0, le=1, description="Similarity (Jaccard, of runs of words) from which documents are duplicates."
    )
    words: int = Field(default=5, ge=1, description="In a run.")
    bands: int = Field(default=20, ge=2, description="Of the locality-sensitive hash; bands x rows hashes are taken of a document.")
    rows: int = Field(default=5, ge=1, description="Of a band.")


class ContaminationRules(Section):
    """Text of benchmarks; on when ``dsv2 prepare`` is given a folder of them."""

    words: int = Field(default=13, ge=2, description="Length of the shared run that counts.")
    ideographs: int = Field(default=20, ge=2, description="Length of the shared run that counts in Chinese and Japanese.")


class FimRules(Section):
    """Fill-in-the-middle, of whole documents before they are packed."""

    rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of the documents of its domains that are turned; Coder-V2-Lite 0.5, Coder-V2 0."
    )
    domains: tuple[str, ...] = Field(
        default=("code*",), description="Which domains; * stands for anything. Code alone is our reading of the report."
    )
    seed: int = Field(default=0, ge=0, lt=2**64, description="Of the choice and of the cuts.")


class PrepareRecipe(Section):
    """All of it. Without a recipe every document goes to the shards as it is."""

    encoding: EncodingRules = EncodingRules()
    personal: PersonalRules = PersonalRules()
    general: GeneralRules = GeneralRules()
    code: CodeRules = CodeRules()
    language: LanguageRules = LanguageRules()
    contentious: ContentiousRules = ContentiousRules()
    duplicates: DuplicateRules = DuplicateRules()
    contamination: ContaminationRules = ContaminationRules()
    fim: FimRules = FimRules()
