"""What the autoregressive tasks share: the decoder, and the loss and held-out metrics in bits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer import patching
from fitformer.config.schema import AudioRecipe, ByteDecoderModel, ByteRecipe, PixelDecoderModel
from fitformer.errors import InputError
from fitformer.generation.steps import check_held
from fitformer.models.decoder import FITDecoder
from fitformer.tasks.batch import Batch, arguments

BYTE_VALUES = 256


def build_decoder(
    model: PixelDecoderModel | ByteDecoderModel,
    num_groups: int,
    tokens_per_group: int,
    vocab_size: int,
    num_classes: int = 0,
) -> FITDecoder:
    """A decoder of `num_groups` groups of `tokens_per_group` tokens."""
    return FITDecoder.from_preset(
        model.preset,
        num_groups=num_groups,
        tokens_per_group=tokens_per_group,
        vocab_size=vocab_size,
        num_classes=num_classes,
        **arguments(model, "patch_size", "tokens_per_group"),
    )


def build_sequence_decoder(recipe: ByteRecipe | AudioRecipe) -> FITDecoder:
    """A decoder of 256 values for sequences of `data.length` tokens.

    Raises:
        InputError: `data.length` is no multiple of `model.tokens_per_group`.
    """
    length, n = recipe.data.length, recipe.model.tokens_per_group
    if n < 1 or length % n:
        below = length // max(n, 1) * max(n, 1)
        near = f"{below} or {below + n}" if below else f"{n}"
        raise InputError(
            f"data.length {length} is not a multiple of model.tokens_per_group {n}; the nearest lengths are {near}"
        )
    return build_decoder(recipe.model, length // n, n, BYTE_VALUES)


def sequence_targets(batch: Batch, recipe: ByteRecipe | AudioRecipe) -> tuple[Tensor, Tensor | None]:
    """Tokens `(b, t, n)` of a batch, and a mask `(b, t, n)` of those that count; None if all do."""
    n, mask = recipe.model.tokens_per_group, batch.get("mask")
    grouped_mask = None if mask is None or bool(mask.all()) else patching.sequence_to_groups(mask, n)
    return patching.sequence_to_groups(batch["tokens"], n), grouped_mask


def continue_sequences(
    network: FITDecoder, prompts: Sequence[Any], length: int, *, window: int | None = None, **options: Any
) -> list[Tensor]:
    """Prompts of any lengths, each with `length` tokens drawn after it, int64 `(L,)` on the CPU.

    Past the decoder's length it goes on with its last groups as context.

    Args:
        network: the decoder. prompts: as `generation.generate` takes a list of them; empty ones begin from nothing.
        length: tokens to draw at most. window: groups of context at most, by default all that the decoder holds.
        options: others of `generation.generate`; tokens are drawn unless `do_sample` is false.

    Raises:
        InputError: a prompt longer than the decoder holds, without a window; options out of range.
    """
    check_held(network, max(map(len, prompts), default=0), window)
    options = {"do_sample": True, "window": network.most_groups if window is None else window, **options}
    return [row.cpu() for row in network.generate(list(prompts), max_new_tokens=length, **options)]


def bits(network: FITDecoder, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of tokens `(b, t, n)` in bits, a scalar with gradients.

    Args:
        network: the decoder. tokens: the targets. mask: bool `(b, t, n)`, true where a token counts; None for all.
        labels: classes `(b,)` of the examples, which a class-conditional decoder is told; others are not.
    """
    shifted = patching.shift_right(tokens)
    weights = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask

    def nats(groups: slice, logits: Tensor, _: Tensor | None) -> Tensor:
        # The logits of a slice are freed before those of the next are computed.
        each = F.cross_entropy(logits.flatten(0, -2).float(), tokens[:, groups].flatten(), reduction="none")
        return (each * weights[:, groups].flatten()).sum()

    told = labels if network.num_classes else None
    return network(shifted, score=nats, labels=told) / weights.sum() / math.log(2)


def loss_in_bits(
    network: FITDecoder, unit: str, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
) -> tuple[Tensor, dict]:
    """Cross-entropy in nats, which is minimized, and the same in bits under the name `unit`, detached."""
    value = bits(network, tokens, mask, labels)
    return value * math.log(2), {unit: value.detach()}


def measure_in_bits(
    network: FITDecoder, unit: str, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
) -> tuple[dict, int]:
    """Held-out `loss` in nats and `unit` in bits, means over tokens, and the number of tokens."""
    value = bits(network, tokens, mask, labels)
    return {"loss": value * math.log(2), unit: value}, tokens.numel() if mask is None else int(mask.sum())
