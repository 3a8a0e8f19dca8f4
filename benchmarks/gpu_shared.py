"""What the parts of `gpu.py` share."""

import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fitformer.execution import Streamed

Row = dict[str, str]


@dataclass(frozen=True)
class Scale:
    """Where and how large: `tiny` is for testing this script."""

    device: str
    tiny: bool

    def ways(self) -> dict[str, Any]:
        """Every execution, by name."""
        size = 2 if self.tiny else 16
        keeps = {f"streamed, {keep}": Streamed(size, keep=keep) for keep in ("memory", "host", "disk")}
        again = ("local", "selective", "light")
        recomputes = {f"streamed, {level}": Streamed(size, recompute=level) for level in again}
        return {"plain": "plain", "checkpointed": "checkpointed", **keeps, **recomputes}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Mean seconds of `work` after one run to warm up."""
    work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def mixed(device: str, on: bool = True) -> Any:
    """bf16 autocast."""
    return torch.autocast(device, torch.bfloat16) if on else nullcontext()


def guarded(name: str, work: Callable[[], Row]) -> Row:
    """A row under its name; a failure of it leaves the other rows of the part."""
    try:
        return {"run": name, **work()}
    except Exception as error:
        traceback.print_exc()
        return {"run": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200].replace("|", "/")}


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A training step in bf16 autocast with AdamW, which gives its loss."""
    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        with mixed(device):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step
