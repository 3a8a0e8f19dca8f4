"""Attention of the latents and relevance for the decision, one value a patch each, under any execution.

Both are computed slice by slice, so that two values a patch are all that is kept: a hook on each read computes its
attention weights again, and a hook on the embedded tokens takes the gradient of the decision in the backward pass.

The decision is the log-odds of the label: a function of the probabilities alone, which does not saturate where a
classifier is sure. Relevance compares a patch with the image's average patch, so that a constant offset that all
patches share counts neither for the label nor against it. The gradient is taken at the image faded a little towards its
average: where a classifier is sure, its inner layers saturate, and the gradient at the image itself is almost zero.
The sign of what remains can still be wrong there: `leave_out` measures, `agreement` compares.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fitformer.errors import InputError
from fitformer.execution import Inputs
from fitformer.inference.explain.leave_out import Tell
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.layers import CrossLayer
from fitformer.patching.any_size import GroupedImage, PixelSource
from fitformer.tasks.answers import Decide, of_likeliest

# How much of its difference from the average patch each patch keeps where the gradient is taken (docs/log.md).
CONTRAST = 0.85

PASSES = 4
"""Forward passes that `attribute` takes the time of: one for the attention, one on the faded image, and two backward
through it, for what is streamed is computed again. Where all activations are kept, backward takes one."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attention and relevance of a classifier on an image.

    Attributes:
        logits: `(classes,)`.
        attention: `(t, n)`: read attention of a patch over that of uniform attention in its group, a mean over latents,
            heads and blocks; in each group these values average 1.
        relevance: `(t, n)`: what each patch, in place of the image's average patch, adds to the explained quantity,
            such as the log-odds of the likeliest class, to first order: gradient at the faded image times (embedded
            patch minus the average one).
        image: the groups.
    """

    logits: Tensor
    attention: Tensor
    relevance: Tensor
    image: GroupedImage


def attribute(
    classifier: FITImageEncoder,
    image: Tensor | PixelSource | GroupedImage,
    tell: Tell | None = None,
    decide: Decide = of_likeliest,
) -> Attribution:
    """Classify an image, with the attention to its patches and their relevance for the decision.

    Args:
        classifier: in eval mode; `set_execution` says how it runs.
        image: one image, float `(H, W, channels)` or read lazily.
        tell: called now and then with the share of the work that is done, from 0 to 1.
        decide: the quantity that is explained; by default the log-odds of the likeliest class.

    Raises:
        InputError: an image that the classifier was not built for, or one without a head or a block that reads.
    """
    grouped = _grouped(classifier, image)
    inputs = classifier.inputs([grouped])
    relevance = torch.zeros(inputs.groups, classifier.patch_grid.tokens_per_group)
    gate = torch.ones(1, device=inputs.latents.device, requires_grad=True)
    average = _Average(grouped, classifier.trunk.position)
    with _frozen(classifier), _read_attention(classifier, inputs.groups, _of_passes(tell)) as attention:
        with torch.no_grad():
            logits = _logits(classifier, grouped, _averaging(inputs, average))
        with torch.enable_grad():
            faded = _logits(classifier, grouped, _noting(inputs, average, gate, relevance))
            torch.autograd.grad(decide(faded, logits), gate)
    if tell is not None:
        tell(1.0)
    return Attribution(logits.detach().float().cpu(), attention, relevance, grouped)


def attend(
    classifier: FITImageEncoder, image: Tensor | PixelSource | GroupedImage, tell: Tell | None = None
) -> tuple[Tensor, Tensor]:
    """Logits `(classes,)` of an image and the attention to its patches `(t, n)`, as `attribute` has them, in one pass.

    Raises:
        InputError: as in `attribute`.
    """
    grouped = _grouped(classifier, image)
    with torch.no_grad(), _read_attention(classifier, grouped.num_groups, tell) as attention:
        logits = _logits(classifier, grouped, classifier.inputs([grouped]))
    return logits.float().cpu(), attention


def _grouped(classifier: FITImageEncoder, image: Tensor | PixelSource | GroupedImage) -> GroupedImage:
    """An image as groups of a classifier with a head."""
    if classifier.head is None:
        raise InputError("this encoder has no head, so it decides nothing; build it with num_classes")
    return classifier.grouped(image)


def _of_passes(tell: Tell | None) -> Tell | None:
    """Tells how many passes are done as a share of `PASSES`: one that is computed again backward counts twice."""
    return None if tell is None else lambda passes: tell(min(1.0, (passes + max(0.0, passes - 2)) / PASSES))


def _logits(classifier: FITImageEncoder, image: GroupedImage, inputs: Inputs) -> Tensor:
    """Logits `(classes,)` of a pass on an image."""
    assert classifier.head is not None
    return classifier.head(classifier.pool([image], inputs))[0]


class _Average:
    """The average patch of an image, embedded, without its position; glimpses and padding are not counted."""

    def __init__(self, image: GroupedImage, position: Callable[[], Tensor]) -> None:
        self.image, self.position = image, position
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, groups: slice, x: Tensor) -> None:
        """Count in the embedded patches `x (1, s, n, c)` of a slice."""
        mask, glimpses = self.image.mask(groups), max(0, self.image.glimpses - groups.start)
        held = torch.ones(x.shape[:3], dtype=torch.bool) if mask is None else mask.clone()
        held[:, :glimpses] = False
        patches = (x - self.position()) * held[..., None].to(x.device)
        self.total = self.total + patches.sum(dim=(0, 1, 2)).cpu().double()
        self.count += int(held.sum())

    def less(self, x: Tensor) -> Tensor:
        """How embedded patches `x (1, s, n, c)` differ from the average one in their places."""
        return x - self.position() - torch.as_tensor(self.total / self.count).to(x)


def _averaging(inputs: Inputs, average: _Average) -> Inputs:
    """The same inputs; `average` counts each embedded patch."""
    plainly = inputs.embed

    def embed(groups: slice, tokens: Tensor) -> Tensor:
        x = plainly(groups, tokens)
        average.add(groups, x)
        return x

    return replace(inputs, embed=embed)


def _noting(inputs: Inputs, average: _Average, gate: Tensor, relevance: Tensor) -> Inputs:
    """Inputs of the faded image; the backward pass writes the relevance of each patch into `relevance (t, n)`.

    `gate`, a one that all tokens are multiplied with, makes every execution compute these gradients, and no others
    where the parameters are frozen.
    """
    plainly = inputs.embed

    def embed(groups: slice, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            x = plainly(groups, tokens)
            difference = average.less(x)
        # Not a hook that holds the tensor it hangs on: that would keep it alive in a cycle.
        faded = (x - (1 - CONTRAST) * difference) * gate
        if faded.requires_grad:
            faded.register_hook(lambda gradient: _note(relevance, groups, (gradient * difference).sum(-1)))
        return faded

    return replace(inputs, embed=embed, parameters=(*inputs.parameters, gate))


def _note(relevance: Tensor, groups: slice, values: Tensor) -> None:
    relevance[groups] = values[0].float().cpu()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within this context no parameter requires a gradient."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _read_attention(classifier: FITImageEncoder, groups: int, tell: Tell | None) -> Iterator[Tensor]:
    """Attention of the latents within this context, `(t, n)`, filled as the encoder's reads run over one image.

    `tell` is called with the number of passes, and parts of one, that the reads have made.

    Raises:
        InputError: no block reads.
    """
    reads = [read for block in classifier.trunk.blocks if isinstance(read := block.read, CrossLayer)]
    if not reads:
        raise InputError("no block of this encoder has global layers, so its latents read nothing; leave groups out")
    attention = torch.zeros(groups, classifier.patch_grid.tokens_per_group)
    done: dict[nn.Module, int] = dict.fromkeys(reads, 0)

    def note(read: Any, inputs: tuple[Any, ...]) -> None:
        # Groups pass each read in order; what follows the last group is the faded image, forward and backward.
        first, count = done[read], len(inputs[0])
        done[read] += count
        if first < groups:
            attention[first : first + count] += (_relative_attention(read, *inputs) / len(reads)).cpu()
        if tell is not None:
            tell(sum(done.values()) / (groups * len(reads)))

    hooks = [read.register_forward_pre_hook(note) for read in reads]
    for block in classifier.trunk.blocks:
        block.runs_absent = True
    try:
        yield attention
    finally:
        for hook in hooks:
            hook.remove()
        for block in classifier.trunk.blocks:
            block.runs_absent = False


@torch.no_grad()
def _relative_attention(read: CrossLayer, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention `(s, n)` of a read over that of uniform attention to the tokens that hold pixels."""
    weights = read.weights(x, context, mask).float().mean(dim=(1, 2))
    held = weights.shape[-1] if mask is None else mask.flatten(1).sum(dim=1, keepdim=True)
    return weights * held
