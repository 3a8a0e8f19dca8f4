"""One table of sizes. Geometry (groups, tokens, channels, vocabulary) is the data's, never a preset's."""

from dataclasses import asdict, dataclass
from typing import Any

from fitformer.errors import InputError


@dataclass(frozen=True)
class Size:
    """The numbers of the trunk that do not depend on the data; names are those of the constructors."""

    layers: str
    dim: int
    latent_dim: int
    heads: int
    latent_heads: int
    latents_per_group: int


# Parameters of an encoder: tiny 0.3M, small 30M, base 101M, large 340M (`fitformer info PRESET` counts them).
SIZES = {
    "tiny": Size("(1)2(1)2", dim=32, latent_dim=64, heads=2, latent_heads=4, latents_per_group=4),
    "small": Size("(2)4(2)4", dim=256, latent_dim=512, heads=4, latent_heads=8, latents_per_group=16),
    "base": Size("(2)4(2)4(2)4", dim=384, latent_dim=768, heads=6, latent_heads=12, latents_per_group=16),
    "large": Size("(2)6(2)6(2)6(2)6", dim=512, latent_dim=1024, heads=8, latent_heads=16, latents_per_group=16),
}


def preset(name: str, *, end_local: bool = False) -> dict[str, Any]:
    """Constructor arguments of a named size.

    Args:
        name: `tiny` (for tests), `small`, `base` or `large`.
        end_local: close the layer string with the local layers of its first block, as the roles that answer in
            data tokens need it (an encoder that ends in global layers answers in latents).

    Raises:
        InputError: no such preset.
    """
    if name not in SIZES:
        raise InputError(f"no preset {name!r}; there are {', '.join(SIZES)}")
    arguments = asdict(SIZES[name])
    if end_local:
        layers = arguments["layers"]
        arguments["layers"] = layers + layers[: layers.index(")") + 1]
    return arguments
