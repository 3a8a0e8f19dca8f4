"""The recipe of a run: small frozen dataclasses of plain data that check themselves; `config.load` reads them.

This module imports neither torch nor numpy, so that the command line checks a recipe at once.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fitformer.config.model_sections import (
    ByteDecoderModel,
    DenoiserModel,
    EncoderModel,
    Model,
    PixelDecoderModel,
    SegmenterModel,
)
from fitformer.config.objectives import (
    AudioObjective,
    ByteObjective,
    ClassifyObjective,
    DiffuseObjective,
    MultilabelObjective,
    PixelObjective,
    RegressObjective,
    SegmentObjective,
    SurvivalObjective,
)
from fitformer.config.ranges import at_least, share
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


@dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon with linear warm-up; norms, biases and positions have no weight decay.

    Attributes:
        name: `muon` (arXiv 2502.16982) has the matrices of attention and feed-forwards, AdamW all else.
        lr: peak learning rate. warmup_steps: steps of linear warm-up from 0. schedule: after the warm-up.
        lr_end: final learning rate of `cosine`, as a share of the peak.
        betas, eps: of AdamW. weight_decay: of matrices. clip: maximum global norm of the gradient, 0 for no clipping.
        fused: use the fused kernel of AdamW.
    """

    name: Literal["adamw", "muon"] = "adamw"
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
        at_least(0, weight_decay=self.weight_decay, warmup_steps=self.warmup_steps, clip=self.clip, eps=self.eps)
        share(lr_end=self.lr_end)
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
        at_least(1, steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate, log_every=self.log_every)
        at_least(1, checkpoint_every=self.checkpoint_every, validate_every=self.validate_every)
        at_least(1, slice_groups=self.slice_groups)
        at_least(0, seed=self.seed, previews=self.previews, validate_batches=self.validate_batches)
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
