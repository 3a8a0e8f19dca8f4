"""Parameters and floating-point operations (FLOPs), part by part.

FLOPs are those of one example's forward pass, counted by torch on meta tensors: two for each multiply-add of a matrix
product (norms, GELU and softmax are left out, as is usual). Attention counts every pair of tokens, also masked ones;
over a window of groups, those that its chunks compute.
The model may be on any device, also `meta`: its weights are not read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fitformer._support.checks import checked
from fitformer.errors import InputError
from fitformer.models.block_causal import Band, chunks
from fitformer.models.config import TrunkConfig
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.dense_head import DenseHead
from fitformer.models.encoder import FITEncoder
from fitformer.models.image_denoiser import FITImageDenoiser
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.models.trunk import Block, Trunk
from fitformer.patching import PatchGrid
from fitformer.profiling.probes import build_layer, cached_by_shapes, layer_inputs, run_layer, without_trunk

Model = FITEncoder | FITImageEncoder | FITImageSegmenter | FITDenoiser | FITDecoder
ROLES: dict[str, type[Model]] = {
    role.__name__: role for role in (FITEncoder, FITImageEncoder, FITImageSegmenter, FITDenoiser, FITDecoder)
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of linear maps, and of attention itself (query by key, weights by value)."""

    linear: int = 0
    attention: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __rmul__(self, times: int) -> "Flops":
        return Flops(times * self.linear, times * self.attention)

    @property
    def total(self) -> int:
        """Both together."""
        return self.linear + self.attention


@dataclass(frozen=True)
class Part:
    """A part of a model: its name, the tokens it runs on, its number of parameters, its FLOPs."""

    name: str
    tokens: str
    parameters: int
    flops: Flops


@dataclass(frozen=True)
class GroupPlan:
    """Numbers of groups t, data tokens in a group n (extra ones included), latents in a group m, and widths c and d."""

    num_groups: int
    tokens_per_group: int
    latents_per_group: int
    dim: int
    latent_dim: int
    layers: str


@checked
def on_meta(role: str, config: dict[str, Any], preset: str | None = None) -> Model:
    """Build a role without memory for its weights.

    Args:
        role: name of a class of `fitformer`; of a `FITImageDenoiser` its `FITDenoiser` is built.
        config: its arguments, as `from_config` takes them; where there is a preset, as `from_preset` does.
        preset: the size that `config` overrides.

    Raises:
        InputError: an unknown role, or arguments that the role refuses.
    """
    roles = {**ROLES, FITImageDenoiser.__name__: FITImageDenoiser}
    if role not in roles:
        raise InputError(f"there is no role {role!r}; there are {', '.join(roles)}")
    with torch.device("meta"):
        built = roles[role].from_config(config) if preset is None else roles[role].from_preset(preset, **config)
    return built.denoiser if isinstance(built, FITImageDenoiser) else built


def count_parameters(module: nn.Module | None) -> int:
    """Number of trained numbers in a module, shared ones once; 0 for no module."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def flops(model: Model, extra_tokens: int = 0, condition_tokens: int = 1, num_groups: int | None = None) -> Flops:
    """FLOPs of one example's forward pass; arguments as in `parts`."""
    return sum_flops([part.flops for part in parts(model, extra_tokens, condition_tokens, num_groups)])


def sum_flops(counts: Sequence[Flops]) -> Flops:
    """The sum of counts."""
    return reduce(add, counts, Flops())


def group_plan(model: Model, extra_tokens: int = 0, num_groups: int | None = None) -> GroupPlan:
    """How the model cuts its input.

    Args:
        model: any of the roles.
        extra_tokens: as in `parts`.
        num_groups: of the input; those that the model was built for by default.

    Raises:
        InputError: no number of groups for a model that takes any.
    """
    trunk, config = model.trunk, model.trunk.config
    num_groups = trunk.num_groups if num_groups is None else num_groups
    if num_groups is None:
        raise InputError("the model takes any number of groups; say how many the input has")
    layers = "".join(f"({local}){glob or ''}" for local, glob in trunk.block_depths)
    tokens = trunk.tokens_per_group + extra_tokens
    return GroupPlan(num_groups, tokens, config.latents_per_group, config.dim, config.latent_dim, layers)


