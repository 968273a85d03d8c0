"""Reports: from the metrics of runs to one HTML file that needs nothing else, no network, and no script but for the rollouts.

``record.py`` reads what a run left, ``drawing.py``, ``curves.py`` and ``heat.py`` draw (matplotlib, loaded only when a figure is drawn),
``learning.py`` and ``balance.py`` are the sections of one run, ``reinforcement.py`` those of GRPO, ``compare.py`` those of several runs,
``page.py`` lays sections out as HTML, ``rollouts.py`` makes the rollouts of a run browsable, and ``runs.py`` is the stage of
``dsv2 report``.
"""

from dsv2.report.page import (
    ChapterSection,
    CommandSection,
    FigureSection,
    Leg,
    LegSection,
    Sample,
    SampleSection,
    Section,
    TableSection,
    TextSection,
    write_report,
)
from dsv2.report.runs import run, run_sections, write_tour_report

__all__ = [
    "ChapterSection",
    "CommandSection",
    "FigureSection",
    "Leg",
    "LegSection",
    "Sample",
    "SampleSection",
    "Section",
    "TableSection",
    "TextSection",
    "run",
    "run_sections",
    "write_report",
    "write_tour_report",
]
