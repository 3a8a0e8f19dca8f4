"""Networks that predict the next token: their training, what it costs, and their held-out loss.

`bytes_against_dense.py`, `shakespeare.py` and `fashion_pixels.py` train FIT and a dense transformer with this code,
`budgeted_training.py` and `race.py`: the same data, optimizer and schedule, to the same budget. Networks take tokens in
groups, `(b, t, n)`, and give logits.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from budgeted_training import Run, Settings, autocast
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fitformer import FITDecoder, patching
from fitformer.data.order import example_generator
from fitformer.models.config import TrunkConfig
from fitformer.models.initialization import zero_branches
from fitformer.profiling.dense_decoder import DenseDecoder, dense_like

# What a training step costs in forward passes.
STEP_IN_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class TokenSettings(Settings):
    """How a network of tokens is trained.

    Attributes:
        length: tokens of an example.
        short: tokens of an example in the first `short_share` of the budget, of which a step takes as many more.
    """

    length: int
    short: int = 0
    short_share: float = 0.0

    def at(self, share: float) -> "TokenSettings":
        """Those of a step after a share of the budget: of examples of the length that it has."""
        if share >= self.short_share or not 0 < self.short < self.length:
            return self
        return replace(self, length=self.short, batch=self.batch * self.length // self.short)


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


def windows(data: Tensor, settings: TokenSettings, step: int) -> Tensor:
    """Windows `(b, length)` of a sequence of tokens that begin anywhere: a pure function of (seed, step)."""
    random = example_generator(settings.seed, 0, step)
    starts = random.integers(len(data) - settings.length + 1, size=settings.batch)
    return torch.stack([data[start : start + settings.length] for start in starts.tolist()]).long()


def rows(data: Tensor, settings: TokenSettings, step: int) -> Tensor:
    """Rows `(b, length)` of a table of sequences: a pure function of (seed, step)."""
    random = example_generator(settings.seed, 0, step)
    return data[torch.from_numpy(random.integers(len(data), size=settings.batch))].long()


def nats(network: nn.Module, tokens: Tensor, tokens_per_group: int) -> Tensor:
    """Negative log-likelihood `(b, length)` of every token of sequences `(b, length)`, in float32."""
    targets = tokens.unflatten(1, (-1, tokens_per_group))
    logits = network(patching.shift_right(targets))
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(tokens.shape)


@dataclass
class TokenRun(Run):
    """The training of a network of tokens, given as `(b, length)`.

    Attributes:
        tokens_per_group: n of its groups.
    """

    settings: TokenSettings
    tokens_per_group: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.known_flops: dict[tuple[int, int], float] = {}

    def loss(self, batch: Tensor) -> Tensor:
        """Mean nats of the tokens."""
        made = self.settings
        with autocast(made.mixed, self.span(batch.shape[1]), made.device):
            return nats(self.network, batch.to(made.device), self.tokens_per_group).mean()

    def cost(self, batch: Tensor) -> float:
        """Operations of a step."""
        return self.step_flops(batch.shape[1], batch.shape[0])

    def step_flops(self, length: int, batch: int) -> float:
        """Operations of a step on examples of a length."""
        if (key := (length, batch)) not in self.known_flops:
            self.known_flops[key] = training_flops(self.network, length, batch, self.tokens_per_group)
        return self.known_flops[key]

    def span(self, length: int) -> int:
        """Tokens that attend to each other, of examples of a length."""
        return length if isinstance(self.network, DenseDecoder) else self.tokens_per_group

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


def fit_decoder(vocab_size: int, tokens_per_group: int, **trunk: Any) -> FITDecoder:
    """A FIT decoder for any number of groups, with the weights that a short training starts from.

    As in the dense transformer residual branches begin at zero, but for read, without which latents would hold nothing,
    and embeddings are large.
    """
    options = {"latent_position": "shared", "position": "none", "rotary": True, **trunk}
    network = FITDecoder(TrunkConfig(**options), None, tokens_per_group, vocab_size)
    zero_branches(network)
    return network


def dense_decoder(fit: Callable[[], FITDecoder]) -> DenseDecoder:
    """The dense transformer of as many parameters as a FIT."""
    with torch.device("meta"):
        like = fit()
    return dense_like(like)


def fit_of(arguments: argparse.Namespace, vocab_size: int) -> Callable[[], FITDecoder]:
    """The maker of the FIT decoder that the options describe."""
    options = {name: getattr(arguments, name) for name in arguments.trunk}
    return lambda: fit_decoder(vocab_size, arguments.tokens_per_group, **options)


def settings_of(
    arguments: argparse.Namespace, lr: float, length: int, batch: int, seed: int, **own: Any
) -> TokenSettings:
    """Settings of one training, with what the options say of all."""
    return TokenSettings(
        lr, batch, length=length, mixed=not arguments.float32, seed=seed, device=arguments.device, **own
    )
