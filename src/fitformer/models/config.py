"""The one place where the trunk's options stand, and the table of sizes.

Roles, recipes, the planner, `official` and the command line read these fields. Nothing slow is imported here: the
command line checks a recipe before it waits for torch. Geometry (groups, tokens, channels, vocabulary) is the data's,
never the trunk's.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from fitformer._support.checks import check_fields, checked, number, rate, whole
from fitformer.errors import InputError

Position = Literal["learned", "sin_cos", "sin_cos2d", "none"]
LatentPosition = Literal["learned", "sin_cos", "row_column", "index", "shared"]


@dataclass(frozen=True)
class TrunkConfig:
    """Options of the trunk (spec sections 2 to 4); the defaults are the preset `tiny`.

    Attributes:
        layers: layer string `(local)global(local)global...`, see `fitformer.models.trunk.parse_layers`.
        dim: width c of data tokens. latent_dim: width d of latents.
        heads, latent_heads: attention heads of local and of global layers.
        latents_per_group: m.
        position: positions of data tokens, `sin_cos2d` for a square group of patches, `none` only with `rotary`.
        latent_position: positions of latents. `learned` and `sin_cos` are tables for one number of groups; `row_column`
            (of groups of an image), `index` (a code of the group's number) and `shared` (the same for every group) take
            any number.
        mlp_ratio: inner over outer width of the feed-forwards.
        drop_path, drop_units, drop_att: dropout of residual branches, feed-forward units, attention weights.
        x_self_attention: local layers have attention, not only their feed-forward half.
        xattn_with_mlp: a feed-forward after read and write.
        xattn_enc_ln: cross-attention normalises its context.
        qk_norm: queries and keys are normalised head by head before they meet (arXiv 2302.05442, section 2).
        rotary: queries and keys of local and global layers are turned by their place (arXiv 2104.09864, section 3.2):
            that of the token in its group, that of the latent's group in the sequence. Read and write have no places.
        global_window: groups that a latent attends to in the global layers of a causal trunk: its own and as many
            before it as make up this number; None for all.
    """

    layers: str = "(1)2(1)2"
    dim: int = 32
    latent_dim: int = 64
    heads: int = 2
    latent_heads: int = 4
    latents_per_group: int = 4
    position: Position = "learned"
    latent_position: LatentPosition = "learned"
    mlp_ratio: float = 4
    drop_path: float = 0.0
    drop_units: float = 0.0
    drop_att: float = 0.0
    x_self_attention: bool = True
    xattn_with_mlp: bool = False
    xattn_enc_ln: bool = True
    qk_norm: bool = False
    rotary: bool = False
    global_window: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for field in fields(TrunkConfig):
            object.__setattr__(self, field.name, _in_range(field.name, field.type, getattr(self, field.name)))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(field.name for field in fields(TrunkConfig))

    @classmethod
    def of(cls, values: Any) -> "TrunkConfig":
        """The trunk's options among the attributes of an object that has them all, such as a recipe's model section."""
        return TrunkConfig(**{name: getattr(values, name) for name in cls.names()})

    def closed(self) -> Self:
        """The same trunk with the local layers of its first block once more at its end.

        Roles that answer in data tokens need it: global layers at the end do not reach them.
        """
        return replace(self, layers=self.layers + self.layers[: self.layers.index(")") + 1])


def _in_range(name: str, kind: Any, value: Any) -> Any:
    """An option of the trunk, in its range; numbers of numpy become plain ones.

    Raises:
        InputError: it is out of range.
    """
    if kind is int or int in get_args(kind):
        return None if value is None else whole(name, value, 1, MOST)
    if kind is float:
        return rate(name, value) if name.startswith("drop_") else number(name, value, 0, MOST_RATIO)
    return bool(value) if kind is bool else value


# Widths and ratios beyond these are mistakes, and would take all memory before anything else complains.
MOST, MOST_RATIO = 2**20, 1024
SIZES = ("layers", "dim", "latent_dim", "heads", "latent_heads", "latents_per_group")
"""The options that a preset is about; the others are the same in all presets."""

# Parameters of an encoder: tiny 0.3M, small 30M, base 101M, large 340M (`fitformer info PRESET` counts them). `slide`,
# for slides as features of their patches, has 1.9M for 1,024 features: narrow data tokens, of which there are 100,000,
# and few but wide latents.
PRESETS = {
    "tiny": TrunkConfig(),
    "slide": TrunkConfig("(1)2(1)2", 32, 192, heads=2, latent_heads=4, latents_per_group=1),
    "small": TrunkConfig("(2)4(2)4", 256, 512, heads=4, latent_heads=8, latents_per_group=16),
    "base": TrunkConfig("(2)4(2)4(2)4", 384, 768, heads=6, latent_heads=12, latents_per_group=16),
    "large": TrunkConfig("(2)6(2)6(2)6(2)6", 512, 1024, heads=8, latent_heads=16, latents_per_group=16),
}


@checked
def preset(name: str, *, ends_local: bool = False) -> TrunkConfig:
    """The trunk of a named size: `tiny` (for tests), `slide` (for slides as features), `small`, `base`, `large`.

    Args:
        name: of the size.
        ends_local: close the layer string, see `TrunkConfig.closed`.

    Raises:
        InputError: no such preset.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name].closed() if ends_local else PRESETS[name]
