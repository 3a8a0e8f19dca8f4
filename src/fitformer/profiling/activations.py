"""Bytes that autograd keeps of each layer for the backward pass, measured on fake tensors.

A layer runs once on one row and once on two, with hooks on the tensors that autograd saves; bytes grow linearly with
rows. A layer's own input counts as kept by the layer that made it, its output as kept by itself. bf16 copies of weights
are not activations (`memory` counts them with the weights). What a streamed step remembers instead of recomputing is
what `selective_checkpoint` records in the same run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fitformer.execution.selective_checkpoint import Kind, contexts
from fitformer.models.config import TrunkConfig
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.dropout import GroupRandom
from fitformer.models.trunk import Block, Trunk
from fitformer.profiling.flops import count_parameters
from fitformer.profiling.probes import (
    GROUP_LAYERS,
    build_layer,
    cached_by_shapes,
    fake_mode,
    layer_inputs,
    run_layer,
    without_trunk,
)

FLOAT = 4
# Tensors of the size of a prediction that a loss holds beside the kept ones: prediction, target, gradient.
LOSS_TENSORS = 3


@dataclass(frozen=True)
class Stage:
    """A layer on some tokens: bytes kept for its backward pass, momentary bytes there, and its number of parameters.

    `moment` is the gradient of its largest kept tensor: it exists beside the kept tensors and the incoming gradients.
    `remembered` counts the bytes that a streamed step does not compute again.
    """

    kept: int
    moment: int
    parameters: int
    remembered: int = 0


@dataclass(frozen=True)
class Numerics:
    """Precision of matrix products (32 or `bf16`, mixed), and kinds of results that a streamed step remembers."""

    precision: Any = 32
    kinds: frozenset[Kind] = frozenset()


def group_stages(trunk: Trunk, i: int, groups: int, tokens_per_group: int, numerics: Numerics) -> Iterator[Stage]:
    """The group phase of block i on a number of groups, of all examples together."""
    block, m, n = trunk.blocks[i], trunk.latents_per_group, tokens_per_group
    causal = int(block.causal_local)
    if block.write is not None:
        yield layer_stage(trunk.config, "write", groups, n, m, numerics)
    for _ in block.local_layers:
        yield layer_stage(trunk.config, "local", groups, n, 0, numerics, causal)
    if block.read is not None:
        yield layer_stage(trunk.config, "read", groups, m, n, numerics)


def global_stages(
    trunk: Trunk, i: int, batch: int, latents: int, conditions: int, numerics: Numerics
) -> Iterator[Stage]:
    """The global phase of block i on `latents` latents of each of `batch` examples."""
    block: Block = trunk.blocks[i]
    # One causal block of all latents keeps what blocks of groups keep; attention to many of those runs in many chunks.
    causal = latents if block.causal_global > 1 else block.causal_global
    if block.condition is not None:
        yield layer_stage(trunk.config, "condition", batch, latents, conditions, numerics)
    for _ in block.global_layers:
        yield layer_stage(trunk.config, "global", batch, latents, 0, numerics, causal)


def layer_stage(
    config: TrunkConfig, name: str, rows: int, queries: int, keys: int, numerics: Numerics, causal: int = 0
) -> Stage:
    """A layer of a block on rows of queries that attend to keys; `keys` is 0 in self-attention."""
    one, two = (_layer_stage(config, name, count, queries, keys, numerics, causal) for count in (1, 2))
    return Stage(
        one.kept + (rows - 1) * (two.kept - one.kept),
        one.moment + (rows - 1) * (two.moment - one.moment),
        one.parameters,
        one.remembered + (rows - 1) * (two.remembered - one.remembered),
    )


@lru_cache(maxsize=4096)
def _layer_stage(
    config: TrunkConfig, name: str, rows: int, queries: int, keys: int, numerics: Numerics, causal: int
) -> Stage:
    with fake_mode():
        layer, inputs = _fake_layer(config, name), layer_inputs(config, name, rows, queries, keys)
        # Layers of a group phase draw what they drop from their groups' keys; without dropout they do not read them.
        random = GroupRandom(torch.zeros(rows, dtype=torch.int64), 0) if name in GROUP_LAYERS else None
        return _measure(layer, lambda: run_layer(layer, inputs, causal, random), numerics)


@lru_cache(maxsize=256)
def _fake_layer(config: TrunkConfig, name: str) -> Any:
    return build_layer(config, name)


@cached_by_shapes
def stem_stage(model: Any, tokens: int, numerics: Numerics) -> Stage:
    """From raw tokens, which are kept as the stem takes them, to data tokens."""
    with fake_mode():
        ends = without_trunk(model, "cpu")
        if isinstance(model, FITDecoder):
            return _measure(ends.embedding, lambda: ends.embedding(torch.zeros(tokens, dtype=torch.int64)), numerics)
        channels = ends.stem.projection.in_features
        return _measure(ends.stem, lambda: ends.stem(torch.empty(tokens, channels)), numerics)


@cached_by_shapes
def head_stage(model: Any, tokens: int, numerics: Numerics) -> Stage:
    """From data tokens to a loss: squared errors of a denoiser, cross-entropies of a decoder."""
    with fake_mode():
        ends = without_trunk(model, "cpu")
        x = torch.empty(1, 1, tokens, model.trunk.config.dim, requires_grad=True)
        if isinstance(model, FITDecoder):
            targets = torch.zeros(tokens, dtype=torch.int64)
            stage = _measure(ends.norm, lambda: F.cross_entropy(ends.head(x).flatten(0, 2), targets), numerics)
        else:
            noise = torch.empty(1, 1, tokens, ends.output.out_features)
            stage = _measure(ends.output, lambda: (ends.head(x) - noise).square().mean(), numerics)
    return replace(stage, moment=LOSS_TENSORS * stage.moment)


@cached_by_shapes
def self_conditioning_stage(model: FITDenoiser, batch: int, latents: int, numerics: Numerics) -> Stage:
    """From the latents of an earlier pass to what they add to the initial ones."""
    with fake_mode():
        module = without_trunk(model, "cpu").self_conditioning
        before = torch.empty(batch, latents, model.trunk.config.latent_dim)
        return _measure(module, lambda: module(before), numerics)


def _measure(module: nn.Module, run: Callable[[], Tensor], numerics: Numerics) -> Stage:
    """What `run()` keeps and makes; `module` is the part of a model that it passes through.

    It runs twice: what both runs keep is there before them, inputs and weights, or a cached bf16 copy of a weight.
    """
    before: dict[int, Any] = {}
    kept: dict[int, Any] = {}
    recording: Any = contexts(numerics.kinds)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=numerics.precision == "bf16"):
        with saved_tensors_hooks(partial(_note, before), _same):
            run()
        with saved_tensors_hooks(partial(_note, kept), _same), recording:
            _note(kept, run())
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in before]
    return Stage(sum(sizes), max(sizes), count_parameters(module), sum(map(_bytes, recording.results)))


def _note(found: dict[int, Any], tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    found[storage._cdata] = storage  # held, so that no address is used twice
    return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _bytes(recorded: tuple[Any, Any]) -> int:
    results = recorded[1] if isinstance(recorded[1], tuple) else recorded[1:]
    return sum(each.nbytes for each in results if isinstance(each, Tensor))


def peak(stages: list[Stage], held: int = 0) -> tuple[int, int]:
    """The largest sum of activations, momentary bytes and gradients of parameters as the stages run backward.

    Args:
        stages: in forward order.
        held: bytes of gradients of parameters that exist from the start.

    Returns:
        bytes of activations, bytes of gradients of parameters, where their sum is largest.
    """
    activations, gradients = sum(stage.kept for stage in stages), held
    most = (activations, gradients)
    for stage in reversed(stages):
        gradients += stage.parameters * FLOAT
        most = max(most, (activations + stage.moment, gradients), key=sum)
        activations -= stage.kept
    return most
