"""What there is to compute, told so that it need never be whole in memory, and the one call that computes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from fitformer.models.trunk import Trunk

Read = Callable[[slice], tuple[Tensor, Tensor | None]]
Embed = Callable[[slice, Tensor], Tensor]
Score = Callable[[slice, Tensor, Tensor | None], Tensor]


class Execution(Protocol):
    """A way to run the trunk on tokens that are in memory, such as `plain`."""

    def __call__(
        self, trunk: Trunk, x: Tensor, latents: Tensor, condition: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data tokens and latents out, of the shapes of `x (b, t, n, c)` and `latents (b, t, m, d)`."""


@dataclass(frozen=True)
class Work:
    """A pass through a role, by slices of groups.

    Attributes:
        groups: t, of every example.
        latents: initial ones `(b, t, m, d)`.
        read: raw tokens `(b, s, n, ...)` of a slice of groups and their mask `(b, s, n)` or None. May be called from
            another thread, and again in the backward pass: it must give the same each time.
        embed: raw tokens of a slice as data tokens `(b, s, n, c)`; the role's own where it is None.
        score: of a slice, the role's outputs and their mask, a tensor to be added up over slices: a loss, or a sum for
            a mean. None where only the latents are wanted.
        condition: tokens `(b, s, d)` for the latents to look at.
        depends_on: tensors with gradients, beside the role's parameters, that `embed` or `score` use.
    """

    groups: int
    latents: Tensor
    read: Read
    embed: Embed | None = None
    score: Score | None = None
    condition: Tensor | None = None
    depends_on: Sequence[Tensor] = ()


def total(role: Any, work: Work) -> tuple[Tensor | None, Tensor]:
    """Run a role on some work, as `role.run` says: the scores' sum over all slices, and the latents `(b, t, m, d)`.

    Args:
        role: `FITEncoder`, `FITDenoiser` or `FITDecoder`.
        work: what to compute.

    Both results can be differentiated, by the role's parameters and the tensors of `work`. Where `role.run` is
    `Streamed`, no tensor of all data tokens ever exists, but for those that it keeps.
    """
    assert isinstance(role, nn.Module)
    if isinstance(role.run, ByWork):
        return role.run.total(role, work)
    everything = slice(0, work.groups)
    tokens, mask = work.read(everything)
    x = embedded(role, work, everything, tokens)
    x, latents = role.run(role.trunk, x, work.latents, work.condition, mask)  # type: ignore[operator]
    score = None if work.score is None else work.score(everything, role.finish(x), mask)  # type: ignore[operator]
    return score, latents


def embedded(role: Any, work: Work, groups: slice, tokens: Tensor) -> Tensor:
    """Raw tokens of a slice as data tokens."""
    return role.embed(tokens) if work.embed is None else work.embed(groups, tokens)


class ByWork:
    """A way to run that reads its work itself."""

    def total(self, role: Any, work: Work) -> tuple[Tensor | None, Tensor]:
        """As the function `total`."""
        raise NotImplementedError
