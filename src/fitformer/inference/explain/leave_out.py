"""What each group of an image adds to the decision, measured: the model's answer with it less its answer without it.

A group that is left out is absent, as one that is skipped: no token, no latent, no place in a mean. So each value is
the difference of two plain runs, no derivative, and holds where a classifier is sure.

The embedding and the first group phase (the local layers before the first global ones, and their read) never mix
groups. They run once, their data tokens are kept where the execution keeps its own, and every run without a group
begins behind them. From the first global layers on everything depends on which group is absent and runs again. So a
trunk of one block repeats its global layers alone, and one without global layers repeats nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fitformer.errors import InputError
from fitformer.execution import Inputs, Outputs, Streamed
from fitformer.execution.base import SomeBlocks
from fitformer.execution.streamed import default_slice
from fitformer.execution.token_store import TokenStore, make_stores
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.trunk import Block
from fitformer.patching.any_size import GroupedImage, PixelSource
from fitformer.tasks.answers import Decide, of_likeliest

Tell = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What each group of an image adds to the decision.

    Attributes:
        logits: `(classes,)` of the whole image.
        added: `(t,)` the explained quantity, such as the log-odds of the likeliest class, with all groups less the
            same without this one; NaN for glimpses, which stand for no part of the image, and where no other group is.
        image: the groups.
    """

    logits: Tensor
    added: Tensor
    image: GroupedImage

    @property
    def values(self) -> Tensor:
        """The same as a map `(t, n)`: every patch has the value of its group."""
        return self.added[:, None].expand(-1, self.image.patch_grid.tokens_per_group)


def leave_out(
    classifier: FITImageEncoder,
    image: Tensor | PixelSource | GroupedImage,
    tell: Tell | None = None,
    decide: Decide = of_likeliest,
) -> LeftOut:
    """Run a classifier on an image, and on the image without each of its groups.

    Args:
        classifier: in eval mode; `set_execution` says how it runs.
        image: one image, float `(H, W, channels)` or read lazily.
        tell: called now and then with the share of the work that is done, from 0 to 1.
        decide: the quantity that is explained; by default the log-odds of the likeliest class.

    Raises:
        InputError: an image that the classifier was not built for, or a classifier without a head.
    """
    grouped = classifier.grouped(image)
    with after_first_phase(classifier, grouped, decide) as later:
        logits = later.logits([None])[0]
        added = torch.full((grouped.num_groups,), float("nan"))
        groups = range(grouped.glimpses, grouped.num_groups)
        added[grouped.glimpses :] = later.added(logits, groups, tell)
    return LeftOut(logits.float().cpu(), added, grouped)


@contextmanager
def after_first_phase(
    classifier: FITImageEncoder, image: GroupedImage, decide: Decide = of_likeliest
) -> Iterator["AfterFirstPhase"]:
    """Run the first group phase on an image; within this context the rest runs with or without any of its groups.

    Raises:
        InputError: a classifier without a head, or an image that it was not built for.
    """
    if classifier.head is None:
        raise InputError("this encoder has no head, so it decides nothing; build it with num_classes")
    later = AfterFirstPhase(classifier, image, decide)
    try:
        yield later
    finally:
        later.close()


