"""The one driver of the trunk: a loop over blocks whose parts every way to run exchanges.

An `Execution` says how the two phases of each block are run (plainly, checkpointed, in slices of groups); `Inputs` say
what is computed, so that the tokens need never be whole in memory. Nothing here imports a model: whatever has blocks of
the two phases can be run.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fitformer._support.checks import check_fields
from fitformer.errors import InputError
from fitformer.execution.examples import Examples

Read = Callable[[slice], tuple[Tensor, Tensor | None]]
Embed = Callable[[slice, Tensor], Tensor]
Score = Callable[[slice, Tensor, Tensor | None], Tensor]


class Trunk(Protocol):
    """What is run: `fitformer.models.trunk.Trunk` is one. Its blocks have `group_phase` and `global_phase`."""

    blocks: Any
    tokens_per_group: int

    def write_latents(self, latents: Tensor, places: Tensor | None = None) -> Tensor:
        """The latents `(b, t, m, d)` that the write of each group attends to; `places` are those of `Inputs`."""

    def dropout_keys(self, batch: int, groups: int) -> Tensor | None:
        """What each group's dropout is drawn from, `(b, t)`; None without dropout."""

    def parameters(self) -> Any:
        """Its parameters."""


class SomeBlocks:
    """Some blocks of a trunk, in their order, run as a trunk of their own: a pass that begins or ends in the middle.

    Args:
        whole: the trunk.
        blocks: of it, or anything with their two phases.
    """

    def __init__(self, whole: Trunk, blocks: Any) -> None:
        self.whole, self.blocks = whole, blocks
        self.tokens_per_group = whole.tokens_per_group

    def write_latents(self, latents: Tensor, places: Tensor | None = None) -> Tensor:
        """As the whole trunk's."""
        return self.whole.write_latents(latents, places)

    def dropout_keys(self, batch: int, groups: int) -> Tensor | None:
        """As the whole trunk's."""
        return self.whole.dropout_keys(batch, groups)

    def parameters(self) -> Any:
        """Those of the whole trunk."""
        return self.whole.parameters()


def as_they_are(groups: slice, tokens: Tensor) -> Tensor:
    """The embedding of tokens that are data tokens already."""
    return tokens


@dataclass(frozen=True)
class Inputs:
    """One pass through a trunk, by slices of groups.

    Attributes:
        tokens: raw tokens `(b, t, n, ...)`, or a function that reads a slice of groups: tokens `(b, s, n, ...)` and
            their mask `(b, s, n)` or None. It may be called from another thread, and again in the backward pass: it
            must give the same each time.
        latents: initial ones `(b, t, m, d)`.
        embed: raw tokens of a slice to data tokens `(b, s, n, c)`.
        mask: of tokens in memory, booleans `(b, t, n)`, false for tokens that nothing attends to.
        score: of a slice, its last data tokens and their mask, a tensor that is added up over slices: a loss, or a sum
            for a mean.
        blocks: numbers of the blocks whose data tokens are wanted whole.
        condition: tokens `(b, s, d)` that the latents attend to.
        parameters: all tensors with gradients that the trunk, `embed` and `score` use.
        places: of the groups in their documents, int64 `(b, t)`: a causal trunk runs each document as if it were alone,
            and one begins where the place is 0. None for one document, at places 0, 1, 2 ...
        examples: that the groups of one row, `b` = 1, belong to, of which none sees another; `condition` has one of
            each. None where every row is an example.

    Raises:
        InputError: an attribute of another kind, or examples of another number of groups.
    """

    tokens: Tensor | Read
    latents: Tensor
    embed: Embed = as_they_are
    mask: Tensor | None = None
    score: Score | None = None
    blocks: Sequence[int] = ()
    condition: Tensor | None = None
    parameters: Sequence[Tensor] = ()
    places: Tensor | None = None
    examples: Examples | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.examples is not None and (1, sum(self.examples.counts)) != tuple(self.latents.shape[:2]):
            raise InputError(
                f"examples of {sum(self.examples.counts)} groups in one row given with latents of "
                f"{tuple(self.latents.shape[:2])} rows and groups"
            )

    @property
    def groups(self) -> int:
        """Groups of every example, t."""
        return self.latents.shape[1]

    def read(self, groups: slice) -> tuple[Tensor, Tensor | None]:
        """Raw tokens of a slice of groups, and their mask."""
        if not isinstance(self.tokens, Tensor):
            return self.tokens(groups)
        return self.tokens[:, groups], None if self.mask is None else self.mask[:, groups]


