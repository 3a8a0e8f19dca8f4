"""Single layers, and a model without its trunk, to run on tensors without data.

FLOPs are counted on torch's meta device, saved tensors on fake CPU tensors: those dispatch to the kernels of a CPU,
whose attention saves other tensors than the decomposition that meta tensors go through. Nothing here allocates memory
for weights or activations.
"""

import copy
from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fitformer.models.block_causal import Band
from fitformer.models.config import TrunkConfig
from fitformer.models.dropout import GroupRandom
from fitformer.models.layers import CrossLayer, TransformerLayer
from fitformer.models.trunk import Block

LATENT_LAYERS = ("read", "condition", "global")
GROUP_LAYERS = ("write", "local", "read")


def build_layer(config: TrunkConfig, name: str) -> CrossLayer | TransformerLayer:
    """One layer of a block, on the current device: `write`, `local`, `read`, `condition` or `global`."""
    block = Block(int(name == "write"), int(name == "local"), int(name in LATENT_LAYERS), config, "none", True)
    stacks = {"local": block.local_layers, "global": block.global_layers}
    return stacks[name][0] if name in stacks else getattr(block, name)  # type: ignore[return-value]


def layer_inputs(config: TrunkConfig, name: str, rows: int, queries: int, keys: int) -> list[Tensor]:
    """Tokens `(rows, queries, width)` that a layer transforms, and those `(rows, keys, width)` that it attends to."""
    c, d = config.dim, config.latent_dim
    widths = {"write": (c, d), "local": (c,), "read": (d, c), "condition": (d, d), "global": (d,)}[name]
    return [
        torch.empty(rows, count, width, requires_grad=True)
        for count, width in zip((queries, keys), widths, strict=False)
    ]


def run_layer(
    layer: CrossLayer | TransformerLayer,
    inputs: list[Tensor],
    causal: int | Band = 0,
    random: GroupRandom | None = None,
) -> Tensor:
    """Run a layer on `layer_inputs`, as a block does."""
    if isinstance(layer, CrossLayer):
        return layer(*inputs, random=random)
    return layer(*inputs, causal=causal, random=random)


def without_trunk(model: nn.Module, device: str) -> Any:
    """A copy of a role but for its trunk, whose parameters have no data, on `device` (or on fake tensors)."""
    memo: dict[int, Any] = {id(model.trunk): nn.Identity()}
    inside = {id(tensor) for tensor in chain(model.trunk.parameters(), model.trunk.buffers())}  # type: ignore[union-attr]
    for tensor in chain(model.parameters(), model.buffers()):
        if id(tensor) not in inside:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


Measured = TypeVar("Measured")


def cached_by_shapes(measure: Callable[..., Measured]) -> Callable[..., Measured]:
    """Cache a function of a model's parts outside its trunk by their shapes, and by further arguments.

    Models themselves are not held.
    """
    found: dict[Any, Measured] = {}

    @wraps(measure)
    def cached(model: nn.Module, *arguments: Any) -> Measured:
        parts = [part for part in model.children() if part is not model.trunk and not hasattr(part, "trunk")]
        own = model.parameters(recurse=False)
        shapes = tuple(tuple(each.shape) for each in chain(own, *(part.parameters() for part in parts)))
        key = type(model), shapes, arguments
        if key not in found:
            found[key] = measure(model, *arguments)
        return found[key]

    return cached


@lru_cache(maxsize=1)
def fake_mode() -> FakeTensorMode:
    """The mode of all fake tensors here; those of two modes do not mix."""
    return FakeTensorMode()
