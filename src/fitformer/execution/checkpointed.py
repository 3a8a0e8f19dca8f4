"""Gradient checkpointing: each phase keeps its inputs alone and is computed again in the backward pass."""

from dataclasses import dataclass
from functools import partial

from torch.utils.checkpoint import checkpoint

from fitformer.execution.base import Execution, InMemory, Inputs, Outputs, Trunk


@dataclass(frozen=True)
class Checkpointed(Execution):
    """Run the trunk, recomputing each phase in the backward pass under the same random state."""

    def run(self, trunk: Trunk, inputs: Inputs) -> Outputs:
        """As `Execution.run`."""
        return InMemory(trunk, inputs, partial(checkpoint, use_reentrant=False)).run()


checkpointed = Checkpointed()
