"""Autoregression over pixels: predict the next pixel value of an image."""

import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitformer import patching
from fitformer.config.schema import PixelRecipe
from fitformer.data.datasets.images import dequantize, quantize
from fitformer.data.datasets.text import ByteBuffer, Piece
from fitformer.data.decoding import UnreadableImageError, decode
from fitformer.data.pixels import fit, to_image
from fitformer.errors import InputError
from fitformer.models.decoder import FITDecoder
from fitformer.patching.sizes import format_size, to_sides
from fitformer.tasks._autoregression import BYTE_VALUES, build_decoder, loss_in_bits, measure_in_bits
from fitformer.tasks._independent_pixels import independent_bits
from fitformer.tasks.batch import Batch, need_classes, one_size
from fitformer.tasks.preview import Preview
from fitformer.tasks.registry import TaskSpec

UNIT = "bits_per_dim"


def build(recipe: PixelRecipe, dataset: Any) -> FITDecoder:
    """A decoder of the dataset's pixel values, a group a patch, told the class if the recipe is class-conditional.

    Raises:
        InputError: an image size that is no multiple of the patch size, images of any size, no classes where they are
            needed.
    """
    image = torch.zeros(1, *to_sides(one_size(recipe), "hw"), dataset.channels, dtype=torch.uint8)
    t, n = patching.image_to_pixels(image, recipe.model.patch_size, recipe.objective.order).shape[1:]
    classes = need_classes(dataset, "class_conditional") if recipe.objective.class_conditional else 0
    return build_decoder(recipe.model, t, n, recipe.data.levels or BYTE_VALUES, classes)


def targets(batch: Batch, recipe: PixelRecipe) -> Tensor:
    """Pixel values `(b, t, n)` of a batch of images, a group a patch."""
    return patching.image_to_pixels(batch["image"], recipe.model.patch_size, recipe.objective.order)