def parts(model: Model, extra_tokens: int = 0, condition_tokens: int = 1, num_groups: int | None = None) -> list[Part]:
    """The model part by part, in the order of execution; their parameters and FLOPs add up to those of the model.

    Args:
        model: any of the roles, on any device.
        extra_tokens: tokens `y` that each group is given beside its own (encoder built with `y_channels`).
        condition_tokens: tokens of the condition (denoiser built with `cond_dim`), the time not counted.
        num_groups: of the input, see `group_plan`.
    """
    plan = group_plan(model, extra_tokens, num_groups)
    before, after = _ends(model, plan, extra_tokens, condition_tokens)
    conditions = 1 + (condition_tokens if isinstance(model, FITDenoiser) and model.cond_dim is not None else 0)
    trunk = model.trunk
    table = count_parameters(trunk.position) + count_parameters(trunk.latent_position)
    positions = Part(
        "positions",
        f"{plan.tokens_per_group - extra_tokens} + {plan.num_groups} x {plan.latents_per_group}",
        table,
        Flops(),
    )
    return [*before, positions, *_trunk_parts(trunk, plan, conditions), *after]


def _ends(model: Model, plan: GroupPlan, extra: int, condition_tokens: int) -> tuple[list[Part], list[Part]]:
    """The parts before and after the trunk."""
    if isinstance(model, FITImageEncoder):
        before, after = _ends(model.encoder, plan, extra, condition_tokens)
        return before, [*after, *_maps(model, head=("1", 1, model.num_features))]
    t, n, m = plan.num_groups, plan.tokens_per_group, plan.latents_per_group
    data, latents = f"{t} x {n}", f"{t} x {m}"
    if isinstance(model, FITImageSegmenter):
        before, after = _ends(model.encoder, plan, extra, condition_tokens)
        cost = t * _dense_flops(model, model.patch_grid)
        return before, [*after, Part("dense head", data, count_parameters(model.head), cost)]
    if isinstance(model, FITEncoder):
        norms = Part("norms", data, count_parameters(model.norm) + count_parameters(model.latent_norm), Flops())
        own = t * (n - extra), model.stem.projection.in_features
        of_y = 0 if model.stem_y is None else model.stem_y.projection.in_features
        return _maps(model, stem=(data, *own), stem_y=(f"{t} x {extra}", t * extra, of_y)), [norms]
    if isinstance(model, FITDenoiser):
        stem = data, t * n, model.output.out_features
        time = "1", 1, 1 + model.time.outer.in_features - model.time.outer.out_features
        condition = str(condition_tokens), condition_tokens, model.cond_dim or 0
        before = _maps(
            model, stem=stem, time=time, cond_proj=condition, self_conditioning=(latents, t * m, plan.latent_dim)
        )
        norm = Part("norm", data, count_parameters(model.norm), Flops())
        return before, [norm, *_maps(model, output=(data, t * n, plan.dim))]
    untied = count_parameters(model.output_embedding) + count_parameters(model.norm)
    bias = 0 if model.output_bias is None else model.output_bias.numel()
    logits = t * n * _token_flops(model, "head", plan.dim)
    embeddings = count_parameters(model.embedding) + count_parameters(model.class_embedding)
    embedding = Part("embedding", data, embeddings, Flops())
    return [embedding], [Part("norm and logits", data, untied + bias, logits)]


PART_NAMES = {"stem_y": "stem of y", "cond_proj": "condition", "self_conditioning": "self-conditioning"}


def _maps(model: nn.Module, **runs: tuple[str, int, int]) -> list[Part]:
    """Parts of a model by attribute, those that there are: on which tokens, how many of them, of what width."""
    found = []
    for name, (tokens, count, width) in runs.items():
        if (module := getattr(model, name)) is not None:
            cost = count * _token_flops(model, name, width)
            found.append(Part(PART_NAMES.get(name, name), tokens, count_parameters(module), cost))
    return found


