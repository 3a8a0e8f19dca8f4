"""What a recipe says about its model: a preset, options of the trunk, and how its data are cut into groups."""

from dataclasses import dataclass, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from fitformer.config.ranges import share
from fitformer.models.config import TrunkConfig


def _check_dropout(model: Any) -> None:
    rates = {name: getattr(model, name) for name in ("drop_path", "drop_units", "drop_att")}
    share(**{name: rate for name, rate in rates.items() if rate is not None})


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class Model(TrunkConfig):
        """A preset, and the options of the trunk that depart from it."""

        preset: str = "tiny"
else:
    # The options of the trunk stand in one place; here each of them may be left to the preset, by None.
    Model = make_dataclass(
        "Model",
        [("preset", str, "tiny"), *((option.name, option.type | None, None) for option in fields(TrunkConfig))],
        frozen=True,
        namespace={
            "__doc__": "A preset, and the options of `TrunkConfig` that depart from it; None keeps the preset's.",
            "__post_init__": _check_dropout,
        },
    )


Initialization = Literal["reference", "zero_branches"]


@dataclass(frozen=True)
class EncoderModel(Model):
    """An encoder of images: `group_size` and `patch_size` in pixels, a side or (rows, columns).

    `glimpses` are copies of the whole image, shrunk to one group, that stand before its groups. `initialization` as
    `ByteDecoderModel` has it.
    """

    group_size: int | tuple[int, int] = 16
    patch_size: int | tuple[int, int] = 4
    mask: Literal["causal"] | None = None
    glimpses: int = 0
    initialization: Initialization = "reference"


@dataclass(frozen=True)
class SegmenterModel(EncoderModel):
    """A segmenter of images; `refinement` are the numbers of a pixel that two convolutions work on, 0 for none."""

    refinement: int = 16


@dataclass(frozen=True)
class DenoiserModel(Model):
    """A denoiser of images: `group_size` and `patch_size` in pixels; the rest as `FITDenoiser` has it."""

    group_size: int | tuple[int, int] = 16
    patch_size: int | tuple[int, int] = 2
    cond_proj: bool = True


@dataclass(frozen=True)
class PixelDecoderModel(Model):
    """A decoder of pixels: a group is one patch of `patch_size` pixels, its tokens the patch's pixel values.

    `initialization` as `ByteDecoderModel` has it.
    """

    patch_size: int | tuple[int, int] = 4
    shared_embedding: bool = True
    output_bias: bool = True
    initialization: Initialization = "reference"


@dataclass(frozen=True)
class ByteDecoderModel(Model):
    """A decoder of bytes, or of mu-law codes, in groups of `tokens_per_group`: `length` is padded to whole groups.

    `initialization` says which weights training starts from: the reference's, or `zero_branches`, with which short
    trainings get further (`fitformer.models.initialization`).
    """

    tokens_per_group: int = 64
    shared_embedding: bool = True
    output_bias: bool = True
    initialization: Initialization = "reference"
