"""Autoregression over sound: predict the next sample, as one of 256 mu-law codes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitformer.config.schema import AudioRecipe
from fitformer.data.datasets.text import ByteBuffer, Piece
from fitformer.data.wav import read_sound
from fitformer.models.decoder import FITDecoder
from fitformer.tasks._autoregression import (
    BYTE_VALUES,
    build_sequence_decoder,
    continue_sequences,
    loss_in_bits,
    measure_in_bits,
    sequence_targets,
)
from fitformer.tasks._given_the_last import given_the_last_bits
from fitformer.tasks.batch import Batch
from fitformer.tasks.preview import Preview
from fitformer.tasks.registry import TaskSpec

UNIT = "bits_per_sample"


def build(recipe: AudioRecipe, dataset: Any) -> FITDecoder:
    """A decoder of mu-law codes.

    Raises:
        InputError: groups of no tokens.
    """
    return build_sequence_decoder(recipe)


def loss(network: FITDecoder, batch: Batch, recipe: AudioRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, and `bits_per_sample`, both means over the samples that count."""
    return loss_in_bits(network, UNIT, **sequence_targets(batch, recipe))


def measure(network: FITDecoder, batch: Batch, recipe: AudioRecipe) -> tuple[dict[str, Tensor], int]:
    """Held-out `loss` in nats and `bits_per_sample`, and the number of samples that count."""
    return measure_in_bits(network, UNIT, **sequence_targets(batch, recipe))


def baselines(recipe: AudioRecipe, train: Iterator[Batch], test: Iterator[Batch]) -> Iterator[tuple[str, float]]:
    """`given_the_last_bits_per_sample`: a code given the one before it, counted in the training part."""
    seen, unseen = (((batch["tokens"], batch["mask"]) for batch in part) for part in (train, test))
    yield f"given_the_last_{UNIT}", given_the_last_bits(seen, unseen, BYTE_VALUES)


def generate_audio(network: FITDecoder, prompts: Sequence[np.ndarray], length: int, **options: Any) -> list[np.ndarray]:
    """Continue sounds of any lengths, mu-law codes uint8 (L,), by `length` samples each; returns both together.

    Args:
        network: a decoder of codes. prompts: an empty one begins from nothing. length: samples to draw for each prompt.
        options: of `generation.GenerationConfig`, such as `temperature`, `seed` and `window`, and a `streamer`.

    Raises:
        InputError: a prompt longer than the decoder holds, without a `window`; options out of range.
    """
    begun = [torch.from_numpy(codes.astype(np.int64)) for codes in prompts]
    rows = continue_sequences(network, begun, length, **options)
    return [row.numpy().astype(np.uint8) for row in rows]


def file_tokens(network: FITDecoder, recipe: AudioRecipe, path: Path) -> ByteBuffer:
    """The codes of a WAV file, read as the recipe's are.

    Raises:
        InputError: what `data.wav.read_sound` refuses.
        MissingDependencyError: SciPy is not installed.
    """
    codes = read_sound(path, recipe.data.sample_rate, recipe.data.resample).codes
    return ByteBuffer([Piece(str(path), 0, len(codes), codes.tobytes())])


def preview(network: FITDecoder, recipe: AudioRecipe, count: int) -> Preview:
    """Sounds from nothing, from the same random numbers at every preview."""
    length, temperature = recipe.objective.preview_length, recipe.objective.preview_temperature
    prompts = [np.zeros(0, np.uint8)] * count
    sounds = generate_audio(network, prompts, length, temperature=temperature, seed=recipe.trainer.seed)
    return Preview(sound=torch.from_numpy(np.stack(sounds)), sample_rate=recipe.data.sample_rate)


TASK = TaskSpec(
    recipe=AudioRecipe,
    model=FITDecoder,
    build=build,
    loss=loss,
    measure=measure,
    monitor=(f"val/{UNIT}", "min"),
    preview=preview,
    counted="tokens",
    baselines=baselines,
    verb="generate",
    generate_audio=generate_audio,
    file_tokens=file_tokens,
    unit=UNIT,
)
