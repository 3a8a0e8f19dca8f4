"""Draws docs/pictures/fit.png, the figure of the README: groups, latents, and the two phases of a block.

python docs/figure.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

GROUPS, TOKENS, LATENTS = 4, 6, 2
DATA, LATENT, INK = "#7fb2d9", "#f0a35e", "#30343b"


def row(axes: Axes, y: float, count: int, color: str, size: float) -> None:
    """A row of tokens in every group, centred in it."""
    for group in range(GROUPS):
        left = group * 3 + (2.4 - count * size) / 2
        for k in range(count):
            axes.add_patch(Rectangle((left + k * size, y), size * 0.86, 0.3, facecolor=color, edgecolor="white"))


def layer(axes: Axes, left: float, y: float, width: float, text: str, color: str) -> None:
    """A box standing for layers."""
    axes.add_patch(FancyBboxPatch((left, y), width, 0.42, "round,pad=0.02", facecolor=color, edgecolor=INK, alpha=0.35))
    axes.text(left + width / 2, y + 0.2, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow of attention."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1))
    if text:
        axes.text(start[0] + 0.12, (start[1] + end[1]) / 2, text, fontsize=9, color=INK, va="center")


def main() -> None:
    """Draw one block and the write that begins the next."""
    figure, axes = plt.subplots(figsize=(10, 4.6), dpi=150)
    row(axes, 0.0, TOKENS, DATA, 0.38)
    row(axes, 2.1, LATENTS, LATENT, 0.5)
    row(axes, 4.2, TOKENS, DATA, 0.38)
    for group in range(GROUPS):
        left = group * 3
        layer(axes, left, 0.75, 2.4, "local layers", DATA)
        arrow(axes, (left + 1.2, 0.32), (left + 1.2, 0.72))
        arrow(axes, (left + 1.2, 1.2), (left + 1.2, 2.06), "read")
        arrow(axes, (left + 1.2, 2.45), (left + 1.2, 2.83))
        arrow(axes, (left + 1.2, 3.33), (left + 1.2, 4.15), "write")
        axes.text(left + 1.2, -0.25, f"group {group + 1}", ha="center", fontsize=9, color=INK)
    layer(axes, 0, 2.87, 3 * GROUPS - 0.6, "global layers: all latents of all groups", LATENT)
    for y, text in ((0.15, "n data tokens"), (2.25, "m latents"), (4.35, "data tokens")):
        axes.text(-0.25, y, text, ha="right", va="center", fontsize=9, color=INK)
    axes.text(11.7, 0.95, "group phase:\nnever mixes groups,\nO(n²) in a group", fontsize=9, va="center", color=INK)
    axes.text(11.7, 3.1, "global phase:\nnever touches data tokens", fontsize=9, va="center", color=INK)
    axes.set_xlim(-2.2, 15)
    axes.set_ylim(-0.5, 4.7)
    axes.set_axis_off()
    path = Path(__file__).parent / "pictures" / "fit.png"
    figure.savefig(path, bbox_inches="tight")
    print(f"wrote {path.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
