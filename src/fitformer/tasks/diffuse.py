"""Diffusion of images: learn the noise, sample by taking it away (`fitformer.diffusion` has the equations)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer import diffusion
from fitformer.config.schema import DiffuseRecipe
from fitformer.errors import InputError
from fitformer.execution import Work, total
from fitformer.models.denoiser import FITDenoiser
from fitformer.patching import ImageGroups
from fitformer.tasks.batch import Batch, arguments, need_classes, need_no_levels, one_size
from fitformer.tasks.preview import Preview
from fitformer.tasks.registry import TaskSpec

_GOLDEN = 0.6180339887498949


def build(recipe: DiffuseRecipe, dataset: Any) -> FITDenoiser:
    """A denoiser of the dataset's images, told their classes if the recipe is class-conditional.

    Raises:
        InputError: no classes where they are asked for, sizes that do not divide, an unknown schedule.
    """
    need_no_levels(recipe)
    for schedule in (recipe.objective.train_schedule, recipe.objective.sample_schedule):
        diffusion.gamma(schedule, 0.5)
    cut = groups(recipe, dataset.channels)
    return FITDenoiser.from_preset(
        recipe.model.preset,
        num_groups=cut.num_groups,
        tokens_per_group=cut.tokens_per_group,
        out_dim=cut.token_dim,
        cond_dim=need_classes(dataset, "class_conditional") if recipe.objective.class_conditional else None,
        self_cond="none" if recipe.objective.self_cond == "none" else "latent",
        **arguments(recipe.model, "group_size", "patch_size"),
    )


def groups(recipe: DiffuseRecipe, channels: int) -> ImageGroups:
    """How images are cut for the denoiser."""
    return ImageGroups(one_size(recipe), recipe.model.group_size, recipe.model.patch_size, channels)


def loss(network: FITDenoiser, batch: Batch, recipe: DiffuseRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error at noise levels drawn evenly over time, from torch's own generator."""
    t = torch.rand(len(batch["image"]), device=batch["image"].device)
    return _error(network, batch, recipe, t, torch.randn_like), {}


def measure(network: FITDenoiser, batch: Batch, recipe: DiffuseRecipe) -> tuple[dict[str, Tensor], int]:
    """The same error with a noise and a noise level that belong to the example, so that two measurements compare.

    Conditions are not dropped, and latents of a first pass are given to every example of a self-conditioned model.
    """
    index = batch["index"]
    # Multiples of the golden section modulo 1 fill [0, 1] evenly however many examples there are.
    t = ((index.double() + 0.5) * _GOLDEN % 1).float()
    seed = recipe.trainer.seed

    def noise(x: Tensor) -> Tensor:
        return diffusion.seeded_noise(seed, index.tolist(), x.shape[1:]).to(x)

    return {"loss": _error(network, batch, recipe, t, noise, training=False)}, len(index)


def _error(
    network: FITDenoiser,
    batch: Batch,
    recipe: DiffuseRecipe,
    t: Tensor,
    noise: Callable[[Tensor], Tensor],
    training: bool = True,
) -> Tensor:
    objective = recipe.objective
    x0 = groups(recipe, batch["image"].shape[-1]).group(diffusion.pixels_to_signal(batch["image"], objective.b_scale))
    gamma, eps = diffusion.gamma(objective.train_schedule, t), noise(x0)
    xt = diffusion.add_noise(x0, gamma, eps)
    seen = diffusion.normalize(xt) if objective.normalize_input else xt
    cond = None
    if network.cond_dim is not None:
        cond = one_hot(batch["label"], network.cond_dim)
        cond = diffusion.drop_condition(cond, objective.condition_dropout) if training else cond
    earlier = _earlier_latents(network, recipe, seen, gamma, cond, training)
    batch_size, groups_in_all = x0.shape[:2]

    def share(groups: slice, output: Tensor, _: Tensor | None) -> Tensor:
        # A slice's part of the mean over all groups; its prediction is gone before the next one's is there.
        noisy, clean, drawn = (each[:, groups] for each in (xt, x0, eps))
        options: dict[str, Any] = {"on": objective.loss_on, "b_scale": objective.b_scale}
        mean = diffusion.loss(objective.prediction, output.float(), noisy, clean, drawn, gamma, **options)
        return mean * (output.shape[1] / groups_in_all)

    work = Work(
        groups=groups_in_all,
        latents=network.initial_latents(batch_size, groups_in_all, earlier),
        read=lambda groups: (seen[:, groups], None),
        score=share,
        condition=network.condition(batch_size, gamma, cond),
    )
    added, _ = total(network, work)
    assert added is not None
    return added


