"""What a recipe says about what is learned, an objective for each task."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from fitformer.config.ranges import at_least, rate, share
from fitformer.errors import InputError


def _check_class_weights(weights: Any) -> None:
    if isinstance(weights, tuple):
        at_least(0, **{f"class_weights[{k}]": weight for k, weight in enumerate(weights)})
        if not any(weights):
            raise InputError(f"class_weights are {weights}: one at least must be above 0")


@dataclass(frozen=True)
class ClassifyObjective:
    """Cross-entropy of the class, with `label_smoothing`.

    `class_weights` weigh the examples of a class in the training loss: `balanced`, inverse to how many there are, or a
    number for each class in their order; their mean over the training images is made 1.
    """

    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"

    def __post_init__(self) -> None:
        rate(label_smoothing=self.label_smoothing)
        _check_class_weights(self.class_weights)


@dataclass(frozen=True)
class SegmentObjective:
    """Cross-entropy of the class of a pixel, and Dice loss, each an image's own, averaged over images.

    Attributes:
        cross_entropy, dice: by how much each counts.
        class_weights: of the pixels of a class in the cross-entropy: `balanced`, inverse to how many there are, or a
            number for each class in their order; their mean over the labelled training pixels is made 1.
    """

    cross_entropy: float = 1.0
    dice: float = 1.0
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"

    def __post_init__(self) -> None:
        at_least(0, cross_entropy=self.cross_entropy, dice=self.dice)
        if not self.cross_entropy + self.dice:
            raise InputError("cross_entropy and dice are both 0: there is nothing to learn from")
        _check_class_weights(self.class_weights)


@dataclass(frozen=True)
class RegressObjective:
    """The error of numbers, each in standard deviations of the training part: squared (`mse`) or absolute (`l1`)."""

    loss: Literal["mse", "l1"] = "mse"


@dataclass(frozen=True)
class MultilabelObjective:
    """Binary cross-entropy of each label, a mean over labels.

    `positive_weights` weigh the examples that have a label in its training loss: `balanced`, the number of those that
    have it not over the number of those that have it, or a number for each label in their order.
    """

    positive_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"

    def __post_init__(self) -> None:
        if isinstance(self.positive_weights, tuple):
            named = {f"positive_weights[{k}]": weight for k, weight in enumerate(self.positive_weights)}
            at_least(0, **named)


@dataclass(frozen=True)
class SurvivalObjective:
    """The likelihood of when an event happens, of observations that may end before it.

    Attributes:
        loss: `hazard`, of the interval of time in which it happens (discrete-time survival), which is a mean over
            examples; or `cox`, the partial likelihood of Cox, which compares the examples of a batch with each other:
            `trainer.batch_size` is then how many.
        intervals: of `hazard`, that time is cut into, with as many events of the training part in each.
    """

    loss: Literal["hazard", "cox"] = "hazard"
    intervals: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.intervals <= 1000:
            raise InputError(f"intervals is {self.intervals}; time is cut into 2 to 1000 intervals")


@dataclass(frozen=True)
class DiffuseObjective:
    """Denoising (spec of `fitformer.diffusion`).

    Attributes:
        prediction: the quantity that the network predicts; loss_on: the quantity whose squared error is the loss.
        train_schedule, sample_schedule: gamma(t), as `fitformer.diffusion.gamma` reads them.
        self_cond: latent self-conditioning: `none`; `half`, the first examples of the batch (share `self_cond_rate`)
            get their own latents; `masking`, every example gets them with probability `self_cond_rate`.
        class_conditional: the denoiser is conditioned on the class; condition_dropout: share of examples whose
            condition is dropped in training, which classifier-free guidance needs.
        b_scale: images are scaled to [-b_scale, b_scale]; normalize_input: divide the noisy input by its standard
            deviation.
        sampler, sample_steps, guidance: defaults of previews and of `fitformer sample`.
    """

    prediction: Literal["eps", "x", "v"] = "eps"
    loss_on: Literal["eps", "x", "v"] = "eps"
    train_schedule: str = "sigmoid@-3,3,0.9"
    sample_schedule: str = "cosine"
    self_cond: Literal["none", "half", "masking"] = "none"
    self_cond_rate: float = 0.5
    class_conditional: bool = False
    condition_dropout: float = 0.0
    b_scale: float = 1.0
    normalize_input: bool = False
    sampler: str = "ddim"
    sample_steps: int = 100
    guidance: float = 0.0

    def __post_init__(self) -> None:
        share(self_cond_rate=self.self_cond_rate)
        rate(condition_dropout=self.condition_dropout)
        if not 0 <= self.guidance <= 100:
            raise InputError(f"guidance is {self.guidance}; it must lie between 0 (none) and 100")
        at_least(1, sample_steps=self.sample_steps)
        if not 0 < self.b_scale < math.inf:
            raise InputError(f"b_scale is {self.b_scale}; it must be finite and above 0")
        if self.condition_dropout and not self.class_conditional:
            raise InputError(
                f"condition_dropout is {self.condition_dropout} but class_conditional is false: there is no condition "
                "to drop; set class_conditional to true or condition_dropout to 0"
            )
        if self.guidance and not (self.class_conditional and self.condition_dropout):
            raise InputError(
                f"guidance is {self.guidance}, which needs class_conditional: true and a condition_dropout above 0 "
                f"(they are {str(self.class_conditional).lower()} and {self.condition_dropout})"
            )


@dataclass(frozen=True)
class PixelObjective:
    """Cross-entropy of the next pixel value.

    Attributes:
        order: of the patches of an image. class_conditional: the class stands before the first pixel value.
    """

    order: Literal["raster", "snake"] = "snake"
    class_conditional: bool = False


@dataclass(frozen=True)
class ByteObjective:
    """Cross-entropy of the next byte; previews are `preview_length` bytes sampled at `preview_temperature`."""

    preview_length: int = 256
    preview_temperature: float = 0.8


@dataclass(frozen=True)
class AudioObjective:
    """Cross-entropy of the next sample; previews are `preview_length` samples drawn at `preview_temperature`."""

    preview_length: int = 4096
    preview_temperature: float = 1.0
