"""Images into groups and groups into maps by tensor operations alone, which a tracer follows at any size.

`fitformer.patching` does the same with checks, and with sizes as plain numbers.
"""

from torch import Tensor

Pair = tuple[int, int]


def cut(images: Tensor, groups: Pair, patches: Pair, patch: Pair) -> Tensor:
    """Tokens `(b, t, n, ph * pw * channels)` of images `(b, H, W, channels)`.

    Args:
        images: of whole groups. groups: rows and columns of the groups. patches: those of the patches of a group.
        patch: those of the pixels of a patch.
    """
    (rows, columns), (high, wide), (ph, pw) = groups, patches, patch
    cells = images.unflatten(2, (columns, wide, pw)).unflatten(1, (rows, high, ph))
    return cells.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5).flatten(3, 4).flatten(1, 2)


def lay_out(x: Tensor, groups: Pair, patches: Pair) -> Tensor:
    """Tokens `(b, t, n, c)` as a map `(b, c, rows, columns)`, each where its patch was; the rest as in `cut`."""
    cells = x.unflatten(2, patches).unflatten(1, groups)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
