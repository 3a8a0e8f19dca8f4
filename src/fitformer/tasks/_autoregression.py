"""What the autoregressive tasks share: the decoder, and the loss and held-out metrics in bits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer import patching
from fitformer._support.checks import whole
from fitformer.config.model_sections import ByteDecoderModel, PixelDecoderModel
from fitformer.config.schema import AudioRecipe, ByteRecipe
from fitformer.generation.steps import check_held
from fitformer.models.decoder import FITDecoder
from fitformer.models.initialization import zero_branches
from fitformer.tasks.batch import Batch, arguments

BYTE_VALUES = 256


def build_decoder(
    model: PixelDecoderModel | ByteDecoderModel,
    num_groups: int,
    tokens_per_group: int,
    vocab_size: int,
    num_classes: int = 0,
) -> FITDecoder:
    """A decoder of `num_groups` groups of `tokens_per_group` tokens, with the weights that training starts from."""
    network = FITDecoder.from_preset(
        model.preset,
        num_groups=num_groups,
        tokens_per_group=tokens_per_group,
        vocab_size=vocab_size,
        num_classes=num_classes,
        **arguments(model, "patch_size", "tokens_per_group"),
    )
    if model.initialization == "zero_branches":
        zero_branches(network)
    return network


def build_sequence_decoder(recipe: ByteRecipe | AudioRecipe) -> FITDecoder:
    """A decoder of 256 values, of as many groups as hold `data.length`.

    Raises:
        InputError: groups of no tokens.
    """
    n = whole("model.tokens_per_group", recipe.model.tokens_per_group)
    return build_decoder(recipe.model, -(-recipe.data.length // n), n, BYTE_VALUES)


def sequence_targets(batch: Batch, recipe: ByteRecipe | AudioRecipe) -> dict[str, Any]:
    """Arguments of `bits`: `tokens (b, t, n)` of a batch, a `mask` of those that count, their `documents (b, t)`.

    The mask is None if all count, and the documents if each example is one.
    """
    n, tokens = recipe.model.tokens_per_group, batch["tokens"]
    mask = batch.get("mask", torch.ones_like(tokens, dtype=torch.bool))
    tokens, mask = (patching.sequence_to_groups(patching.pad_to_groups(each, n), n) for each in (tokens, mask))
    return {"tokens": tokens, "mask": None if bool(mask.all()) else mask, "documents": batch.get("documents")}


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


def bits(
    network: FITDecoder,
    tokens: Tensor,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood of tokens `(b, t, n)` in bits, a scalar with gradients.

    Args:
        network: the decoder. tokens: the targets. mask: bool `(b, t, n)`, true where a token counts; None for all.
        documents: of the groups, see `FITDecoder.forward`.
        labels: classes `(b,)` of the examples, which a class-conditional decoder is told; others are not.
    """
    shifted = patching.shift_right(tokens, documents)
    weights = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask

    def nats(groups: slice, logits: Tensor, _: Tensor | None) -> Tensor:
        # The logits of a slice are freed before those of the next are computed.
        each = F.cross_entropy(logits.flatten(0, -2).float(), tokens[:, groups].flatten(), reduction="none")
        return (each * weights[:, groups].flatten()).sum()

    told = labels if network.num_classes else None
    return network(shifted, score=nats, labels=told, documents=documents) / weights.sum() / math.log(2)


def loss_in_bits(
    network: FITDecoder, unit: str, tokens: Tensor, mask: Tensor | None = None, **given: Tensor | None
) -> tuple[Tensor, dict]:
    """Cross-entropy in nats, which is minimized, and the same in bits under the name `unit`, detached.

    Arguments as those of `bits`.
    """
    value = bits(network, tokens, mask, **given)
    return value * math.log(2), {unit: value.detach()}


def measure_in_bits(
    network: FITDecoder, unit: str, tokens: Tensor, mask: Tensor | None = None, **given: Tensor | None
) -> tuple[dict, int]:
    """Held-out `loss` in nats and `unit` in bits, means over tokens, and the number of tokens; as `loss_in_bits`."""
    value = bits(network, tokens, mask, **given)
    return {"loss": value * math.log(2), unit: value}, tokens.numel() if mask is None else int(mask.sum())
