"""Suggestions for misspelt words in error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of `words`; None if none has a similarity (`difflib`, from 0 to 1) of `cutoff`."""
    return next(iter(get_close_matches(word, list(words), 1, cutoff)), None)


def suggest(word: str, words: Iterable[str], otherwise: str = "") -> str:
    """Return `; did you mean 'steps'?` for the most similar of `words`, or `otherwise` if none is similar."""
    near = nearest(word, words)
    return otherwise if near is None else f"; did you mean {near!r}?"
