"""``dsv2 info``: what a model amounts to, by exact arithmetic and from file headers. No weights are read and torch is not imported.

``target.py`` finds what was meant and what its files show, ``description.py`` gathers everything in one frozen ``Description``,
``tables.py`` prints that; the JSON is the same record field by field.
"""

from dsv2.info.description import Description, describe, to_json
from dsv2.info.tables import run

__all__ = ["Description", "describe", "run", "to_json"]
