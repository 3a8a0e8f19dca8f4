"""Ranges of the numbers of a recipe."""

import math

from fitformer.errors import InputError


def at_least(lowest: float, **values: float | None) -> None:
    """Raise InputError if a value is below `lowest`, infinite or NaN; None passes."""
    for name, value in values.items():
        # Not `value < lowest`: NaN compares false.
        if value is not None and not lowest <= value < math.inf:
            raise InputError(f"{name} is {value}; it must be at least {lowest:g} and finite")


def share(**values: float) -> None:
    """Raise InputError if a value is not between 0 and 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; it must lie between 0 and 1")


def rate(**values: float) -> None:
    """Raise InputError if a value is not at least 0 and below 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; it must be at least 0 and below 1")