def _earlier_latents(
    network: FITDenoiser, recipe: DiffuseRecipe, x: Tensor, gamma: Tensor, cond: Tensor | None, training: bool
) -> Tensor | None:
    kind, rate = recipe.objective.self_cond, recipe.objective.self_cond_rate
    if kind == "none":
        return None
    if not training:
        return diffusion.self_condition_half(network, x, gamma, cond, rate=1.0)
    by = diffusion.self_condition_half if kind == "half" else diffusion.self_condition_masked
    return by(network, x, gamma, cond, rate=rate)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Condition `(b, classes)` of labels `(b,)`: one-hot, and zeros (no condition) where the label is -1."""
    return F.one_hot(labels.clamp_min(0), classes).float() * (labels >= 0)[:, None]


def sample_images(
    network: FITDenoiser,
    recipe: DiffuseRecipe,
    labels: Sequence[int] | None,
    count: int,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 64,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw images, uint8 `(count, H, W, ch)` on the CPU. Image k depends on (seed, first + k) and its class alone.

    Args:
        network: the denoiser; runs where its weights are.
        recipe: gives the cut, the scale, and what the other arguments leave at None.
        labels: class of each image, -1 for none; None goes through the classes in turn, or is no class at all if
            the model knows none.
        count: how many.
        steps, sampler, guidance: see `diffusion.sample`.
        seed: of the noise. first: number of the first image. batch_size: how many at once.
        on_step: called with each step's number and predicted tokens.

    Raises:
        InputError: a class out of range, classes for a model that knows none, guidance where it was not learned.
    """
    labels = _check_labels(network, labels, count, first)
    if guidance and not recipe.objective.condition_dropout:
        raise InputError(
            f"guidance {guidance:g} needs a model that also learned to do without its condition, and this one was "
            "trained with condition_dropout 0"
        )
    device = next(network.parameters()).device
    parts = []
    for start in range(0, count, batch_size):
        numbers = range(first + start, first + min(start + batch_size, count))
        label = None if labels is None else torch.tensor(labels[start : start + len(numbers)], device=device)
        parts.append(_sample(network, recipe, label, list(numbers), steps, sampler, guidance, seed, on_step))
    return torch.cat(parts)


def _sample(
    network: FITDenoiser,
    recipe: DiffuseRecipe,
    label: Tensor | None,
    numbers: list[int],
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
    seed: int,
    on_step: Callable[[int, Tensor], None] | None,
) -> Tensor:
    objective, device = recipe.objective, next(network.parameters()).device
    assert network.num_groups is not None  # training builds a table
    shape = (network.num_groups, network.tokens_per_group, network.output.out_features)
    noise = partial(diffusion.seeded_noise, seed, numbers, shape)
    tokens = diffusion.sample(
        network,
        noise().to(device),
        objective.sample_steps if steps is None else steps,
        schedule=objective.sample_schedule,
        sampler=objective.sampler if sampler is None else sampler,
        prediction=objective.prediction,
        guidance=objective.guidance if guidance is None else guidance,
        clip=(-objective.b_scale, objective.b_scale),
        cond=None if label is None else one_hot(label, network.cond_dim or 0),
        self_cond=objective.self_cond != "none",
        noise=lambda k: noise(k + 1),
        normalize_input=objective.normalize_input,
        on_step=on_step,
    )
    cut = groups(recipe, _channels(network, recipe))
    return diffusion.signal_to_pixels(cut.ungroup(tokens), objective.b_scale).cpu()


def _channels(network: FITDenoiser, recipe: DiffuseRecipe) -> int:
    return network.output.out_features // groups(recipe, 1).token_dim


def _check_labels(network: FITDenoiser, labels: Sequence[int] | None, count: int, first: int) -> Sequence[int] | None:
    classes = network.cond_dim
    if classes is None:
        if labels is not None:
            raise InputError("the model was trained without classes and cannot draw one; leave the classes out")
        return None
    labels = [(first + k) % classes for k in range(count)] if labels is None else labels
    if len(labels) != count:
        raise InputError(f"{len(labels)} classes given for {count} images; give one for each")
    if wrong := [label for label in labels if not -1 <= label < classes]:
        raise InputError(f"class {wrong[0]} is out of range: the model knows classes 0 to {classes - 1} (-1 for none)")
    return labels


def preview(network: FITDenoiser, recipe: DiffuseRecipe, count: int) -> Preview:
    """Samples of the classes in turn, from noise that is the same at every preview."""
    return Preview(images=sample_images(network, recipe, None, count, seed=recipe.trainer.seed))


TASK = TaskSpec(
    recipe=DiffuseRecipe,
    model=FITDenoiser,
    build=build,
    loss=loss,
    measure=measure,
    monitor=("val/loss", "min"),
    preview=preview,
    verb="sample",
    sample_images=sample_images,
)
