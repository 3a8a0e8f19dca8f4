"""Parsing and formatting of byte sizes."""

import re

from fitformer.errors import InputError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Fewer bytes without a unit are a forgotten unit.
MIN_BARE_BYTES = 10**6


def parse_bytes(text: str | int) -> int:
    """Bytes of a size such as `8GB` (8,000,000,000), `7.5 GiB` (2**30 each) or a plain number.

    Text without a unit must be at least a million bytes.

    Raises:
        InputError: not a size, not above 0, or small and without a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS:
        raise InputError(f"{str(text)!r} is not a size of memory; write 8GB, 500MB or 7.5GiB")
    amount = int(float(found[1]) * UNITS[found[2].upper()])
    if amount < 1:
        raise InputError(f"{str(text)!r} is not above 0 bytes of memory; write 8GB, 500MB or 7.5GiB")
    if isinstance(text, str) and not found[2] and amount < MIN_BARE_BYTES:
        raise InputError(f"{text!r} has no unit and means {format_bytes(amount)}; write {text.strip()}GB")
    return amount


def format_bytes(count: float) -> str:
    """Bytes with three digits and a decimal unit: 1234567890 is `1.23 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
