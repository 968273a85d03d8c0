"""Cells of parquet as values of JSON, so that a row means the same in whichever kind of file it stands.

Parquet gives all structs of a column the same fields, and null where a struct has none of its own: of two tools in one column each would
have the other's parameters, and a model would learn to write ``null``. A null of a struct is therefore no field. A null in a list was there
before the table, and stays.
"""

import math
from collections import Counter
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any


def as_json(cell: Any, column: str, foreign: Counter[str]) -> Any:
    """Return a cell as JSON has it; None for null and for what has no meaning as text: NaN, bytes that are not UTF-8.

    Dates and times become ISO 8601, decimals numbers, other bytes and whatever else there is text.

    Args:
        cell: as pyarrow gives it.
        column: its name.
        foreign: counts what is no value of JSON, by column and type.
    """
    if cell is None or isinstance(cell, bool | int | str) or (isinstance(cell, float) and math.isfinite(cell)):
        return cell
    if isinstance(cell, Mapping):
        fields = ((str(name), as_json(value, column, foreign)) for name, value in cell.items())
        return {name: value for name, value in fields if value is not None}
    if isinstance(cell, list | tuple):  # a column of maps has pairs
        return [as_json(item, column, foreign) for item in cell]
    foreign[f"{column}: {type(cell).__name__}"] += 1
    return _nearest(cell)


def _nearest(cell: Any) -> str | int | float | None:
    """Return the value of JSON that is nearest to one that it has not."""
    if isinstance(cell, float):
        return None
    if isinstance(cell, Decimal):
        return int(cell) if cell == cell.to_integral_value() else float(cell)
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            return None
    return cell.isoformat() if isinstance(cell, date | time) else str(cell)
