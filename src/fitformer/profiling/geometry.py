"""A role of some size on an image of some size: which model that is, how many groups there are, and which are best."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from fitformer._support.checks import check_fields
from fitformer.errors import InputError
from fitformer.models.config import preset
from fitformer.patching import PatchGrid
from fitformer.patching.sizes import Size, format_size, to_sides
from fitformer.profiling.flops import Flops, Model, on_meta, parts, sum_flops

ROLE_NAMES = ("encoder", "segmenter", "denoiser", "decoder")
# Patches along the side of a square group that are tried; of another shape, groups of as many patches.
SIDES = range(4, 65)


@dataclass(frozen=True)
class Geometry:
    """What is asked for: a role, its size, and the image.

    Attributes:
        role: `encoder`, `segmenter`, `denoiser`, or `decoder`, whose tokens are the values of pixels, so that a patch
            is one pixel.
        sizes: arguments of the constructors, as `fitformer.models.config.preset` gives them.
        image_size, patch_size, group_size: in pixels, one number or (rows, columns); a group of None is chosen.
        channels: of the image. num_classes: of the head of an encoder or a segmenter.
        refinement: of a segmenter, see `FITImageSegmenter`.

    Raises:
        InputError: an unknown role, sizes that are no sizes, or patches of several pixels for a decoder.
    """

    role: str
    sizes: dict[str, Any]
    image_size: Size
    patch_size: Size = 16
    group_size: Size | None = None
    channels: int = 3
    num_classes: int = 10
    refinement: int = 16

    def __post_init__(self) -> None:
        check_fields(self)
        if self.role not in ROLE_NAMES:
            raise InputError(f"there is no role {self.role!r}; there are {', '.join(ROLE_NAMES)}")
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, to_sides(getattr(self, name), "hw"))
        patch = to_sides(self.patch_size, "hw")
        if self.role == "decoder" and patch != (1, 1):
            raise InputError(f"a decoder's tokens are pixels: its patch size is 1, not {format_size(patch)}")
        if self.group_size is not None:
            object.__setattr__(self, "group_size", to_sides(self.group_size, "hw"))

    @classmethod
    def of_preset(cls, role: str, name: str, image_size: Size, *, patch_size: Size | None = None, **rest: Any) -> Any:
        """The geometry of a preset; `layers=...` and the like take the place of its numbers.

        Raises:
            InputError: as the class, or no such preset.
        """
        sizes = asdict(preset(name, ends_local=role != "encoder"))
        sizes |= {key: value for key in tuple(sizes) if (value := rest.pop(key, None)) is not None}
        patch = patch_size if patch_size is not None else 1 if role == "decoder" else 16
        return cls(role, sizes, image_size, patch, **rest)

    @property
    def patch_grid(self) -> PatchGrid:
        """How the image is cut.

        Raises:
            InputError: no group size yet, or patches that do not divide it.
        """
        if self.group_size is None:
            raise InputError("the group size is not chosen yet")
        return PatchGrid(None, self.group_size, self.patch_size, self.channels)

    def checked(self) -> "Geometry":
        """Itself, if its model can be built.

        Raises:
            InputError: it cannot.
        """
        self.model()
        return self

    @property
    def num_groups(self) -> int:
        """Groups that cover the image, t."""
        rows, columns = to_sides(self.image_size, "hw")
        return prod(self.patch_grid.cover(rows, columns))

    @property
    def tokens_per_group(self) -> int:
        """Tokens in a group, n."""
        return self.patch_grid.tokens_per_group * (self.channels if self.role == "decoder" else 1)

    @property
    def length(self) -> int:
        """Data tokens that cover the image, those that fill up groups at its edges not counted."""
        sides = zip(to_sides(self.image_size, "hw"), to_sides(self.patch_size, "hw"), strict=True)
        patches = prod([-(-side // patch) for side, patch in sides])
        return patches * (self.channels if self.role == "decoder" else 1)

    def config(self) -> tuple[str, dict[str, Any]]:
        """The name of the class in `fitformer` and its arguments.

        Raises:
            InputError: as `patch_grid`.
        """
        grid = self.patch_grid
        if self.role in ("encoder", "segmenter"):
            cut = {"image_size": None, "group_size": grid.group_size, "patch_size": grid.patch_size}
            rest = {"channels": self.channels, "num_classes": self.num_classes, "latent_position": "row_column"}
            if self.role == "encoder":
                return "FITImageEncoder", {**self.sizes, **cut, **rest}
            return "FITImageSegmenter", {**self.sizes, **cut, **rest, "refinement": self.refinement}
        of_groups: dict[str, Any] = {"tokens_per_group": self.tokens_per_group, "num_groups": None}
        if self.role == "denoiser":
            of_groups |= {"out_dim": grid.token_dim, "latent_position": "row_column"}
            return "FITDenoiser", {**self.sizes, **of_groups}
        return "FITDecoder", {**self.sizes, **of_groups, "num_groups": self.num_groups, "vocab_size": 256}

    def model(self) -> Model:
        """The model without weights.

        Raises:
            InputError: sizes that it refuses.
        """
        return on_meta(*self.config())

    def flops(self) -> Flops:
        """Operations of one example's forward pass; tokens that fill up groups at the edges are computed too."""
        role, config = self.config()
        return _flops(role, tuple(config.items()), self.num_groups)


@lru_cache(maxsize=4096)
def _flops(role: str, config: tuple[tuple[str, Any], ...], num_groups: int) -> Flops:
    return sum_flops([part.flops for part in parts(on_meta(role, dict(config)), num_groups=num_groups)])


def candidate_group_sizes(geometry: Geometry) -> Iterator[Geometry]:
    """The geometry with a group size: its own, or those that are worth trying, the one of fewest operations first."""
    if geometry.group_size is not None:
        yield geometry
        return
    ph, pw = to_sides(geometry.patch_size, "hw")
    rows, columns = to_sides(geometry.image_size, "hw")
    extent = -(-rows // ph), -(-columns // pw)
    # A group may reach beyond the image, but for its last patch.
    sides = [side for side in SIDES if side <= max(extent)] or [max(extent)]
    shapes = dict.fromkeys(_within(side, extent) for side in sides)
    candidates = [replace(geometry, group_size=(high * ph, wide * pw)) for high, wide in shapes]
    yield from sorted(candidates, key=lambda candidate: candidate.flops().total)


def _within(side: int, extent: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches: a square, or as many in the shape of an image that is not so high or wide."""
    high, wide = (min(side, length) for length in extent)
    return min(-(-side * side // wide), extent[0]), min(-(-side * side // high), extent[1])
