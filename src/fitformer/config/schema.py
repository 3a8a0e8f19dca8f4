"""The recipe of a run: small frozen dataclasses of plain data that check themselves; `config.load` reads them.

This module imports neither torch nor numpy, so that the command line checks a recipe at once.
"""

import math
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from fitformer.data.settings import (
    AudioData,
    ByteData,
    ImageData,
    MultilabelData,
    RegressData,
    SegmentData,
    SurvivalData,
)
from fitformer.errors import InputError
from fitformer.models.config import TrunkConfig


def _at_least(lowest: float, **values: float | None) -> None:
    for name, value in values.items():
        # Not `value < lowest`: NaN compares false.
        if value is not None and not lowest <= value < math.inf:
            raise InputError(f"{name} is {value}; it must be at least {lowest:g} and finite")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; it must lie between 0 and 1")


def _rate(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; it must be at least 0 and below 1")


def _check_dropout(model: Any) -> None:
    rates = {name: getattr(model, name) for name in ("drop_path", "drop_units", "drop_att")}
    _share(**{name: rate for name, rate in rates.items() if rate is not None})


def _check_class_weights(weights: Any) -> None:
    if isinstance(weights, tuple):
        _at_least(0, **{f"class_weights[{k}]": weight for k, weight in enumerate(weights)})
        if not any(weights):
            raise InputError(f"class_weights are {weights}: one at least must be above 0")


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class Model(TrunkConfig):
        """A preset, and the options of the trunk that depart from it."""

        preset: str = "tiny"
else:
    # The options of the trunk stand in one place; here each of them may be left to the preset, by None.
    Model = make_dataclass(
        "Model",
        [("preset", str, "tiny"), *((option.name, option.type | None, None) for option in fields(TrunkConfig))],
        frozen=True,
        namespace={
            "__doc__": "A preset, and the options of `TrunkConfig` that depart from it; None keeps the preset's.",
            "__post_init__": _check_dropout,
        },
    )


Initialization = Literal["reference", "zero_branches"]


@dataclass(frozen=True)
class EncoderModel(Model):
    """An encoder of images: `group_size` and `patch_size` in pixels, a side or (rows, columns).

    `glimpses` are copies of the whole image, shrunk to one group, that stand before its groups.
    """

    group_size: int | tuple[int, int] = 16
    patch_size: int | tuple[int, int] = 4
    mask: Literal["causal"] | None = None
    glimpses: int = 0


@dataclass(frozen=True)
class SegmenterModel(EncoderModel):
    """A segmenter of images; `refinement` are the numbers of a pixel that two convolutions work on, 0 for none."""

    refinement: int = 16


@dataclass(frozen=True)
class DenoiserModel(Model):
    """A denoiser of images: `group_size` and `patch_size` in pixels; the rest as `FITDenoiser` has it."""

    group_size: int | tuple[int, int] = 16
    patch_size: int | tuple[int, int] = 2
    cond_proj: bool = True


@dataclass(frozen=True)
class PixelDecoderModel(Model):
    """A decoder of pixels: a group is one patch of `patch_size` pixels, its tokens the patch's pixel values.

    `initialization` as `ByteDecoderModel` has it.
    """

    patch_size: int | tuple[int, int] = 4
    shared_embedding: bool = True
    output_bias: bool = True
    initialization: Initialization = "reference"


@dataclass(frozen=True)
class ByteDecoderModel(Model):
    """A decoder of bytes, or of mu-law codes, in groups of `tokens_per_group`: `length` is padded to whole groups.

    `initialization` says which weights training starts from: the reference's, or `zero_branches`, with which short
    trainings get further (`fitformer.models.initialization`).
    """

    tokens_per_group: int = 64
    shared_embedding: bool = True
    output_bias: bool = True
    initialization: Initialization = "reference"


@dataclass(frozen=True)
class ClassifyObjective:
    """Cross-entropy of the class, with `label_smoothing`.

    `class_weights` weigh the examples of a class in the training loss: `balanced`, inverse to how many there are, or a
    number for each class in their order; their mean over the training images is made 1.
    """

    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"

    def __post_init__(self) -> None:
        _rate(label_smoothing=self.label_smoothing)
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
        _at_least(0, cross_entropy=self.cross_entropy, dice=self.dice)
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
            _at_least(0, **named)


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
        _share(self_cond_rate=self.self_cond_rate)
        _rate(condition_dropout=self.condition_dropout)
        if not 0 <= self.guidance <= 100:
            raise InputError(f"guidance is {self.guidance}; it must lie between 0 (none) and 100")
        _at_least(1, sample_steps=self.sample_steps)
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


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up; norms, biases and positions have no weight decay.

    Attributes:
        lr: peak learning rate. warmup_steps: steps of linear warm-up from 0. schedule: after the warm-up.
        lr_end: final learning rate of `cosine`, as a share of the peak.
        betas, eps, weight_decay: of AdamW. clip: maximum global norm of the gradient, 0 for no clipping.
        fused: use the fused kernel.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    lr_end: float = 0.0
    clip: float = 1.0
    fused: bool = True

    def __post_init__(self) -> None:
        _at_least(0, weight_decay=self.weight_decay, warmup_steps=self.warmup_steps, clip=self.clip, eps=self.eps)
        _share(lr_end=self.lr_end)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}; each must be at least 0 and below 1")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr is {self.lr}; it must be finite and above 0")


