"""Ways to run the trunk: the same two phases and weights, differing only in what they keep and what they recompute.

Each is a function `(trunk, x, latents, condition=None) -> (x, latents)`, proved equal to `plain` by a test, and is
chosen by giving it to a role: `encoder.run = checkpointed`.
"""

from fitformer.execution.checkpointed import checkpointed
from fitformer.execution.plain import plain

__all__ = ["checkpointed", "plain"]
