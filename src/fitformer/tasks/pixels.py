"""Autoregression over pixels: predict the next pixel value of an image."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitformer import patching
from fitformer.config.schema import PixelRecipe
from fitformer.data.datasets.images import quantize
from fitformer.data.datasets.text import ByteBuffer, Piece
from fitformer.data.decoding import UnreadableImageError, decode
from fitformer.data.pixels import fit
from fitformer.errors import InputError
from fitformer.models.decoder import FITDecoder
from fitformer.patching.sizes import to_sides
from fitformer.tasks._autoregression import BYTE_VALUES, build_decoder, loss_in_bits, measure_in_bits
from fitformer.tasks._independent_pixels import independent_bits
from fitformer.tasks.batch import Batch, one_size
from fitformer.tasks.preview import Preview
from fitformer.tasks.registry import TaskSpec

UNIT = "bits_per_dim"


def build(recipe: PixelRecipe, dataset: Any) -> FITDecoder:
    """A decoder of the dataset's pixel values, a group a patch.

    Raises:
        InputError: an image size that is no multiple of the patch size, images of any size.
    """
    image = torch.zeros(1, *to_sides(one_size(recipe), "hw"), dataset.channels, dtype=torch.uint8)
    t, n = patching.image_to_pixels(image, recipe.model.patch_size, recipe.objective.order).shape[1:]
    return build_decoder(recipe.model, t, n, recipe.data.levels or BYTE_VALUES)


def targets(batch: Batch, recipe: PixelRecipe) -> Tensor:
    """Pixel values `(b, t, n)` of a batch of images, a group a patch."""
    return patching.image_to_pixels(batch["image"], recipe.model.patch_size, recipe.objective.order)


def loss(network: FITDecoder, batch: Batch, recipe: PixelRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, and `bits_per_dim`, both means over pixel values."""
    return loss_in_bits(network, UNIT, targets(batch, recipe))


def measure(network: FITDecoder, batch: Batch, recipe: PixelRecipe) -> tuple[dict[str, Tensor], int]:
    """Held-out `loss` in nats and `bits_per_dim`, and the number of pixel values."""
    return measure_in_bits(network, UNIT, targets(batch, recipe))


def baselines(recipe: PixelRecipe, train: Iterator[Batch], test: Iterator[Batch]) -> Iterator[tuple[str, float]]:
    """`independent_bits_per_dim`: pixels that are independent given their position, fitted on the training part."""
    levels = recipe.data.levels or BYTE_VALUES
    seen, unseen = ((targets(batch, recipe) for batch in part) for part in (train, test))
    yield f"independent_{UNIT}", independent_bits(seen, unseen, levels)


def generate_images(
    network: FITDecoder,
    recipe: PixelRecipe,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    first: int = 0,
) -> Tensor:
    """Draw images pixel by pixel, uint8 0 .. 255 `(count, H, W, ch)` on the CPU.

    Image k depends on the weights, `seed` and `first + k` alone, not on `count` or `batch_size`.

    Args:
        network: the decoder. recipe: gives the image size and the order of the patches. count: number of images.
        temperature, top_k, top_p: see `generation.filter_logits`.
        seed: of the random numbers. batch_size: images at once. first: number of the first image.

    Raises:
        InputError: a temperature below 0, a `top_k` or `top_p` out of range.
    """
    assert network.num_groups is not None
    parts = []
    for start in range(0, count, batch_size):
        tokens = network.generate(
            max_new_tokens=network.num_groups * network.tokens_per_group,
            num_return_sequences=min(batch_size, count - start),
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            first=first + start,
        )
        parts.append(_to_images(tokens.cpu(), network, recipe))
    return to_grey(torch.cat(parts), network.vocab_size)


def _to_images(tokens: Tensor, network: FITDecoder, recipe: PixelRecipe) -> Tensor:
    """Pixel values `(b, L)` in the order of the decoder as images `(b, H, W, ch)`."""
    size = to_sides(one_size(recipe), "hw")
    groups = patching.sequence_to_groups(tokens, network.tokens_per_group)
    channels = tokens.shape[1] // math.prod(size)
    return patching.pixels_to_image(groups, size, recipe.model.patch_size, channels, recipe.objective.order)


def to_grey(images: Tensor, levels: int) -> Tensor:
    """Images of `levels` values, 0 .. levels-1, as uint8 0 .. 255."""
    return images if levels == BYTE_VALUES else (images.float() * (255 / (levels - 1))).round().to(torch.uint8)


def file_tokens(network: FITDecoder, recipe: PixelRecipe, path: Path) -> ByteBuffer:
    """The pixel values of an image file, brought to the size, channels and levels of the model, in its order.

    Raises:
        InputError: it is missing, or no image.
    """
    channels = network.tokens_per_group // math.prod(to_sides(recipe.model.patch_size, "hw"))
    try:
        pixels = decode(path, str(path), channels, recipe.data.pixel_range)
    except UnreadableImageError as error:
        raise InputError(f"{path} cannot be read as an image: {error.reason}") from error
    rows, columns = to_sides(one_size(recipe), "hw")
    pixels = fit(pixels, (rows, columns), recipe.data.resize)
    if recipe.data.levels is not None:
        pixels = quantize(pixels, recipe.data.levels)
    tokens = patching.tokens_to_bytes(targets({"image": torch.from_numpy(pixels.copy())[None]}, recipe))
    return ByteBuffer([Piece(str(path), 0, len(tokens), tokens)])


def preview(network: FITDecoder, recipe: PixelRecipe, count: int) -> Preview:
    """Generated images, from the same random numbers at every preview."""
    return Preview(images=generate_images(network, recipe, count, seed=recipe.trainer.seed))


TASK = TaskSpec(
    recipe=PixelRecipe,
    model=FITDecoder,
    build=build,
    loss=loss,
    measure=measure,
    monitor=(f"val/{UNIT}", "min"),
    preview=preview,
    counted="tokens",
    baselines=baselines,
    verb="generate",
    generate_images=generate_images,
    file_tokens=file_tokens,
    unit=UNIT,
)
