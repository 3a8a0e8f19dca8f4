"""What can be read, and in which order.

`build(settings, split, seed)` makes a dataset of a recipe's `settings.ImageData` or `settings.ByteData`;
`order.StepBatches` and `order.EvaluationBatches` say in which order to read it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitformer.data.building import build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    # Settings and order must be importable without waiting for torch.
    if name == "build":
        from fitformer.data.building import build

        return build
    raise AttributeError(f"module 'fitformer.data' has no attribute {name!r}")
