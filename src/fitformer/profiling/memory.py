"""Memory of a training step at its peak, before it runs: what is kept where, and what one stage needs at a time.

The bytes follow from the shapes of the layers (`activations.py`) and from the order in which a way to run goes through
them. The weights are float32, the optimizer is AdamW, and a step is one after the first: the optimizer has its state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from fitformer.data.readers.cache import MOST_BYTES
from fitformer.errors import InputError
from fitformer.execution._streamed_pass import MANY_SLICES
from fitformer.execution.selective_checkpoint import SAVE_POLICIES, Recompute
from fitformer.execution.streamed import SLICE_TOKENS
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.encoder import FITEncoder
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.trunk import Trunk
from fitformer.profiling.activations import (
    FLOAT,
    Numerics,
    Stage,
    global_stages,
    group_stages,
    head_stage,
    peak,
    self_conditioning_stage,
    stem_stage,
)
from fitformer.profiling.flops import GroupPlan, Model, count_parameters, group_plan

Execution = Literal["plain", "checkpointed", "streamed"]
Keep = Literal["memory", "host", "disk"]
Precision = Literal[32, "bf16"]
MIB = 2**20
# Python, torch and this library with its optimizer, before the first tensor; measured.
PROCESS = 320 * MIB
# What a run of training has beside that: Lightning and its loggers, the look at new images; measured.
TRAINER = 150 * MIB
# Of a tile or picture while it is decoded: what the library that decodes it holds beside its pixels (Pillow holds three
# channels in four bytes, and more for a time); measured.
DECODING = 5, 2
# On a GPU: what libraries of matrix products take from torch.
WORKSPACE = 64 * MIB


@dataclass(frozen=True)
class StepConfig:
    """How a training step runs.

    Attributes:
        groups: of one example, those that are skipped not counted; None for those the model was built for.
        execution: way to run.
        slice_groups: groups of a slice of the streamed execution; None as `Streamed` has it.
        keep: where the streamed execution keeps data tokens. kept_precision: in which, `bf16` is half.
        recompute: what its backward pass computes again.
        batch: examples at once. accumulate: gradients of parameters stay from one micro-step to the next.
        precision: 32, or bf16 (mixed).
        pixel_bytes: of a number of the input as it is read. decode_bytes: of the pixels that its files decode at once,
            at the most: of a tile, or the whole of a PNG or JPEG. conditions: tokens of a denoiser's condition.
        data_bytes: of the pixels of all files that are read piece by piece, if there are more than one.
        trainer: the step is one of `fitformer train`, which brings libraries of its own.
        device: cpu, where memory is that of the whole process, or cuda, where it is torch's on the device.

    Raises:
        InputError: numbers below 1, or unknown words.
    """

    groups: int | None = None
    execution: Execution = "plain"
    slice_groups: int | None = None
    keep: Keep = "memory"
    kept_precision: Literal["bf16"] | None = None
    recompute: Recompute = "full"
    batch: int = 1
    accumulate: bool = False
    precision: Precision = 32
    pixel_bytes: int = 1
    decode_bytes: int = 0
    conditions: int = 1
    data_bytes: int = 0
    trainer: bool = False
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        for name in ("groups", "slice_groups", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        words: dict[str, Any] = {"execution": Execution, "keep": Keep, "recompute": Recompute, "precision": Precision}
        for name, known in ((name, get_args(kind)) for name, kind in words.items()):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; known are {', '.join(map(str, known))}")


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step.

    Attributes:
        weights: parameters and all their gradients (at an earlier peak, their room is slack).
        optimizer: the two averages of AdamW.
        kept: data tokens between blocks, latents, and remembered results that wait for the backward pass.
        working: what one stage computes on, forward and backward, and pixels.
        process: Python, torch, decoded tiles; on a GPU the workspace of its libraries.
        slack: freed, and not given back by the C library, see `_allocator_overhead`; none on a GPU.
        scratch: on disk, and not part of the total. host: on the host of a GPU, not part of the total either.
    """

    weights: int
    optimizer: int
    kept: int
    working: int
    process: int
    slack: int = 0
    scratch: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.optimizer + self.kept + self.working + self.process + self.slack


@dataclass(frozen=True)
class _Snapshot:
    """What there is at one time of a step: kept, working, gradients of parameters so far, remembered results."""

    kept: int
    working: int
    gradients: int
    remembered: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.working + self.gradients + self.remembered


