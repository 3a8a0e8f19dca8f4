"""The matrix products of a piece of work, recorded and run again by themselves: the least time that it can take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fitformer._support.checks import checked
from fitformer.errors import InputError

# Linear maps, attention's products, and attention where one operation is all of it.
PRODUCTS = {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}
ATTENTION = "scaled_dot_product"

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in PRODUCTS or ATTENTION in name:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@checked
def record_products(work: Callable[[], object]) -> list[Call]:
    """The matrix products and attention operations of `work()`, with the tensors they were given, in their order.

    Raises:
        InputError: there are none, or they are hidden in compiled code.
    """
    with torch.inference_mode(), _Recorder() as recorder:
        work()
    if not recorder.calls:
        raise InputError("no matrix product was seen: the work has none, or runs as compiled code; run it uncompiled")
    return recorder.calls


@torch.inference_mode()
def replay(calls: list[Call]) -> Tensor:
    """Run recorded calls again, and nothing else; the last one's result."""
    for func, args, kwargs in calls:
        out = func(*args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]
