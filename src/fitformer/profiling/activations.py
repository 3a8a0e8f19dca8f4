"""Bytes that autograd keeps of each layer for the backward pass, measured on fake tensors.

A layer runs with hooks on the tensors that autograd saves. Layers of a group phase run on one group, and their bytes
are multiplied; global layers run at full size. A layer's own input counts as kept by the layer that made it, its output
as kept by itself. bf16 copies of weights are not activations (`memory` counts them with the weights). Results that a
streamed step remembers in place of computing them again are those that `selective_checkpoint` records in the same run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fitformer.execution.selective_checkpoint import SAVE_POLICIES, Kind, contexts
from fitformer.models.block_causal import MOST_MASK, Band
from fitformer.models.config import TrunkConfig
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.dropout import GroupRandom
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.models.trunk import Block, Trunk
from fitformer.patching import PatchGrid
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
from fitformer.tasks._pixel_sums import loss_sums

FLOAT = 4
KINDS = frozenset[Kind]().union(*(kinds for policy in SAVE_POLICIES.values() for kinds in policy))
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


@dataclass(frozen=True)
class _Cost:
    """What was measured in one run: as `Stage`, but remembered bytes of each kind."""

    kept: int
    moment: int
    parameters: int
    remembered: dict[Kind, int]

    def stage(self, kinds: frozenset[Kind] = frozenset(), times: int = 1) -> Stage:
        """The stage of so many times as many rows, where results of these kinds are remembered."""
        remembered = sum(self.remembered[kind] for kind in kinds)
        return Stage(times * self.kept, times * self.moment, self.parameters, times * remembered)


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
    causal: int | Band = latents if block.causal_global > 1 else block.causal_global
    if block.window is not None:
        # A window runs in chunks from fewer latents on; those are few chunks, which may be measured.
        small = latents**2 <= MOST_MASK
        causal = Band(block.causal_global, block.window) if small else latents
    if block.condition is not None:
        yield layer_stage(trunk.config, "condition", batch, latents, conditions, numerics)
    for _ in block.global_layers:
        yield layer_stage(trunk.config, "global", batch, latents, 0, numerics, causal)


def layer_stage(
    config: TrunkConfig, name: str, rows: int, queries: int, keys: int, numerics: Numerics, causal: int | Band = 0
) -> Stage:
    """A layer of a block on rows of queries that attend to keys; `keys` is 0 in self-attention."""
    alone = name in GROUP_LAYERS
    cost = _layer_cost(config, name, 1 if alone else rows, queries, keys, numerics.precision, causal)
    return cost.stage(numerics.kinds, rows if alone else 1)


@lru_cache(maxsize=4096)
def _layer_cost(
    config: TrunkConfig, name: str, rows: int, queries: int, keys: int, precision: Any, causal: int | Band
) -> _Cost:
    with fake_mode():
        layer, inputs = _fake_layer(config, name), layer_inputs(config, name, rows, queries, keys)
        # Layers of a group phase draw what they drop from their groups' keys; without dropout they do not read them.
        random = GroupRandom(torch.zeros(rows, dtype=torch.int64), 0) if name in GROUP_LAYERS else None
        return _measure(layer, lambda: run_layer(layer, inputs, causal, random), precision, inputs)


@lru_cache(maxsize=256)
def _fake_layer(config: TrunkConfig, name: str) -> Any:
    return build_layer(config, name)


@cached_by_shapes
def stem_stage(model: Any, tokens: int, precision: Any) -> Stage:
    """From raw tokens, which are kept as the stem takes them, to data tokens."""
    with fake_mode():
        ends = without_trunk(model, "cpu")
        if isinstance(model, FITDecoder):
            stem = ends.embedding
            return _measure(stem, lambda: stem(torch.zeros(tokens, dtype=torch.int64)), precision).stage()
        stem, channels = ends.stem, ends.stem.projection.in_features
        return _measure(stem, lambda: stem(torch.empty(tokens, channels)), precision).stage()


@cached_by_shapes
def head_stage(model: Any, tokens: int, precision: Any) -> Stage:
    """From data tokens to a loss: squared errors of a denoiser, cross-entropies of a decoder."""
    with fake_mode():
        ends = without_trunk(model, "cpu")
        x = torch.empty(1, 1, tokens, model.trunk.config.dim, requires_grad=True)
        if isinstance(model, FITDecoder):
            targets = torch.zeros(tokens, dtype=torch.int64)
            cost = _measure(ends, lambda: F.cross_entropy(ends.head(x).flatten(0, 2), targets), precision, [x])
        else:
            noise = torch.empty(1, 1, tokens, ends.output.out_features)
            cost = _measure(ends, lambda: (ends.head(x) - noise).square().mean(), precision, [x])
        parameters = count_parameters(ends.output if isinstance(model, FITDenoiser) else ends.norm)
    return Stage(cost.kept, LOSS_TENSORS * cost.moment, parameters)


def dense_stage(model: FITImageSegmenter, groups: int, batch: int, precision: Any) -> Stage:
    """From data tokens to the sums that the loss of a segmenter is made of, of `groups` groups of a batch in all."""
    piece = min(groups, batch * model.groups_at_once(batch))
    cost, at_once = (_dense_cost(model, model.patch_grid, each, precision) for each in (groups, piece))
    return Stage(cost.kept, LOSS_TENSORS * at_once.moment, cost.parameters)


@cached_by_shapes
def _dense_cost(model: FITImageSegmenter, grid: PatchGrid, groups: int, precision: Any) -> _Cost:
    rows, columns = grid.group_size  # type: ignore[misc]
    with fake_mode():
        ends = without_trunk(model, "cpu").head
        x = torch.empty(1, groups, grid.tokens_per_group, model.trunk.config.dim, requires_grad=True)
        patches = torch.empty(1, groups, grid.tokens_per_group, grid.token_dim)
        labels = torch.zeros(1, groups, rows, columns, dtype=torch.uint8)
        return _measure(ends, lambda: loss_sums(ends(x, patches), labels), precision, [x, patches])


@cached_by_shapes
def self_conditioning_stage(model: FITDenoiser, batch: int, latents: int, precision: Any) -> Stage:
    """From the latents of an earlier pass to what they add to the initial ones."""
    with fake_mode():
        module = without_trunk(model, "cpu").self_conditioning
        latents_prev = torch.empty(batch, latents, model.trunk.config.latent_dim)
        return _measure(module, lambda: module(latents_prev), precision, [latents_prev]).stage()


def _measure(module: nn.Module, run: Callable[[], Tensor], precision: Any, inputs: Sequence[Tensor] = ()) -> _Cost:
    """What `run()` keeps and makes beside its inputs; `module` is the part of a model that it passes through."""
    before: dict[int, Any] = {}
    kept: dict[int, Any] = {}
    modes: dict[Kind, Any] = {kind: contexts(frozenset({kind}))[0] for kind in KINDS}
    for tensor in (*module.parameters(), *inputs):
        _note(before, tensor)
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"))
        if precision == "bf16":
            # What both runs keep are cached copies of weights.
            with saved_tensors_hooks(partial(_note, before), _same):
                run()
        stack.enter_context(saved_tensors_hooks(partial(_note, kept), _same))
        for mode in modes.values():
            stack.enter_context(mode)
        _note(kept, run())
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in before]
    remembered = {kind: sum(map(_bytes, mode.results)) for kind, mode in modes.items()}
    return _Cost(sum(sizes), max(sizes), count_parameters(module), remembered)


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
