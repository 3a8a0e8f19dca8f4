"""Weights that a training from scratch may start from in place of the reference's."""

from collections.abc import Iterable

from torch import nn

from fitformer.models.decoder import FITDecoder
from fitformer.models.layers import CrossLayer, TransformerLayer
from fitformer.models.trunk import Trunk

EMBEDDING_STD = 0.1


def zero_branches(decoder: FITDecoder) -> None:
    """Let the residual branches of a decoder begin at zero, and its embedding large: short trainings get further."""
    nn.init.normal_(decoder.embedding.weight, std=EMBEDDING_STD)
    zero_trunk_branches(decoder.trunk)


def zero_trunk_branches(trunk: Trunk) -> None:
    """Let the residual branches of a trunk begin at zero.

    Each local and global layer, and each write, then hands on what it is given. Read stays as it is: latents that were
    given nothing would hold nothing.
    """
    for block in trunk.blocks:
        zero_layer_branches([*block.local_layers, *block.global_layers])
        if block.write is not None:
            zero_layer_branches([block.write])


def zero_layer_branches(layers: Iterable[CrossLayer | TransformerLayer]) -> None:
    """Let layers begin with residual branches of zero: each hands on what it is given."""
    for layer in layers:
        if layer.attention is not None:
            nn.init.zeros_(layer.attention.output.weight)
        if layer.ffn is not None:
            nn.init.zeros_(layer.ffn.outer.weight)