def loss(network: FITDecoder, batch: Batch, recipe: PixelRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, and `bits_per_dim`, both means over pixel values."""
    return loss_in_bits(network, UNIT, targets(batch, recipe), labels=batch["label"])


def measure(network: FITDecoder, batch: Batch, recipe: PixelRecipe) -> tuple[dict[str, Tensor], int]:
    """Held-out `loss` in nats and `bits_per_dim`, and the number of pixel values."""
    return measure_in_bits(network, UNIT, targets(batch, recipe), labels=batch["label"])


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
    classes: Sequence[int] | None = None,
    batch_size: int = 64,
    first: int = 0,
    **options: Any,
) -> Tensor:
    """Draw images pixel by pixel, uint8 0 .. 255 `(count, H, W, ch)` on the CPU.

    Image k depends on the weights, `seed`, `first + k` and its class alone, not on `count` or `batch_size`.

    Args:
        network: the decoder. recipe: gives the image size and the order of the patches. count: number of images.
        classes: class of each image, for a class-conditional network; None takes all classes in turn.
        batch_size: images at once. first: number of the first image.
        options: of `generation.GenerationConfig`, such as `temperature`, `top_k`, `top_p` and `seed`, and a `streamer`.

    Raises:
        InputError: options out of range; classes that do not go with the network.
    """
    prompts = torch.zeros(count, 0, dtype=torch.int64)
    return _draw(network, recipe, prompts, _labels(network, classes, count, first), batch_size, first, options)


def complete_images(
    network: FITDecoder,
    recipe: PixelRecipe,
    images: Tensor,
    *,
    keep_rows: int | None = None,
    count: int = 1,
    classes: Sequence[int] | None = None,
    batch_size: int = 64,
    first: int = 0,
    **options: Any,
) -> Tensor:
    """Keep the upper rows of images and draw the others, uint8 0 .. 255 `(b * count, H, W, ch)` on the CPU.

    Args:
        network, recipe, batch_size, first, options: as in `generate_images`.
        images: uint8 0 .. 255 `(b, H, W, ch)`, of the network's size.
        keep_rows: rows to keep, which must come first in the order of the decoder; None is half of them, or the most
            below half that do.
        count: completions of each image, which stand together.
        classes: class of each completion; None takes all classes in turn.

    Raises:
        InputError: images of another size or kind; rows that do not come first; and what `generate_images` refuses.
    """
    size = (*to_sides(one_size(recipe), "hw"), _channels(network, recipe))
    if images.shape[1:] != size or images.dtype != torch.uint8:
        found = format_size(images.shape[1:])
        raise InputError(
            f"images are {images.dtype} of {found}, and the model completes uint8 ones of {format_size(size)} (rows x "
            "columns x channels); cut or scale them to that size"
        )
    if recipe.data.levels is not None:
        images = torch.from_numpy(quantize(images.numpy(), recipe.data.levels))
    kept = kept_rows(recipe, keep_rows) * size[1] * size[2]
    prompts = targets({"image": images}, recipe).flatten(1)[:, :kept].repeat_interleave(count, 0)
    labels = _labels(network, classes, len(prompts), first)
    return _draw(network, recipe, prompts, labels, batch_size, first, options)


def kept_rows(recipe: PixelRecipe, asked: int | None) -> int:
    """How many upper rows are kept for completion: those asked for, or at most half of them.

    Raises:
        InputError: patches are as high as the image, or the rows asked for are not the first in the decoder's order.
    """
    height, width = to_sides(one_size(recipe), "hw")
    ph, pw = to_sides(recipe.model.patch_size, "hw")
    # Rows of pixels follow one another where a patch is as wide as the image, else only rows of patches do.
    step = 1 if pw == width else ph
    if step == height:
        raise InputError(f"patches are as high as the image, {ph} rows, so no upper rows come before the others")
    rows = height // 2 // step * step if asked is None else asked
    if not 0 < rows < height:
        raise InputError(f"keep_rows is {rows}; of the {height} rows of an image, 1 to {height - 1} can be kept")
    if rows % step:
        near = [each for each in (rows // step * step, rows // step * step + step) if 0 < each < height]
        raise InputError(
            f"keep_rows is {rows}; pixels come patch by patch, {ph} rows high: keep {' or '.join(map(str, near))} rows"
        )
    return rows


def _labels(network: FITDecoder, classes: Sequence[int] | None, count: int, first: int) -> Tensor | None:
    """The class of each image `(count,)`; None for an unconditional network."""
    if classes is None:
        in_turn = [(first + k) % network.num_classes for k in range(count)] if network.num_classes else None
        return None if in_turn is None else torch.tensor(in_turn, dtype=torch.int64)
    labels = torch.tensor(list(classes), dtype=torch.int64)
    network.check_labels(labels, count)
    return labels


def _draw(
    network: FITDecoder,
    recipe: PixelRecipe,
    prompts: Tensor,
    labels: Tensor | None,
    batch_size: int,
    first: int,
    options: dict[str, Any],
) -> Tensor:
    """Images whose first pixel values are `prompts (b, L)`, batch by batch."""
    parts, new = [], math.prod((*to_sides(one_size(recipe), "hw"), _channels(network, recipe))) - prompts.shape[1]
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        told = {} if labels is None else {"labels": labels[rows]}
        drawing = {"do_sample": True, "first": first + start, **options, **told}
        parts.append(_to_images(network.generate(prompts[rows], max_new_tokens=new, **drawing).cpu(), network, recipe))
    return to_grey(torch.cat(parts), network.vocab_size)


def _channels(network: FITDecoder, recipe: PixelRecipe) -> int:
    return network.tokens_per_group // math.prod(to_sides(recipe.model.patch_size, "hw"))


def _to_images(tokens: Tensor, network: FITDecoder, recipe: PixelRecipe) -> Tensor:
    """Pixel values `(b, L)` in the order of the decoder as images `(b, H, W, ch)`."""
    size, channels = to_sides(one_size(recipe), "hw"), _channels(network, recipe)
    groups = patching.sequence_to_groups(tokens, network.tokens_per_group)
    return patching.pixels_to_image(groups, size, recipe.model.patch_size, channels, recipe.objective.order)


def to_grey(images: Tensor, levels: int) -> Tensor:
    """Images of `levels` values, 0 .. levels-1, as uint8 0 .. 255."""
    return images if levels == BYTE_VALUES else (images.float() * (255 / (levels - 1))).round().to(torch.uint8)


def file_tokens(network: FITDecoder, recipe: PixelRecipe, path: Path) -> ByteBuffer:
    """The pixel values of an image file, brought to the size, channels and levels of the model, in its order.

    Raises:
        InputError: it is missing, or no image.
    """
    rows, columns = to_sides(one_size(recipe), "hw")
    pixels = _decoded(path, _channels(network, recipe), recipe)
    return _as_tokens(fit(pixels, (rows, columns), recipe.data.resize), recipe, path)


def exact_tokens(network: FITDecoder, recipe: PixelRecipe, path: Path) -> ByteBuffer:
    """The pixel values of an image file that has the size, channels and levels of the model.

    Raises:
        InputError: it is missing, no image, or has others, so that its pixels would change.
    """
    pixels, size = _decoded(path, None, recipe), (*to_sides(one_size(recipe), "hw"), _channels(network, recipe))
    if pixels.shape != size:
        raise InputError(
            f"{path} is {format_size(pixels.shape)} (rows x columns x channels) and the model's images are "
            f"{format_size(size)}; its pixels would change: give an image of that size"
        )
    levels = recipe.data.levels
    if levels is not None and not np.array_equal(dequantize(quantize(pixels, levels), levels), pixels):
        raise InputError(f"{path} has other pixel values than the model's {levels} levels; its pixels would change")
    return _as_tokens(pixels, recipe, path)


def restored(network: FITDecoder, recipe: PixelRecipe, tokens: bytes) -> bytes:
    """The PNG file of an image whose pixel values are `tokens`, in the order of the decoder."""
    (values,) = _to_images(patching.bytes_to_tokens(tokens)[None], network, recipe).numpy()
    file = BytesIO()
    to_image(values if recipe.data.levels is None else dequantize(values, recipe.data.levels)).save(file, "PNG")
    return file.getvalue()


def _decoded(path: Path, channels: int | None, recipe: PixelRecipe) -> np.ndarray:
    try:
        return decode(path, str(path), channels, recipe.data.pixel_range)
    except UnreadableImageError as error:
        raise InputError(f"{path} cannot be read as an image: {error.reason}") from error


def _as_tokens(pixels: np.ndarray, recipe: PixelRecipe, path: Path) -> ByteBuffer:
    """Pixels (H, W, ch) 0 .. 255 in the order of the decoder."""
    values = pixels if recipe.data.levels is None else quantize(pixels, recipe.data.levels)
    tokens = patching.tokens_to_bytes(targets({"image": torch.from_numpy(values.copy())[None]}, recipe))
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
    complete_images=complete_images,
    file_tokens=file_tokens,
    unit=UNIT,
    exact_tokens=exact_tokens,
    restored=restored,
)
