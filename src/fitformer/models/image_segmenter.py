"""FIT as a segmenter of images: logits of classes for every pixel, of images of one size or of any."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from fitformer._support.checks import checked, whole
from fitformer.errors import InputError
from fitformer.execution import Inputs
from fitformer.models.adapt import Grid
from fitformer.models.base import FITModel
from fitformer.models.config import TrunkConfig
from fitformer.models.dense_head import DenseHead
from fitformer.models.encoder import FITEncoder
from fitformer.models.image_encoder import FITImageEncoder, Images
from fitformer.models.layers import MOST_SIZE
from fitformer.models.trunk import Trunk
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import GroupedImage, PixelSource, to_signal
from fitformer.patching.sizes import Size

PixelScore = Callable[[slice, Tensor, Tensor | None], Tensor]
"""Of a slice of groups, their logits `(b, s, classes, rows, columns)`, and which pixels lie in patches that the image
has, booleans `(b, s, rows, columns)` or None for all: a tensor that is added up over slices."""


# Numbers of decoded pixels that are worked on at once, 16 MiB. Tensors above 32 MiB are slower: the C library gives
# them back to the system each time, and gets new ones page by page.
_PIECE = 2**22


class FITImageSegmenter(FITModel):
    """FIT segmenter of images: a `FITImageEncoder`, and a head that decodes each data token to its patch's pixels.

    Args:
        trunk: options of the trunk, whose layer string ends in local layers, as `(2)4(2)`: what the last global layers
            learned must reach the data tokens.
        image_size, group_size, patch_size, channels, glimpses, mask: as in `FITImageEncoder`.
        num_classes: classes of a pixel.
        refinement: numbers of a pixel that two convolutions work on, see `DenseHead`; 0 for none.

    Raises:
        InputError: a layer string that ends in global layers, or what `FITImageEncoder` and `DenseHead` refuse.
    """

    free = FITModel.free | {"num_classes", "image_size", "group_size"}
    class_weights = ("head.",)
    parts: ClassVar[dict[str, str]] = {"FITImageEncoder": "backbone"}

    @checked
    def __init__(
        self,
        trunk: TrunkConfig,
        image_size: Size | None,
        group_size: Size,
        patch_size: Size,
        *,
        num_classes: int,
        channels: int = 3,
        refinement: int = 16,
        glimpses: int = 0,
        mask: str | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = whole("num_classes", num_classes, 1, MOST_SIZE)
        sizes = (image_size, group_size, patch_size)
        self.backbone = FITImageEncoder(trunk, *sizes, channels=channels, glimpses=glimpses, mask=mask)
        if self.backbone.ends_in_latents:
            raise InputError(
                f"layers is {trunk.layers!r}, whose last global layers reach no pixel; end it with local layers, such "
                f"as {trunk.closed().layers!r}"
            )
        self.channels, self.glimpses = channels, glimpses
        self.head = DenseHead(trunk.dim, self.patch_grid, num_classes, refinement)

    @classmethod
    def around(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Those of a classifier but for its head, with the local layers of its first block at the end."""
        own = {name: value for name, value in config.items() if name not in ("num_classes", "outputs")}
        layers = own.get("layers")
        if isinstance(layers, str) and ")" in layers and not layers.endswith(")"):
            own["layers"] = layers + layers[: layers.index(")") + 1]
        return own

    @property
    def trunk(self) -> Trunk:  # type: ignore[override]
        """The encoder's trunk."""
        return self.backbone.trunk

    @property
    def encoder(self) -> FITEncoder:
        """The encoder of grouped tokens."""
        return self.backbone.encoder

    @property
    def patch_grid(self) -> PatchGrid:
        """How images are cut."""
        return self.backbone.patch_grid

    def grids(self) -> tuple[Grid, Grid | None]:
        """As those of the image encoder."""
        return self.backbone.grids()

    def grouped(self, image: Tensor | PixelSource | GroupedImage) -> GroupedImage:
        """An image as groups of this model, see `FITImageEncoder.grouped`."""
        return self.backbone.grouped(image)

    def forward(self, images: Images) -> Tensor | list[Tensor]:
        """Logits `(b, classes, H, W)` of images `(b, H, W, channels)`.

        Of images given as a sequence, a list of logits `(classes, H, W)`, 0 where groups were skipped. They are whole
        in memory, whatever the way to run; `score` never has them whole.

        Args:
            images: as in `FITImageEncoder.forward`.

        Raises:
            InputError: no images, or images of another size or number of channels.
        """
        if isinstance(images, Tensor) and not self.patch_grid.any_size:
            rows, _ = self.patch_grid.shape  # type: ignore[misc]
            logits = self._logits(*self._of_one_size(images))
            return rearrange(logits, "b (gr gc) k r c -> b k (gr r) (gc c)", gr=rows)
        if not len(images):
            raise InputError("no images are given, a sequence of none")
        found = []
        for image in map(self.grouped, images):
            found.append(image.pixel_map(self._logits(*self._of_any_size([image]))[0]))
        return found

    def score(self, images: Tensor | Sequence[GroupedImage], score: PixelScore) -> Tensor:
        """The sum of a function over slices of groups: logits of all pixels never exist without a backward pass.

        Args:
            images: `(b, H, W, channels)` float, or images of any size. Those with different numbers of groups are one
                row of the groups of all, b = 1, see `image_encoder.examples_of`.
            score: see `PixelScore`. It may run in the backward pass again, and must then do the same.
        """
        inputs, patches = self._of_one_size(images) if isinstance(images, Tensor) else self._of_any_size(images)

        def scored(groups: slice, x: Tensor, mask: Tensor | None) -> Tensor:
            found, size = [], self.groups_at_once(len(x))
            for first in range(0, x.shape[1], size):
                tokens, seen = x[:, first : first + size], None if mask is None else mask[:, first : first + size]
                piece = slice(groups.start + first, groups.start + first + tokens.shape[1])
                pixels = None if seen is None else self._of_pixels(seen)
                found.append(score(piece, self._decoded(piece, tokens, patches), pixels))
            return torch.stack(found).sum(0)

        return self.encoder.answer(replace(inputs, parameters=self.all_parameters()), scored)[0]

    def groups_at_once(self, batch: int) -> int:
        """Groups of every example that `score` decodes at once, where a slice has as many."""
        return max(1, _PIECE // (batch * self.head.numbers))

    def _of_one_size(self, images: Tensor) -> tuple[Inputs, Callable[[slice], Tensor]]:
        """One pass, and the raw patches of a slice of groups."""
        x = self.patch_grid.group(images)
        return self.encoder.inputs(x), lambda groups: x[:, groups]

    def _of_any_size(self, images: Sequence[GroupedImage]) -> tuple[Inputs, Callable[[slice], Tensor]]:
        inputs = replace(self.backbone.inputs(images), score=None)
        return inputs, lambda groups: to_signal(self.backbone.read(images, groups)[0])

    def _logits(self, inputs: Inputs, patches: Callable[[slice], Tensor]) -> Tensor:
        """Logits of the pixels of all groups."""
        x, _ = self.encoder.answer(replace(inputs, blocks=self.last_block()))
        return self._decoded(slice(None), x, patches)

    def _decoded(self, groups: slice, x: Tensor, patches: Callable[[slice], Tensor]) -> Tensor:
        return self.head(x, patches(groups) if self.head.refinement else None)

    def _of_pixels(self, mask: Tensor) -> Tensor:
        """Of tokens `(b, s, n)`, for each of their pixels `(b, s, rows, columns)`."""
        (high, wide), (ph, pw) = self.patch_grid.patches, self.patch_grid.patch_size  # type: ignore[misc]
        cells = mask.unflatten(2, (high, wide))
        return torch.repeat_interleave(torch.repeat_interleave(cells, ph, dim=2), pw, dim=3)
