"""A frozen encoder of patches: pixels in, a vector of features out, whatever it is made of."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer.data.pixels import MODES
from fitformer.data.readers import LazyImage, check_channels
from fitformer.data.readers.levels import OpenOptions
from fitformer.errors import InputError, ran_out_of_memory
from fitformer.patching.any_size import check_pixels, to_signal

Size = tuple[int, int]


@dataclass(frozen=True)
class Normalization:
    """Means and deviations of channels, of pixels from 0 to 1, as torchvision and timm state them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        finite = all(np.isfinite((*self.mean, *self.std))) and all(each > 0 for each in self.std)
        if len(self.mean) != len(self.std) or not finite:
            raise InputError(
                f"mean is {_shown(self.mean)} and std {_shown(self.std)}: give a finite mean and a positive std for "
                "each channel, of pixels from 0 to 1, such as 0.5 0.5 0.5"
            )

    def __call__(self, signal: Tensor) -> Tensor:
        """Pixels (b, H, W, channels) of -1 .. 1, normalised."""
        mean, std = (torch.tensor(each, device=signal.device) for each in (self.mean, self.std))
        return ((signal + 1) / 2 - mean) / std


def _shown(numbers: Sequence[float]) -> str:
    return " ".join(f"{each:g}" for each in numbers)


@dataclass(frozen=True, eq=False)
class PatchEncoder:
    """A frozen encoder of patches on a device: pixels in, features (b, D) out.

    Attributes:
        name: what it is called in messages.
        digest: of its weights or its file; tells it from others.
        run: features (b, D) of pixels (b, H, W, channels), or (b, channels, H, W) if `channels_first`.
        channels: of the pixels.
        size: rows and columns that it takes, to which patches are scaled; None for any.
        device: where pixels are put.
        normalization: of the pixels, which are whole numbers. Without one it takes them as
            `patching.any_size.to_signal` has them: whole numbers from -1 to 1, floats as they are.
        channels_first: the layout of `run`.
        trained: without a normalisation, the type of the pixels that it was trained on; None for any.
        pixel_range: the numbers that are black and white; None goes by their type.
        bf16: whether it computes in bfloat16 where that is safe.
    """

    name: str
    digest: str
    run: Callable[[Tensor], Any]
    channels: int
    size: Size | None
    device: torch.device
    normalization: Normalization | None = None
    channels_first: bool = False
    trained: np.dtype | None = None
    pixel_range: tuple[float, float] | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.normalization is not None and len(self.normalization.mean) != self.channels:
            raise InputError(
                f"{self.name} takes {self.channels} channels, and mean and std are given for "
                f"{len(self.normalization.mean)}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What its features depend on beside the weights."""
        return {
            "normalization": None if self.normalization is None else asdict(self.normalization),
            "pixel_range": self.pixel_range,
            "precision": "bf16" if self.bf16 else "32",
        }

    @property
    def options(self) -> OpenOptions:
        """How slides are opened for it: grey and colour are converted into each other."""
        return OpenOptions(pixel_range=self.pixel_range, channels=self.channels if self.channels in MODES else None)

    def check(self, image: LazyImage) -> None:
        """Check that it takes the pixels of a slide.

        Raises:
            InputError: another number of channels, or floats in place of whole numbers.
        """
        check_channels(image, self.channels)
        if self.trained is not None:
            check_pixels(image.path, image.dtype, self.trained)
        if self.normalization is not None and image.dtype.kind == "f":
            raise InputError(
                f"{image.path} has {image.dtype} pixels, whose range the file does not tell: say which numbers are "
                "black and white (pixel_range), or convert it to uint8 or uint16"
            )

    def features(self, pixels: np.ndarray, patch_size: int) -> np.ndarray:
        """Features float32 (b, D) of patches (b, H, W, channels) of any scale, brought to `patch_size` or its own size.

        Raises:
            InputError: it cannot take patches of this size, or gives something else than a vector for each.
        """
        signal = to_signal(torch.from_numpy(pixels).to(self.device))
        size = self.size or (patch_size, patch_size)
        if tuple(signal.shape[1:3]) != size:
            signal = _scaled(signal, size, clip=pixels.dtype.kind == "u")
        if self.normalization is not None:
            signal = self.normalization(signal)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            found = self.run(signal.permute(0, 3, 1, 2).contiguous() if self.channels_first else signal)
        if not isinstance(found, Tensor) or found.shape[:1] != signal.shape[:1] or found.ndim != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"{self.name} gives {shape} for {len(signal)} patches, and features are ({len(signal)}, D): export it "
                "with its pooling and without its head"
            )
        return found.float().cpu().numpy()

    def width(self, patch_size: int) -> int:
        """How many numbers it makes of a patch, by trying.

        Raises:
            InputError: as `features`.
        """
        try:
            return self.features(np.zeros((1, patch_size, patch_size, self.channels), np.float32), patch_size).shape[1]
        except Exception as error:
            # Whatever runs the encoder has errors of its own kinds.
            if isinstance(error, InputError) or ran_out_of_memory(error):
                raise
            raise InputError(
                f"{self.name} does not take patches of {patch_size} x {patch_size} pixels and {self.channels} "
                f"channels ({' '.join(str(error).split())[:200]}); give another patch size"
            ) from error


def _scaled(signal: Tensor, size: Size, clip: bool) -> Tensor:
    """Pixels (b, H, W, channels) at another size, by cubic interpolation over all pixels that one covers."""
    found = F.interpolate(signal.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    return found.clamp(-1, 1) if clip else found
