"""Which tokens of groups are present: groups of which many are absent run without them, in a few widths."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# In how many widths groups may run: first those with the fewest present tokens, and so on, as many groups in each.
WIDTHS = (1, 2, 4, 8)
# Tokens that take as long as one more piece; a GPU waits longer for the host. Measured on a narrow model of slides.
PIECE_TOKENS = {"cpu": 384, "cuda": 6144}
# The least share of the work that must be saved.
WORTHWHILE = 0.1


@dataclass(frozen=True)
class Piece:
    """Groups with about as many present tokens, which run together.

    Attributes:
        groups: their numbers, int64 `(s,)`.
        tokens: the places in each of them of the tokens that run, int64 `(s, k)`, the present ones in front.
        mask: which of these are present, and do not fill up, booleans `(s, k)`; None if all are.
    """

    groups: Tensor
    tokens: Tensor
    mask: Tensor | None

    def of(self, values: Tensor) -> Tensor:
        """What these groups have of values `(r, ...)` of all."""
        return values.index_select(0, self.groups)


class Present:
    """The tokens of groups `(r, n)` that run, in pieces that make up all groups.

    Attributes:
        pieces: of groups, by how many present tokens they have.
    """

    def __init__(self, pieces: Sequence[Piece], tokens_per_group: int) -> None:
        self.pieces = pieces
        self._groups = torch.cat([piece.groups for piece in pieces])
        places = [(piece.groups[:, None] * tokens_per_group + piece.tokens).flatten() for piece in pieces]
        self._sizes, self._places = [len(each) for each in places], torch.cat(places)

    def take(self, x: Tensor) -> list[Tensor]:
        """The tokens of each piece `(s, k, c)`, of all `(r, n, c)`."""
        parts = x.flatten(0, 1).index_select(0, self._places).split(self._sizes)
        return [part.unflatten(0, piece.tokens.shape) for part, piece in zip(parts, self.pieces, strict=True)]

    def put(self, x: Tensor, taken: Sequence[Tensor], left: Sequence[Tensor]) -> Tensor:
        """All tokens `(r, n, c)` again, of those of the pieces that were taken the present ones as they have become."""
        changed = [
            (new if piece.mask is None else torch.where(piece.mask[..., None], new, old)).flatten(0, 1)
            for piece, old, new in zip(self.pieces, taken, left, strict=True)
        ]
        new = torch.cat(changed)
        return x.flatten(0, 1).to(new.dtype).index_copy(0, self._places, new).view_as(x)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Values `(r, ...)` of all groups, of those of the pieces `(s, ...)`."""
        values = torch.cat(list(parts))
        return torch.empty_like(values).index_copy(0, self._groups, values)


def present(mask: Tensor) -> Present | None:
    """How groups with a mask `(r, n)` run without what is absent; None where that saves too little."""
    counts, order = mask.sum(dim=1).sort(stable=True)
    each, price = counts.tolist(), PIECE_TOKENS.get(mask.device.type, PIECE_TOKENS["cpu"])

    def cost(parts: list[tuple[slice, int]]) -> int:
        return sum((part.stop - part.start) * width + price for part, width in parts)

    parts = min((_parts(each, widths) for widths in WIDTHS), key=cost)
    if cost(parts) > (1 - WORTHWHILE) * mask.numel():
        return None
    held, tokens = mask[order].to(torch.uint8).sort(dim=1, descending=True, stable=True)
    pieces = [
        Piece(order[part], tokens[part, :width], None if each[part.start] == width else held[part, :width].bool())
        for part, width in parts
    ]
    return Present(pieces, mask.shape[1])


def _parts(counts: list[int], widths: int) -> list[tuple[slice, int]]:
    """Groups whose ascending numbers of present tokens are `counts`, in so many parts, and the most tokens of each."""
    ends = [len(counts) * k // widths for k in range(widths + 1)]
    # Of a group without any, one token runs all the same.
    return [(slice(start, stop), max(1, counts[stop - 1])) for start, stop in pairwise(ends) if start < stop]
