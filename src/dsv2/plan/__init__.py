"""``dsv2 plan``: what training or serving a model on a cluster comes to. Arithmetic alone, without torch (docs/plan.md).

``options.py`` says what can be asked; ``train.py`` and ``serve.py`` decide what is planned and hold its values; ``train_sheets.py`` and
``serve_sheets.py`` say it in tables whose last column tells how a number comes about; ``cases.py`` and ``what_if.py`` are what is set side
by side; ``figures.py`` draws. The formulas are in ``parallel/``, all wording is here, and ``docs/plan.md`` is tested line by line.
"""

from dsv2.plan.command import run

__all__ = ["run"]
