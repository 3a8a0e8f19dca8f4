"""Sequences of tokens as groups, and back: of any tokens, of the pixel values of images, of bytes (spec section 6).

Tokens are int64, sequences `(b, L)`, groups `(b, t, n)`.
"""

from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fitformer._support.checks import checked, whole
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.patching.documents import places_in_documents
from fitformer.patching.image import extract_patches, merge_patches
from fitformer.patching.sizes import (
    MOST_CHANNELS,
    Size,
    check_axes,
    check_divisible,
    format_size,
    inverse_pattern,
    to_sides,
)

SEQUENCE = "b (t n) ... -> b t n ..."
# Tokens that are looked at one by one.
FEW = 32


@checked
def sequence_to_groups(tokens: Tensor, n: int) -> Tensor:
    """Cut a sequence `(b, L)` or `(b, L, c)` into groups of `n`: `(b, t, n)` or `(b, t, n, c)`.

    Raises:
        InputError: `n` does not divide L; `pad_to_groups` makes it.
    """
    if tokens.ndim < 2:
        raise InputError(f"a batch of sequences (b, L) is expected, not shape {tuple(tokens.shape)}; try tokens[None]")
    whole("n", n)
    check_divisible(tokens.shape[1], n, ("a sequence", "groups", "tokens"))
    return rearrange(tokens, SEQUENCE, n=n)


@checked
def pad_to_groups(tokens: Tensor, n: int) -> Tensor:
    """A sequence `(b, L)` or `(b, L, c)`, or its mask, with zeros at its end until groups of `n` fill it.

    Raises:
        InputError: fewer than two axes, or groups of no tokens.
    """
    if tokens.ndim < 2:
        raise InputError(f"a batch of sequences (b, L) is expected, not tokens {tuple(tokens.shape)}; try tokens[None]")
    missing = -tokens.shape[1] % whole("n", n)
    check_room(f"groups of n={n} tokens", missing)
    return F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, missing)) if missing else tokens


@checked
def groups_to_sequence(x: Tensor, length: int | None = None) -> Tensor:
    """Join groups `(b, t, n)` or `(b, t, n, c)` into `(b, t * n)` or `(b, t * n, c)`, or the first `length` of these.

    Raises:
        InputError: fewer than three axes, or groups of fewer tokens than `length`.
    """
    if x.ndim < 3:
        raise InputError(f"groups (b, t, n) are expected, not shape {tuple(x.shape)}")
    joined = rearrange(x, inverse_pattern(SEQUENCE))
    return joined if length is None else joined[:, : whole("length", length, 0, joined.shape[1])]


@checked
def shift_right(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Input `(b, t, n)` of an autoregressive decoder for targets `(b, t, n)`: position k holds target k-1, the first 0.

    The shift runs through the whole sequence, across groups (spec section 5, autoregressive decoder). With `documents
    (b, t)`, a number for each group (see `pack_documents`), the first of each document is 0.

    Raises:
        InputError: not three axes, or documents of other groups.
    """
    check_axes(tokens, "tokens (b, t, n)", 3)
    shifted = sequence_to_groups(F.pad(groups_to_sequence(tokens)[:, :-1], (1, 0)), tokens.shape[2])
    if documents is None:
        return shifted
    if documents.shape != tokens.shape[:2]:
        raise InputError(f"documents {tuple(documents.shape)} are not of the groups of tokens {tuple(tokens.shape)}")
    shifted[:, :, 0] = shifted[:, :, 0].masked_fill(places_in_documents(documents) == 0, 0)
    return shifted


@checked
def image_to_pixels(images: Tensor, patch: Size, order: str = "snake") -> Tensor:
    """Pixel values of uint8 images `(b, H, W, ch)` as int64 tokens `(b, t, n)`: a group is a patch, channel fastest.

    These are an autoregressive decoder's targets; `shift_right` makes its input of them. n = ph * pw * ch.

    Raises:
        InputError: images that are not uint8, and what `extract_patches` raises.
    """
    if images.dtype != torch.uint8:
        raise InputError(f"pixel tokens are made of uint8 images, not {images.dtype}; scale to 0..255 and convert")
    return extract_patches(images, patch, order).long()


@checked
def pixels_to_image(tokens: Tensor, image_size: Size, patch: Size, channels: int, order: str = "snake") -> Tensor:
    """Images uint8 `(b, H, W, channels)` of pixel tokens `(b, t, n)`: the inverse of `image_to_pixels`.

    Raises:
        InputError: tokens outside 0..255, or of another shape than these sizes make.
    """
    check_axes(tokens, "tokens (b, t, n)", 3)
    values = (*to_sides(patch, "hw", "patch"), whole("channels", channels, 1, MOST_CHANNELS))
    if tokens.shape[-1] != prod(values):
        raise InputError(f"a patch of {format_size(values)} values has {prod(values)} tokens, not {tokens.shape[-1]}")
    return merge_patches(_as_bytes(tokens), image_size, patch, order)


@checked
def bytes_to_tokens(data: bytes | bytearray | memoryview) -> Tensor:
    """Bytes as int64 tokens `(L,)`, 0..255."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64))


@checked
def tokens_to_bytes(tokens: Tensor) -> bytes:
    """Bytes of tokens of any shape, in their order: the inverse of `bytes_to_tokens`.

    Raises:
        InputError: tokens that are not whole numbers in 0..255.
    """
    return _as_bytes(tokens).cpu().numpy().tobytes()


def check_vocabulary(tokens: Tensor, vocab_size: int) -> None:
    """Refuse tokens outside 0 to vocab_size - 1.

    Only where looking costs nothing: on an accelerator it would make the host wait for the device, and a graph that is
    being traced has no values to check.

    Raises:
        InputError: a token outside, or tokens that are no whole numbers.
    """
    if tokens.is_floating_point() or tokens.is_complex():
        raise InputError(f"tokens are {tokens.dtype}; they are whole numbers below {vocab_size}")
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or tokens.numel() == 0:
        return
    # A token or two of a generation are looked at in less time than torch takes for a call.
    ends = tokens.flatten().tolist() if tokens.numel() <= FEW else torch.aminmax(tokens)
    low, high = int(min(ends)), int(max(ends))
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise InputError(f"token {outside} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})")


def _as_bytes(tokens: Tensor) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex():
        raise InputError(f"tokens are whole numbers, not {tokens.dtype}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= 255:
        raise InputError(f"tokens from {int(tokens.min())} to {int(tokens.max())} are not all within 0..255")
    return tokens.to(torch.uint8)
