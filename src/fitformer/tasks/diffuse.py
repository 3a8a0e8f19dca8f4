"""Diffusion of images: learn to predict the noise or the data (`fitformer.diffusion` has the equations)."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fitformer import diffusion
from fitformer.config.schema import DiffuseRecipe
from fitformer.models.image_denoiser import FITImageDenoiser
from fitformer.tasks.batch import Batch, arguments, need_classes, need_no_levels, one_size
from fitformer.tasks.preview import Preview
from fitformer.tasks.registry import TaskSpec

_GOLDEN = 0.6180339887498949


def build(recipe: DiffuseRecipe, dataset: Any) -> FITImageDenoiser:
    """A denoiser of the dataset's images, conditioned on their classes if the recipe is class-conditional.

    Raises:
        InputError: no classes where they are needed, sizes that do not divide, an unknown schedule.
    """
    need_no_levels(recipe)
    objective = recipe.objective
    return FITImageDenoiser.from_preset(
        recipe.model.preset,
        image_size=one_size(recipe),
        channels=dataset.channels,
        num_classes=need_classes(dataset, "class_conditional") if objective.class_conditional else 0,
        self_cond="none" if objective.self_cond == "none" else "latent",
        **{field.name: getattr(objective, field.name) for field in fields(diffusion.DiffusionConfig)},
        **arguments(recipe.model),
    )


def loss(network: FITImageDenoiser, batch: Batch, recipe: DiffuseRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error at noise levels drawn uniformly in time, from torch's default generator."""
    t = torch.rand(len(batch["image"]), device=batch["image"].device)
    return _error(network, batch, recipe, t, torch.randn_like), {}


def measure(network: FITImageDenoiser, batch: Batch, recipe: DiffuseRecipe) -> tuple[dict[str, Tensor], int]:
    """The same error with noise and noise level fixed for each example, so that measurements are comparable.

    No condition is dropped, and every example of a self-conditioned model gets the latents of a first pass.
    """
    index = batch["index"]
    # Multiples of the golden ratio modulo 1 cover [0, 1] evenly for any number of examples.
    t = ((index.double() + 0.5) * _GOLDEN % 1).float()
    seed = recipe.trainer.seed

    def noise(x: Tensor) -> Tensor:
        return diffusion.seeded_noise(seed, index.tolist(), x.shape[1:]).to(x)

    return {"loss": _error(network, batch, recipe, t, noise, training=False)}, len(index)


def _error(
    network: FITImageDenoiser,
    batch: Batch,
    recipe: DiffuseRecipe,
    t: Tensor,
    noise: Callable[[Tensor], Tensor],
    training: bool = True,
) -> Tensor:
    options = network.diffusion
    x0 = network.tokens(batch["image"])
    gamma, eps = diffusion.gamma(options.train_schedule, t), noise(x0)
    xt = diffusion.add_noise(x0, gamma, eps)
    seen = diffusion.normalize(xt) if options.normalize_input else xt
    cond = network.condition(batch["label"]) if network.num_classes else None
    if cond is not None and training:
        cond = diffusion.drop_condition(cond, options.condition_dropout)
    latents = _earlier_latents(network, recipe, seen, gamma, cond, training)

    def score(groups: slice, output: Tensor, _: Tensor | None) -> Tensor:
        # Share of these groups in the mean over all groups.
        noisy, clean, drawn = (each[:, groups] for each in (xt, x0, eps))
        scale: dict[str, Any] = {"on": recipe.objective.loss_on, "b_scale": options.b_scale}
        mean = diffusion.loss(options.prediction, output.float(), noisy, clean, drawn, gamma, **scale)
        return mean * (output.shape[1] / x0.shape[1])

    return network(seen, gamma, cond, latents, score=score)[0]


def _earlier_latents(
    network: FITImageDenoiser,
    recipe: DiffuseRecipe,
    x: Tensor,
    gamma: Tensor,
    cond: Tensor | None,
    training: bool,
) -> Tensor | None:
    """Latents of a first pass, for the examples that get them; None without self-conditioning."""
    kind, rate = recipe.objective.self_cond, recipe.objective.self_cond_rate
    if kind == "none":
        return None
    if not training:
        return diffusion.self_condition_half(network, x, gamma, cond, rate=1.0)
    by = diffusion.self_condition_half if kind == "half" else diffusion.self_condition_masked
    return by(network, x, gamma, cond, rate=rate)


def preview(network: FITImageDenoiser, recipe: DiffuseRecipe, count: int) -> Preview:
    """Samples of all classes in turn, from the same noise at every preview."""
    return Preview(images=network.sample(count, seed=recipe.trainer.seed))


TASK = TaskSpec(
    recipe=DiffuseRecipe,
    model=FITImageDenoiser,
    build=build,
    loss=loss,
    measure=measure,
    monitor=("val/loss", "min"),
    preview=preview,
    verb="sample",
)
