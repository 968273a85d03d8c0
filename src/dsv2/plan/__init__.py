"""``dsv2 plan``: what training or serving a model on a cluster comes to. Arithmetic alone, without torch (docs/plan.md).

``options.py`` says what can be asked, ``train.py`` and ``serve.py`` answer in tables whose last column says how a number comes about,
``figures.py`` draws. The arithmetic is in ``parallel/``.
"""

from dsv2.plan.command import run

__all__ = ["run"]
