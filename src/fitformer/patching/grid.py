"""How images are cut into groups of patches: `PatchGrid`, for images of one size or of any."""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from fitformer._support.checks import check_fields, whole
from fitformer.errors import InputError
from fitformer.patching.image import groups_to_image, groups_to_map, image_to_groups
from fitformer.patching.sizes import MOST_CHANNELS, Size, axis_lengths, format_size, to_sides


@dataclass(frozen=True)
class PatchGrid:
    """Groups of `group_size` pixels in patches of `patch_size`: one number or `(rows, columns)`, checked once.

    `image_size=None` is for images of any size: the groups at the lower and right edge may reach beyond the image.

    Raises:
        InputError: sizes that do not divide (names the nearest that do), or are not positive whole numbers.
    """

    image_size: Size | None
    group_size: Size
    patch_size: Size
    channels: int = 3

    def __post_init__(self) -> None:
        check_fields(self)
        extent = self.group_size if self.image_size is None else self.image_size
        axis_lengths(extent, self.group_size, self.patch_size, "hw")
        whole("channels", self.channels, 1, MOST_CHANNELS)
        # One way to write a size, so that equal grids are equal objects.
        for name in ("image_size", "group_size", "patch_size"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, to_sides(size, "hw"))

    @property
    def any_size(self) -> bool:
        """Whether images of any size are cut."""
        return self.image_size is None

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of the patches of a group."""
        (gh, gw), (ph, pw) = self.group_size, self.patch_size  # type: ignore[misc]
        return gh // ph, gw // pw

    @property
    def tokens_per_group(self) -> int:
        """Patches in a group, n."""
        return prod(self.patches)

    @property
    def token_dim(self) -> int:
        """Numbers in a patch: rows * columns * channels."""
        return prod(self.patch_size) * self.channels  # type: ignore[arg-type]

    def cover(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the groups that cover an image of any size."""
        gh, gw = self.group_size  # type: ignore[misc]
        return -(-rows // gh), -(-columns // gw)

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of the groups of an image of the one size; None for any size."""
        return None if self.image_size is None else self.cover(*self.image_size)  # type: ignore[misc]

    @property
    def num_groups(self) -> int | None:
        """Groups of an image of the one size, t; None for any size."""
        return None if self.shape is None else prod(self.shape)

    def check_size(self, rows: int, columns: int) -> None:
        """Check that an image has the one size, if there is one.

        Raises:
            InputError: it has another.
        """
        if self.image_size is not None and (rows, columns) != self.image_size:
            raise InputError(
                f"an image of {format_size((rows, columns))} given to a model of "
                f"{format_size(self.image_size)} pixels; "  # type: ignore[arg-type]
                "build it with image_size=None and latent_position='row_column' for any size"
            )

    def group(self, images: Tensor) -> Tensor:
        """Cut images of the one size `(b, H, W, channels)` into `(b, t, n, token_dim)`.

        Raises:
            InputError: images of another size or channel count, or with the channels first; no one size.
        """
        (h, w), got = self._one_size(), tuple(images.shape)
        if got[1:] != (h, w, self.channels):
            hint = "; channels come last: images.permute(0, 2, 3, 1)" if got[1:] == (self.channels, h, w) else ""
            raise InputError(f"images of shape {got} where (b, {h}, {w}, {self.channels}) is expected{hint}")
        return image_to_groups(images, self.group_size, self.patch_size)

    def ungroup(self, x: Tensor) -> Tensor:
        """Put `(b, t, n, token_dim)` back into images `(b, H, W, channels)`: the inverse of `group`.

        Raises:
            InputError: `x` has another shape; no one size.
        """
        if x.shape[-1] != self.token_dim:
            raise InputError(f"tokens have width {x.shape[-1]} where patches of {self.token_dim} numbers are expected")
        return groups_to_image(x, self._one_size(), self.group_size, self.patch_size)

    def map(self, x: Tensor) -> Tensor:
        """Lay tokens `(b, t, n, c)` of any width out as a feature map `(b, c, H / ph, W / pw)`.

        Raises:
            InputError: `x` has another number of groups or of tokens in a group; no one size.
        """
        return groups_to_map(x, self._one_size(), self.group_size, self.patch_size)

    def _one_size(self) -> tuple[int, int]:
        if self.image_size is None:
            raise InputError("this grid is for images of any size: give them one by one, as a GroupedImage each")
        return self.image_size  # type: ignore[return-value]
