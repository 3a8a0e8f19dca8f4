"""The loss of each role on a huge image, computed slice by slice."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitformer.data.labels import UNLABELLED
from fitformer.execution import Inputs
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.patching.any_size import GroupedImage, PixelSource, stacked, to_signal
from fitformer.profiling import Geometry
from fitformer.tasks._pixel_sums import loss_sums, losses

# Noise level of the denoiser's step.
GAMMA = 0.5


def loss_of(
    model: nn.Module, geometry: Geometry, sources: list[PixelSource], device: torch.device
) -> Callable[[], Tensor]:
    """A function that computes the loss of a batch of images: of their class, their noise, or the next pixel value."""
    images = [GroupedImage(source, geometry.patch_grid) for source in sources]
    if isinstance(model, FITImageEncoder):
        labels = torch.arange(len(images), device=device) % model.num_classes
        return lambda: F.cross_entropy(model(images), labels)
    if isinstance(model, FITImageSegmenter):
        return lambda: _classes_of_pixels(model, images)
    if isinstance(model, FITDenoiser):
        return lambda: _denoising(model, images, device)
    assert isinstance(model, FITDecoder)
    return lambda: _next_value(model, images, device)


def _classes_of_pixels(model: FITImageSegmenter, images: list[GroupedImage]) -> Tensor:
    """Cross-entropy and Dice loss of classes that go round from group to group."""

    def score(groups: slice, logits: Tensor, mask: Tensor | None) -> Tensor:
        own = torch.arange(groups.start, groups.stop, device=logits.device) % model.num_classes
        labels = own.to(torch.uint8)[:, None, None].expand(logits[:, :, 0].shape)
        return loss_sums(logits, labels if mask is None else labels.masked_fill(~mask, UNLABELLED))

    cross, dice, _ = losses(model.score(images, score))
    return cross + dice


def _denoising(model: FITDenoiser, images: list[GroupedImage], device: torch.device) -> Tensor:
    """Mean squared error of the noise that was mixed into the images."""
    count = sum(image.num_groups * image.patch_grid.tokens_per_group * image.patch_grid.token_dim for image in images)
    coords = torch.stack([image.coords for image in images]).to(device)
    time = torch.full((len(images),), GAMMA, device=device)

    def read(groups: slice) -> tuple[Tensor, Tensor | None]:
        tokens, mask = stacked(images, groups)
        return tokens.to(device, non_blocking=True), None if mask is None else mask.to(device)

    def noise(groups: slice, like: Tensor) -> Tensor:
        # Drawn again on each use: the noise of a whole image would take four times the image's memory.
        generator = torch.Generator(device).manual_seed(groups.start)
        return torch.randn(like.shape, generator=generator, device=device)

    def embed(groups: slice, tokens: Tensor) -> Tensor:
        clean = to_signal(tokens)
        return model.embed(GAMMA**0.5 * clean + (1 - GAMMA) ** 0.5 * noise(groups, clean))

    def score(groups: slice, prediction: Tensor, mask: Tensor | None) -> Tensor:
        error = (prediction - noise(groups, prediction)).square()
        return (error if mask is None else error * mask[..., None]).sum() / count

    latents = model.initial_latents(len(images), images[0].num_groups, None, coords)
    inputs = Inputs(
        tokens=read,
        latents=latents,
        embed=embed,
        score=lambda groups, x, mask: score(groups, model.head(x), mask),
        condition=model.condition(len(images), time, None),
        parameters=model.all_parameters(),
    )
    loss = model.execute(inputs).score
    assert loss is not None
    return loss


def _next_value(model: FITDecoder, images: list[GroupedImage], device: torch.device) -> Tensor:
    """Mean cross-entropy of the next value of a pixel, group by group."""
    groups, count = images[0].num_groups, len(images) * images[0].num_groups * model.tokens_per_group

    def values(which: slice) -> Tensor:
        return stacked(images, which)[0].flatten(2).to(device).long()

    def read(which: slice) -> tuple[Tensor, Tensor | None]:
        """Values shifted right by one, through all groups."""
        first, last, _ = which.indices(groups)
        found = values(slice(max(first - 1, 0), last))
        before = found[:, :1, -1] if first else torch.zeros_like(found[:, :1, 0])
        own = found[:, min(first, 1) :]
        return torch.cat([before, own.flatten(1)[:, :-1]], dim=1).view_as(own), None

    def score(which: slice, logits: Tensor, mask: Tensor | None) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 2), values(which).flatten(), reduction="sum") / count

    return model.read(read, len(images), groups, score)
