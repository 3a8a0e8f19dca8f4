"""Which options of a trunk go together: checked once, before anything is built."""

from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.models.config import TrunkConfig
from fitformer.models.layers import check_heads, check_sizes

Depths = list[tuple[int, int]]


def check_trunk(
    config: TrunkConfig, depths: Depths, num_groups: int | None, tokens_per_group: int, causal: str
) -> None:
    """Check the options of a trunk, whose blocks have so many local and global layers; the rest as in `Trunk`.

    Raises:
        InputError: sizes that are not positive, heads that do not divide widths, options that exclude each other, or
            weights beyond the memory that there is.
    """
    _check_sizes(config, depths, num_groups, tokens_per_group)
    _check_positions(config, depths)
    if config.global_window is not None and causal == "none":
        raise InputError(
            f"global_window is {config.global_window}, of a trunk that is not causal: it is for a decoder, or for an "
            "encoder or denoiser with mask='causal'"
        )
    room = f"a trunk {config.layers} of widths {config.dim} and {config.latent_dim}"
    check_room(room, _count(config, depths))


def _count(config: TrunkConfig, depths: Depths) -> int:
    """About how many weights the layers have, local and global ones alone."""
    local, glob = (sum(counts) for counts in zip(*depths, strict=True))
    inner, attention = 2 * config.mlp_ratio, 4 * config.x_self_attention
    return int(local * config.dim**2 * (inner + attention) + glob * config.latent_dim**2 * (inner + 4))


def _check_sizes(config: TrunkConfig, depths: Depths, num_groups: int | None, tokens_per_group: int) -> None:
    """Refuse sizes that are not positive, and heads that do not divide the widths of layers that there are."""
    check_sizes(tokens_per_group=tokens_per_group, latents_per_group=config.latents_per_group)
    check_sizes(num_groups=1 if num_groups is None else num_groups, dim=config.dim, latent_dim=config.latent_dim)
    has_local, has_global = (any(counts) for counts in zip(*depths, strict=True))
    if has_local and config.x_self_attention:
        check_heads(config.heads, config.dim, "local layers, dim")
    if has_global:
        check_heads(config.latent_heads, config.latent_dim, "global layers, latent_dim")
        heads, width = min(config.heads, config.latent_heads), min(config.dim, config.latent_dim)
        check_heads(heads, width, "read and write, the smaller of both widths")


def _check_positions(config: TrunkConfig, depths: Depths) -> None:
    """Refuse positions that exclude each other, and heads that cannot be turned in layers that there are."""
    has_local, has_global = (any(counts) for counts in zip(*depths, strict=True))
    if config.position == "none" and not (config.rotary and config.x_self_attention):
        raise InputError(
            "position is 'none', which leaves the tokens of a group without order; take rotary=True (and local layers "
            "with attention) beside it, or position='learned'"
        )
    if config.rotary and config.latent_position == "row_column":
        raise InputError(
            "rotary turns by the number of a group in a line, and latent_position='row_column' has groups in rows and "
            "columns; take rotary=False, or latent_position='index' for sequences"
        )
    widths = {"dim": (config.dim, config.heads, has_local and config.x_self_attention)}
    widths["latent_dim"] = config.latent_dim, config.latent_heads, has_global
    for name, (width, heads, there) in widths.items():
        if config.rotary and there and width // heads % 2:
            raise InputError(
                f"rotary turns pairs of channels, and {heads} heads of {name} {width} have {width // heads} each; take "
                f"a {name} of {heads * (width // heads + 1)}"
            )
