"""The rollouts of a run as a page to browse: groups of answers to one prompt, with what each earned; filtered by step, sorted by reward."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsv2.errors import DataError
from dsv2.report.learning import evenly
from dsv2.report.page import write_page

MOST_ROLLOUTS = 2000  # on a page: a browser sorts these at once, and the file stays below some megabytes
LONGEST_TEXT = 6000  # characters of one text

Row = Mapping[str, Any]


def write_rollouts(run: Path, out: Path, *, most: int = MOST_ROLLOUTS) -> None:
    """Write the page of a run's rollouts.

    Args:
        run: folder with a rollouts.jsonl: one JSON object a rollout, with step, group, index, text, reward, rewards (by name),
            advantage, num_tokens, finish_reason, and with the first of a group prompt (a text or messages) and example; under process
            supervision with steps, each of which has reward and advantage.
        out: the HTML file.
        most: rollouts on the page; of more, whole groups are taken evenly over the run, and the page says so.

    Raises:
        DataError: no such file, no rollout in it, or a damaged line that is not the last.
    """
    path = run / "rollouts.jsonl"
    sizes: dict[tuple[int, int], int] = {}
    earned: dict[int, list[float]] = {}  # step -> rewards
    for row in _rows(path):
        sizes[_key(row)] = sizes.get(_key(row), 0) + 1
        if (reward := row.get("reward")) is not None:
            earned.setdefault(row["step"], []).append(reward)
    if not sizes:
        raise DataError(f"{path} holds no rollout", hint="let the run take a step")
    num, keys = sum(sizes.values()), list(sizes)
    chosen = evenly(range(len(keys)), max(2, most * len(keys) // num)) if num > most else range(len(keys))
    groups: dict[tuple[int, int], list[Row]] = {keys[i]: [] for i in chosen}
    for row in _rows(path):
        if _key(row) in groups:
            groups[_key(row)].append(row)
    shown = sum(map(len, groups.values()))
    note = f" Shown are {shown:,} of its {num:,} rollouts, whole groups taken evenly over the run." if shown < num else ""
    write_page(
        out,
        title=f"Rollouts of {run.resolve().name}",
        subtitle=f"Answers to the same prompt stand together, with their rewards.{note}",
        summary=_cards(num, len(sizes), earned),
        body=f'{_controls(sorted({step for step, _ in groups}))}\n<div id="groups">\n{_groups(groups)}\n</div>',
        style=_resource("rollouts.css"),
        script=_resource("rollouts.js"),
    )


def _rows(path: Path) -> Iterator[Row]:
    """Yield the lines of the file, a torn last one left out; they are never all in memory."""
    if not path.is_file():
        raise DataError(f"there are no rollouts at {path}", hint="give the folder of a run of dsv2 grpo")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                _key(row)
            except (ValueError, KeyError, TypeError) as error:
                if line.endswith(b"\n"):
                    raise DataError(f"{path}:{number}: not a rollout: {line[:60]!r}", hint="remove that line") from error
                return
            yield row


def _key(row: Row) -> tuple[int, int]:
    return int(row["step"]), int(row["group"])


def _cards(num: int, num_groups: int, earned: Mapping[int, Sequence[float]]) -> list[tuple[str, str]]:
    cards = [("rollouts", f"{num:,}"), ("groups", f"{num_groups:,}")]
    if earned:
        first, last = min(earned), max(earned)
        cards += [(f"mean reward, step {step}", f"{sum(earned[step]) / len(earned[step]):.3f}") for step in sorted({first, last})]
    return cards


def _controls(steps: Sequence[int]) -> str:
    options = "".join(f'<option value="{step}">{step}</option>' for step in steps)
    return (
        '<div class="controls" id="controls" hidden>'
        f'<label>step <select id="step"><option value="">all</option>{options}</select></label>'
        '<label>order <select id="order"><option value="drawn">as drawn</option><option value="highest">highest reward</option>'
        '<option value="lowest">lowest reward</option><option value="longest">longest</option></select></label>'
        '<label><input type="checkbox" id="differ"> rewards differ</label>'
        '<label>with <input type="search" id="find" placeholder="text"></label><output id="shown"></output></div>'
    )


def _groups(groups: Mapping[tuple[int, int], Sequence[Row]]) -> str:
    parts = []
    place = 0
    for (step, group), rows in groups.items():
        rewards = [row["reward"] for row in rows if row.get("reward") is not None]
        differ = int(bool(rewards) and max(rewards) > min(rewards))
        data = f'data-place="{place}" data-step="{step}" data-differ="{differ}" data-reward="{_number(max(rewards, default=None))}"'
        longest = max(int(row.get("num_tokens") or 0) for row in rows)
        answers = "\n".join(_answer(row, place + i) for i, row in enumerate(rows))
        place += len(rows)
        parts.append(
            f'<div class="group" {data} data-tokens="{longest}">\n<h2>Step {step}, prompt {group + 1}</h2>\n'
            f"{_prompt(rows[0].get('prompt', ''))}{_truth(rows[0].get('example') or {})}\n{answers}\n</div>"
        )
    return "\n".join(parts)


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return f'<p class="prompt">{_text(prompt)}</p>'
    return "".join(
        f'<p class="prompt"><small>{_text(str(message.get("role", "")))}</small> {_text(_plain(message.get("content")))}</p>'
        for message in prompt
    )


def _truth(example: Mapping[str, Any]) -> str:
    """Return what the rewards knew of the prompt."""
    known = "; ".join(f"{name}: {_plain(value)[:300]}" for name, value in example.items() if name not in ("messages", "prompt"))
    return f'<p class="truth">{_text(known)}</p>' if known else ""


def _answer(row: Row, place: int) -> str:
    reward, advantage, tokens = row.get("reward"), row.get("advantage") or 0.0, row.get("num_tokens") or 0
    kind = " better" if advantage > 0 else " worse" if advantage < 0 else ""
    parts = row.get("rewards") or {}
    lines = [f"advantage {advantage:+.2f}", f"{tokens} tokens, {row.get('finish_reason', '')}"]
    if len(parts) > 1 or list(parts.values()) not in ([reward], []):
        lines = [*(f"{name} {_shown(value)}" for name, value in parts.items()), *lines]
    if steps := row.get("steps"):
        lines.append("steps " + ", ".join(f"{_shown(step['reward'])} ({step['advantage']:+.2f})" for step in steps))
    if row.get("learned") is False:
        lines.append("not learned from")
    meta = " · ".join(escape(line) for line in lines)
    return (
        f'<div class="answer{kind}" data-place="{place}" data-reward="{_number(reward)}" data-tokens="{int(tokens)}">'
        f"<b>{_shown(reward)}</b><div><blockquote>{_text(str(row.get('text', '')))}</blockquote><small>{meta}</small></div></div>"
    )


def _shown(value: float | None) -> str:
    return "no score" if value is None else f"{value:.3g}"


def _number(value: float | None) -> str:
    """Return a number for the script to sort by; nothing for no score."""
    return "" if value is None else repr(float(value))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _text(text: str) -> str:
    """Escape a text, a long one cut with a note."""
    cut = f" … ({len(text) - LONGEST_TEXT:,} more characters)" if len(text) > LONGEST_TEXT else ""
    return escape(text[:LONGEST_TEXT] + cut)


def _resource(name: str) -> str:
    return (files("dsv2.report") / name).read_text(encoding="utf8")
