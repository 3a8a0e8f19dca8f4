"""Documents of several lengths packed into one batch of groups, and back.

A document begins at a group's start, so its last group is padded. Documents of one row are told apart by a number for
each group, `documents (b, t)`: a model that is given it runs each document as if it were alone.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fitformer._support.checks import checked, whole
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError


class PackedDocuments(NamedTuple):
    """Documents in rows of groups.

    Attributes:
        tokens: int64 `(b, t, n)`, 0 where there is no token of a document.
        documents: int64 `(b, t)`, the number of each group's document, -1 for a group that holds none.
        mask: booleans `(b, t, n)`, true where a token of a document is.
    """

    tokens: Tensor
    documents: Tensor
    mask: Tensor


@checked
def pack_documents(documents: Sequence[Tensor], n: int, groups: int) -> PackedDocuments:
    """Pack sequences `(L,)` of whole numbers into rows of `groups` groups of `n` tokens, as few rows as best fit gives.

    Raises:
        InputError: no documents, an empty one, one that fills more groups than a row has, or one that is no sequence of
            whole numbers.
    """
    whole("n", n), whole("groups", groups)
    for k, each in enumerate(documents):
        if not isinstance(each, Tensor) or each.ndim != 1 or each.is_floating_point() or each.is_complex():
            raise InputError(f"documents[{k}] is no sequence (L,) of whole numbers; convert it by tensor.long()")
    rows = pack_rows([-(-len(each) // n) for each in documents], groups)
    # Tokens are int64: as much as two numbers each.
    check_room(f"{len(rows)} rows of groups={groups} of n={n} tokens", 2 * len(rows) * groups * n)
    device = documents[0].device
    tokens = torch.zeros(len(rows), groups * n, dtype=torch.int64, device=device)
    numbers = torch.full((len(rows), groups), -1, device=device)
    mask = torch.zeros(len(rows), groups * n, dtype=torch.bool, device=device)
    for row, members in enumerate(rows):
        group = 0
        for k in members:
            place, length = group * n, len(documents[k])
            tokens[row, place : place + length] = documents[k]
            mask[row, place : place + length] = True
            stop = group + -(-length // n)
            numbers[row, group:stop], group = k, stop
    return PackedDocuments(tokens.unflatten(1, (groups, n)), numbers, mask.unflatten(1, (groups, n)))


@checked
def unpack_documents(x: Tensor, documents: Tensor, mask: Tensor) -> list[Tensor]:
    """Cut what belongs to packed tokens, `(b, t, n, ...)`, into the documents again, `(L, ...)` each, in their order.

    The inverse of `pack_documents` for its tokens; `documents (b, t)` and `mask (b, t, n)` are the packed ones. What
    belongs to tokens may be logits or losses of them.

    Raises:
        InputError: shapes that do not belong together.
    """
    if x.ndim < 3 or mask.shape != x.shape[:3] or documents.shape != x.shape[:2] or mask.dtype != torch.bool:
        raise InputError(
            f"documents {tuple(documents.shape)} and mask {mask.dtype} {tuple(mask.shape)} do not belong to x "
            f"{tuple(x.shape)}; they are (b, t) and booleans (b, t, n)"
        )
    numbers, held = documents.flatten(), mask.flatten(0, 1)
    order = numbers.argsort(stable=True)[int((numbers < 0).sum()) :]
    counts = numbers[order].unique_consecutive(return_counts=True)[1].tolist()
    parts = zip(x.flatten(0, 1)[order].split(counts), held[order].split(counts), strict=True)
    return [part[real] for part, real in parts]


@checked
def pack_rows(sizes: Sequence[int], groups: int) -> list[list[int]]:
    """Which documents share a row, by their numbers: of documents of `sizes` groups, in rows of `groups`.

    The largest first, each into the fullest row that has room for it (best fit).

    Raises:
        InputError: no documents, one of no groups, or of more than a row has.
    """
    if not sizes:
        raise InputError("there are no documents to pack; sizes is empty")
    for k, size in enumerate(sizes):
        if not 0 < size <= groups:
            raise InputError(
                f"document {k} fills {size} groups, of a row's {groups}; cut it, or give longer rows, and leave out "
                "documents without tokens"
            )
    rows: list[list[int]] = []
    # Rows by how many groups they have left, and those numbers in order.
    left: dict[int, list[list[int]]] = {}
    rooms: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        place = bisect_left(rooms, sizes[k])
        if place < len(rooms):
            room = rooms[place]
            row = left[room].pop()
            if not left[room]:
                del rooms[place]
        else:
            room, row = groups, []
            rows.append(row)
        row.append(k)
        if room := room - sizes[k]:
            if not left.setdefault(room, []):
                insort(rooms, room)
            left[room].append(row)
    return sorted(sorted(row) for row in rows)


@checked
def places_in_documents(documents: Tensor) -> Tensor:
    """The place of each group in its document, int64 `(b, t)`, from 0 on.

    A document begins wherever the number in `documents (b, t)` changes. A group with a negative number holds none and
    stands by itself, at place 0.

    Raises:
        InputError: not two axes, or no whole numbers.
    """
    if documents.ndim != 2 or documents.is_floating_point() or documents.is_complex():
        raise InputError(
            f"documents are {documents.dtype} {tuple(documents.shape)}; give a whole number for each group, (b, t)"
        )
    groups = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = (documents[:, 1:] != documents[:, :-1]) | (documents[:, 1:] < 0)
    return groups - torch.where(begins, groups, 0).cummax(dim=1).values