@cached_by_shapes
def _token_flops(model: nn.Module, name: str, width: int) -> Flops:
    """FLOPs of a part of a model, by attribute, on one token."""
    part = getattr(without_trunk(model, "meta"), name)
    return count_flops(lambda: part(torch.empty(1, width, device="meta")))


@cached_by_shapes
def _dense_flops(model: FITImageSegmenter, grid: PatchGrid) -> Flops:
    """FLOPs of the dense head of a segmenter on one group."""
    head: DenseHead = without_trunk(model, "meta").head
    x, patches = (
        torch.empty(1, 1, grid.tokens_per_group, c, device="meta") for c in (model.trunk.config.dim, grid.token_dim)
    )
    return count_flops(lambda: head(x, patches))


def _trunk_parts(trunk: Trunk, plan: GroupPlan, conditions: int) -> Iterator[Part]:
    t, n, m = plan.num_groups, plan.tokens_per_group, plan.latents_per_group
    shapes = {"write": (t, n, m), "local": (t, n, 0), "read": (t, m, n), "condition": (1, t * m, conditions)}
    shapes["global"] = (1, t * m, 0)
    for i, block in enumerate(trunk.blocks, start=1):
        stacks = {"write": block.write, "local": block.local_layers, "read": block.read, "condition": block.condition}
        for name, layers in (stacks | {"global": block.global_layers}).items():
            depth = len(layers) if isinstance(layers, nn.ModuleList) else int(layers is not None)
            if not depth:
                continue
            rows, queries, keys = shapes[name]
            times = f" x {depth}" if isinstance(layers, nn.ModuleList) else ""
            tokens = f"{rows} x {queries}" + (f" to {keys}" if keys else "")
            pairs = _window_pairs(block, queries) if name == "global" else None
            cost = depth * rows * layer_flops(trunk.config, name, queries, keys, pairs)
            yield Part(f"block {i} {name}{times}", tokens, count_parameters(layers), cost)


def _window_pairs(block: Block, latents: int) -> int | None:
    """Pairs of latents in a global layer over a window of groups; None without one."""
    if block.window is None:
        return None
    return sum(chunk.pairs for chunk in chunks(latents, Band(block.causal_global, block.window)))


def layer_flops(config: TrunkConfig, name: str, queries: int, keys: int, pairs: int | None = None) -> Flops:
    """FLOPs of a layer of a block on one row of queries that attend to keys; `keys` is 0 in self-attention.

    `pairs` of a query and a key are all of them by default.
    """
    query, key, pair = _layer_rates(config, name)
    pairs = queries * (keys or queries) if pairs is None else pairs
    return queries * query + keys * key + pairs * pair


@lru_cache(maxsize=1024)
def _layer_rates(config: TrunkConfig, name: str) -> tuple[Flops, Flops, Flops]:
    """FLOPs of a layer for each query, each key and each pair of a query and a key, counted on one or two of each."""
    with torch.device("meta"):
        layer = build_layer(config, name).eval()

        def count(queries: int, keys: int) -> Flops:
            inputs = layer_inputs(config, name, 1, queries, keys)
            return count_flops(lambda: run_layer(layer, inputs))

        one, more_queries = count(1, 1), count(2, 1)
    query = more_queries.linear - one.linear
    return Flops(query), Flops(one.linear - query), Flops(attention=one.attention)


def count_flops(run: Callable[[], object]) -> Flops:
    """FLOPs of matrix products in `run()`, by torch's counter: of linear maps and convolutions, and of all others.

    Run it on meta tensors: their attention is decomposed into the products that the counter knows.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = counter.get_flop_counts().get("Global", {})
    maps = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    linear = sum(counts.get(operation, 0) for operation in maps)
    return Flops(linear, sum(counts.values()) - linear)
