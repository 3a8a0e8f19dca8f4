"""Autoregression over bytes: predict the next byte of a text or file."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitformer import patching
from fitformer.config.schema import ByteRecipe
from fitformer.data.datasets.text import ByteBuffer, compressed_bits_per_byte, whole_file
from fitformer.errors import InputError
from fitformer.models.decoder import FITDecoder
from fitformer.tasks._autoregression import BYTE_VALUES, build_decoder, loss_in_bits, measure_in_bits
from fitformer.tasks.batch import Batch
from fitformer.tasks.preview import Preview
from fitformer.tasks.registry import TaskSpec

UNIT = "bits_per_byte"
COMPRESSORS = ("gzip", "xz")
_PREVIEW_PROMPT = b"\n"


def build(recipe: ByteRecipe, dataset: Any) -> FITDecoder:
    """A decoder of bytes.

    Raises:
        InputError: `data.length` is no multiple of `model.tokens_per_group`.
    """
    return build_decoder(recipe.model, _num_groups(recipe), recipe.model.tokens_per_group, BYTE_VALUES)


def _num_groups(recipe: ByteRecipe) -> int:
    length, n = recipe.data.length, recipe.model.tokens_per_group
    if n < 1 or length % n:
        below = length // max(n, 1) * max(n, 1)
        near = f"{below} or {below + n}" if below else f"{n}"
        raise InputError(
            f"data.length {length} is not a multiple of model.tokens_per_group {n}; the nearest lengths are {near}"
        )
    return length // n


def targets(batch: Batch, recipe: ByteRecipe) -> tuple[Tensor, Tensor | None]:
    """Bytes `(b, t, n)` of a batch, and a mask `(b, t, n)` of those that count; None if all do."""
    n, mask = recipe.model.tokens_per_group, batch.get("mask")
    grouped_mask = None if mask is None or bool(mask.all()) else patching.sequence_to_groups(mask, n)
    return patching.sequence_to_groups(batch["tokens"], n), grouped_mask


def loss(network: FITDecoder, batch: Batch, recipe: ByteRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, and `bits_per_byte`, both means over the bytes that count."""
    return loss_in_bits(network, UNIT, *targets(batch, recipe))


def measure(network: FITDecoder, batch: Batch, recipe: ByteRecipe) -> tuple[dict[str, Tensor], int]:
    """Held-out `loss` in nats and `bits_per_byte`, and the number of bytes that count."""
    return measure_in_bits(network, UNIT, *targets(batch, recipe))


def baselines(recipe: ByteRecipe, train: Iterator[Batch], test: Iterator[Batch]) -> Iterator[tuple[str, float]]:
    """Bits per byte of `gzip -9` and `xz -9` on the test bytes in one piece.

    The compressors see more context than the model, which starts anew in every example.
    """
    tokens = torch.cat([batch["tokens"][batch["mask"]] for batch in test])
    content = tokens.to(torch.uint8).cpu().numpy().tobytes()
    for compressor in COMPRESSORS:
        yield f"{compressor}_{UNIT}", compressed_bits_per_byte(content, compressor)


def generate_bytes(
    network: FITDecoder,
    prompts: Sequence[bytes],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_token: Callable[..., None] | None = None,
) -> list[bytes]:
    """Continue prompts of one length by `length` bytes each, and return prompts with their continuations.

    The result may be longer than the trained length: the decoder then sees the most recent bytes.

    Args:
        network: a decoder of bytes. prompts: at least one byte each.
        length: bytes to draw for each prompt.
        temperature, top_k, top_p: see `generation.filter_logits`.
        seed: of the random numbers.
        on_token: called with the position and the bytes `(b,)` as they are drawn.

    Raises:
        InputError: empty prompts or prompts of several lengths; a temperature, `top_k` or `top_p` out of range.
    """
    if len({len(prompt) for prompt in prompts}) != 1 or not prompts[0]:
        raise InputError("the prompts must not be empty and must have one length; continue others one at a time")
    device = next(network.parameters()).device
    start = torch.stack([patching.bytes_to_tokens(prompt) for prompt in prompts]).to(device)
    new = []
    for column in network.stream(
        start,
        max_new_tokens=length,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        window=network.num_groups,
    ):
        new.append(column)
        if on_token is not None:
            on_token(start.shape[1] + len(new) - 1, column)
    tokens = torch.cat([start, *(column[:, None] for column in new)], dim=1)
    return [patching.tokens_to_bytes(row) for row in tokens]


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
)
