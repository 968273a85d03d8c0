"""Sections and the page around them: frozen records in, one self-contained HTML file out; every text is escaped."""

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path

from dsv2.files import atomic_write

STROKES = ("solid", "dashed", "dotted")  # as drawing.py dashes the seventh run and the thirteenth on


@dataclass(frozen=True, slots=True)
class TextSection:
    """Paragraphs of plain text."""

    title: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChapterSection:
    """A heading over the sections that follow, with a sentence on what they show; the contents are grouped by it."""

    title: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class TableSection:
    """A table of plain text; columns of numbers are set to the right. Without column names the first column is the heading of its row.

    A folded one is opened by a click on its title; in one of ``runs`` every column but the first is set to the right.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False
    runs: bool = False


@dataclass(frozen=True, slots=True)
class FigureSection:
    """A drawing of ``curves.py`` or ``heat.py``.

    Args:
        svg: trusted markup, set into the page as it is; the only field of any section that is not escaped.
        caption: what to see in it and how to read it; also what a screen reader says.
        key: (name, number) of the runs in it, whose colours and dashes go by the number.
    """

    title: str
    svg: str
    caption: str
    key: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One text that the model wrote: ``label`` says when, ``text`` goes on after ``prompt``."""

    label: str
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class SampleSection:
    """What the model wrote, oldest first."""

    title: str
    samples: tuple[Sample, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Leg:
    """One leg of a tour: how long it took, in seconds, and its figures in words."""

    name: str
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class LegSection:
    """Legs in order, each with a bar for its share of the time."""

    title: str
    legs: tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class CommandSection:
    """Commands to paste, each with what it does."""

    title: str
    commands: tuple[tuple[str, str], ...]


Section = ChapterSection | TextSection | TableSection | FigureSection | SampleSection | LegSection | CommandSection


def write_report(out: Path, *, title: str, summary: Sequence[tuple[str, str]], sections: Sequence[Section], subtitle: str = "") -> None:
    """Write one HTML file that refers to nothing outside itself, whole or not at all.

    Args:
        out: the file.
        title: heading of the page.
        summary: (label, value) of the cards at the top.
        sections: in reading order.
        subtitle: one sentence under the heading.

    Raises:
        DataError: the disk is full or may not be written.
    """
    level = 3 if any(isinstance(section, ChapterSection) for section in sections) else 2
    body = "\n".join(render(section, number, level) for number, section in enumerate(sections))
    write_page(out, title=title, summary=summary, subtitle=subtitle, contents=render_contents(sections), body=body)


def write_page(
    out: Path,
    *,
    title: str,
    summary: Sequence[tuple[str, str]],
    body: str,
    contents: str = "",
    subtitle: str = "",
    style: str = "",
    script: str = "",
) -> None:
    """Write the page around a body, whole or not at all; a browser runs no script in it but ``script``, and loads nothing.

    Args:
        out: the file.
        title: heading of the page.
        summary: (label, value) of the cards at the top.
        body: trusted markup, as are the next three.
        contents: links into the body.
        style: CSS beside that of every page.
        script: JavaScript at the end of the page.
        subtitle: one sentence under the heading.

    Raises:
        DataError: the disk is full or may not be written.
    """
    style = (files("dsv2.report") / "style.css").read_text(encoding="utf8") + style
    cards = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(label)}</dt></div>" for label, value in summary)
    allowed = f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
{f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""}
<dl class="cards">{cards}</dl>
<nav>{contents}</nav>
</header>
{body}
<footer>Written by <code>dsv2</code>. This file is complete: it loads nothing.</footer>
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""
    atomic_write(out, page)


def render_contents(sections: Sequence[Section]) -> str:
    """Return links to the sections, a row for each chapter."""
    rows: list[list[str]] = [[]]
    for number, section in enumerate(sections):
        chapter = isinstance(section, ChapterSection)
        if chapter:
            rows.append([])
        kind = ' class="chapter"' if chapter else ""
        rows[-1].append(f'<a{kind} href="#s{number}">{escape(section.title)}</a>')
    return "".join(f"<div>{''.join(row)}</div>" for row in rows if row)


