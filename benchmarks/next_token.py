"""Training a network on the next token to a budget, and its held-out loss.

`bytes_against_dense.py`, `shakespeare.py` and `fashion_pixels.py` train FIT and a dense transformer with this code and
`race.py`: the same data, optimizer and schedule, to the same budget. Networks take tokens in groups, `(b, t, n)`, and
give logits.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from fitformer import FITDecoder, patching
from fitformer._support.atomic_files import write_atomically
from fitformer.data.order import example_generator
from fitformer.profiling.dense_decoder import DenseDecoder
from fitformer.tasks.optimizers import parameter_groups

# What a training step costs in forward passes.
STEP_IN_PASSES = 3
# In bf16, on a CPU, torch's fused attention of spans up to this is slower than its products by themselves.
MOST_SPAN = 128
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Attributes:
        lr: peak of AdamW's learning rate. betas, weight_decay, clip: as usual.
        warmup: share of the budget with a rising learning rate; after it the rate falls on a line to `end` of the peak.
        length: tokens of an example. batch: examples of a step.
        short: tokens of an example in the first `short_share` of the budget, of which a step takes as many more.
        mixed: bf16 autocast. seed: of weights and of the order of examples.
        average: decay of the weights' moving average, which is what is measured; 0 measures the weights themselves.
        device: `cpu` or `cuda`.
    """

    lr: float
    length: int
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
    short: int = 0
    short_share: float = 0.0

    def at(self, share: float) -> "Settings":
        """Those of a step after a share of the budget: of examples of the length that it has."""
        if share >= self.short_share or not 0 < self.short < self.length:
            return self
        return replace(self, length=self.short, batch=self.batch * self.length // self.short)


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


def training_flops(network: nn.Module, length: int, batch: int, tokens_per_group: int) -> float:
    """Operations of a training step, forward and backward, by torch's counter on tensors without memory.

    Of causal attention inside a sequence or a group half of the pairs count, as its kernels compute it.
    """
    with torch.device("meta"):
        twin = _twin(network)
        tokens = torch.zeros(batch, length // tokens_per_group, tokens_per_group, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            twin(tokens).sum().backward()
    return counter.get_total_flops() - STEP_IN_PASSES * _masked_flops(network, length, batch, tokens_per_group)


def _twin(network: nn.Module) -> nn.Module:
    """The same network without weights; built where the default device is meta."""
    if isinstance(network, DenseDecoder):
        hidden = network.layers[0].outer.in_features
        return DenseDecoder(network.vocab_size, network.dim, len(network.layers), network.heads, hidden)
    return FITDecoder.from_config(network.config)


def _masked_flops(network: nn.Module, length: int, batch: int, tokens_per_group: int) -> float:
    """Of a forward pass, those of the pairs that causal self-attention leaves out."""
    if isinstance(network, DenseDecoder):
        layers, rows, span, width = len(network.layers), batch, length, network.dim
    else:
        layers = sum(local for local, _ in network.trunk.block_depths)
        rows, span, width = batch * length // tokens_per_group, tokens_per_group, network.trunk.config.dim
    return layers * rows * 2 * span * (span - 1) * width


def windows(data: Tensor, settings: Settings, step: int) -> Tensor:
    """Windows `(b, length)` of a sequence of tokens that begin anywhere: a pure function of (seed, step)."""
    random = example_generator(settings.seed, 0, step)
    starts = random.integers(len(data) - settings.length + 1, size=settings.batch)
    return torch.stack([data[start : start + settings.length] for start in starts.tolist()]).long()


def rows(data: Tensor, settings: Settings, step: int) -> Tensor:
    """Rows `(b, length)` of a table of sequences: a pure function of (seed, step)."""
    random = example_generator(settings.seed, 0, step)
    return data[torch.from_numpy(random.integers(len(data), size=settings.batch))].long()


def nats(network: nn.Module, tokens: Tensor, tokens_per_group: int) -> Tensor:
    """Negative log-likelihood `(b, length)` of every token of sequences `(b, length)`, in float32."""
    targets = tokens.unflatten(1, (-1, tokens_per_group))
    logits = network(patching.shift_right(targets))
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(tokens.shape)


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
    """A training under way, which `save` and `load` keep in a file.

    Attributes:
        network: what learns. settings: how. tokens_per_group: n of its groups.
        steps, seconds, flops: done so far; the clock stands still while it is evaluated.
        curve: points of measurements, `(flops, seconds, value)`.
    """

    network: nn.Module
    settings: Settings
    tokens_per_group: int
    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    curve: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = self.settings
        self.network.to(made.device)
        self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(made.average))
        groups = parameter_groups(self.network, made.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=made.lr, betas=made.betas, fused=True)
        self.known_flops: dict[tuple[int, int], float] = {}

    def step_flops(self, length: int, batch: int) -> float:
        """Operations of a step on examples of a length."""
        if (key := (length, batch)) not in self.known_flops:
            self.known_flops[key] = training_flops(self.network, length, batch, self.tokens_per_group)
        return self.known_flops[key]

    def span(self, length: int) -> int:
        """Tokens that attend to each other, of examples of a length."""
        return length if isinstance(self.network, DenseDecoder) else self.tokens_per_group

    def step(self, tokens: Tensor, share: float) -> None:
        """One training step on tokens `(b, length)`."""
        start, made = time.perf_counter(), self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = made.lr * rate(share, made)
        with autocast(made.mixed, self.span(tokens.shape[1]), made.device):
            loss = nats(self.network, tokens.to(made.device), self.tokens_per_group).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), made.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if made.average:
            self.averaged.update_parameters(self.network)
        if made.device == "cuda":
            torch.cuda.synchronize()
        self.steps, self.flops = self.steps + 1, self.flops + self.step_flops(tokens.shape[1], tokens.shape[0])
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

    @torch.no_grad()
    def held_out(self, data: Tensor, overlap: float = 0.0, batch: int = 8) -> Tensor:
        """Nats of the tokens of a sequence, each once, in windows of the trained length, float64.

        Windows overlap by a share of their length, and a token counts in the first window that holds it: with an
        overlap of half, all but the first window's tokens have at least half a window of context. The end that fills no
        group is left out. Of a table of sequences `(rows, length)` each row is a window.
        """
        if data.ndim == 2:
            starts, length = list(range(0, data.numel(), data.shape[1])), data.shape[1]
        else:
            starts, length = self._starts(len(data), overlap)
        flat, parts, done = data.flatten(), [], 0
        network = self.measured().eval()
        for first in range(0, len(starts), batch):
            some = starts[first : first + batch]
            tokens = torch.stack([flat[start : start + length] for start in some]).long()
            device = self.settings.device
            with autocast(self.settings.mixed, self.span(length), device):
                each = nats(network, tokens.to(device), self.tokens_per_group).double().cpu()
            for start, row in zip(some, each, strict=True):
                parts.append(row[done - start :])
                done = start + length
        network.train()
        return torch.cat(parts)

    def _starts(self, size: int, overlap: float) -> tuple[list[int], int]:
        """Where windows begin, and their length, in tokens."""
        n = self.tokens_per_group
        size = size // n * n
        length = min(self.settings.length, size)
        stride = max(n, int(length * (1 - overlap)) // n * n)
        starts = list(range(0, size - length + 1, stride))
        return (starts if starts[-1] + length == size else [*starts, size - length]), length


def rate(share: float, settings: Settings) -> float:
    """The learning rate as a share of its peak: up on a line, then down on a line."""
    if share < settings.warmup:
        return max(share / settings.warmup, 1e-2)
    done = min((share - settings.warmup) / (1 - settings.warmup), 1.0)
    return 1 - done * (1 - settings.end)


def by_place(each: Tensor, tokens_per_group: int) -> dict[str, float]:
    """Mean nats by the place of a token in its group, in spans that double: what a group's first tokens lack.

    `each` is nats of tokens from a group's start on.
    """
    places = each[: len(each) // tokens_per_group * tokens_per_group].view(-1, tokens_per_group).mean(0)
    spans, first = {}, 0
    while first < tokens_per_group:
        stop = min(max(2 * first, first + 1), tokens_per_group)
        spans[f"{first}" if stop == first + 1 else f"{first} to {stop - 1}"] = float(places[first:stop].mean())
        first = stop
    return spans


def train(
    run: Run,
    batch: Callable[[Settings, int], Tensor],
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
        batch: tokens `(b, length)` of a step, given settings and its number.
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
