"""What can be read, and in which order.

`build_dataset(settings, split, seed)` makes a dataset of a recipe's `ImageData`, `ByteData` or `AudioData`;
`order.StepBatches` and `order.EvaluationBatches` say in which order to read it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitformer.data.build import build_dataset

__all__ = ["build_dataset"]


def __getattr__(name: str) -> Any:
    # Settings and order must be importable without waiting for torch.
    if name == "build_dataset":
        from fitformer.data.build import build_dataset

        return build_dataset
    raise AttributeError(f"module 'fitformer.data' has no attribute {name!r}")
