"""Training a network to a budget of FLOPs or seconds, with a curve of held-out measurements and a checkpoint.

What all comparisons of `race.py` share: `next_token.py` has the networks that predict tokens, `cifar10.py` those that
classify images, `camvid.py` those that classify their pixels.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fitformer._support.atomic_files import write_atomically
from fitformer.config.schema import Optimizer
from fitformer.tasks.optimizers import optimizer_of

# In bf16, on a CPU, torch's fused attention of spans up to this is slower than its products by themselves.
MOST_SPAN = 128
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Attributes:
        lr: peak learning rate. optimizer: `adamw` or `muon`. betas, weight_decay, clip: as usual.
        batch: examples of a step.
        warmup: share of the budget with a rising learning rate; after it the rate falls on a line to `end` of the peak.
        mixed: bf16 autocast. seed: of weights and of the order of examples.
        average: decay of the weights' moving average, which is what is measured; 0 measures the weights themselves.
        device: `cpu` or `cuda`.
    """

    lr: float
    batch: int
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.05
    end: float = 0.02
    mixed: bool = False
    seed: int = 0
    average: float = 0.0
    device: str = "cpu"
    optimizer: Literal["adamw", "muon"] = "adamw"

    def at(self, share: float) -> "Settings":
        """Those of a step after a share of the budget."""
        return self


@dataclass(frozen=True)
class Budget:
    """What a training may spend: floating-point operations, or seconds of training on the clock."""

    flops: float | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, text: str) -> "Budget":
        """Read `600s`, `8h` or `1e14` (FLOPs)."""
        units = {"s": 1, "m": 60, "h": 3600}
        try:
            if text[-1:] in units:
                return cls(seconds=float(text[:-1]) * units[text[-1]])
            return cls(flops=float(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no budget; write 600s, 8h, or 1e14 for FLOPs") from None

    def share(self, run: "Run") -> float:
        """The share that a run has spent."""
        return run.flops / self.flops if self.flops is not None else run.seconds / (self.seconds or math.inf)


@contextmanager
def autocast(mixed: bool, span: int, device: str = "cpu") -> Iterator[None]:
    """bf16 where it is asked for, with the attention that is fastest for `span` tokens."""
    if not mixed or device != "cpu":
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            yield
        return
    backends = nn.attention.SDPBackend
    kernels = [backends.MATH] if span <= MOST_SPAN else [backends.FLASH_ATTENTION, backends.MATH]
    with torch.autocast("cpu", torch.bfloat16), nn.attention.sdpa_kernel(kernels):
        yield


@dataclass
class Run:
    """A training under way, which `save` and `load` keep in a file; what is learned is a subclass's.

    Attributes:
        network: what learns. settings: how.
        steps, seconds, flops: done so far; the clock stands still while it is evaluated.
        curve: points of measurements, `(flops, seconds, value)`.
    """

    network: nn.Module
    settings: Settings
    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    curve: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = self.settings
        self.network.to(made.device)
        self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(made.average))
        settings = Optimizer(made.optimizer, lr=made.lr, betas=made.betas, weight_decay=made.weight_decay)
        self.optimizer = optimizer_of(self.network, settings)

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError

    def cost(self, batch: Any) -> float:
        """Operations of a training step on a batch, forward and backward."""
        raise NotImplementedError

    def step(self, batch: Any, share: float) -> None:
        """One training step after a share of the budget."""
        start, made = time.perf_counter(), self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = made.lr * rate(share, made)
        self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), made.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if made.average:
            self.averaged.update_parameters(self.network)
        if made.device == "cuda":
            torch.cuda.synchronize()
        self.steps, self.flops = self.steps + 1, self.flops + self.cost(batch)
        self.seconds += time.perf_counter() - start

    def save(self, path: Path) -> None:
        """All that the next step needs."""
        kept = {name: getattr(self, name) for name in ("steps", "seconds", "flops", "curve")}
        with write_atomically(path) as scratch:
            torch.save(
                {**kept, **{name: getattr(self, name).state_dict() for name in ("network", "averaged", "optimizer")}},
                scratch,
            )

    def load(self, path: Path) -> None:
        """As it was saved."""
        kept = torch.load(path, weights_only=True)
        for name in ("network", "averaged", "optimizer"):
            getattr(self, name).load_state_dict(kept.pop(name))
        for name, value in kept.items():
            setattr(self, name, value)

    def measured(self) -> Any:
        """The network that is measured: the averaged one, if there is one."""
        return self.averaged.module if self.settings.average else self.network


def rate(share: float, settings: Settings) -> float:
    """The learning rate as a share of its peak: up on a line, then down on a line."""
    if share < settings.warmup:
        return max(share / settings.warmup, 1e-2)
    done = min((share - settings.warmup) / (1 - settings.warmup), 1.0)
    return 1 - done * (1 - settings.end)


def train(
    run: Run,
    batch: Callable[[Any, int], Any],
    budget: Budget,
    evaluate: Callable[[Run], float],
    *,
    points: int = 10,
    checkpoint: Path | None = None,
    save_every: float = 120.0,
) -> None:
    """Train a run to the end of its budget, from its checkpoint where there is one.

    Args:
        run: the training.
        batch: what a step is given, from settings and its number.
        budget: of the whole run.
        evaluate: the held-out measurement of the curve, made at `points` equal shares of the budget.
        points: of the curve.
        checkpoint: file that the run is kept in. save_every: seconds of training between two savings.
    """
    if checkpoint is not None and checkpoint.is_file():
        run.load(checkpoint)
    saved = run.seconds
    while (share := budget.share(run)) < 1:
        run.step(batch(run.settings.at(share), run.steps), share)
        after = budget.share(run)
        if after >= 1 or int(after * points) > int(share * points):
            run.curve.append((run.flops, run.seconds, evaluate(run)))
            spent = f"{run.steps} steps, {run.seconds:.0f} s, {run.flops:.3g} FLOPs"
            print(f"  {min(after, 1):4.0%}, {spent}: {run.curve[-1][2]:.4f}", flush=True)
        if checkpoint is not None and (after >= 1 or run.seconds > saved + save_every):
            run.save(checkpoint)
            saved = run.seconds
