"""Selective checkpointing of a streamed step: what the backward pass computes again, and what it remembers instead.

Selective recomputation (Korthikanti et al. 2022, arXiv 2205.05198, section 5) remembers the results that took many
operations a number. A matrix product takes as many as it sums over, attention as many as there are keys.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

Recompute = Literal["full", "local", "selective", "light"]
Kind = Literal["attention", "down", "square", "up"]


class SavePolicy(NamedTuple):
    """Kinds of results that are remembered, of group phases and of global layers."""

    groups: frozenset[Kind] = frozenset()
    latents: frozenset[Kind] = frozenset()


# Plain execution keeps sixteen widths of numbers a token of a layer. `selective` remembers two, for half of the
# operations or more, and `light` six: only the up projection and pointwise functions are computed again.
# The last projection of a layer is a down projection; a global layer is recomputed by itself and does not need it.
SAVE_POLICIES: dict[Recompute, SavePolicy] = {
    "full": SavePolicy(),
    "local": SavePolicy(latents=frozenset({"attention"})),
    "selective": SavePolicy(frozenset({"attention", "down"}), frozenset({"attention"})),
    "light": SavePolicy(frozenset({"attention", "down", "square"}), frozenset({"attention", "square"})),
}

aten = torch.ops.aten
# The products that linear projections are made of, each with the place of the weights among the arguments.
MAPS = {aten.mm.default: 1, aten.addmm.default: 2}
ATTENTIONS = {
    getattr(aten, name).default
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    if hasattr(aten, name := f"_scaled_dot_product_{kind}")
}


def kind_of(inputs: int, outputs: int) -> Kind:
    """The kind of a linear projection, by its widths."""
    return "down" if inputs > outputs else "square" if inputs == outputs else "up"


def contexts(kinds: frozenset[Kind]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """A context for running some layers forward, and one for running them again backward, both with a graph.

    The second takes the results that the first remembers, each once.
    """
    results: deque[tuple[Any, Any]] = deque()
    return _RecordMode(kinds, results), _ReplayMode(kinds, results)


def checkpointing(kinds: frozenset[Kind]) -> Callable[..., Tensor]:
    """How a layer is called, `call(layer, *inputs)`, so that the backward pass recomputes it but for these kinds."""
    more: dict[str, Any] = {"context_fn": lambda: contexts(kinds)} if kinds else {}

    def call(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        return checkpoint(layer, *inputs, use_reentrant=False, **more)

    return call


class _RecordMode(TorchDispatchMode):
    """Remember the results that are worth it, in their order.

    torch's own contexts of this kind number every operation, and break where mixed precision casts a weight for the
    first slice only.
    """

    def __init__(self, kinds: frozenset[Kind], results: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.kinds, self.results = kinds, results

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if _kind(function, args, kwargs or {}) in self.kinds:
            self.results.append((function, _detached(result)))
        return result


class _ReplayMode(_RecordMode):
    """Give back what was remembered, in place of computing it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _kind(function, args, kwargs or {}) not in self.kinds:
            return function(*args, **(kwargs or {}))
        remembered, result = self.results.popleft() if self.results else (None, None)
        if remembered is not function:
            raise RuntimeError(
                f"{function} is computed in the backward pass where the forward pass computed {remembered}: choose the "
                "same kernels of attention in both, or recompute='full'"
            )
        return result


def _kind(function: Any, args: Any, kwargs: dict[str, Any]) -> Kind | None:
    if function in MAPS:
        return kind_of(*args[MAPS[function]].shape)
    # Weights by values; queries by keys, one number for each pair, are not worth it.
    if function is aten.bmm.default and args[1].shape[-2] > args[1].shape[-1]:
        return "attention"
    # What draws random numbers must draw them again, or whatever draws after it would draw others.
    return "attention" if function in ATTENTIONS and not _dropped(function, args, kwargs) else None


def _dropped(function: Any, args: Any, kwargs: dict[str, Any]) -> float:
    names = (argument.name for argument in function._schema.arguments)
    return float((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p", 0.0))


def _detached(result: Any) -> Any:
    # The very tensor that the graph goes on with would hold that graph.
    if isinstance(result, tuple):
        return tuple(_detached(part) for part in result)
    return result.detach() if isinstance(result, Tensor) else result
