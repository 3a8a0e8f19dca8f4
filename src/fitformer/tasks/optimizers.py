"""AdamW with weight decay on matrices only, linear warm-up and a cosine schedule, in plain torch."""

import math
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fitformer.config.schema import Optimizer
from fitformer.models.positions import PositionTable, SharedPositions


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of parameters: matrices, with weight decay; norms, biases, positions and embeddings, without."""
    tables = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, PositionTable | SharedPositions | nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [p for p in learned if p.ndim >= 2 and id(p) not in tables]
    rest = [p for p in learned if p.ndim < 2 or id(p) in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def rate(step: int, settings: Optimizer, steps: int) -> float:
    """Learning rate at a step as a share of the peak: linear warm-up, then cosine to `lr_end` or constant."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = min((step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1), 1.0)
    return settings.lr_end + (1 - settings.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


def build(network: nn.Module, settings: Optimizer, steps: int) -> tuple[AdamW, LambdaLR]:
    """The optimizer and its schedule over `steps` optimizer steps."""
    groups = parameter_groups(network, settings.weight_decay)
    optimizer = AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=settings.fused or None)
    return optimizer, LambdaLR(optimizer, lambda step: rate(step, settings, steps))
