"""The verbs of the command line: where each goes, what it takes, and what its help says.

``VERBS`` says where each verb goes, in river order. Every verb declares its options in a function that only collects them into a ``Call``;
cli.py then runs the stage.
"""

from dsv2.verbs import training  # noqa: F401  (declares its verbs first: help lists them in river order)

from dsv2.verbs import models  # noqa: F401  # isort: skip
from dsv2.verbs.options import app
from dsv2.verbs.table import TRAINING, VERBS, Call

__all__ = ["TRAINING", "VERBS", "Call", "app"]
