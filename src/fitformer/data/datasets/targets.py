"""Columns of a table that are learned as numbers: read strictly, split with some of each kind on both sides."""

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np

from fitformer._support.listed import listed
from fitformer._support.suggest import suggest
from fitformer.data.settings import NumberColumns
from fitformer.errors import InputError

# As Parquet's booleans are written.
_TRUTH = {"true": "1", "false": "0"}


def read_numbers(table: Mapping[str, Sequence[str]], columns: NumberColumns, title: str, first_row: int) -> np.ndarray:
    """Numbers float32 (rows, columns) of a table of text.

    Args:
        table: columns by name. columns: which ones, and what they hold.
        title: of the table, for messages. first_row: the number of its first row, for messages.

    Raises:
        InputError: a missing column, a cell that is empty or no finite number, labels and events other than 0 and 1, a
            negative time, or no event at all.
    """
    for name in columns.names:
        if name not in table:
            raise InputError(
                f"{title} has no column {name!r}{suggest(name, list(table))} (it has {listed(list(table))})"
            )
    found = np.zeros((len(next(iter(table.values()))), len(columns.names)), dtype=np.float32)
    for place, name in enumerate(columns.names):
        for row, cell in enumerate(table[name]):
            word = cell.lower() if columns.kind != "number" else cell
            found[row, place] = _number(_TRUTH.get(word, cell), f"{title} row {first_row + row}: {name!r}")
        is_time = columns.kind == "survival" and place == 0
        if columns.kind != "number":
            _check(found[:, place], is_time, table[name], f"{title} row {{}}: {name!r}", first_row)
    if columns.kind == "survival" and not found[:, 1].any():
        raise InputError(
            f"{title} has no event: {columns.names[1]!r} is 0 in all {len(found)} rows, so nothing can be learned of "
            "when it happens; 1 marks the rows where it happened"
        )
    return found


def _number(cell: str, where: str) -> float:
    """A cell as a number that float32 holds."""
    if not cell:
        raise InputError(f"{where} is empty; give a number, or leave the row out")
    try:
        value = float(cell)
    except ValueError:
        raise InputError(f"{where} is {cell!r}, which is no number") from None
    if not isfinite(value) or abs(value) > np.finfo(np.float32).max:
        raise InputError(f"{where} is {cell!r}, no finite number; give one, or leave the row out")
    return value


def _check(values: np.ndarray, is_time: bool, cells: Sequence[str], where: str, first_row: int) -> None:
    """Refuse negative times, and others than 0 and 1 where there is no time."""
    wrong = np.flatnonzero(values < 0 if is_time else (values != 0) & (values != 1))
    if len(wrong):
        row = int(wrong[0])
        wanted = "a time of at least 0" if is_time else "0 or 1"
        raise InputError(f"{where.format(first_row + row)} is {cells[row]}; it must be {wanted}")


def strata(labels: np.ndarray, columns: NumberColumns | None) -> np.ndarray:
    """What a held-out part takes its share of each of, int64 (len,).

    Classes as they are; of survival whether the event happened; of labels the rarest that an example has. Numbers are
    all of one kind.
    """
    if columns is None:
        return labels
    if columns.kind == "survival":
        return labels[:, 1].astype(np.int64)
    if columns.kind == "number":
        return np.zeros(len(labels), dtype=np.int64)
    counts = np.where(labels > 0, labels.sum(axis=0), np.inf)
    return np.where(labels.any(axis=1), counts.argmin(axis=1), -1)
