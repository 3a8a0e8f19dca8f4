"""FIT against a plain ViT of the same width and number of layers with flash attention: one training step of each.

    python benchmarks/vit.py --tokens 4096,16384,65536 --plot docs/pictures/vit.png > benchmarks/results/...

The ViT is made of the same transformer layers (`fitformer.models.layers`, torch's fused attention), all of FIT's
width c, as many as FIT has local and global ones, over all tokens. FIT runs plainly, with groups of its planned size.
A step is forward, a mean of squares as the loss, backward and a fused AdamW update; raw tokens are random. Both are
measured in turn, in the same process. With `--layers-of-vit`, only so many of the ViT's layers run at that length or
above, and their time, stem taken out, is scaled up: the table says so."""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fitformer import FITEncoder
from fitformer._support.atomic_files import write_atomically
from fitformer.models.encoder import Stem
from fitformer.models.layers import TransformerLayer, layer_norm
from fitformer.profiling import Geometry
from fitformer.profiling.geometry import candidate_group_sizes
from fitformer.profiling.scaling import exponent

PATCH = 16
TOKEN = PATCH * PATCH * 3


class ViT(nn.Module):
    """Stem, positions, `layers` transformer layers of width `dim` on all tokens, norm."""

    def __init__(self, tokens: int, layers: int, dim: int, heads: int) -> None:
        super().__init__()
        self.stem, self.position = Stem(TOKEN, dim), nn.Parameter(torch.zeros(tokens, dim))
        self.layers = nn.ModuleList(TransformerLayer(dim, heads) for _ in range(layers))
        self.norm = layer_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@dataclass
class Row:
    tokens: int
    group: int
    fit: float
    vit: float
    ran: int
    layers: int
    ratio: float
    cpu_ratio: float


def step(model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], tuple[float, float]]:
    """A function that runs one training step and returns its seconds, on the clock and of the processors."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run() -> tuple[float, float]:
        start, busy = time.perf_counter(), time.process_time()
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start, time.process_time() - busy

    return run


def compare(tokens: int, preset: str, few: int | None, repeats: int) -> Row:
    side = math.isqrt(tokens) * PATCH
    planned = candidate_group_sizes(Geometry.of_preset("encoder", preset, side, patch_size=PATCH))
    # The best of those that need no filling up at the edges.
    geometry = next(each for each in planned if each.num_groups * each.tokens_per_group == tokens)
    size, n, groups = geometry.sizes, geometry.tokens_per_group, geometry.num_groups
    fit = FITEncoder.from_config(num_groups=groups, tokens_per_group=n, in_channels=TOKEN, **size)
    count = sum(local + glob for local, glob in fit.trunk.block_depths)
    vit = ViT(tokens, few or count, size["dim"], size["heads"])
    x = torch.randn(1, tokens, TOKEN)
    one = step(fit, lambda: fit(x.view(1, groups, n, TOKEN))[1])
    other = step(vit, lambda: vit(x))
    stem = step(nothing := ViT(tokens, 0, size["dim"], size["heads"]), lambda: nothing(x))
    times: list[list[tuple[float, float]]] = [[], [], []]
    # The shorter ones once more, to warm up.
    for k in range(repeats + (tokens <= 4096)):
        for run, found in zip((one, other, stem) if few else (one, other), times):
            found.append(run())
            print(f"  {tokens} tokens, round {k}: {found[-1][0]:.2f} s", file=sys.stderr, flush=True)
    seconds = []
    for clock in range(2):
        fit_time, vit_time = (statistics.median(pair[clock] for pair in found[-repeats:]) for found in times[:2])
        if few:
            base = statistics.median(pair[clock] for pair in times[2])
            vit_time = base + (vit_time - base) * count / few
        seconds.append((fit_time, vit_time))
    (fit_time, vit_time), (fit_busy, vit_busy) = seconds
    group = math.isqrt(n) * PATCH
    return Row(tokens, group, fit_time, vit_time, few or count, count, vit_time / fit_time, vit_busy / fit_busy)


def crossing(rows: list[Row]) -> float:
    """Tokens at which both take the same time, on the power laws through the lengths right before and after it."""
    after = next(k for k, row in enumerate(rows) if row.ratio > 1)
    near = rows[after - 1 : after + 1]
    fit, vit = (exponent([r.tokens for r in near], [getattr(r, name) for r in near]) for name in ("fit", "vit"))
    return (fit.factor / vit.factor) ** (1 / (vit.exponent - fit.exponent))


def plot(path: Path, rows: list[Row], preset: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="data tokens L", ylabel="seconds a training step", xscale="log", yscale="log")
    lengths = [row.tokens for row in rows]
    axes.plot(lengths, [row.fit for row in rows], "o-", label=f"FIT {preset}")
    axes.plot(lengths, [row.vit for row in rows], "s-", label="ViT, same width and layers, flash attention")
    for row in rows:
        axes.annotate(f"{row.ratio:.1f}x", (row.tokens, row.vit), textcoords="offset points", xytext=(-10, 6))
    if rows[0].ratio <= 1 < rows[-1].ratio:
        axes.axvline(crossing(rows), linestyle=":", color="grey", label=f"equal at {crossing(rows):,.0f} tokens")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with write_atomically(path) as scratch:
        figure.savefig(scratch, format=path.suffix.lstrip("."), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="256,1024,4096,16384,65536", help="lengths, squares of whole numbers")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--layers-of-vit", type=int, help="run so many layers of the ViT at --from and above")
    parser.add_argument("--from", type=int, default=65536, dest="start")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for tokens in map(int, arguments.tokens.split(",")):
        few = arguments.layers_of_vit if tokens >= arguments.start else None
        rows.append(compare(tokens, arguments.preset, few, arguments.repeats))
    print("| tokens | groups of | FIT, s | ViT, s | layers of the ViT that ran | FIT is faster | by processor time |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.tokens:,} | {row.group} | {row.fit:.2f} | {row.vit:.2f} | {row.ran} of {row.layers} ", end="")
        print(f"| {row.ratio:.1f}x | {row.cpu_ratio:.1f}x |")
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.plot:
        plot(arguments.plot, rows, arguments.preset)
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
