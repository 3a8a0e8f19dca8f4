"""AdamW and Muon with weight decay on matrices only, linear warm-up and a cosine schedule, in plain torch."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from fitformer.config.schema import Optimizer
from fitformer.errors import InputError
from fitformer.models.layers import Attention, FeedForward
from fitformer.models.positions import PositionTable, SharedPositions


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982, section 2) for hidden matrices and AdamW for all else, with one learning rate.

    Muon's updates are as large as AdamW's usually are. The two are torch's; they share the groups and the state of this
    one, the first group being Muon's, so that schedules and checkpoints see a single optimizer.
    """

    def __init__(self, hidden: dict[str, Any], rest: list[dict[str, Any]], settings: Optimizer) -> None:
        """Of groups of parameters with their weight decay: hidden matrices, and the others."""
        self._muon = Muon([hidden], lr=settings.lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = adamw(rest, settings)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer of torch does."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """One step of both; the loss of the closure, if there is one."""
        loss = self._muon.step(closure)
        self._adamw.step()
        return loss


def hidden_matrices(network: nn.Module) -> list[torch.Tensor]:
    """The matrices within attention and feed-forwards that are learned: neither of the input nor of the answer."""
    inside = (module for module in network.modules() if isinstance(module, Attention | FeedForward))
    linears = (module for layer in inside for module in layer.modules() if isinstance(module, nn.Linear))
    return [linear.weight for linear in linears if linear.weight.requires_grad]


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


def adamw(groups: list[dict[str, Any]], settings: Optimizer) -> AdamW:
    """AdamW of groups of parameters."""
    return AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=settings.fused or None)


def optimizer_of(network: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of a network's parameters.

    Raises:
        InputError: Muon for a network without a matrix that it could learn.
    """
    groups = parameter_groups(network, settings.weight_decay)
    if settings.name == "adamw":
        return adamw(groups, settings)
    hidden = hidden_matrices(network)
    if not hidden:
        raise InputError("no matrix of attention or a feed-forward is learned; optimizer.name=adamw trains what is")
    those = {id(parameter) for parameter in hidden}
    groups[0]["params"] = [parameter for parameter in groups[0]["params"] if id(parameter) not in those]
    rest = [group for group in groups if group["params"]]
    return MuonAndAdamW({"params": hidden, "weight_decay": settings.weight_decay}, rest, settings)


def build(network: nn.Module, settings: Optimizer, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer and its schedule over `steps` optimizer steps.

    Raises:
        InputError: Muon for a network without a matrix that it could learn.
    """
    optimizer = optimizer_of(network, settings)
    return optimizer, LambdaLR(optimizer, lambda step: rate(step, settings, steps))
