"""Quality of preference data: what is dropped, and how often each source is seen ("quality filtering and proportion adjustments",
section 4.2; neither the filters nor the proportions are published, so these are ours).
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from dsv2.data.order import canonical, content_lot
from dsv2.data.preferences import Answer, Preference
from dsv2.errors import ConfigError, did_you_mean


def content_hash(preference: Preference) -> int:
    """Return 64 bits that the answers alone decide, in whichever order: the two directions of a comparison have the same."""
    return content_lot("\0".join(sorted(_text(answer) for answer in preference.answers)))


def filtered(
    preferences: Sequence[Preference], *, drop_contradictions: bool = True, max_length_ratio: float | None = None
) -> tuple[list[Preference], Counter[str]]:
    """Drop what is there twice, what contradicts itself, and pairs that mere length decides; return the rest, and how many by reason.

    Args:
        preferences: in order.
        drop_contradictions: drop both of two rows that judge the same answers differently.
        max_length_ratio: characters of the longer answer of a pair over those of the shorter; None: any.
    """
    verdicts: dict[int, set[str]] = {}
    for preference in preferences:
        verdicts.setdefault(content_hash(preference), set()).add(_verdict(preference))
    kept: list[Preference] = []
    dropped: Counter[str] = Counter()
    seen: set[int] = set()
    for preference in preferences:
        content = content_hash(preference)
        reason = None
        if drop_contradictions and len(verdicts[content]) > 1:
            reason = "the same answers are judged differently in another row"
        elif content in seen:
            reason = "it was there before"
        elif max_length_ratio is not None and preference.is_pair and _length_ratio(preference) > max_length_ratio:
            reason = f"one answer is more than {max_length_ratio:g} times as long as the other"
        seen.add(content)
        if reason is None:
            kept.append(preference)
        else:
            dropped[reason] += 1
    return kept, dropped


def in_proportion(preferences: Sequence[Preference], weights: Mapping[str, float]) -> list[Preference]:
    """Repeat or thin out the sources: of weight 2 a source is there twice, of weight 0.5 half of it; unnamed ones have 1.

    Which part is kept its content decides, so it is the same whatever else is in the data.

    Raises:
        ConfigError: a weight is negative, names no source, or nothing is left.
    """
    domains = Counter(preference.domain for preference in preferences)
    for name, weight in weights.items():
        if name not in domains:
            raise ConfigError(f"data.weights names {name!r}; the sources are {', '.join(domains)}", hint=did_you_mean(name, domains))
        if not 0 <= weight <= 100:
            raise ConfigError(f"data.weights.{name} = {weight:g}; it can be 0 to 100")
    found = [
        preference
        for preference in preferences
        for _ in range(_copies(weights.get(preference.domain, 1.0), content_hash(preference) / 2**64))
    ]
    if not found:
        raise ConfigError("data.weights leave no preference", hint="give one source a weight above 0")
    return found


def _copies(weight: float, place: float) -> int:
    return int(weight) + (place < weight - int(weight))


def _text(answer: Answer) -> str:
    return canonical([answer.prompt, answer.messages, answer.tools])


def _verdict(preference: Preference) -> str:
    return _text(preference.answers[0]) if preference.is_pair else str(preference.score)


def _length_ratio(preference: Preference) -> float:
    lengths = [sum(len(message.get("content") or "") for message in answer.messages) for answer in preference.answers]
    return max(lengths) / max(1, min(lengths))
