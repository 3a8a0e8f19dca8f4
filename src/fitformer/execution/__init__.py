"""Ways to run the trunk: the same two phases and weights, differing only in what they keep and what they recompute.

Each is called `(trunk, x, latents, condition=None, mask=None) -> (x, latents)`, proved equal to `plain` by a test, and
is chosen by giving it to a role: `encoder.run = checkpointed`, or `Streamed(keep="disk")`. `total` runs a role, in any
of these ways, on `Work` that is read slice by slice.
"""

from fitformer.execution.base import Execution, Work, total
from fitformer.execution.checkpointed import checkpointed
from fitformer.execution.plain import plain
from fitformer.execution.streamed import Streamed

__all__ = ["Execution", "Streamed", "Work", "checkpointed", "plain", "total"]
