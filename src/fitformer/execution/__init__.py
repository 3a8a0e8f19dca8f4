"""Ways to run a trunk: the same two phases and weights, differing only in what they keep and what they recompute.

A model is told which one by `model.set_execution(checkpointed)` or `model.set_execution(Streamed(keep="disk"))`; every
one is proved equal to `plain` by a test. `base` has the one loop over blocks and what a new way to run implements.
"""

from fitformer.execution.base import Execution, Inputs, Outputs
from fitformer.execution.checkpointed import checkpointed
from fitformer.execution.plain import plain
from fitformer.execution.streamed import Streamed

__all__ = ["Execution", "Inputs", "Outputs", "Streamed", "checkpointed", "plain"]
