"""One token's way through a decoder as compiled code: a CPU is as long at Python's calls as at their products.

Torch compares a compiled function's inputs with those it was compiled for at every call, all weights included, which
takes a fifth of a small decoder's token. Here a key of the decoder and of the inputs takes the place of that.
"""

from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fitformer.errors import InputError

Token = Callable[[Any, dict[str, Tensor], Tensor, int], Tensor]
"""`token(reader, tensors, inputs (b, 1), place) -> logits (b, 1, vocab)`; a function that closes over nothing."""

LEAST_SIZE = 2
_COMPILED: dict[Hashable, Callable[..., Tensor]] = {}


def kind_of(decoder: Any) -> Hashable:
    """What decoders have in common that may run the same code: all but the values of their weights."""
    tensors = (*decoder.parameters(), *decoder.buffers())
    layouts = tuple((tuple(each.shape), each.stride(), each.dtype) for each in tensors)
    return type(decoder), repr(decoder), repr(decoder.config), decoder.training, layouts


def run_compiled(
    kind: Hashable, token: Token, reader: Any, tensors: dict[str, Tensor], inputs: Tensor, place: int
) -> Tensor:
    """`token(reader, tensors, inputs, place)`, compiled at the first call, which takes seconds to half a minute.

    Args:
        kind: of the reader's decoder.
        token: what is compiled. The place must be neither the first nor the last of a group, which differ in shapes.
        reader, tensors, inputs, place: its arguments; tensors of the cache are contiguous, and written to.

    Raises:
        InputError: it cannot be compiled, as without a C++ compiler.
    """
    cast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    key = (kind, token, len(inputs), inputs.dtype, reader.decoder.embedding.weight.dtype, cast)
    # A size above 1 may be any number in compiled code, where a number would be compiled for as it is.
    span, inputs = torch.empty(place + LEAST_SIZE), inputs.contiguous()
    if key in _COMPILED:
        return _COMPILED[key](reader, tensors, inputs, span)
    compiled = _compile(token, len(_COMPILED))
    torch._dynamo.mark_dynamic(span, 0)
    try:
        logits = compiled(reader, tensors, inputs, span)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        reason = str(getattr(error, "inner_exception", error)).strip().split("\n")[0]
        raise InputError(
            f"compile does not work here: it needs a C++ compiler such as g++ ({reason}); leave it out otherwise"
        ) from error
    _COMPILED[key] = compiled
    return logits


def _compile(token: Token, number: int) -> Callable[..., Tensor]:
    def call(reader: Any, tensors: dict[str, Tensor], inputs: Tensor, span: Tensor) -> Tensor:
        return token(reader, tensors, inputs, span.shape[0] - LEAST_SIZE)

    # Torch finds what it has compiled by the code of a function: each kind needs code of its own.
    own = FunctionType(
        call.__code__.replace(co_name=f"call_{number}"), globals(), call.__name__, None, call.__closure__
    )
    options: dict[str, Any] = {"cpp_wrapper": True}
    if hasattr(torch.compiler, "keep_tensor_guards_unsafe"):
        options["guard_filter_fn"] = lambda guards: [False] * len(guards)
    # Without fullgraph, torch would run in silence what it does not compile.
    return torch.compile(own, fullgraph=True, options=options)
