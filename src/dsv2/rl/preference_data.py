"""What a run on preferences reads: packed answers, held-out ones, and how they came about."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv2.data.order import canonical, drawn_by_content
from dsv2.data.preference_filters import filtered, in_proportion
from dsv2.data.preference_rows import JudgedAnswers, PreferenceRows, render_preferences
from dsv2.data.preferences import Preference, read_preferences
from dsv2.data.rows import ReadingReport, Refused
from dsv2.errors import DataError
from dsv2.rl.preference_recipe import PreferenceRecipe
from dsv2.tokenizer.tokenizer import Tokenizer

Paths = Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """Everything that a run reads, rendered and packed.

    Args:
        rows: to train on.
        held_out: by domain; empty without any.
        tokenizer: of the model, with the template that the answers are written in.
        num_preferences: trained on, by domain.
        reports: what was read and refused, of the training files and of the validation files.
        dropped: rows that the filters left out, by reason.
    """

    rows: PreferenceRows
    held_out: dict[str, PreferenceRows]
    tokenizer: Tokenizer
    num_preferences: dict[str, int]
    reports: dict[str, ReadingReport]
    dropped: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Hash of all answers and the tokenizer: equal fingerprints are equal data."""
        parts = [rows.answers.fingerprint for rows in (self.rows, *self.held_out.values())]
        return hashlib.sha256(" ".join([*parts, self.tokenizer.fingerprint]).encode()).hexdigest()


def open_preferences(
    recipe: PreferenceRecipe,
    tokenizer: Tokenizer,
    paths: Paths,
    *,
    validation: Paths = (),
    form: Callable[[Preference], list[Preference]] = lambda preference: [preference],
) -> PreferenceData:
    """Read, filter, weigh, render and pack what a run trains on and what it is validated on.

    Args:
        recipe: says how.
        tokenizer: of the model.
        paths: files and folders of preferences.
        validation: those held out; without any the recipe's share of the prompts. They are not weighed.
        form: what the loss makes of a preference; raises Refused where it can make nothing of it, and the row is refused.

    Raises:
        DataError: a file is missing or damaged, more rows are refused than the recipe allows, or none is left.
        ConfigError: the template does not fit the tokenizer, or a weight names no source.
    """
    section, tokenizer = recipe.data, tokenizer.with_template(recipe.data.template)
    reports = {name: ReadingReport("preferences") for name in (("training", "validation") if validation else ("training",))}
    share = 0.0 if validation else section.validation_share
    dropped: Counter[str] = Counter()

    def read(name: str, files: Paths) -> list[Preference]:
        given = list(read_preferences(files, reports[name]))
        kept, left_out = filtered(given, drop_contradictions=section.drop_contradictions, max_length_ratio=section.max_length_ratio)
        dropped.update(left_out)
        return _formed(kept, form, reports[name])

    def render(preferences: list[Preference], name: str) -> JudgedAnswers:
        return render_preferences(
            preferences, tokenizer, template=section.template, seq_len=recipe.run.seq_len, too_long=section.too_long, report=reports[name]
        )

    def is_held_out(preference: Preference) -> bool:
        return drawn_by_content(canonical(preference.answers[0].prompt), share)  # no prompt is on both sides

    given = read("training", paths)
    training = [one for one in given if not is_held_out(one)]
    held = read("validation", validation) if validation else [one for one in given if is_held_out(one)]
    training = in_proportion(training, section.weights) if training else []
    name = "validation" if validation else "training"
    by_domain = {domain: [one for one in held if one.domain == domain] for domain in dict.fromkeys(one.domain for one in held)}
    answers = render(training, "training")
    held_answers = {domain: rendered for domain, preferences in by_domain.items() if len(rendered := render(preferences, name))}
    for found, purpose, which in ((len(answers), "to train on", "training"), (len(held_answers), "to validate on", "validation")):
        if which in reports and not found:
            reason = "; ".join(reports[which].lines())
            raise DataError(f"no preference is left {purpose}: {reason}", hint="raise run.seq_len, or mend the files")
    for which, report in reports.items():
        report.require_few_refused(which, section.max_refused)
    held_out = {domain: _packed(rendered, recipe, tokenizer) for domain, rendered in held_answers.items()}
    counts = dict(Counter(one.domain for one in training))
    return PreferenceData(_packed(answers, recipe, tokenizer), held_out, tokenizer, counts, reports, dict(dropped))


def _formed(preferences: Sequence[Preference], form: Callable[[Preference], list[Preference]], report: ReadingReport) -> list[Preference]:
    """Return what the loss makes of preferences; those of which it can make nothing are refused in ``report``."""
    found: list[Preference] = []
    for preference in preferences:
        try:
            found += form(preference)
        except Refused as reason:
            report.refuse(str(reason), preference.place)
    return found


def _packed(answers: JudgedAnswers, recipe: PreferenceRecipe, tokenizer: Tokenizer) -> PreferenceRows:
    return PreferenceRows(answers, recipe.run.seq_len, pad_id=tokenizer.eos_id)


def only_pairs(preference: Preference) -> list[Preference]:
    """Return a pair as it is: the ``form`` of a loss that compares two answers.

    Raises:
        Refused: it is a single answer.
    """
    if not preference.is_pair:
        raise Refused("it is one answer with a score, no pair; of a reward model's losses, loss.kind = 'logistic' and 'squared' take both")
    return [preference]
