"""FIT as an encoder of images: the cut into groups, feature maps, a classification head; of one size or of any."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fitformer._support.checks import checked, whole
from fitformer.errors import InputError
from fitformer.execution import Inputs, Outputs
from fitformer.execution.examples import Examples
from fitformer.models.adapt import Grid
from fitformer.models.base import FITModel
from fitformer.models.config import TrunkConfig
from fitformer.models.encoder import FITEncoder
from fitformer.models.heads import Meaning, make_head
from fitformer.models.layers import MOST_SIZE
from fitformer.models.positions import GridPositions
from fitformer.models.trunk import Trunk
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import (
    GroupedImage,
    PixelArray,
    PixelSource,
    in_a_row,
    stacked,
    to_signal,
    together,
)
from fitformer.patching.glimpse import MOST_GLIMPSES
from fitformer.patching.joined_images import JoinedImages
from fitformer.patching.sizes import Size

Image = Tensor | PixelSource | GroupedImage
Images = Tensor | Sequence[Image | Sequence[Image]]


class FITImageEncoder(FITModel):
    """FIT encoder of images: the cut into groups of patches, a `FITEncoder`, and an optional classification head.

    Args:
        trunk: options of the trunk; `position="sin_cos2d"` follows rows and columns of a square group of patches.
        image_size, group_size, patch_size: in pixels, one number or `(rows, columns)`; each divides the one before.
            `image_size=None` takes images of any size, with `latent_position="row_column"`.
        channels: of the images.
        num_classes: classes, or other outputs, of the head; 0 for none. The head is one linear map of the mean over
            latents if the layer string ends in global layers, over data tokens if not.
        outputs: what those of the head mean, see `heads`: logits, numbers or hazards.
        glimpses: copies of the whole image, averaged down to one group, that stand before its groups; only for images
            of any size.
        mask: as in `FITEncoder`.

    Raises:
        InputError: sizes that do not divide (names the nearest that do), or what `FITEncoder` refuses.
    """

    ends_local = False
    free = FITModel.free | {"num_classes", "outputs", "channels", "image_size", "group_size"}
    class_weights = ("head.",)

    @checked
    def __init__(
        self,
        trunk: TrunkConfig,
        image_size: Size | None,
        group_size: Size,
        patch_size: Size,
        *,
        channels: int = 3,
        num_classes: int = 0,
        glimpses: int = 0,
        mask: str | None = None,
        outputs: Meaning = "logits",
    ) -> None:
        super().__init__()
        grid = self.patch_grid = PatchGrid(image_size, group_size, patch_size, channels)
        if whole("glimpses", glimpses, 0, MOST_GLIMPSES) and not grid.any_size:
            raise InputError(f"glimpses is {glimpses}; it is 0 but for images of any size (image_size=None)")
        if grid.any_size and trunk.latent_position in ("index", "shared"):
            raise InputError(
                f"latent_position is {trunk.latent_position!r}, of groups in a line; images of any size need "
                "'row_column'"
            )
        self.glimpses, self.channels = glimpses, channels
        self.encoder = FITEncoder(trunk, grid.num_groups, grid.tokens_per_group, grid.token_dim, mask=mask)
        self.ends_in_latents = self.trunk.block_depths[-1][1] > 0
        whole("num_classes", num_classes, 0, MOST_SIZE)  # 0 is no head
        self.num_classes, self.outputs = num_classes, outputs
        if outputs == "hazards" and num_classes == 1:
            raise InputError("num_classes is 1; hazards are those of at least 2 intervals of time")
        self.head = make_head(outputs, self.num_features, num_classes) if num_classes else None

    @property
    def trunk(self) -> Trunk:  # type: ignore[override]
        """The encoder's trunk."""
        return self.encoder.trunk

    def grids(self) -> tuple[Grid, Grid | None]:
        """Rows and columns of the patches of a group, and of the groups of an image of one size."""
        return self.patch_grid.patches, self.patch_grid.shape

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new head for `num_classes` classes in the place of the head; 0 for none.

        Raises:
            InputError: a negative number of classes.
        """
        whole("num_classes", num_classes, 0, MOST_SIZE)
        like = self.encoder.norm.weight
        self.num_classes = num_classes
        self.head = make_head(self.outputs, self.num_features, num_classes).to(like) if num_classes else None
        self._hub_mixin_config = {**self._hub_mixin_config, "num_classes": num_classes}  # type: ignore[dict-item]

    @property
    def num_features(self) -> int:
        """Width of the pooled features that the head takes."""
        return self.trunk.config.latent_dim if self.ends_in_latents else self.trunk.config.dim

    def forward(self, images: Images) -> Tensor:
        """Outputs `(b, num_classes)` of the head, of images; without a head the pooled features.

        Args:
            images: `(b, H, W, channels)` float, or a sequence of images of any size, each a float tensor
                `(H, W, channels)`, a `PixelSource` (read slice by slice where the model runs `Streamed`) or a
                `GroupedImage`, or a tuple or list of such, which is one example. Examples with about as many groups
                run as a batch.

        Raises:
            InputError: no images, or images of another size or number of channels.
        """
        if isinstance(images, Tensor) and not self.patch_grid.any_size:
            x, latents = self.encoder(self.patch_grid.group(images))
            pooled = (latents if self.ends_in_latents else x).mean(dim=(1, 2))
        else:
            if not len(images):
                raise InputError("no images are given, a sequence of none")
            pooled = self._pooled([self.grouped(image) for image in images])
        return pooled if self.head is None else self.head(pooled)

    def forward_features(self, images: Images) -> Tensor | list[Tensor]:
        """Normalised data tokens of images `(b, H, W, channels)` as a map `(b, c, H/p, W/p)`.

        Of images given as a sequence, a list of maps `(c, rows, columns)`, 0 where groups were skipped.

        In an encoder that ends in global layers, the tokens are those read last: what the latents learned after
        is in the latents alone. Give such a trunk a closing local block, `"(2)4(2)4(2)"`, for dense features.
        """
        return self.forward_intermediates(images, [-1])[0]

    def forward_intermediates(
        self, images: Images, indices: Sequence[int] | None = None
    ) -> list[Tensor] | list[list[Tensor]]:
        """Data tokens after the local layers of each block (or of blocks `indices`) as maps `(b, c, H/p, W/p)`.

        Of images given as a sequence, a list of maps `(c, rows, columns)` for each block. All pass the final norm, so
        the last one is `forward_features`.

        Raises:
            InputError: a block that is not there.
        """
        count = len(self.trunk.blocks)
        wanted = range(count) if indices is None else indices
        if absent := [i for i in wanted if not -count <= i < count]:
            raise InputError(f"no block {absent[0]}: the layer string has {count}, counted from 0")
        blocks = sorted({i % count for i in wanted})
        places = [blocks.index(i % count) for i in wanted]
        if isinstance(images, Tensor) and not self.patch_grid.any_size:
            inputs = self.encoder.inputs(self.patch_grid.group(images), blocks=blocks)
            maps = [self.patch_grid.map(x) for x in self._features(inputs)]
            return [maps[k] for k in places]
        each = []
        for image in map(self.grouped, images):
            inputs = replace(self.inputs([image]), score=None, blocks=blocks)
            each.append([image.map(x[0]) for x in self._features(inputs)])
        return [[maps[k] for maps in each] for k in places]

    def _features(self, inputs: Inputs) -> list[Tensor]:
        return [self.encoder.head(x) for x in self.encoder.execute(inputs).tokens]

    def grouped(self, image: Image | Sequence[Image]) -> GroupedImage:
        """An image as groups of this encoder; several images, as of one patient, as `JoinedImages`.

        Raises:
            InputError: no such image, another number of channels, other groups than the encoder's, or another size
                where the encoder has a table of positions.
        """
        if isinstance(image, tuple | list):
            return JoinedImages([self.grouped(each) for each in image])
        if not isinstance(image, GroupedImage):
            source = PixelArray(image) if isinstance(image, Tensor) else image
            if not isinstance(source, PixelSource):
                raise InputError(
                    f"an image is given as {type(source).__name__}: wrap an array as "
                    "fitformer.patching.any_size.PixelArray(...), open a file by fitformer.data.readers.open_image(...)"
                )
            image = GroupedImage(source, self.patch_grid, glimpses=self.glimpses)
        if image.patch_grid != self.patch_grid or image.glimpses != self.glimpses * image.images:
            raise InputError(
                f"an image cut as {image.patch_grid} with {image.glimpses} glimpses, given to an encoder of "
                f"{self.patch_grid} with {self.glimpses}"
            )
        return image

    def latents(self, images: Sequence[GroupedImage]) -> Tensor:
        """The initial latents `(b, t, m, d)` of images with the same number of groups, else `(1, t, m, d)` in a row."""
        trunk, examples = self.trunk, examples_of(images)
        if not isinstance(trunk.latent_position, GridPositions):
            if any(image.num_groups != self.patch_grid.num_groups for image in images):
                raise InputError("groups are skipped by their rows and columns; take latent_position='row_column'")
            return trunk.initial_latents(len(images), images[0].num_groups)
        each = [image.coords for image in images]
        coords = torch.stack(each) if examples is None else torch.cat(each)[None]
        batch, groups = coords.shape[:2]
        return trunk.initial_latents(batch, groups, coords.to(trunk.latent_position.slots.device))

    def inputs(self, images: Sequence[GroupedImage]) -> Inputs:
        """One pass on images, read slice by slice where the model runs `Streamed`.

        Images with different numbers of groups are one row of the groups of all, see `Inputs.examples`. The score of
        the pass is the sum over the tokens that hold pixels, `(b, c)`; none where the encoder ends in latents.
        """
        examples = examples_of(images)

        def added(groups: slice, x: Tensor, mask: Tensor | None) -> Tensor:
            x = self.encoder.head(x)
            each = (x if mask is None else x * mask[..., None]).sum(dim=2)
            return each.sum(dim=1) if examples is None else examples.sums(each, groups)

        return Inputs(
            tokens=lambda groups: self.read(images, groups),
            latents=self.latents(images),
            embed=lambda groups, tokens: self._embed(tokens),
            score=None if self.ends_in_latents else added,
            parameters=self.encoder.all_parameters(),
            examples=examples,
        )

    def pool(self, images: Sequence[GroupedImage], inputs: Inputs) -> Tensor:
        """Means `(b, num_features)` that the head takes, of a pass on these images."""
        return self.pool_outputs(self.encoder.execute(inputs), [image.count() for image in images], inputs.examples)

    def pool_outputs(self, outputs: Outputs, counts: Sequence[int], examples: Examples | None = None) -> Tensor:
        """Means `(b, num_features)` that the head takes, of a pass and of how many tokens of each image hold pixels."""
        if outputs.score is None:
            latents = self.encoder.latent_norm(outputs.latents)
            if examples is None:
                return latents.mean(dim=(1, 2))
            groups = torch.tensor(examples.counts, device=latents.device)
            return examples.sums(latents.mean(dim=2)) / groups[:, None]
        return outputs.score / torch.tensor(counts, device=outputs.score.device)[:, None]

    def _pooled(self, images: Sequence[GroupedImage]) -> Tensor:
        """Means `(b, num_features)` over latents, or over the tokens that hold pixels."""
        pooled: dict[int, Tensor] = {}
        for where in together(images):
            batch = [images[k] for k in where]
            pooled.update(zip(where, self.pool(batch, self.inputs(batch)), strict=True))
        return torch.stack([pooled[k] for k in range(len(images))])

    def _embed(self, tokens: Tensor) -> Tensor:
        """Raw tokens as data tokens, in the precision of the encoder's weights whatever the image holds."""
        return self.encoder.embed(to_signal(tokens).to(self.encoder.norm.weight.dtype))

    def read(self, images: Sequence[GroupedImage], groups: slice) -> tuple[Tensor, Tensor | None]:
        """Raw tokens of a slice of groups of images, and their mask, on the device.

        The slice is of each image's groups if all have as many, of the row of the groups of all if not.
        """
        tokens, mask = (stacked if examples_of(images) is None else in_a_row)(images, groups)
        device = self.encoder.norm.weight.device
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(device, non_blocking=True), None if mask is None else mask.to(device)


def examples_of(images: Sequence[GroupedImage]) -> Examples | None:
    """Images with different numbers of groups as examples of one row; None if all have as many."""
    counts = tuple(image.num_groups for image in images)
    return Examples(counts) if len(set(counts)) > 1 else None