def render(section: Section, number: int, level: int) -> str:
    """Return the HTML of one section; ``number`` makes its anchor, ``level`` is that of its heading below a chapter's."""
    match section:
        case ChapterSection(title=title, text=text):
            told = f'<p class="note">{escape(text)}</p>' if text else ""
            return f'<div class="chapter" id="s{number}">\n<h2>{escape(title)}</h2>\n{told}\n</div>'
        case TextSection(paragraphs=paragraphs):
            inner = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
        case TableSection():
            inner = render_table(section)
        case FigureSection(svg=svg, caption=caption, key=key):
            inner = (
                f'<figure>{render_key(key)}<div class="scroll" role="img" aria-label="{escape(caption)}">{svg}</div>'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
        case SampleSection(samples=samples, note=note):
            inner = (f'<p class="note">{escape(note)}</p>' if note else "") + "".join(render_sample(sample) for sample in samples)
        case LegSection(legs=legs):
            inner = render_legs(legs)
        case CommandSection(commands=commands):
            inner = "".join(f"<p>{escape(purpose)}</p><pre><code>{escape(command)}</code></pre>" for command, purpose in commands)
    heading = f"<h{level}>{escape(section.title)}</h{level}>"
    if isinstance(section, TableSection) and section.folded:
        return f'<section id="s{number}">\n<details><summary>{heading}</summary>\n{inner}\n</details>\n</section>'
    return f'<section id="s{number}">\n{heading}\n{inner}\n</section>'


def render_key(key: Sequence[tuple[str, int]]) -> str:
    """Return the names of runs beside strokes of their colours and dashes."""
    stroke = '<i style="border-top:2.5px {} var(--c{})"></i>'
    strokes = "".join(f"<span>{stroke.format(STROKES[number // 6 % 3], number % 6 + 1)}{escape(name)}</span>" for name, number in key)
    return f'<div class="key">{strokes}</div>' if key else ""


def render_table(section: TableSection) -> str:
    """Return a table; a column whose cells all start like numbers is aligned to the right."""
    width = max((len(row) for row in section.rows), default=len(section.columns))
    is_number = [
        all(re.match(r"[-+~]?\d|[-\u2013]?$", row[column]) for row in section.rows if column < len(row)) for column in range(width)
    ]
    kind = ["", *(' class="number"' if number else ' class="right"' if section.runs else "" for number in is_number[1:])]
    head = "".join(f"<th{kind[i] if i < width else ''}>{escape(name)}</th>" for i, name in enumerate(section.columns))
    rows = []
    for row in section.rows:
        # A long name in a narrow column may break after an underscore or a point between letters.
        cells = [re.sub(r"(?<=[a-z])([_.])(?=[a-z])", r"\1<wbr>", escape(cell)) if section.runs else escape(cell) for cell in row]
        first = f'<th scope="row">{cells[0]}</th>' if row else ""
        rows.append(f"<tr>{first}{''.join(f'<td{kind[i]}>{cell}</td>' for i, cell in enumerate(cells) if i)}</tr>")
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    thead = f"<thead><tr>{head}</tr></thead>" if section.columns else ""
    runs = ' class="runs"' if section.runs else ""
    return f'<div class="scroll"><table{runs}>{thead}<tbody>{"".join(rows)}</tbody></table></div>{note}'


def render_sample(sample: Sample) -> str:
    """Return one sample: its label beside the prompt in grey and the continuation in black."""
    return (
        f'<div class="sample"><div class="label">{escape(sample.label)}</div>'
        f"<blockquote><span>{escape(sample.prompt)}</span>{escape(sample.text)}</blockquote></div>"
    )


def render_legs(legs: Sequence[Leg]) -> str:
    """Return the legs as rows with bars; the longest leg fills the width."""
    longest = max((leg.seconds for leg in legs), default=0.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(leg.name)}</th><td class="number">{duration(leg.seconds)}</td>'
        f'<td class="bar"><i style="width:{max(0.4, 100 * leg.seconds / longest):.1f}%"></i>'
        f"{f'<small>{escape(leg.note)}</small>' if leg.note else ''}</td></tr>"
        for leg in legs
    )
    total = f'<tr><th scope="row">together</th><td class="number">{duration(sum(leg.seconds for leg in legs))}</td><td></td></tr>'
    return f'<div class="scroll"><table class="legs"><tbody>{rows}{total}</tbody></table></div>'


def duration(seconds: float) -> str:
    """Return a time in words of at most two units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
