"""Held-out means over batches of different weights."""

from collections.abc import Mapping

from torch import Tensor

from fitformer._support.processes import from_all_processes


class Means:
    """Sums of what a task measures, tensors of any shape, each weighted by the examples or tokens it is a mean over."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0

    def add(self, means: Mapping[str, Tensor], weight: int) -> None:
        """Add the means over a batch."""
        for name, value in means.items():
            added = value.detach().cpu().double() * weight
            self.sums[name] = self.sums[name] + added if name in self.sums else added
        self.weight += weight

    def join(self, other: "Means") -> None:
        """Add what another process measured."""
        if other.weight:
            self.add({name: value / other.weight for name, value in other.sums.items()}, other.weight)

    def means(self) -> dict[str, Tensor]:
        """Means over all that was added; nothing if nothing was."""
        return {name: value / self.weight for name, value in self.sums.items()}


def joined(own: Means) -> Means:
    """Those of all processes that train together."""
    found = Means()
    for each in from_all_processes(own):
        found.join(each)
    return found
