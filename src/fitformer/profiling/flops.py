"""Parameters and floating-point operations, part by part.

Operations are those of one example's forward pass, two for each multiply-add, of matrix products alone (norms, GELU and
softmax are left out, as is usual). Attention counts every pair of tokens, also those that a mask hides.
Models built under `torch.device("meta")` do: nothing here looks at a weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import nn

from fitformer.errors import InputError
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.encoder import FITEncoder
from fitformer.models.image_denoiser import FITImageDenoiser
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.layers import Attention, CrossLayer, FeedForward, TransformerLayer
from fitformer.models.positions import PositionTable
from fitformer.models.trunk import Block, Trunk

Model = FITEncoder | FITImageEncoder | FITDenoiser | FITDecoder
ROLES: dict[str, type[Model]] = {role.__name__: role for role in (FITEncoder, FITImageEncoder, FITDenoiser, FITDecoder)}


@dataclass(frozen=True)
class Flops:
    """Operations in linear maps, and in attention itself (query by key, weights by value)."""

    linear: int = 0
    attention: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.attention + other.attention)

    @property
    def total(self) -> int:
        """Both together."""
        return self.linear + self.attention


@dataclass(frozen=True)
class Part:
    """A part of a model: where it stands, what tokens it runs on, what it holds and costs."""

    name: str
    tokens: str
    parameters: int
    flops: Flops


@dataclass(frozen=True)
class GroupPlan:
    """Numbers of groups t, data tokens in a group n (extra ones included), latents in a group m, and widths c and d."""

    groups: int
    tokens_per_group: int
    latents_per_group: int
    dim: int
    latent_dim: int
    layers: str


def on_meta(role: str, config: dict[str, Any]) -> Model:
    """Build a role without memory for its weights; `config` holds the arguments of `fitformer.<role>`.

    Raises:
        InputError: an unknown role, or arguments that the role refuses.
    """
    if role == FITImageDenoiser.__name__:
        with torch.device("meta"):
            return FITImageDenoiser.from_config(config).denoiser
    if role not in ROLES:
        raise InputError(f"there is no role {role!r}; there are {', '.join(ROLES)}")
    with torch.device("meta"):
        return ROLES[role].from_config(config)


def count_parameters(module: nn.Module | None) -> int:
    """Number of trained numbers in a module, shared ones once; 0 for no module."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def flops(model: Model, extra_tokens: int = 0, condition_tokens: int = 1, groups: int | None = None) -> Flops:
    """Operations of one example's forward pass; arguments as in `parts`."""
    return total([part.flops for part in parts(model, extra_tokens, condition_tokens, groups)])


def total(counts: Sequence[Flops]) -> Flops:
    """The sum of counts."""
    return reduce(add, counts, Flops())


def group_plan(model: Model, extra_tokens: int = 0, groups: int | None = None) -> GroupPlan:
    """How the model cuts its input.

    Args:
        model: any of the roles.
        extra_tokens: as in `parts`.
        groups: of the input; those that a model of one size was built for by default.

    Raises:
        InputError: no number of groups for a model that takes any.
    """
    trunk = model.trunk
    (coords, c), latent = trunk.position.weight.shape, trunk.latent_position
    m, d = trunk.latents_per_group, (latent.weight if isinstance(latent, PositionTable) else latent.slots).shape[-1]
    if groups is None:
        if not isinstance(latent, PositionTable):
            raise InputError("the model takes any number of groups; say how many the input has")
        groups = latent.weight.shape[0] // m
    layers = "".join(f"({local}){glob or ''}" for local, glob in trunk.block_depths)
    return GroupPlan(groups, coords + extra_tokens, m, c, d, layers)


def parts(model: Model, extra_tokens: int = 0, condition_tokens: int = 1, groups: int | None = None) -> list[Part]:
    """The model part by part, in the order they run; their parameters and operations add up to the whole's.

    Args:
        model: any of the roles, on any device.
        extra_tokens: tokens `y` that each group is given beside its own (encoder built with `y_channels`).
        condition_tokens: tokens of the condition (denoiser built with `cond_dim`), the time not counted.
        groups: of the input, see `group_plan`.
    """
    plan = group_plan(model, extra_tokens, groups)
    before, after = _ends(model, plan, extra_tokens, condition_tokens)
    conditions = 1 + (condition_tokens if isinstance(model, FITDenoiser) and model.cond_dim is not None else 0)
    trunk = model.trunk
    table = count_parameters(trunk.position) + count_parameters(trunk.latent_position)
    positions = Part("positions", f"{plan.tokens_per_group - extra_tokens} + {_times(plan, 'm')}", table, Flops())
    return [*before, positions, *_trunk_parts(trunk, plan, conditions), *after]