@dataclass(frozen=True)
class Outputs:
    """What a pass gives, all of it differentiable.

    Attributes:
        latents: `(b, t, m, d)` as they leave the last block.
        score: the scores' sum over slices; None where none was asked for.
        tokens: data tokens `(b, t, n, c)` as they leave each block of `Inputs.blocks`.
    """

    latents: Tensor
    score: Tensor | None
    tokens: tuple[Tensor, ...]


class Execution(ABC):
    """A way to run a trunk; every one equals `plain`, outputs and gradients, by a test."""

    @abstractmethod
    def run(self, trunk: Trunk, inputs: Inputs) -> Outputs:
        """Run all blocks of a trunk."""

    def __call__(
        self, trunk: Trunk, x: Tensor, latents: Tensor, condition: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run a trunk on data tokens `x (b, t, n, c)` and latents `(b, t, m, d)` in memory; returns both."""
        last = (len(trunk.blocks) - 1,)
        parameters = tuple(trunk.parameters())
        inputs = Inputs(x, latents, mask=mask, blocks=last, condition=condition, parameters=parameters)
        outputs = self.run(trunk, inputs)
        return outputs.tokens[0], outputs.latents


class Phases(Protocol):
    """How the two phases are run in one pass: the exchangeable parts of the loop."""

    def run_groups(self, i: int, latents: Tensor) -> Tensor:
        """The group phase of block i on all groups: latents `(b, t, m, d)` in and out. Tokens are kept by the part."""

    def exchange_latents(self, i: int, latents: Tensor) -> Tensor:
        """The global phase of block i: latents `(b, t, m, d)` of all groups in and out."""


def exchange(
    phase: Callable[..., Tensor],
    inputs: Inputs,
    latents: Tensor,
    condition: Tensor | None,
    call: Callable[..., Tensor] | None = None,
) -> Tensor:
    """A block's global phase on the latents of some inputs, `(b, t, m, d)` in and out.

    Args:
        phase: of the block.
        inputs: whose latents they are. latents: at this block. condition: that of the inputs, if there is one.
        call: how a layer is called, if not plainly.
    """
    if inputs.examples is None:
        return phase(latents, condition, inputs.places, call)
    mask = inputs.examples.mask.to(latents.device)
    return inputs.examples.joined(phase(inputs.examples.apart(latents), condition, None, call, mask))


def run_blocks(trunk: Trunk, phases: Phases, latents: Tensor) -> Tensor:
    """The loop over blocks that every way to run goes through; returns the latents `(b, t, m, d)`."""
    for i in range(len(trunk.blocks)):
        latents = phases.run_groups(i, latents)
        latents = phases.exchange_latents(i, latents)
    return latents


class InMemory:
    """Both phases on everything at once, each through `call(phase, *arguments)`; data tokens stay in memory."""

    def __init__(self, trunk: Trunk, inputs: Inputs, call: Callable[..., Any]) -> None:
        everything = slice(0, inputs.groups)
        tokens, self.mask = inputs.read(everything)
        self.x = inputs.embed(everything, tokens)
        self.trunk, self.inputs, self.call = trunk, inputs, call
        self.keys = trunk.dropout_keys(*inputs.latents.shape[:2])
        self.wanted: dict[int, Tensor] = {}

    def run_groups(self, i: int, latents: Tensor) -> Tensor:
        """As `Phases` has it."""
        phase, write_latents = self.trunk.blocks[i].group_phase, self.trunk.write_latents(latents, self.inputs.places)
        self.x, latents = self.call(phase, self.x, latents, write_latents, self.mask, self.keys)
        if i in self.inputs.blocks:
            self.wanted[i] = self.x
        return latents

    def exchange_latents(self, i: int, latents: Tensor) -> Tensor:
        """As `Phases` has it."""
        return self.call(exchange, self.trunk.blocks[i].global_phase, self.inputs, latents, self.inputs.condition)

    def run(self) -> Outputs:
        """Run all blocks."""
        inputs = self.inputs
        latents = run_blocks(self.trunk, self, inputs.latents)
        score = None if inputs.score is None else inputs.score(slice(0, inputs.groups), self.x, self.mask)
        return Outputs(latents, score, tuple(self.wanted[i] for i in inputs.blocks))
