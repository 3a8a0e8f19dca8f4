"""The plain way: every phase on everything, all activations kept. The oracle for all the others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fitformer.execution.base import Execution, InMemory, Inputs, Outputs, Trunk


@dataclass(frozen=True)
class Plain(Execution):
    """Run the trunk as it is written."""

    def run(self, trunk: Trunk, inputs: Inputs) -> Outputs:
        """As `Execution.run`."""
        return InMemory(trunk, inputs, _call).run()


def _call(phase: Callable[..., Any], *arguments: Any) -> Any:
    return phase(*arguments)


plain = Plain()
