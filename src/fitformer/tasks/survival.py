"""Survival: when an event happens, learned from observations that may end before it.

`hazard` is the likelihood of discrete time: the probability that the event comes in an interval, given that it did not
before. Each example counts by itself, so slides of any size are learned one at a time. `cox` compares the examples of a
batch with each other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer.config.schema import SurvivalRecipe
from fitformer.errors import InputError
from fitformer.models.heads import HazardsHead
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.tasks.answers import Answers, RiskAnswers
from fitformer.tasks.batch import Batch
from fitformer.tasks.concordance import concordance_index, cox_loss
from fitformer.tasks.image_outputs import build_encoder, finite_outputs, outputs
from fitformer.tasks.registry import TaskSpec


def build(recipe: SurvivalRecipe, dataset: Any) -> FITImageEncoder:
    """An image encoder with a logit for the hazard of each interval of time, or one for Cox's relative hazard.

    The intervals end at quantiles of the times of the dataset's events, so that as many are in each.

    Raises:
        InputError: no event, none after time 0, batches of one example for `cox`, or what `build_encoder` refuses.
    """
    time, event = np.asarray(dataset.source.labels, dtype=np.float64).T
    if not (event * time).any():
        raise InputError(
            f"none of the {len(time)} examples to train on has an event after time 0; take another data.split_seed, or "
            "more examples"
        )
    if recipe.objective.loss == "cox":
        if recipe.trainer.batch_size == 1:
            raise InputError(
                "objective.loss is cox, which compares the examples of a batch with each other, and trainer.batch_size "
                "is 1: raise it to 8, say, or take objective.loss=hazard, in which each example counts by itself"
            )
        return build_encoder(recipe, dataset, 1)
    shares = np.arange(1, recipe.objective.intervals) / recipe.objective.intervals
    cuts = np.unique(np.quantile(time[event > 0], shares).astype(np.float32))
    cuts = cuts[cuts > 0] if cuts[-1] > 0 else time[event > 0].max(keepdims=True).astype(np.float32)
    network = build_encoder(recipe, dataset, len(cuts) + 1, "hazards")
    assert isinstance(network.head, HazardsHead)
    network.head.cuts.copy_(torch.from_numpy(cuts))
    return network


def hazard_loss(hazards: Tensor, cuts: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative log-likelihood of discrete time in nats, a mean over examples.

    An example tells of every interval that it survived, and of the one of its event that it did not. An observation
    that ended within an interval says nothing of it.

    Args:
        hazards: logits `(b, k)`. cuts: `(k - 1,)`. time, event: `(b,)`.
    """
    # An event at a cut is in the interval before it; who was observed up to a cut has survived that interval.
    happened = torch.searchsorted(cuts, time.contiguous())
    survived = torch.where(event > 0, happened, torch.searchsorted(cuts, time.contiguous(), right=True))
    interval = torch.arange(hazards.shape[1], device=hazards.device)
    alive = interval < survived[:, None]
    ends = (interval == survived[:, None]) & (event > 0)[:, None]
    each = F.binary_cross_entropy_with_logits(hazards, ends.to(hazards), reduction="none")
    return (each * (alive | ends)).sum(1).mean()


def _error(network: FITImageEncoder, predicted: Tensor, labels: Tensor) -> Tensor:
    time, event = labels.unbind(1)
    if isinstance(network.head, HazardsHead):
        return hazard_loss(predicted, network.head.cuts.to(predicted), time, event)
    return cox_loss(predicted[:, 0], time, event)


def loss(network: FITImageEncoder, batch: Batch, recipe: SurvivalRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative logarithm of the likelihood of discrete time, or of Cox's partial likelihood of the batch.

    Raises:
        InputError: the outputs for images of any size are NaN or infinite (names the images).
    """
    return _error(network, *finite_outputs(network, batch)), {}


def scores(
    network: FITImageEncoder, predicted: Tensor, labels: Tensor, recipe: SurvivalRecipe
) -> Iterator[tuple[str, Any]]:
    """The loss, of Cox's likelihood over all examples; the concordance index; how many events there are."""
    yield "loss", float(_error(network, predicted, labels))
    risks = answers(network, recipe, ()).quantity(predicted, 0)
    yield "concordance", concordance_index(risks, *labels.unbind(1))
    yield "events", int(labels[:, 1].sum())


def answers(network: FITImageEncoder, recipe: SurvivalRecipe, classes: Sequence[str]) -> Answers:
    """The risk, and with hazards the probability of surviving each cut."""
    return RiskAnswers(network.head.cuts if isinstance(network.head, HazardsHead) else None)


TASK = TaskSpec(
    recipe=SurvivalRecipe,
    model=FITImageEncoder,
    build=build,
    loss=loss,
    measure=None,
    outputs=outputs,
    scores=scores,
    monitor=("val/concordance", "max"),
    answers=answers,
    verb="predict",
    # One of the encoder's two final norms is unused.
    find_unused_parameters=True,
)
