"""The probabilities of the next token of every segment, by the same operations in the same order on both sides."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitformer.errors import InputError
from fitformer.generation import CachedDecoder, context_start
from fitformer.generation.steps import group_limit
from fitformer.inference.compression.container import CHECKSUM_BYTES
from fitformer.inference.compression.numerics import device_of
from fitformer.inference.compression.segments import Segments

Code = Callable[[np.ndarray], np.ndarray]
"""Encodes or decodes the tokens (live,) of a step by their probabilities (live, vocab), and returns them."""


class Predictor:
    """The decoder on rows that move on together, a token at a time, with a bounded context.

    Args:
        decoder: a `FITDecoder` in eval mode. rows: of the batch. length: tokens that a row may come to.
        window: most groups of context, None for as many as the decoder has.

    Raises:
        InputError: no memory for the cache.
    """

    def __init__(self, decoder: Any, rows: int, length: int, window: int | None = None) -> None:
        self.decoder, self.groups = CachedDecoder(decoder), group_limit(decoder, window)
        self.decoder.check_room(rows, length if self.groups is None else min(length, self.groups * self.decoder.n))
        self.device = device_of(decoder)
        self.state, self.position, self.begin = self.decoder.start(rows), 0, 0
        # Of no use where the context never begins anew.
        places = 0 if self.groups is None else self.groups * self.decoder.n
        self.context = torch.zeros(rows, places, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def next(self, column: Tensor) -> np.ndarray:
        """Probabilities float32 `(rows, vocab)` of the next tokens, after those just before, int64 `(rows,)`, or 0."""
        inputs = column.to(self.device)[:, None]
        if self.groups is not None and self.position:
            self.context[:, self.position - 1 - self.begin] = inputs[:, 0]
        begin = context_start(self.position, self.decoder.n, self.groups)
        if begin != self.begin:
            kept = self.context[:, begin - self.begin : self.position - self.begin].clone()
            self.context[:, : kept.shape[1]] = kept
            self.state, self.begin = self.decoder.start(len(column)), begin
            inputs = torch.nn.functional.pad(kept, (1, 0))
        self.position += 1
        probabilities = self.decoder.feed(self.state, inputs, last=True)[:, 0].float().softmax(-1).cpu().numpy()
        if not np.isfinite(probabilities).all():
            raise InputError("the decoder's logits are not finite numbers; its weights or its precision are broken")
        return probabilities


def run(
    predictor: Predictor,
    segments: Segments,
    code: Code,
    on_numbers: Callable[[str], None],
    on_step: Callable[[int, int], None],
) -> None:
    """Code all segments step by step.

    Args:
        predictor: for the segments' rows. segments: of the sequence. code: called once a step.
        on_numbers: called once with a checksum of the probabilities of the first group, or of all if they are fewer.
        on_step: called after every step with the number of steps done and of all.
    """
    probed, digest = min(predictor.decoder.n + 1, segments.steps), blake2b(digest_size=CHECKSUM_BYTES)
    column = torch.zeros(segments.rows, dtype=torch.int64)
    for step in range(segments.steps):
        probabilities = predictor.next(column)
        if step < probed:
            digest.update(probabilities.tobytes())
        if step == probed - 1:
            on_numbers(digest.hexdigest())
        live = segments.live(step)
        column = torch.zeros(segments.rows, dtype=torch.int64)
        column[:live] = torch.from_numpy(code(probabilities[:live]).astype(np.int64))
        on_step(step + 1, segments.steps)
