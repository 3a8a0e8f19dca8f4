"""Lists in messages."""

from collections.abc import Sequence


def listed(words: Sequence[object], most: int = 10) -> str:
    """Words for a message, cut short."""
    shown = ", ".join(str(word) for word in words[:most])
    return shown + (f", ... ({len(words)} in all)" if len(words) > most else "")