class AfterFirstPhase:
    """A classifier on an image after the first group phase; see `after_first_phase`.

    Args:
        classifier: with a head, in eval mode.
        image: groups that it was built for.
        decide: the quantity that is explained.
    """

    def __init__(self, classifier: FITImageEncoder, image: GroupedImage, decide: Decide = of_likeliest) -> None:
        self.classifier, self.image, self.decide = classifier, image, decide
        self.first, *self.rest = classifier.trunk.blocks
        self.mask = image.mask(slice(None))
        whole = torch.ones(image.num_groups, image.patch_grid.tokens_per_group, dtype=torch.bool)
        self.counts = (whole if self.mask is None else self.mask[0]).sum(1)
        self.inputs = classifier.inputs([image])
        self.store: TokenStore | None = None
        self.scores: list[Tensor] = []
        phase = SomeBlocks(classifier.trunk, [_GroupPhase(self.first)])
        with torch.no_grad():
            outputs = classifier.encoder.execution.run(phase, replace(self.inputs, score=self._leave))
        self.latents = outputs.latents

    def close(self) -> None:
        """Release the space of the data tokens."""
        if self.store is not None:
            self.store.close()

    def added(self, logits: Tensor, groups: Sequence[int], tell: Tell | None = None) -> Tensor:
        """What each of these groups adds to the explained quantity, `(groups,)` float32.

        Args:
            logits: `(classes,)` of the whole image.
            groups: their numbers, glimpses counted.
            tell: called with the share of the work that is done, from 0 to 1.
        """
        found: list[Tensor] = []
        if self.image.num_groups == 1:
            return torch.full((len(groups),), float("nan"))
        for k in range(0, len(groups), self._together):
            part = groups[k : k + self._together]
            found.append(self.decide(self.logits(part).double(), logits).cpu())
            if tell is not None:
                tell((k + len(part)) / len(groups))
        if not found:
            return torch.zeros(0)
        return (self.decide(logits.double(), logits).cpu() - torch.cat(found)).float()

    @torch.no_grad()
    def logits(self, left_out: Sequence[int | None]) -> Tensor:
        """Logits `(v, classes)` of the image without a group, for each of several, or with all for None alone."""
        everything = torch.arange(self.image.num_groups)
        kept = torch.stack([everything[everything != (-1 if group is None else group)] for group in left_out])
        here = kept.to(self.latents.device)
        latents = self.first.global_phase(self.latents[0][here], places=self._places(here))
        counts = self.counts[kept].sum(1).tolist()
        if self.rest:
            inputs = self._inputs(kept, latents)
            rest = SomeBlocks(self.classifier.trunk, self.rest)
            outputs = self.classifier.encoder.execution.run(rest, inputs)
        else:
            outputs = Outputs(latents, self._score(left_out), ())
        assert self.classifier.head is not None
        return self.classifier.head(self.classifier.pool_outputs(outputs, counts))

    @property
    def _together(self) -> int:
        """How many groups are left out at once, each from a row of the batch: as many as one slice may hold tokens."""
        # Without later blocks no data tokens are read again.
        tokens = self.image.patch_grid.tokens_per_group if self.rest else self.classifier.trunk.latents_per_group
        return default_slice(self.latents.device.type, tokens, self.image.num_groups)

    def _leave(self, groups: slice, x: Tensor, mask: Tensor | None) -> Tensor:
        """Keep of the data tokens `x (1, s, n, c)` that leave the first block what the rest asks for."""
        if self.rest:
            if self.store is None:
                self.store = self._make_store(x)
            self.store.put(groups, x)
        elif self.inputs.score is not None:
            for k in range(x.shape[1]):
                held = None if mask is None else mask[:, k : k + 1]
                one = slice(groups.start + k, groups.start + k + 1)
                self.scores.append(self.inputs.score(one, x[:, k : k + 1], held))
        return x.new_zeros(())

    def _make_store(self, x: Tensor) -> TokenStore:
        """Space for the data tokens of all groups, where the execution keeps its own and as precisely."""
        way = self.classifier.encoder.execution
        options = way if isinstance(way, Streamed) else Streamed()
        dtype = torch.bfloat16 if options.precision == "bf16" else x.dtype
        folder = None if options.folder is None else Path(options.folder)
        shape = (1, self.image.num_groups, *x.shape[2:])
        return make_stores(1, options.keep, shape, dtype, x, folder)[0]

    def _inputs(self, kept: Tensor, latents: Tensor) -> Inputs:
        """What the blocks after the first take: the data tokens of the groups `kept (v, t')`, for each row its own."""

        def read(groups: slice) -> tuple[Tensor, Tensor | None]:
            rows = [self._tokens(row[groups]) for row in kept]
            # Not copied where one is left out at a time, of large images.
            tokens = torch.cat(rows) if len(rows) > 1 else rows[0]
            mask = None if self.mask is None else self.mask[0][kept[:, groups]]
            return tokens, None if mask is None or bool(mask.all()) else mask.to(tokens.device)

        places = self._places(kept.to(latents.device))
        return Inputs(read, latents, score=self.inputs.score, parameters=self.inputs.parameters, places=places)

    def _places(self, kept: Tensor) -> Tensor | None:
        """Where the groups `kept (v, t')` stand among all, where the trunk's attention asks for it."""
        return kept if self.classifier.trunk.config.rotary else None

    def _tokens(self, groups: Tensor) -> Tensor:
        """Data tokens `(1, s, n, c)` of groups in ascending order, at most one of them missing in between."""
        assert self.store is not None
        first, last = int(groups[0]), int(groups[-1]) + 1
        if last - first == len(groups):
            return self.store.get(slice(first, last))
        gap = int((groups - first == torch.arange(len(groups))).sum())
        pieces = slice(first, first + gap), slice(first + gap + 1, last)
        return torch.cat([self.store.get(piece) for piece in pieces], dim=1)

    def _score(self, left_out: Sequence[int | None]) -> Tensor | None:
        """The score of all groups but one, `(v, c)`, of a trunk without global layers."""
        if not self.scores:
            return None
        each = torch.cat(self.scores).double()
        return torch.stack([each.sum(0) - (0 if k is None else each[k]) for k in left_out]).to(self.scores[0].dtype)


@dataclass(frozen=True)
class _GroupPhase:
    """A block that ends before its global phase."""

    block: Block

    @property
    def group_phase(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self.block.group_phase

    def global_phase(self, latents: Tensor, *_: object) -> Tensor:
        return latents
