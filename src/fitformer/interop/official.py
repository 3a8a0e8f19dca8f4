"""The reference implementation's weights, in and out: its TensorFlow names and shapes on our modules.

Every variable of the reference is a parameter of ours, transposed where it is a kernel and cut into heads where it
belongs to an attention. One walk over a model, `_walk`, lists the pairs; the functions below read or write them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fitformer._support.checks import checked
from fitformer.errors import InputError
from fitformer.models.base import FITModel
from fitformer.models.config import TrunkConfig
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.encoder import FITEncoder
from fitformer.models.layers import Attention, CrossLayer, FeedForward, TransformerLayer, check_sizes
from fitformer.models.positions import PositionTable
from fitformer.models.pretrained import difference

ROOTS = {"FIT": "fit", "FITDenoiser": "fitdenoiser", "FITAR": "fitar"}
ROLES: dict[str, type[FITModel]] = {"FIT": FITEncoder, "FITDenoiser": FITDenoiser, "FITAR": FITDecoder}

# The reference's constructor arguments whose meaning does not depend on the role, by our names.
RENAMED = {
    "layers": "layers",
    "num_groups": "num_groups",
    "latents_per_group": "latents_per_group",
    "x_dim": "dim",
    "latent_dim": "latent_dim",
    "x_num_heads": "heads",
    "latent_num_heads": "latent_heads",
    "mlp_ratio": "mlp_ratio",
    "drop_path": "drop_path",
    "drop_units": "drop_units",
    "drop_att": "drop_att",
    "x_pos_encoding": "position",
    "latent_pos_encoding": "latent_position",
}
OF_ROLE = {
    "FIT": ("mask",),
    "FITDenoiser": ("mask", "out_dim", "cond_proj", "self_cond", "x_self_attention", "xattn_with_mlp", "xattn_enc_ln"),
    "FITAR": ("vocab_size", "shared_embedding", "output_bias"),
}
REQUIRED = {"x_size", *list(RENAMED)[:7]}  # geometry, widths and heads; the rest has defaults
REQUIRED_OF_ROLE: dict[str, set[str]] = {"FIT": set(), "FITDenoiser": {"out_dim"}, "FITAR": {"vocab_size"}}
# What the reference takes and this library has no use for.
IGNORED = ("name", "dtype", "trainable")


class Variable(NamedTuple):
    """One variable of the reference: its name and shape there, and the parameter that it is here."""

    name: str
    parameter: Tensor
    shape: tuple[int, ...]

    def to_reference(self, tensor: Tensor) -> np.ndarray:
        """Give a tensor of the parameter's shape the reference's shape."""
        tensor = tensor.detach().float().cpu()
        return (tensor.T if self.is_kernel else tensor).reshape(self.shape).numpy().copy()

    def from_reference(self, array: np.ndarray) -> Tensor:
        """Give an array of the reference's shape the parameter's shape."""
        flat = torch.as_tensor(np.array(array, dtype=np.float32))
        if self.is_kernel:
            return flat.reshape(tuple(self.parameter.shape)[::-1]).T
        return flat.reshape(self.parameter.shape)

    @property
    def is_kernel(self) -> bool:
        """Kernels are (in, out) there and (out, in) here; all else agrees."""
        return self.name.endswith("kernel:0")


@checked
def build(kind: str, kwargs: Mapping[str, Any], variables: Mapping[str, np.ndarray]) -> nn.Module:
    """Build a role from the reference's constructor arguments and weights, in eval mode.

    Args:
        kind: `"FIT"` (encoder), `"FITDenoiser"` or `"FITAR"` (autoregressive decoder).
        kwargs: arguments of the reference's constructor; `x_size` is L.
        variables: arrays by the reference's names, `fit/stem/kernel:0` and so on; what the arguments leave open
            (channels, the condition's width, whether `y` tokens are given) is read off their shapes.

    Raises:
        InputError: unknown kind or argument; variables that are unknown, missing or misshapen, all in one message.
    """
    if kind not in ROLES:
        raise InputError(f"unknown kind {kind!r}; there are {', '.join(ROLES)}")
    model = ROLES[kind].from_config(_arguments(kind, kwargs, variables)).eval()
    pairs = list(_walk(model))
    faults = difference(
        {name: tuple(np.shape(array)) for name, array in variables.items()},
        {variable.name: variable.shape for variable in pairs},
        most=1000,
    )
    if faults:
        raise InputError(f"these variables are not those of this {kind}: {faults}")
    with torch.no_grad():
        for variable in pairs:
            variable.parameter.copy_(variable.from_reference(variables[variable.name]))
    return model


@checked
def variables(model: nn.Module) -> dict[str, np.ndarray]:
    """A role's weights under the reference's names and shapes: what `build` takes."""
    return {variable.name: variable.to_reference(variable.parameter) for variable in _walk(model)}


@checked
def gradients(model: nn.Module) -> dict[str, np.ndarray]:
    """A role's gradients under the reference's names and shapes; zeros for a parameter that nothing depended on.

    Raises:
        InputError: no parameter has a gradient: nothing was propagated backwards.
    """
    if all(variable.parameter.grad is None for variable in _walk(model)):
        raise InputError("the model holds no gradients; call loss.backward() first")
    return {
        variable.name: variable.to_reference(
            torch.zeros_like(variable.parameter) if variable.parameter.grad is None else variable.parameter.grad
        )
        for variable in _walk(model)
    }


def _arguments(kind: str, kwargs: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Translate the reference's arguments; complete them from the shapes of the variables."""
    known = {**RENAMED, **{name: name for name in OF_ROLE[kind]}}
    unknown = set(kwargs) - set(known) - {"x_size"} - set(IGNORED)
    if unknown:
        raise InputError(f"unknown arguments of {kind}: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    missing = (REQUIRED | REQUIRED_OF_ROLE[kind]) - set(kwargs)
    if missing:
        raise InputError(f"arguments of {kind} missing: {', '.join(sorted(missing))}")
    length, groups = kwargs["x_size"], kwargs["num_groups"]
    check_sizes(x_size=length, num_groups=groups)
    if length % groups:
        below = length // groups * groups
        near = f"{below} or {below + groups} do" if below else f"{groups} do"
        raise InputError(f"x_size={length} tokens do not divide into num_groups={groups} groups; {near}")
    arguments = {known[name]: value for name, value in kwargs.items() if name in known}
    arguments["tokens_per_group"] = length // groups

    def width(name: str, axis: int = 0) -> int | None:
        shape = np.shape(given.get(f"{ROOTS[kind]}/{name}/kernel:0", 0))
        return shape[axis] if len(shape) == 2 and shape[axis] else None  # anything else is refused as misshapen

    if kind == "FIT":
        arguments |= {"in_channels": width("stem") or 1, "y_channels": width("stem_y")}
    if kind == "FITDenoiser":
        extra = (width("time_emb/dense1") or kwargs["latent_dim"]) - kwargs["latent_dim"]
        projected = arguments.get("cond_proj", True)
        arguments |= {
            "cond_dim": width("cond_proj") if projected else kwargs["latent_dim"],
            "extra_time": max(extra, 0),
        }
    return arguments


def _walk(model: nn.Module) -> Iterator[Variable]:
    """Every variable of a role with its parameter."""
    kind = next((kind for kind, role in ROLES.items() if type(model) is role), None)
    if kind is None:
        raise InputError(
            f"{type(model).__name__} is none of the reference's models; those are "
            f"{', '.join(role.__name__ for role in ROLES.values())}"
        )
    _check_options(model.trunk.config)  # type: ignore[arg-type, union-attr]
    own = {"FIT": _encoder, "FITDenoiser": _denoiser, "FITAR": _decoder}[kind]
    rows = [*own(model), *_trunk(model.trunk, causal=kind == "FITAR")]  # type: ignore[operator]
    if len(rows) != len(list(model.parameters())):
        raise InputError(f"this {type(model).__name__} has options that the reference lacks, such as qk_norm")
    for name, parameter, shape in rows:
        yield Variable(f"{ROOTS[kind]}/{name}:0", parameter, shape)


def _check_options(config: TrunkConfig) -> None:
    """Refuse options that the reference lacks and that no parameter gives away."""
    usual = {"rotary": (False,), "global_window": (None,), "position": ("learned", "sin_cos", "sin_cos2d")}
    usual["latent_position"] = ("learned", "sin_cos")
    for name, values in usual.items():
        if (value := getattr(config, name)) not in values:
            raise InputError(f"the reference has no {name}={value!r}; it knows {', '.join(map(str, values))}")


_Rows = Iterator[tuple[str, Tensor, tuple[int, ...]]]


def _suffix(i: int) -> str:
    return f"_{i}" if i else ""


def _plain(name: str, parameter: Tensor) -> _Rows:
    yield name, parameter, tuple(parameter.shape)


def _norm(name: str, norm: nn.LayerNorm) -> _Rows:
    yield from _plain(f"{name}/gamma", norm.weight)
    yield from _plain(f"{name}/beta", norm.bias)


def _linear(name: str, linear: nn.Linear, kernel: tuple[int, ...] = (), bias: tuple[int, ...] = ()) -> _Rows:
    yield f"{name}/kernel", linear.weight, kernel or (linear.in_features, linear.out_features)
    yield f"{name}/bias", linear.bias, bias or (linear.out_features,)


def _attention(name: str, attention: Attention) -> _Rows:
    width = attention.query.out_features
    heads = (attention.heads, width // attention.heads)
    for part in ("query", "key", "value"):
        linear = getattr(attention, part)
        yield from _linear(f"{name}/{part}", linear, (linear.in_features, *heads), heads)
    output = attention.output
    yield from _linear(f"{name}/attention_output", output, (*heads, output.out_features))


def _ffn(name: str, ffn: FeedForward) -> _Rows:
    yield from _linear(f"{name}/dense1", ffn.inner)
    yield from _linear(f"{name}/dense2", ffn.outer)
    yield from _norm(f"{name}/ln", ffn.norm)


def _layer(name: str, layer: TransformerLayer, attention: str) -> _Rows:
    if layer.attention is not None and layer.norm is not None:
        yield from _norm(f"{name}/{attention}/ln", layer.norm)
        yield from _attention(f"{name}/{attention}", layer.attention)
    yield from _ffn(f"{name}/mlp/ffn", layer.ffn)


def _cross(name: str, cross: CrossLayer) -> _Rows:
    yield from _norm(f"{name}/cross_mha/ln", cross.norm)
    if cross.context_norm is not None:
        yield from _norm(f"{name}/cross_mha/enc_ln", cross.context_norm)
    yield from _attention(f"{name}/cross_mha", cross.attention)
    if cross.ffn is not None:
        yield from _ffn(f"{name}/mlp/ffn", cross.ffn)


def _table(name: str, table: PositionTable) -> _Rows:
    if isinstance(table.weight, nn.Parameter):
        yield from _plain(f"{name}/kernel/vis_pos_embedding", table.weight)


def _trunk(trunk: Any, causal: bool) -> _Rows:
    """The positions and blocks; the reference calls the causal layers decoder layers."""
    stack, attention = ("transformer_decoder_layer", "self_mha") if causal else ("transformer_encoder", "mha")
    yield from _table("x_pos_emb", trunk.position)
    yield from _table("latent_pos_emb", trunk.latent_position)
    for i, block in enumerate(trunk.blocks):
        if block.write is not None:  # named there after the block it ends, here it begins the next
            yield from _cross(f"x2l_cross_attn{_suffix(i - 1)}", block.write)
        if block.read is not None:
            yield from _cross(f"l2x_cross_attn{_suffix(i)}", block.read)
        if block.condition is not None:
            yield from _cross(f"l2c_cross_attn{_suffix(i)}", block.condition)
        for network, layers in (("x_network", block.local_layers), ("l_network", block.global_layers)):
            for j, layer in enumerate(layers):
                yield from _layer(f"{network}{_suffix(i)}/{stack}{_suffix(j)}", layer, attention)


def _encoder(model: FITEncoder) -> _Rows:
    for name, stem in (("stem", model.stem), ("stem_y", model.stem_y)):
        if stem is not None:
            yield from _linear(name, stem.projection)
            yield from _norm(f"{name}_ln", stem.norm)
    yield from _norm("x_output_ln", model.norm)
    yield from _norm("l_output_ln", model.latent_norm)


def _denoiser(model: FITDenoiser) -> _Rows:
    yield from _linear("stem", model.stem.projection)
    yield from _norm("stem_ln", model.stem.norm)
    yield from _linear("time_emb/dense0", model.time.inner)
    yield from _linear("time_emb/dense1", model.time.outer)
    if model.cond_proj is not None:
        yield from _linear("cond_proj", model.cond_proj)
    if model.self_conditioning is not None:
        yield from _ffn("latent_prev_proj/ffn", model.self_conditioning.ffn)
        yield from _norm("latent_prev_ln", model.self_conditioning.norm)
    yield from _norm("x_output_ln", model.norm)
    yield from _linear("x_output_linear", model.output)


def _decoder(model: FITDecoder) -> _Rows:
    if model.output_embedding is None:
        yield from _plain("token_embedding", model.embedding.weight)
    else:
        yield from _plain("inp_token_embedding", model.embedding.weight)
        yield from _plain("outp_token_embedding", model.output_embedding.weight)
    if model.output_bias is not None:
        yield from _plain("outp_bias", model.output_bias)
    yield from _norm("x_output_ln", model.norm)
