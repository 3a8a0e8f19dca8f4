"""Autoregression: the next pixel value of an image, or the next byte of a text or file, in bits."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer import generation, patching
from fitformer.config.schema import ByteRecipe, PixelRecipe
from fitformer.errors import InputError
from fitformer.models.decoder import FITDecoder
from fitformer.patching.sizes import to_sides
from fitformer.tasks.batch import Batch, arguments, one_size
from fitformer.tasks.preview import Preview

BYTES = 256
_PREVIEW_PROMPT = b"\n"


def build(recipe: PixelRecipe | ByteRecipe, dataset: Any) -> FITDecoder:
    """A decoder of the dataset's pixel values or bytes.

    Raises:
        InputError: sizes that do not divide.
    """
    if isinstance(recipe, ByteRecipe):
        return _build(recipe, _division(recipe), recipe.model.tokens_per_group, BYTES)
    image = torch.zeros(1, *to_sides(one_size(recipe), "hw"), dataset.channels, dtype=torch.uint8)
    t, n = patching.image_to_pixels(image, recipe.model.patch_size, recipe.objective.order).shape[1:]
    return _build(recipe, t, n, recipe.data.levels or BYTES)


def _build(recipe: PixelRecipe | ByteRecipe, num_groups: int, tokens_per_group: int, vocabulary: int) -> FITDecoder:
    return FITDecoder.from_preset(
        recipe.model.preset,
        num_groups=num_groups,
        tokens_per_group=tokens_per_group,
        vocab_size=vocabulary,
        **arguments(recipe.model, "patch_size", "tokens_per_group"),
    )


def _division(recipe: ByteRecipe) -> int:
    length, n = recipe.data.length, recipe.model.tokens_per_group
    if n < 1 or length % n:
        below = length // max(n, 1) * max(n, 1)
        near = f"{below} or {below + n}" if below else f"{n}"
        raise InputError(
            f"data.length {length} is not a whole number of groups of model.tokens_per_group {n}; "
            f"lengths near it are {near}"
        )
    return length // n


def targets(batch: Batch, recipe: PixelRecipe | ByteRecipe) -> tuple[Tensor, Tensor | None]:
    """Tokens `(b, t, n)` to be learned, and a mask `(b, t, n)` of those that count (None: all do)."""
    if isinstance(recipe, ByteRecipe):
        n = recipe.model.tokens_per_group
        mask = batch.get("mask")
        kept = None if mask is None or bool(mask.all()) else patching.sequence_to_groups(mask, n)
        return patching.sequence_to_groups(batch["tokens"], n), kept
    return patching.image_to_pixels(batch["image"], recipe.model.patch_size, recipe.objective.order), None


def bits(network: FITDecoder, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean bits of the tokens `(b, t, n)` that count, a scalar, with gradients: the paper's negative log-likelihood."""
    given = patching.shift_right(tokens)
    weights = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask

    def nats(groups: slice, logits: Tensor, _: Tensor | None) -> Tensor:
        # A slice's logits are gone before the next one's are there.
        each = F.cross_entropy(logits.flatten(0, -2).float(), tokens[:, groups].flatten(), reduction="none")
        return (each * weights[:, groups].flatten()).sum()

    return network(given, score=nats) / weights.sum() / math.log(2)


def unit(recipe: PixelRecipe | ByteRecipe) -> str:
    """What the loss is called: `bits_per_byte`, or `bits_per_dim` for a pixel value."""
    return "bits_per_byte" if isinstance(recipe, ByteRecipe) else "bits_per_dim"


def loss(network: FITDecoder, batch: Batch, recipe: PixelRecipe | ByteRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats (what the optimizer sees), and the same in bits."""
    value = bits(network, *targets(batch, recipe))
    return value * math.log(2), {unit(recipe): value.detach()}


def measure(network: FITDecoder, batch: Batch, recipe: PixelRecipe | ByteRecipe) -> tuple[dict[str, Tensor], int]:
    """Held-out bits, a mean over tokens, and the number of tokens."""
    tokens, mask = targets(batch, recipe)
    value = bits(network, tokens, mask)
    count = tokens.numel() if mask is None else int(mask.sum())
    return {"loss": value * math.log(2), unit(recipe): value}, count


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
    """Draw images pixel by pixel, uint8 0 .. 255 `(count, H, W, ch)`. Image k depends on (seed, first + k) alone."""
    length = network.num_groups * network.tokens_per_group
    size, levels = to_sides(one_size(recipe), "hw"), network.vocab_size
    parts = []
    for start in range(0, count, batch_size):
        k = min(batch_size, count - start)
        drawn = generation.generate(
            network,
            None,
            length,
            count=k,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            first=first + start,
        )
        tokens = patching.sequence_to_groups(drawn.cpu(), network.tokens_per_group)
        channels = length // math.prod(size)
        parts.append(patching.pixels_to_image(tokens, size, recipe.model.patch_size, channels, recipe.objective.order))
    return to_grey(torch.cat(parts), levels)


def to_grey(images: Tensor, levels: int) -> Tensor:
    """Images of `levels` values, 0 .. levels-1, as uint8 0 .. 255."""
    return images if levels == BYTES else (images.float() * (255 / (levels - 1))).round().to(torch.uint8)


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
    """Continue prompts of one length by `length` bytes each; the text may outgrow the trained length.

    Raises:
        InputError: prompts that are empty or of several lengths.
    """
    if len({len(prompt) for prompt in prompts}) != 1 or not prompts[0]:
        raise InputError("prompts must be given, all of one length above 0; continue others one at a time")
    device = next(network.parameters()).device
    start = torch.stack([patching.bytes_to_tokens(prompt) for prompt in prompts]).to(device)
    drawn = generation.generate(
        network,
        start,
        start.shape[1] + length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_token=on_token,
        window=True,
    )
    return [patching.tokens_to_bytes(row) for row in drawn]


def preview(network: FITDecoder, recipe: PixelRecipe | ByteRecipe, count: int) -> Preview:
    """Images, or text after a line's end; the same random numbers at every preview."""
    seed = recipe.trainer.seed
    if isinstance(recipe, PixelRecipe):
        return Preview(images=generate_images(network, recipe, count, seed=seed))
    length, temperature = recipe.objective.preview_length, recipe.objective.preview_temperature
    drawn = generate_bytes(network, [_PREVIEW_PROMPT] * count, length, temperature=temperature, seed=seed)
    return Preview(text=tuple(data.decode("utf-8", errors="replace") for data in drawn))


def monitor(recipe: PixelRecipe | ByteRecipe) -> tuple[str, str]:
    """The best checkpoint needs the fewest held-out bits."""
    return f"val/{unit(recipe)}", "min"