def _ends(model: Model, plan: GroupPlan, extra: int, condition_tokens: int) -> tuple[list[Part], list[Part]]:
    """The parts before and after the trunk."""
    if isinstance(model, FITImageEncoder):
        before, after = _ends(model.encoder, plan, extra, condition_tokens)
        return before, [*after, _linears("head", "1", model.head, 1)] if model.head is not None else after
    length, own = plan.groups * plan.tokens_per_group, plan.groups * (plan.tokens_per_group - extra)
    if isinstance(model, FITEncoder):
        norms = count_parameters(model.norm) + count_parameters(model.latent_norm)
        stems = [_linears("stem", _times(plan, "n"), model.stem, own)]
        if model.stem_y is not None:
            stems.append(_linears("stem of y", f"{plan.groups} x {extra}", model.stem_y, plan.groups * extra))
        return stems, [Part("norms", _times(plan, "n"), norms, Flops())]
    if isinstance(model, FITDenoiser):
        return _denoiser_stem(model, plan, condition_tokens), [
            Part("norm", _times(plan, "n"), count_parameters(model.norm), Flops()),
            _linears("output", _times(plan, "n"), model.output, length),
        ]
    untied = count_parameters(model.output_embedding)
    bias = 0 if model.output_bias is None else model.output_bias.numel()
    logits = Flops(2 * length * plan.dim * model.vocab_size)
    return [Part("embedding", _times(plan, "n"), count_parameters(model.embedding), Flops())], [
        Part("norm and logits", _times(plan, "n"), count_parameters(model.norm) + untied + bias, logits)
    ]


def _denoiser_stem(model: FITDenoiser, plan: GroupPlan, condition_tokens: int) -> list[Part]:
    stems = [
        _linears("stem", _times(plan, "n"), model.stem, plan.groups * plan.tokens_per_group),
        _linears("time", "1", model.time, 1),
    ]
    if model.cond_proj is not None:
        stems.append(_linears("condition", f"{condition_tokens}", model.cond_proj, condition_tokens))
    if model.self_conditioning is not None:
        latents = plan.groups * plan.latents_per_group
        stems.append(_linears("self-conditioning", _times(plan, "m"), model.self_conditioning, latents))
    return stems


def _trunk_parts(trunk: Trunk, plan: GroupPlan, conditions: int) -> Iterator[Part]:
    t, n, m = plan.groups, plan.tokens_per_group, plan.latents_per_group
    for i, block in enumerate(trunk.blocks, start=1):
        assert isinstance(block, Block)
        local, glob = len(block.local_layers), len(block.global_layers)
        yield from _cross(f"block {i} write", block.write, t, n, m)
        if local:
            yield _stack(f"block {i} local x {local}", block.local_layers, t, n)
        yield from _cross(f"block {i} read", block.read, t, m, n)
        yield from _cross(f"block {i} condition", block.condition, 1, t * m, conditions)
        if glob:
            yield _stack(f"block {i} global x {glob}", block.global_layers, 1, t * m)


def _stack(name: str, layers: nn.ModuleList, rows: int, tokens: int) -> Part:
    cost = total([layer_flops(layer, rows, tokens) for layer in layers])  # type: ignore[arg-type]
    return Part(name, f"{rows} x {tokens}", count_parameters(layers), cost)


def _cross(name: str, layer: CrossLayer | None, rows: int, queries: int, keys: int) -> list[Part]:
    if layer is None:
        return []
    cost = cross_flops(layer, rows, queries, keys)
    return [Part(name, f"{rows} x {queries} to {keys}", count_parameters(layer), cost)]


def _linears(name: str, tokens: str, module: nn.Module, count: int) -> Part:
    """A part whose linear maps each run once on each of `count` tokens."""
    maps = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return Part(name, tokens, count_parameters(module), total([linear_flops(layer, count) for layer in maps]))


def _times(plan: GroupPlan, letter: str) -> str:
    return f"{plan.groups} x {plan.tokens_per_group if letter == 'n' else plan.latents_per_group}"


def linear_flops(layer: nn.Linear, tokens: int) -> Flops:
    """Operations of a linear map on `tokens` tokens."""
    return Flops(linear=2 * tokens * layer.in_features * layer.out_features)


def attention_flops(attention: Attention, rows: int, queries: int, keys: int) -> Flops:
    """Operations of attention from `queries` to `keys` tokens in each of `rows` rows, projections included."""
    maps = (
        linear_flops(attention.query, rows * queries),
        linear_flops(attention.key, rows * keys),
        linear_flops(attention.value, rows * keys),
        linear_flops(attention.output, rows * queries),
    )
    return total(maps) + Flops(attention=4 * rows * queries * keys * attention.query.out_features)


def ffn_flops(ffn: FeedForward | None, tokens: int) -> Flops:
    """Operations of a feed-forward branch on `tokens` tokens; none of none."""
    return Flops() if ffn is None else linear_flops(ffn.inner, tokens) + linear_flops(ffn.outer, tokens)


def layer_flops(layer: TransformerLayer, rows: int, tokens: int) -> Flops:
    """Operations of a transformer layer on `rows` rows of `tokens` tokens."""
    looking = Flops() if layer.attention is None else attention_flops(layer.attention, rows, tokens, tokens)
    return looking + ffn_flops(layer.ffn, rows * tokens)


def cross_flops(layer: CrossLayer, rows: int, queries: int, keys: int) -> Flops:
    """Operations of a cross-attention layer from `queries` to `keys` tokens in each of `rows` rows."""
    return attention_flops(layer.attention, rows, queries, keys) + ffn_flops(layer.ffn, rows * queries)