@dataclass(frozen=True)
class Training:
    """Length of the training, batch size, hardware, and how the trunk runs.

    Attributes:
        steps: optimizer steps of the whole run. batch_size: examples of one micro-step on one device.
        accumulate: micro-steps of an optimizer step. seed: of weights, order, augmentation, dropout and noise.
        precision: 32, or bf16 (mixed). devices, accelerator: as in Lightning's `Trainer`. ema: decay of the averaged
            weights, 0 for no average; it warms up as (1 + k) / (10 + k).
        checkpoint_every, validate_every, log_every: in optimizer steps.
        validate_batches: maximum number of validation batches, None for all, 0 for no validation.
        previews: samples generated at each validation, 0 for none. keep_best: also keep the best checkpoint.
        compile: compile each layer with torch.compile.
        execution: how the trunk runs (`fitformer.execution`). The remaining fields belong to streamed execution:
        keep, keep_precision, scratch: where data tokens are stored between blocks, in which precision (null keeps the
            precision of the computation), and the folder on disk (null is the system's temporary folder).
        slice_groups: groups of a slice. recompute: what the backward pass recomputes, from `light` over `selective`
            and `local` to `full`. Both are chosen to fit `memory` where they are null.
        memory: memory that a step may use, such as 8GB; null is the machine's.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    precision: Literal[32, "bf16"] = 32
    devices: int | str = "auto"
    accelerator: str = "auto"
    ema: float = 0.0
    checkpoint_every: int = 500
    validate_every: int = 500
    validate_batches: int | None = None
    log_every: int = 20
    previews: int = 10
    keep_best: bool = False
    compile: bool = False
    execution: Literal["plain", "checkpointed", "streamed"] = "plain"
    keep: Literal["memory", "host", "disk"] = "memory"
    keep_precision: Literal["bf16"] | None = None
    slice_groups: int | None = None
    recompute: Literal["full", "local", "selective", "light"] | None = None
    scratch: str | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate, log_every=self.log_every)
        _at_least(1, checkpoint_every=self.checkpoint_every, validate_every=self.validate_every)
        _at_least(1, slice_groups=self.slice_groups)
        _at_least(0, seed=self.seed, previews=self.previews, validate_batches=self.validate_batches)
        if self.seed >= 2**63:
            raise InputError(f"seed is {self.seed}; it must be below 2**63")
        if self.compile and self.recompute not in (None, "full"):
            raise InputError(
                f"recompute is {self.recompute!r} with compile: compiled layers choose themselves what they recompute; "
                "leave out recompute, or set compile to false"
            )
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; the decay must be at least 0 (no averaging) and below 1")


@dataclass(frozen=True)
class Recipe:
    """What every recipe has; a task's recipe is a subclass that narrows `task`, `model`, `data` and `objective`.

    Attributes:
        task: name of the task, which is the name of its module in `fitformer.tasks`.
        model, data, objective: sections of the task. optimizer, trainer: the same for all tasks.
    """

    task: str = ""
    model: Model = field(default_factory=Model)
    data: ImageData | ByteData | AudioData = field(default_factory=ImageData)
    objective: Any = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    trainer: Training = field(default_factory=Training)


@dataclass(frozen=True)
class ClassifyRecipe(Recipe):
    """Predict the class of an image."""

    task: Literal["classify"] = "classify"
    model: EncoderModel = field(default_factory=EncoderModel)
    data: ImageData = field(default_factory=ImageData)
    objective: ClassifyObjective = field(default_factory=ClassifyObjective)


@dataclass(frozen=True)
class SegmentRecipe(Recipe):
    """Predict the class of every pixel of an image."""

    task: Literal["segment"] = "segment"
    model: SegmenterModel = field(default_factory=SegmenterModel)
    data: SegmentData = field(default_factory=SegmentData)
    objective: SegmentObjective = field(default_factory=SegmentObjective)


@dataclass(frozen=True)
class RegressRecipe(Recipe):
    """Predict numbers of an image."""

    task: Literal["regress"] = "regress"
    model: EncoderModel = field(default_factory=EncoderModel)
    data: RegressData = field(default_factory=RegressData)
    objective: RegressObjective = field(default_factory=RegressObjective)


@dataclass(frozen=True)
class MultilabelRecipe(Recipe):
    """Predict which of several labels an image has, each by itself."""

    task: Literal["multilabel"] = "multilabel"
    model: EncoderModel = field(default_factory=EncoderModel)
    data: MultilabelData = field(default_factory=MultilabelData)
    objective: MultilabelObjective = field(default_factory=MultilabelObjective)


@dataclass(frozen=True)
class SurvivalRecipe(Recipe):
    """Predict when an event happens."""

    task: Literal["survival"] = "survival"
    model: EncoderModel = field(default_factory=EncoderModel)
    data: SurvivalData = field(default_factory=SurvivalData)
    objective: SurvivalObjective = field(default_factory=SurvivalObjective)


@dataclass(frozen=True)
class DiffuseRecipe(Recipe):
    """Denoise images, to sample them."""

    task: Literal["diffuse"] = "diffuse"
    model: DenoiserModel = field(default_factory=DenoiserModel)
    data: ImageData = field(default_factory=ImageData)
    objective: DiffuseObjective = field(default_factory=DiffuseObjective)


@dataclass(frozen=True)
class PixelRecipe(Recipe):
    """Predict the next pixel value of an image."""

    task: Literal["pixels"] = "pixels"
    model: PixelDecoderModel = field(default_factory=PixelDecoderModel)
    data: ImageData = field(default_factory=ImageData)
    objective: PixelObjective = field(default_factory=PixelObjective)


@dataclass(frozen=True)
class ByteRecipe(Recipe):
    """Predict the next byte of a text or file."""

    task: Literal["bytes"] = "bytes"
    model: ByteDecoderModel = field(default_factory=ByteDecoderModel)
    data: ByteData = field(default_factory=ByteData)
    objective: ByteObjective = field(default_factory=ByteObjective)


@dataclass(frozen=True)
class AudioRecipe(Recipe):
    """Predict the next sample of a sound."""

    task: Literal["audio"] = "audio"
    model: ByteDecoderModel = field(default_factory=ByteDecoderModel)
    data: AudioData = field(default_factory=AudioData)
    objective: AudioObjective = field(default_factory=AudioObjective)


PACKAGED_RECIPES: dict[str, type[Recipe]] = {
    kind.task: kind
    for kind in (
        *(ClassifyRecipe, RegressRecipe, MultilabelRecipe, SurvivalRecipe, SegmentRecipe),
        *(DiffuseRecipe, PixelRecipe, ByteRecipe, AudioRecipe),
    )
}
"""Recipe classes by task of the tasks whose modules import torch; other tasks declare theirs in their own module."""
