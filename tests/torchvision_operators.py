"""A pytest plugin that lets torchvision be imported where its compiled part does not load.

Package indexes hold torchvision as it is compiled for a torch with CUDA. Beside a torch for the CPU that part does not
load, and the import ends where two of its operators are described. Declaring them is enough: nothing here calls them.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