def memory(model: Model, setup: StepConfig) -> Memory:
    """The peak of a training step of a model (on any device, `on_meta` does).

    Raises:
        InputError: no number of groups for a model that takes any.
    """
    step = _Step(model, setup)
    moments = {"plain": step.plain, "checkpointed": step.checkpointed, "streamed": step.streamed}[setup.execution]
    most = max([*moments(), step.optimizing()], key=lambda moment: moment.total)
    copies = 2 if setup.precision == "bf16" else 0
    # What is decoded stays while it fits the cache, and one piece of any size.
    tiles = min(MOST_BYTES, max(step.tokens * step.raw, setup.data_bytes))
    tiles = max(tiles, setup.decode_bytes * DECODING[0] // DECODING[1])
    away = step.boundaries if setup.execution == "streamed" else 0
    on_gpu = setup.device == "cuda"
    return Memory(
        weights=step.parameters * (2 * FLOAT + copies),
        optimizer=2 * step.parameters * FLOAT,
        kept=most.kept + most.remembered,
        working=most.working,
        process=WORKSPACE if on_gpu else PROCESS + TRAINER * setup.trainer + tiles,
        slack=0 if on_gpu else _allocator_overhead(setup.execution, most, step),
        scratch=away if setup.keep == "disk" else 0,
        host=away if setup.keep == "host" and on_gpu else 0,
    )


def _allocator_overhead(execution: str, most: _Snapshot, step: "_Step") -> int:
    """Bytes that are free at the peak and yet held: fitted to measured peaks, the rest follows from shapes.

    glibc keeps tensors of less than 32 MiB in a heap that it rarely gives back, unless many slices have it do so. With
    a fixed threshold (`MALLOC_MMAP_THRESHOLD_=524288`) there is none of it, for a tenth more time.
    """
    if execution == "plain":
        return max(min(200 * MIB, most.working // 2) - step.parameters * FLOAT, 0)
    if execution == "checkpointed":
        small = step.tokens * step.x < 32 * MIB
        return min(most.kept + most.working, (500 if small else 150) * MIB)
    if step.plan.groups >= MANY_SLICES * step.slice_groups:
        held = min(100 * MIB + most.working // 5, 150 * MIB)
    else:
        held = min(100 * MIB + most.working * 11 // 20, 500 * MIB)
    # The room of gradients that are still to come is counted as theirs.
    to_come = step.parameters * FLOAT - most.gradients
    return max(held + most.remembered // 10 - to_come, 0)


class _Step:
    """Sizes of a step, and its moments in each way to run."""

    def __init__(self, model: Model, setup: StepConfig) -> None:
        self.model = model.encoder if isinstance(model, FITImageEncoder) else model
        self.trunk: Trunk = model.trunk
        self.setup = setup
        self.plan: GroupPlan = group_plan(model, groups=setup.groups)
        self.numerics = Numerics(setup.precision)
        self.remembered = SAVE_POLICIES[setup.recompute if setup.execution == "streamed" else "full"]
        self.parameters = count_parameters(model)
        self.rows = setup.batch * self.plan.groups
        self.tokens = self.rows * self.plan.tokens_per_group
        self.latents = self.plan.groups * self.plan.latents_per_group
        self.x = self.plan.dim * FLOAT
        self.of_latents = setup.batch * self.latents * self.plan.latent_dim * FLOAT
        self.conditions = 1 + setup.conditions if isinstance(self.model, FITDenoiser) else 0
        self.blocks = len(self.trunk.blocks)
        self.held = self.parameters * FLOAT if setup.accumulate else 0
        size = 2 if setup.kept_precision == "bf16" else FLOAT
        self.boundaries = (self.blocks - 1) * self.tokens * self.plan.dim * size

    @property
    def raw(self) -> int:
        """Bytes of a token as it is read."""
        if isinstance(self.model, FITDecoder):
            return 8
        return self._raw_numbers() * self.setup.pixel_bytes

    def _raw_numbers(self) -> int:
        assert isinstance(self.model, FITEncoder | FITDenoiser)
        return self.model.stem.projection.in_features

    def stem(self, tokens: int) -> Stage:
        """From raw tokens to data tokens."""
        return stem_stage(self.model, tokens, self.numerics)

    def ends(self, tokens: int) -> list[Stage]:
        """From data tokens to the loss; nothing in an encoder, which pools."""
        return [] if isinstance(self.model, FITEncoder) else [head_stage(self.model, tokens, self.numerics)]

    def start_of_latents(self) -> int:
        """Bytes kept of the computation of the initial latents, these included."""
        if isinstance(self.model, FITDenoiser) and self.model.self_conditioning is not None:
            stage = self_conditioning_stage(self.model, self.setup.batch, self.latents, self.numerics)
            return stage.kept + self.of_latents
        return self.of_latents

    def grouped(self, i: int, rows: int) -> list[Stage]:
        """The group phase of block i on `rows` groups."""
        numerics = replace(self.numerics, kinds=self.remembered.groups)
        return list(group_stages(self.trunk, i, rows, self.plan.tokens_per_group, numerics))

    def globals(self, i: int) -> list[Stage]:
        """The global phase of block i."""
        numerics = replace(self.numerics, kinds=self.remembered.latents)
        return list(global_stages(self.trunk, i, self.setup.batch, self.latents, self.conditions, numerics))

    def optimizing(self) -> _Snapshot:
        """When the optimizer steps, all gradients are there and nothing else is."""
        return _Snapshot(0, 0, self.parameters * FLOAT)

    def plain(self) -> Iterator[_Snapshot]:
        """Everything is kept; gradients come in from the last layer on."""
        pixels = self.tokens * self.raw
        stages = [self.stem(self.tokens)]
        for i in range(self.blocks):
            # The gradient of the data tokens comes with their last reader's, that of the latents is always there.
            inner = [*self.grouped(i, self.rows), *self._with(self.globals(i), 0 if i == self.blocks - 1 else 1)]
            stages += [replace(stage, moment=stage.moment + self.of_latents) for stage in inner]
        stages += self.ends(self.tokens)
        stages = [*self._with(stages[:1]), *stages[1:]]
        activations, gradients = peak(stages, self.held)
        yield _Snapshot(0, pixels + self.start_of_latents() + activations, min(gradients, self.parameters * FLOAT))

    def _with(self, stages: list[Stage], copies: int = 1) -> list[Stage]:
        """Stages in whose backward pass the gradient of all data tokens is there."""
        return [replace(stage, moment=stage.moment + copies * self.tokens * self.x) for stage in stages]

    def checkpointed(self) -> Iterator[_Snapshot]:
        """What enters a phase is kept; a phase at a time is computed again."""
        pixels, stem = self.tokens * self.raw, self.stem(self.tokens)
        kept = stem.kept + self.start_of_latents() + self.blocks * 2 * self.of_latents
        kept += (self.blocks - 1) * self.tokens * self.x
        gradients = self.held
        stages: list[list[Stage]] = []
        for i in range(self.blocks):
            stages += [self.grouped(i, self.rows), self.globals(i)]
        stages[-1] += self.ends(self.tokens)
        incoming = self.tokens * self.x + self.of_latents
        for phase in reversed(stages):
            activations, most = peak(phase, gradients)
            yield _Snapshot(kept, pixels + incoming + activations, min(most, self.parameters * FLOAT))
            gradients += sum(stage.parameters for stage in phase) * FLOAT

    def streamed(self) -> Iterator[_Snapshot]:
        """Data tokens between blocks and the inputs of global layers are kept; a slice, or a layer, is at work.

        What is remembered of a slice or a layer goes over into its activations when it is its turn.
        """
        here = self.setup.keep == "memory" or (self.setup.keep == "host" and self.setup.device == "cpu")
        kept_latents = self.of_latents + self.start_of_latents()
        kept_latents += sum(1 + len(self.globals(i)) for i in range(self.blocks)) * self.of_latents
        gradients = self.held
        rows = self.setup.batch * min(self.slice_groups, self.plan.groups)
        tokens = rows * self.plan.tokens_per_group
        pixels = 2 * tokens * self.raw
        remembered = sum(_remembered([*self.grouped(i, self.rows), *self.globals(i)]) for i in range(self.blocks))
        for i in reversed(range(self.blocks)):
            rooms = min(i + 1, self.blocks - 1) / max(self.blocks - 1, 1)
            kept = kept_latents + (int(rooms * self.boundaries) if here else 0)
            for stage in reversed(self.globals(i)):
                remembered -= stage.remembered
                yield _Snapshot(kept, stage.kept + stage.moment + 2 * self.of_latents, gradients, remembered)
                gradients += stage.parameters * FLOAT
            phase = self.grouped(i, rows)
            phase = [*([self.stem(tokens)] if i == 0 else []), *phase, *(self.ends(tokens) if self.is_last(i) else [])]
            gradients += sum(stage.parameters for stage in phase) * FLOAT
            # The sums over slices, and beside them the gradients of this one.
            activations, fresh = peak(phase)
            incoming = 3 * tokens * self.x + 3 * self.of_latents
            others = remembered - _remembered(phase)
            yield _Snapshot(kept, pixels + incoming + activations + fresh, gradients, others)
            remembered -= _remembered(self.grouped(i, self.rows))

    def is_last(self, i: int) -> bool:
        """Whether block i is the last."""
        return i == self.blocks - 1

    @property
    def slice_groups(self) -> int:
        """Groups of a slice."""
        return self.setup.slice_groups or default_slice(self.plan.tokens_per_group, self.setup.batch)


def _remembered(stages: list[Stage]) -> int:
    return sum(stage.remembered for stage in stages)


def default_slice(tokens_per_group: int, batch: int) -> int:
    """Groups of a slice where nothing is said: as many as stay in a processor's cache."""
    return max(1, SLICE_TOKENS // (tokens_per_group * batch))
