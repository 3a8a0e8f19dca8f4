"""The cache of the decoder in the hands of `transformers`: what is read, reordered and repeated in `generate`."""

from typing import Any, Self

import torch
from torch import Tensor

from fitformer.errors import InputError, require
from fitformer.generation import CachedDecoder, DecodingState
from fitformer.generation.cached_decoder import rows_by
from fitformer.interop.padding import Columns
from fitformer.models.decoder import FITDecoder

transformers: Any = require("transformers", extra="transformers")


class FITCache(transformers.Cache):
    """A `DecodingState` of rows whose columns may have padding.

    transformers' own caches are lists of layers of keys and values by token; of a finished group its latents are kept
    instead, so this one has no such layers, and cannot be rewound, offloaded or quantised. A new one is empty, and is
    bound to the decoder that first reads into it.

    Attributes:
        state: what the rows have read; None before anything.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: DecodingState | None = None
        self._decoder: CachedDecoder | None = None
        self._columns = 0
        # Logits (b, vocab) after the last column: of rows that come next to padding.
        self._logits = torch.empty(0)

    def read(self, decoder: FITDecoder, new: Columns, keep: slice | Tensor, labels: Tensor | None = None) -> Tensor:
        """Read new columns; the cache moves on.

        Args:
            decoder: in eval mode; the one that was read with before.
            new: the columns.
            keep: columns whose logits are wanted.
            labels: classes `(b,)` of a class-conditional decoder, with the first columns.

        Returns:
            logits `(b, k, vocab)` of the tokens after the columns that are kept.

        Raises:
            InputError: another number of rows, or what `CachedDecoder.feed` refuses.
        """
        begins = self._columns == 0
        if begins:
            self._decoder = CachedDecoder(decoder)
            self.state = self._decoder.start(len(new.tokens), labels)
        self._check(new)
        inputs = new.inputs() if begins else new.tokens
        last = isinstance(keep, slice) and keep.start == -1
        logits = self._feed(inputs, new.counts[:, -1] + begins, last)
        if not last:
            logits = new.after(logits if begins else torch.cat([self._logits[:, None], logits], dim=1))
        self._columns += new.tokens.shape[1]
        self._logits = logits[:, -1]
        return logits if last else logits[:, keep]

    def _feed(self, inputs: Tensor, lengths: Tensor, last: bool) -> Tensor:
        """Logits after each of the first inputs of every row, `(b, k, vocab)`, or after the last of them."""
        assert self.state is not None
        assert self._decoder is not None
        batch, width = len(inputs), 1 if last else inputs.shape[1]
        embedding = self._decoder.decoder.embedding.weight
        logits = embedding.new_zeros(batch, width, len(embedding), requires_grad=False)
        for length, rows in rows_by(lengths.tolist()).items():
            if not length:
                logits[rows, -1] = self._logits[rows]
                continue
            some = self.state if len(rows) == batch else self.state.select(rows)
            fed = self._decoder.feed(some, inputs[rows, :length], last)
            logits[rows, : fed.shape[1]] = fed
            if some is not self.state:
                self.state.cache.put(rows, some.cache)
        return logits

    def _check(self, new: Columns) -> None:
        if len(new.tokens) != self.batch_size:
            raise InputError(
                f"tokens of {len(new.tokens)} rows are given with a cache of {self.batch_size}; repeat its rows first "
                "(batch_repeat_interleave), or begin without it"
            )

    @property
    def batch_size(self) -> int:
        """Rows; -1 before anything is read."""
        return -1 if self.state is None else len(self.state.position)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding among them."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: what ends is the decoder's table of positions, not the cache."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back.

        Raises:
            InputError: tokens are to be removed.
        """
        if tokens_to_remove:
            raise InputError("a FITCache cannot be rewound: finished groups are summed up; copy it before going on")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of these indices, in their order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows of these indices, in their order, any of them several times."""
        if self.state is not None:
            rows = torch.arange(self.batch_size)[indices.cpu()]
            self.state, self._logits = self.state.select(rows), self._logits[indices.to(self._logits.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that goes on by itself, with the same decoder."""
        copy = type(self)()
        if self.state is not None:
            copy.state, copy._decoder = self.state.clone(), self._decoder
            copy._columns, copy._logits = self._columns, self._logits.clone()
        return copy
