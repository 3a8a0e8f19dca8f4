"""Autoregression over bytes: predict the next byte of a text or file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitformer import patching
from fitformer.config.schema import ByteRecipe
from fitformer.data.datasets.text import ByteBuffer, compressed_bits_per_byte, whole_file
from fitformer.errors import InputError
from fitformer.models.decoder import FITDecoder
from fitformer.tasks._autoregression import (
    build_sequence_decoder,
    continue_sequences,
    loss_in_bits,
    measure_in_bits,
    sequence_targets,
)
from fitformer.tasks.batch import Batch
from fitformer.tasks.preview import Preview
from fitformer.tasks.registry import TaskSpec

UNIT = "bits_per_byte"
COMPRESSORS = ("gzip", "xz")
_PREVIEW_PROMPT = b"\n"


def build(recipe: ByteRecipe, dataset: Any) -> FITDecoder:
    """A decoder of bytes, of as many groups as hold `data.length`.

    Raises:
        InputError: groups of no tokens, or more than `data.short_length` has.
    """
    network, short = build_sequence_decoder(recipe), recipe.data.short_length
    if short is not None and short % network.tokens_per_group:
        raise InputError(
            f"data.short_length is {short}; it must be whole groups of model.tokens_per_group, "
            f"{network.tokens_per_group}"
        )
    return network


def loss(network: FITDecoder, batch: Batch, recipe: ByteRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, and `bits_per_byte`, both means over the bytes that count.

    In the first `data.short_share` of the training shorter examples take the place of each.
    """
    data = recipe.data
    if data.short_length is not None and batch["done"] < data.short_share:
        batch = {"tokens": batch["short"].flatten(0, 1)}
    return loss_in_bits(network, UNIT, **sequence_targets(batch, recipe))


def measure(network: FITDecoder, batch: Batch, recipe: ByteRecipe) -> tuple[dict[str, Tensor], int]:
    """Held-out `loss` in nats and `bits_per_byte`, and the number of bytes that count."""
    return measure_in_bits(network, UNIT, **sequence_targets(batch, recipe))


def baselines(recipe: ByteRecipe, train: Iterator[Batch], test: Iterator[Batch]) -> Iterator[tuple[str, float]]:
    """Bits per byte of `gzip -9` and `xz -9` on the test bytes in one piece.

    The compressors see more context than the model, which starts anew in every example.
    """
    tokens = torch.cat([batch["tokens"][batch["mask"]] for batch in test])
    content = tokens.to(torch.uint8).cpu().numpy().tobytes()
    for compressor in COMPRESSORS:
        yield f"{compressor}_{UNIT}", compressed_bits_per_byte(content, compressor)


def generate_bytes(network: FITDecoder, prompts: Sequence[bytes], length: int, **options: Any) -> list[bytes]:
    """Continue prompts of any lengths by `length` bytes each, and return prompts with their continuations.

    The result may be longer than the trained length: the decoder then sees the most recent bytes.

    Args:
        network: a decoder of bytes. prompts: of any bytes; an empty one begins from nothing.
        length: bytes to draw for each prompt, fewer where `stop_strings` end it.
        options: of `generation.GenerationConfig`, such as `temperature`, `stop_strings`, `seed` and `window`, and a
            `streamer`.

    Raises:
        InputError: a prompt longer than the decoder holds, without a `window`; options out of range.
    """
    rows = continue_sequences(network, prompts, length, **options)
    return [patching.tokens_to_bytes(row) for row in rows]


def file_tokens(network: FITDecoder, recipe: ByteRecipe, path: Path) -> ByteBuffer:
    """The bytes of a file.

    Raises:
        InputError: there is no such file.
    """
    return whole_file(path)


def preview(network: FITDecoder, recipe: ByteRecipe, count: int) -> Preview:
    """Text that follows a newline, from the same random numbers at every preview."""
    length, temperature = recipe.objective.preview_length, recipe.objective.preview_temperature
    prompts, seed = [_PREVIEW_PROMPT] * count, recipe.trainer.seed
    texts = generate_bytes(network, prompts, length, temperature=temperature, seed=seed)
    return Preview(text=tuple(text.decode("utf-8", errors="replace") for text in texts))


TASK = TaskSpec(
    recipe=ByteRecipe,
    model=FITDecoder,
    build=build,
    loss=loss,
    measure=measure,
    monitor=(f"val/{UNIT}", "min"),
    preview=preview,
    counted="tokens",
    baselines=baselines,
    verb="generate",
    generate_bytes=generate_bytes,
    file_tokens=file_tokens,
    unit=UNIT,
    exact_tokens=file_tokens,
)
