"""Amounts of memory as people write them, and back."""

import re

from fitformer.errors import InputError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Nobody means so few bytes by digits without a unit.
LEAST_BARE = 10**6


def parse_bytes(text: str | int) -> int:
    """Bytes of an amount such as `8GB` (8,000,000,000), `7.5 GiB` (2**30 each) or a plain number.

    A text of digits alone is at least a million: fewer are an amount whose unit was forgotten.

    Raises:
        InputError: it is no such amount, not above 0, or says no unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS:
        raise InputError(f"{str(text)!r} is no amount of memory; write 8GB, 500MB or 7.5GiB")
    amount = int(float(found[1]) * UNITS[found[2].upper()])
    if amount < 1:
        raise InputError(f"{str(text)!r} is no memory at all; write 8GB, 500MB or 7.5GiB")
    if isinstance(text, str) and not found[2] and amount < LEAST_BARE:
        raise InputError(f"{text!r} says no unit and would be {format_bytes(amount)} of memory; write {text.strip()}GB")
    return amount


def format_bytes(count: float) -> str:
    """Bytes for people, in units of a thousand: 1234567890 is `1.23 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
