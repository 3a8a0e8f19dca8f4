"""Suggestions for misspelt words in error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(word: str, words: Iterable[str], otherwise: str = "") -> str:
    """Return `; did you mean 'steps'?` for the most similar of `words`, or `otherwise` if none is similar.

    Words with dots, such as `trainer.steps`, also match by their last part: `step` suggests `trainer.steps`.

    Args:
        word: the misspelt word. words: the valid ones.
        otherwise: the hint where none is similar, such as `; choose one of ...`.
    """
    valid = list(words)
    last = {each.rpartition(".")[2]: each for each in valid}
    dotted = any("." in each for each in valid)
    near = get_close_matches(word, valid, 1, 0.75 if dotted else 0.6)
    near = near or [last[each] for each in get_close_matches(word.rpartition(".")[2], last, 1)]
    return f"; did you mean {near[0]!r}?" if near else otherwise
