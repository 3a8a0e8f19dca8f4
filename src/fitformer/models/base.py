"""What all models have in common: a trunk, a way to run it, and folders to be saved in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fitformer.errors import InputError
from fitformer.execution import Execution, Inputs, Outputs, Streamed, checkpointed, plain
from fitformer.models.adapt import Grid
from fitformer.models.pretrained import Pretrained
from fitformer.models.trunk import Trunk

EXECUTIONS: dict[str, Execution] = {"plain": plain, "checkpointed": checkpointed, "streamed": Streamed()}


class FITModel(Pretrained, nn.Module):
    """A model around a trunk. Models of images hold one of grouped tokens, and are one themselves."""

    trunk: Trunk
    execution: Execution = plain
    # Channels of an image, of those models that know images.
    channels: int | None = None
    # Names of the tensors that belong to the classes, and are new where there are other classes.
    class_weights: tuple[str, ...] = ()

    def set_execution(self, execution: str | Execution) -> None:
        """Choose how the trunk is run: `"plain"`, `"checkpointed"`, `"streamed"`, or an `Execution` with its options.

        Results and gradients stay the same, save for rounding.

        Raises:
            InputError: neither of these.
        """
        if isinstance(execution, str) and execution in EXECUTIONS:
            execution = EXECUTIONS[execution]
        if not isinstance(execution, Execution):
            raise InputError(f"{execution!r} is no way to run a trunk; there are {', '.join(EXECUTIONS)}")
        for module in self.modules():
            if isinstance(module, FITModel):
                module.execution = execution

    def execute(self, inputs: Inputs) -> Outputs:
        """Run the trunk on inputs, in the way that was chosen."""
        return self.execution.run(self.trunk, inputs)

    def grids(self) -> tuple[Grid, Grid | None]:
        """Rows and columns of the tokens of a group, and of the groups; a sequence is one row. None for any groups."""
        groups = getattr(self, "num_groups", None)
        return (1, self.trunk.tokens_per_group), None if groups is None else (1, groups)

    def last_block(self) -> Sequence[int]:
        """The number of the last block, whose data tokens are the trunk's: what `Inputs.blocks` takes."""
        return (len(self.trunk.blocks) - 1,)

    def all_parameters(self, *more: Any) -> tuple[Any, ...]:
        """The parameters, and further tensors with gradients: what `Inputs.parameters` takes."""
        return *self.parameters(), *(tensor for tensor in more if tensor is not None)


def check_classes(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no classes `(b,)`, -1 for none.

    Raises:
        InputError: labels that are no whole numbers `(b,)`, or, on a CPU, one that is no class.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise InputError(f"classes are {labels.dtype} {tuple(labels.shape)}; give whole numbers (b,), -1 for none")
    # Elsewhere the host would have to wait for the device.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels < -1) | (labels >= classes)]
        if len(wrong):
            raise InputError(f"class {int(wrong[0])} is out of range: classes are 0 to {classes - 1}, -1 for none")
