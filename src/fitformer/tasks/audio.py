"""Autoregression over sound: predict the next sample, as one of 256 mu-law codes."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fitformer.config.schema import AudioRecipe
from fitformer.models.decoder import FITDecoder
from fitformer.tasks._autoregression import (
    BYTE_VALUES,
    build_sequence_decoder,
    loss_in_bits,
    measure_in_bits,
    sequence_targets,
)
from fitformer.tasks._given_the_last import given_the_last_bits
from fitformer.tasks.batch import Batch
from fitformer.tasks.registry import TaskSpec

UNIT = "bits_per_sample"


def build(recipe: AudioRecipe, dataset: Any) -> FITDecoder:
    """A decoder of mu-law codes.

    Raises:
        InputError: `data.length` is no multiple of `model.tokens_per_group`.
    """
    return build_sequence_decoder(recipe)


def loss(network: FITDecoder, batch: Batch, recipe: AudioRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, and `bits_per_sample`, both means over the samples that count."""
    return loss_in_bits(network, UNIT, *sequence_targets(batch, recipe))


def measure(network: FITDecoder, batch: Batch, recipe: AudioRecipe) -> tuple[dict[str, Tensor], int]:
    """Held-out `loss` in nats and `bits_per_sample`, and the number of samples that count."""
    return measure_in_bits(network, UNIT, *sequence_targets(batch, recipe))


def baselines(recipe: AudioRecipe, train: Iterator[Batch], test: Iterator[Batch]) -> Iterator[tuple[str, float]]:
    """`given_the_last_bits_per_sample`: a code given the one before it, counted in the training part."""
    seen, unseen = (((batch["tokens"], batch["mask"]) for batch in part) for part in (train, test))
    yield f"given_the_last_{UNIT}", given_the_last_bits(seen, unseen, BYTE_VALUES)


TASK = TaskSpec(
    recipe=AudioRecipe,
    model=FITDecoder,
    build=build,
    loss=loss,
    measure=measure,
    monitor=(f"val/{UNIT}", "min"),
    counted="tokens",
    baselines=baselines,
)
