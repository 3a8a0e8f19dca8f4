"""The class of every pixel of an image, read and written piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitformer._support.scratch_array import scratch_array
from fitformer.data.labels import UNLABELLED
from fitformer.data.pixels import convert, fit, unfit
from fitformer.data.readers.levels import blocks
from fitformer.inference.folder_work import NonFiniteError, Tell
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.patching.any_size import GroupedImage, PixelArray

# A probability of 1, in a byte.
WHOLE = 255


@dataclass(frozen=True)
class LabelMap:
    """What a segmenter says of an image; large maps are files without a name, see `scratch_array`.

    Attributes:
        labels: class of each pixel uint8 (H, W), `UNLABELLED` where groups were skipped or nothing was seen.
        probabilities: of each class uint8 (H, W, classes), 255 for 1; None if they were not asked for.
        groups, groups_in_all: how many were read, of how many.
    """

    labels: np.ndarray
    probabilities: np.ndarray | None
    groups: int
    groups_in_all: int


@torch.inference_mode()
def labels_of(
    network: FITImageSegmenter,
    image: GroupedImage,
    *,
    probabilities: bool = False,
    folder: str | Path | None = None,
    tell: Tell = lambda share: None,
) -> LabelMap:
    """The label map of an image; where the model runs streamed, logits of all pixels never exist.

    Args:
        network: in eval mode.
        image: cut as the network cuts images.
        probabilities: also keep those of all classes, which take as many bytes a pixel.
        folder: of large maps; the system's folder for temporary files by default.
        tell: is told the share of the image that is done; the last share takes most of the time.

    Raises:
        NonFiniteError: logits are NaN or infinite.
    """
    size = image.shape[:2]
    labels = scratch_array(size, UNLABELLED, folder)
    shares = scratch_array((*size, network.num_classes), 0, folder) if probabilities else None

    def note(groups: slice, logits: Tensor, mask: Tensor | None) -> Tensor:
        if not bool(logits.isfinite().all()):
            name = getattr(image, "path", "an image")
            raise NonFiniteError(f"the logits of {name} are NaN or infinite: it has NaN or infinite pixels")
        image.put(labels, groups, logits[0].argmax(1).to(torch.uint8).cpu().numpy())
        if shares is not None:
            bytes_ = (logits[0].float().softmax(1) * WHOLE).round().to(torch.uint8)
            image.put(shares, groups, bytes_.movedim(1, -1).cpu().numpy())
        tell(min(groups.stop / image.num_groups, 1.0))
        return logits.new_zeros(1)

    network.score([image], note)
    rows, columns = image.grid
    return LabelMap(labels, shares, image.num_groups - image.glimpses, rows * columns)


def labels_of_fitted(
    network: FITImageSegmenter, pixels: np.ndarray, resize: Any, *, probabilities: bool = False
) -> LabelMap:
    """The label map of an image by a model of one size: what it sees is brought there, its answer back.

    Args:
        network: in eval mode.
        pixels: uint8 (H, W, ch). resize: as `data.resize` of its recipe, see `fit`.
        probabilities: as in `labels_of`.

    Raises:
        NonFiniteError: logits are NaN or infinite.
    """
    grid = network.patch_grid
    seen = fit(convert(pixels, grid.channels), grid.image_size, resize)  # type: ignore[arg-type]
    # A copy: Pillow's own pixels cannot be written to, of which torch warns.
    found = labels_of(network, network.grouped(PixelArray(np.array(seen))), probabilities=probabilities)
    size = (pixels.shape[0], pixels.shape[1])
    shares = found.probabilities
    if shares is not None:
        shares = np.stack([unfit(shares[..., k], size, resize, 0) for k in range(shares.shape[2])], axis=-1)
    return LabelMap(unfit(found.labels, size, resize, UNLABELLED), shares, found.groups, found.groups_in_all)


def class_shares(labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """The share of each class in the labelled pixels of a map uint8 (H, W), by name; all 0 where none is labelled."""
    counts = np.zeros(UNLABELLED + 1, dtype=np.int64)
    image = PixelArray(labels[..., None])
    for window in blocks(image):
        counts += np.bincount(image.window(*window).ravel(), minlength=len(counts))
    whole = max(int(counts[:UNLABELLED].sum()), 1)
    return {name: int(count) / whole for name, count in zip(classes, counts)}
