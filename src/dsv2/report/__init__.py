"""Reports: from the metrics of runs to one HTML file that needs nothing else, no network, no script.

``page.py`` lays sections out as HTML, ``figures.py`` draws (matplotlib, loaded only when a figure is drawn), ``runs.py`` reads a run's
metrics and is the stage of ``dsv2 report``.
"""

from dsv2.report.page import (
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
