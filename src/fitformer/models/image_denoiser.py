"""FIT as a denoiser of images: a `FITDenoiser` and all that sampling needs, so that a saved model samples by itself."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fitformer import diffusion as maths
from fitformer._support.checks import checked, whole
from fitformer._support.system_memory import check_room
from fitformer.diffusion import DiffusionConfig
from fitformer.diffusion.samplers import sampler_of
from fitformer.errors import InputError
from fitformer.execution.base import Score
from fitformer.models.adapt import Grid
from fitformer.models.base import FITModel, check_classes
from fitformer.models.config import TrunkConfig
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.layers import MOST_SIZE, check_sizes
from fitformer.models.trunk import Trunk
from fitformer.patching import PatchGrid
from fitformer.patching.sizes import Size

OnStep = Callable[[int, Tensor], None]


class FITImageDenoiser(FITModel):
    """FIT denoiser of images of one size: the cut into groups of patches, a `FITDenoiser`, and how it was trained.

    Args:
        trunk: options of the trunk; its layer string ends in `)`.
        diffusion: prediction, schedules, scale of the data, defaults of sampling.
        image_size, group_size, patch_size: in pixels, one number or `(rows, columns)`; each divides the one before.
        channels: of the images.
        num_classes: classes that condition the model, one-hot; 0 for an unconditional model.
        self_cond: `"latent"` passes latents from one sampling step to the next, `"none"` does not.
        cond_proj: as in `FITDenoiser`.

    Raises:
        InputError: sizes that do not divide, an unknown schedule or sampler, or what `FITDenoiser` refuses.
    """

    nested: ClassVar[dict[str, type]] = {"trunk": TrunkConfig, "diffusion": DiffusionConfig}
    free = FITModel.free | {
        "num_classes",
        "image_size",
        "group_size",
        "sample_schedule",
        "sample_steps",
        "sampler",
        "guidance",
    }
    class_weights = ("denoiser.cond_proj.",)

    @checked
    def __init__(
        self,
        trunk: TrunkConfig,
        diffusion: DiffusionConfig,
        image_size: Size,
        group_size: Size,
        patch_size: Size,
        *,
        channels: int = 3,
        num_classes: int = 0,
        self_cond: str = "none",
        cond_proj: bool = True,
    ) -> None:
        super().__init__()
        whole("num_classes", num_classes, 0, MOST_SIZE)  # 0 is unconditional
        sampler_of(diffusion.sampler)
        for schedule in (diffusion.train_schedule, diffusion.sample_schedule):
            maths.gamma(schedule, 0.5)
        grid = self.patch_grid = PatchGrid(image_size, group_size, patch_size, channels)
        self.diffusion, self.num_classes, self.self_cond = diffusion, num_classes, self_cond != "none"
        self.denoiser = FITDenoiser(
            trunk,
            grid.num_groups,
            grid.tokens_per_group,
            grid.token_dim,
            cond_dim=num_classes or None,
            cond_proj=cond_proj,
            self_cond=self_cond,
        )

    @property
    def trunk(self) -> Trunk:  # type: ignore[override]
        """The denoiser's trunk."""
        return self.denoiser.trunk

    def grids(self) -> tuple[Grid, Grid | None]:
        """Rows and columns of the patches of a group, and of the groups."""
        return self.patch_grid.patches, self.patch_grid.shape

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor | None = None,
        latents_prev: Tensor | None = None,
        score: Score | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Denoise grouped tokens.

        Args:
            x: noisy tokens `(b, t, n, ph * pw * channels)`, as `tokens` makes them.
            time: noise level gamma in [0, 1], `(b,)`.
            cond: classes `(b,)`, whole numbers, -1 for none; or `(b, num_classes)`, as `condition` makes it of them;
                None for an unconditional model.
            latents_prev: latents of an earlier pass, `(b, t, m, d)`.
            score: as in `FITDenoiser.forward`.

        Returns:
            the prediction, of the shape of `x`, or the score; and the latents `(b, t, m, d)`.
        """
        if cond is not None and cond.ndim == 1 and not cond.is_floating_point():
            cond = self.condition(cond)
        return self.denoiser(x, time, cond, latents_prev, score=score)

    def tokens(self, images: Tensor) -> Tensor:
        """Images uint8 `(b, H, W, channels)` as grouped tokens `(b, t, n, ph * pw * channels)` in [-b_scale, b_scale].

        Raises:
            InputError: images of another size or number of channels.
        """
        return self.patch_grid.group(maths.pixels_to_signal(images, self.diffusion.b_scale))

    def images(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`; values outside [-b_scale, b_scale] are clipped."""
        return maths.signal_to_pixels(self.patch_grid.ungroup(tokens), self.diffusion.b_scale)

    def condition(self, labels: Tensor) -> Tensor | None:
        """Condition `(b, num_classes)` of labels `(b,)`: one-hot, zeros for -1; None for an unconditional model.

        Raises:
            InputError: labels that are no whole numbers, or, on a CPU, one that is no class.
        """
        return one_hot(labels, self.num_classes) if self.num_classes else None

    @checked
    def sample(
        self,
        count: int,
        classes: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        sampler: str | maths.Sampler | None = None,
        guidance: float | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images uint8 `(count, H, W, channels)` on the CPU, computed where the weights are.

        Image k depends on (seed, first + k) and its class, up to rounding not on the batch it is computed in.

        Args:
            count: number of images.
            classes: class of each image, -1 for none; None takes all classes in turn.
            steps, sampler, guidance: see `fitformer.diffusion.sample`; None takes the model's own
                `sample_steps`, `sampler` and `guidance`.
            seed: of the noise. first: number of the first image. batch_size: images computed at once.
            on_step: called as `on_step(k, tokens)` with each step's predicted tokens, batch after batch.

        Raises:
            InputError: a class out of range, classes for an unconditional model, another number of classes than of
                images, guidance for a model that was trained with `condition_dropout` 0, an unknown sampler.
        """
        self.check_room(count, batch_size)
        labels, own = self._labels(classes, count, first), self.diffusion
        options = {
            "steps": own.sample_steps if steps is None else steps,
            "sampler": own.sampler if sampler is None else sampler,
            "guidance": own.guidance if guidance is None else guidance,
            "on_step": on_step,
        }
        if options["guidance"] and not own.condition_dropout:
            raise InputError(
                f"guidance {options['guidance']:g} needs a model that was trained with condition_dropout above 0, and "
                "this one was trained with 0; set guidance to 0"
            )
        batches = self._batches(count, first, labels, batch_size)
        return torch.cat([self._sample(numbers, cond, seed, **options) for numbers, cond in batches])

    def check_room(self, count: int, batch_size: int = 64) -> None:
        """Check that `sample` has the memory for so many images, and for a batch of them at work.

        Raises:
            InputError: it has not (names both amounts), or a number that is none.
        """
        check_sizes(count=count, batch_size=batch_size)
        tokens = (self.patch_grid.num_groups or 1) * self.patch_grid.tokens_per_group
        # Noise, prediction, guesses and the trunk's activations; images are kept as bytes.
        at_work = min(count, batch_size) * tokens * (8 * self.patch_grid.token_dim + 4 * self.trunk.config.dim)
        images = count * tokens * self.patch_grid.token_dim // 4
        check_room(f"{count} images, {min(count, batch_size)} at once,", at_work + images)

    def _batches(
        self, count: int, first: int, labels: Sequence[int], batch_size: int
    ) -> Iterator[tuple[range, Tensor | None]]:
        """Numbers and conditions of the images, batch by batch."""
        for start in range(0, count, batch_size):
            part = torch.tensor(labels[start : start + batch_size], dtype=torch.long, device=self._device)
            numbers = range(first + start, first + min(start + batch_size, count))
            yield numbers, self.condition(part)

    def _sample(self, numbers: Sequence[int], cond: Tensor | None, seed: int, **options: Any) -> Tensor:
        """The images of these numbers, uint8 `(b, H, W, channels)`; `options` of `fitformer.diffusion.sample`."""
        own, grid = self.diffusion, self.patch_grid
        assert grid.num_groups is not None
        shape = (grid.num_groups, grid.tokens_per_group, grid.token_dim)
        noise = partial(maths.seeded_noise, seed, numbers, shape)
        tokens = maths.sample(
            self,
            noise().to(self._device),
            schedule=own.sample_schedule,
            prediction=own.prediction,
            clip=(-own.b_scale, own.b_scale),
            cond=cond,
            self_cond=self.self_cond,
            noise=lambda k: noise(k + 1),
            normalize_input=own.normalize_input,
            **options,
        )
        return self.images(tokens).cpu()

    @property
    def _device(self) -> torch.device:
        return self.denoiser.output.weight.device

    def _labels(self, classes: Sequence[int] | None, count: int, first: int) -> Sequence[int]:
        """The class of each image, checked; empty for an unconditional model."""
        if not self.num_classes:
            if classes is not None:
                raise InputError("the model was trained without classes; leave classes out")
            return []
        labels = [(first + k) % self.num_classes for k in range(count)] if classes is None else classes
        if len(labels) != count:
            raise InputError(f"{len(labels)} classes given for {count} images; give one for each")
        if wrong := [label for label in labels if not -1 <= label < self.num_classes]:
            raise InputError(f"class {wrong[0]} is out of range: classes are 0 to {self.num_classes - 1}, -1 for none")
        return labels


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """One-hot rows `(b, classes)` of labels `(b,)`; zeros, which mean no condition, where the label is -1.

    Raises:
        InputError: labels that are no whole numbers, or, on a CPU, one that is no class.
    """
    check_classes(labels, classes)
    return F.one_hot(labels.long().clamp_min(0), classes).float() * (labels >= 0)[:, None]
