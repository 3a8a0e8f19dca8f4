"""Peak memory of a training step before it runs.

Bytes of a layer are measured (`activations.py`); how an execution composes them is written here: which exist at the
same time. Weights are float32, the optimizer is AdamW, and its state exists (every step but the first).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fitformer._support.checks import check_fields, whole
from fitformer.data.readers.cache import MOST_BYTES
from fitformer.execution._streamed_pass import MANY_SLICES
from fitformer.execution.selective_checkpoint import SAVE_POLICIES, Recompute
from fitformer.execution.streamed import default_slice
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.encoder import FITEncoder
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.models.trunk import Trunk
from fitformer.profiling.activations import (
    FLOAT,
    Numerics,
    Stage,
    dense_stage,
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

# Fitted constants, all of them, from Linux with glibc on a CPU. Everything else follows from shapes.
# PROCESS: resident memory of `fitformer bench step` with a model of a few weights: Python, torch, this library.
PROCESS = 320 * MIB
# TRAINER: what the same step in `fitformer train` takes more: Lightning, its loggers, the check of new images.
TRAINER = 150 * MIB
# DECODING: resident memory while a whole PNG or JPEG is decoded, over its pixels (Pillow holds 3 channels in 4 bytes).
DECODING = 5 / 2
# HEAP: free memory that glibc does not return to the system: a share of the working set, a constant beside it, and a
# bound, fitted to measured peaks less all the rest (`benchmarks/peaks.py` compares). Tensors below 32 MiB stand in a
# heap that fragments; MALLOC_MMAP_THRESHOLD_=524288 in the environment avoids it for a tenth more time.
HEAP = {
    "plain": (0.5, 0, 200 * MIB),
    "checkpointed": (1.0, 0, 150 * MIB),
    "checkpointed, small": (1.0, 0, 500 * MIB),
    "streamed": (0.55, 100 * MIB, 500 * MIB),
    "streamed, trimmed": (0.2, 100 * MIB, 150 * MIB),
}
SMALL_TENSOR = 32 * MIB
# REMEMBERED: the same of results that a streamed step remembers: a share of them.
REMEMBERED = 0.1
# WORKSPACE: on a GPU, what its libraries of matrix products take from torch.
WORKSPACE = 64 * MIB


@dataclass(frozen=True)
class StepConfig:
    """How a training step runs.

    Attributes:
        num_groups: groups of one example, skipped ones not counted; None for those that the model was built for.
        execution: of the trunk.
        slice_groups: groups of a slice of streamed execution; None for the default of `Streamed`.
        keep: where streamed execution keeps data tokens. kept_precision: in which precision, `bf16` takes half.
        recompute: what the streamed backward pass computes again.
        batch: examples at once. accumulate: gradients of parameters stay from one micro-step to the next.
        precision: 32, or bf16 (mixed).
        pixel_bytes: of a number of the input as it is read. decode_bytes: of the pixels that a file decodes at once at
            most: of a tile, or of a whole PNG or JPEG. conditions: tokens of a denoiser's condition.
        data_bytes: of the pixels of all files that are read piece by piece, if there are more than one.
        trainer: the step is one of `fitformer train`, which loads more libraries.
        device: cpu, where memory is that of the process, or cuda, where it is what torch allocates on the device.

    Raises:
        InputError: numbers below 1, or unknown words.
    """

    num_groups: int | None = None
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
        check_fields(self)
        for name in ("num_groups", "slice_groups", "batch"):
            if (value := getattr(self, name)) is not None:
                whole(name, value)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step.

    Attributes:
        weights: parameters and all their gradients (at an earlier peak, memory of later ones counts as slack).
        optimizer: the two averages of AdamW.
        kept: data tokens between blocks, latents, and remembered results, until the backward pass uses them.
        working: tensors of one stage, forward and backward, and pixels.
        process: Python, torch, decoded tiles; on a GPU the workspace of its libraries.
        slack: free memory that the C library has not returned, see `HEAP`; none on a GPU.
        scratch: on disk, not in the total. host: on the host of a GPU, not in the total either.
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
    """Bytes at one time of a step: kept, working, gradients of parameters so far, remembered results.

    `dense` are those of the working bytes that a segmenter's head keeps of pixels.
    """

    kept: int
    working: int
    gradients: int
    remembered: int = 0
    dense: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.working + self.gradients + self.remembered


def memory(model: Model, setup: StepConfig) -> Memory:
    """The peak of a training step of a model (on any device, also `meta`, see `on_meta`).

    Raises:
        InputError: no number of groups for a model that takes any.
    """
    step = _Step(model, setup)
    snapshots = {"plain": step.plain, "checkpointed": step.checkpointed, "streamed": step.streamed}[setup.execution]
    most = max([*snapshots(), step.optimizing()], key=lambda snapshot: snapshot.total)
    copies = 2 if setup.precision == "bf16" else 0
    away = step.boundaries if setup.execution == "streamed" else 0
    on_gpu = setup.device == "cuda"
    return Memory(
        weights=step.parameters * (2 * FLOAT + copies),
        optimizer=2 * step.parameters * FLOAT,
        kept=most.kept + most.remembered,
        working=most.working,
        process=WORKSPACE if on_gpu else PROCESS + TRAINER * setup.trainer + _decoded(step),
        slack=0 if on_gpu else _heap(most, step),
        scratch=away if setup.keep == "disk" else 0,
        host=away if setup.keep == "host" and on_gpu else 0,
    )


def _decoded(step: "_Step") -> int:
    """Bytes of decoded pixels: as many as the cache of tiles holds, or one piece of any size."""
    cached = min(MOST_BYTES, max(step.tokens * step.raw, step.setup.data_bytes))
    return max(cached, int(step.setup.decode_bytes * DECODING))


def _heap(most: _Snapshot, step: "_Step") -> int:
    """Bytes that are free at the peak and not returned to the system, see `HEAP`."""
    execution, later = step.setup.execution, step.parameters * FLOAT
    # What a segmenter keeps of pixels is in pieces of a few sizes, between which little is free.
    used = most.working - most.dense
    kind: str = execution
    if execution == "checkpointed":
        kind += ", small" if step.tokens * step.x < SMALL_TENSOR else ""
        used, later = used + most.kept, 0
    elif execution == "streamed":
        kind += ", trimmed" if step.plan.num_groups >= MANY_SLICES * step.slice_groups else ""
        later -= most.gradients
    share, constant, bound = HEAP[kind]
    held = min(constant + int(share * used), bound) + int(REMEMBERED * most.remembered)
    # Gradients of parameters that come later take free memory, and count as weights already.
    return max(held - later, 0)


class _Step:
    """Sizes of a step, and its snapshots in each execution."""

    def __init__(self, model: Model, setup: StepConfig) -> None:
        self.model = model.encoder if isinstance(model, FITImageEncoder | FITImageSegmenter) else model
        self.segmenter = model if isinstance(model, FITImageSegmenter) else None
        self.trunk: Trunk = model.trunk
        self.setup = setup
        self.plan: GroupPlan = group_plan(model, num_groups=setup.num_groups)
        self.numerics = Numerics(setup.precision)
        self.remembered = SAVE_POLICIES[setup.recompute if setup.execution == "streamed" else "full"]
        self.parameters = count_parameters(model)
        self.rows = setup.batch * self.plan.num_groups
        self.tokens = self.rows * self.plan.tokens_per_group
        self.latents = self.plan.num_groups * self.plan.latents_per_group
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
        assert isinstance(self.model, FITEncoder | FITDenoiser)
        return self.model.stem.projection.in_features * self.setup.pixel_bytes

    @property
    def slice_groups(self) -> int:
        """Groups of a slice."""
        return self.setup.slice_groups or default_slice(self.setup.device, self.plan.tokens_per_group, self.setup.batch)

    def is_last(self, i: int) -> bool:
        """Whether block i is the last."""
        return i == self.blocks - 1

    def stem(self, tokens: int) -> Stage:
        """From raw tokens to data tokens."""
        return stem_stage(self.model, tokens, self.setup.precision)

    def dense(self, tokens: int) -> int:
        """Bytes that a segmenter's head keeps of pixels."""
        return 0 if self.segmenter is None else self.head(tokens)[0].kept

    def head(self, tokens: int) -> list[Stage]:
        """From data tokens to the loss; nothing in an encoder that pools."""
        if self.segmenter is not None:
            groups = tokens // self.plan.tokens_per_group
            return [dense_stage(self.segmenter, groups, self.setup.batch, self.setup.precision)]
        return [] if isinstance(self.model, FITEncoder) else [head_stage(self.model, tokens, self.setup.precision)]

    def initial_latents(self) -> int:
        """Bytes kept of the computation of the initial latents, these included."""
        if isinstance(self.model, FITDenoiser) and self.model.self_conditioning is not None:
            stage = self_conditioning_stage(self.model, self.setup.batch, self.latents, self.setup.precision)
            return stage.kept + self.of_latents
        return self.of_latents

    def group_phase(self, i: int, rows: int) -> list[Stage]:
        """The group phase of block i on `rows` groups."""
        numerics = replace(self.numerics, kinds=self.remembered.groups)
        return list(group_stages(self.trunk, i, rows, self.plan.tokens_per_group, numerics))

    def global_phase(self, i: int) -> list[Stage]:
        """The global phase of block i."""
        numerics = replace(self.numerics, kinds=self.remembered.latents)
        return list(global_stages(self.trunk, i, self.setup.batch, self.latents, self.conditions, numerics))

    def optimizing(self) -> _Snapshot:
        """While the optimizer steps: all gradients of parameters, nothing else."""
        return _Snapshot(0, 0, self.parameters * FLOAT)

    def plain(self) -> Iterator[_Snapshot]:
        """All activations are kept; the backward pass frees them from the last layer on."""
        pixels = self.tokens * self.raw
        stages = [self.stem(self.tokens)]
        for i in range(self.blocks):
            # The gradient of the data tokens exists from their last reader on, that of the latents always.
            after = 0 if self.is_last(i) else 1
            inner = [*self.group_phase(i, self.rows), *self._with_gradient(self.global_phase(i), after)]
            stages += [replace(stage, moment=stage.moment + self.of_latents) for stage in inner]
        stages += self.head(self.tokens)
        stages = [*self._with_gradient(stages[:1]), *stages[1:]]
        activations, gradients = peak(stages, self.held)
        working, gradients = pixels + self.initial_latents() + activations, min(gradients, self.parameters * FLOAT)
        yield _Snapshot(0, working, gradients, dense=self.dense(self.tokens))

    def _with_gradient(self, stages: list[Stage], copies: int = 1) -> list[Stage]:
        """Stages during whose backward pass the gradient of all data tokens exists."""
        return [replace(stage, moment=stage.moment + copies * self.tokens * self.x) for stage in stages]

    def checkpointed(self) -> Iterator[_Snapshot]:
        """Inputs of phases are kept; one phase at a time is computed again."""
        pixels = self.tokens * self.raw
        kept = self.stem(self.tokens).kept + self.initial_latents() + self.blocks * 2 * self.of_latents
        kept += (self.blocks - 1) * self.tokens * self.x
        phases = [phase for i in range(self.blocks) for phase in (self.group_phase(i, self.rows), self.global_phase(i))]
        phases[-1] += self.head(self.tokens)
        dense = self.dense(self.tokens)
        gradients, incoming = self.held, self.tokens * self.x + self.of_latents
        for phase in reversed(phases):
            activations, most = peak(phase, gradients)
            most = min(most, self.parameters * FLOAT)
            yield _Snapshot(kept, pixels + incoming + activations, most, dense=dense if phase is phases[-1] else 0)
            gradients += sum(stage.parameters for stage in phase) * FLOAT

    def streamed(self) -> Iterator[_Snapshot]:
        """Data tokens between blocks and inputs of global layers are kept; one slice, or one layer, is computed.

        Remembered results of a slice or a layer become activations when its backward pass comes.
        """
        phases = [(self.group_phase(i, self.rows), self.global_phase(i)) for i in range(self.blocks)]
        remembered = sum(_remembered([*groups, *latents]) for groups, latents in phases)
        kept_latents = self.of_latents + self.initial_latents()
        kept_latents += sum(1 + len(latents) for _, latents in phases) * self.of_latents
        gradients = self.held
        for i in reversed(range(self.blocks)):
            kept = kept_latents + self._kept_tokens(i)
            for stage in reversed(phases[i][1]):
                remembered -= stage.remembered
                yield _Snapshot(kept, stage.kept + stage.moment + 2 * self.of_latents, gradients, remembered)
                gradients += stage.parameters * FLOAT
            working, own, parameters = self._slice(i)
            gradients += parameters * FLOAT
            yield _Snapshot(kept, working, gradients, remembered - own, self._dense_of_slice(i))
            remembered -= _remembered(phases[i][0])

    def _kept_tokens(self, i: int) -> int:
        """Bytes of data tokens in memory while block i runs backward."""
        if self.setup.keep == "disk" or (self.setup.keep == "host" and self.setup.device == "cuda"):
            return 0
        stores = min(i + 1, self.blocks - 1)
        return stores * self.boundaries // max(self.blocks - 1, 1)

    @property
    def _slice_rows(self) -> int:
        """Groups of a slice, of all examples together."""
        return self.setup.batch * min(self.slice_groups, self.plan.num_groups)

    def _dense_of_slice(self, i: int) -> int:
        """Bytes that a segmenter's head keeps of the pixels of a slice that leaves block i."""
        return self.dense(self._slice_rows * self.plan.tokens_per_group) if self.is_last(i) else 0

    def _slice(self, i: int) -> tuple[int, int, int]:
        """A slice of the group phase of block i backward: working and remembered bytes, and number of parameters."""
        rows, tokens = self._slice_rows, self._slice_rows * self.plan.tokens_per_group
        groups = self.group_phase(i, rows)
        stages = [*([] if i else [self.stem(tokens)]), *groups, *(self.head(tokens) if self.is_last(i) else [])]
        # The gradients of parameters of this slice exist beside the sums over slices, which the caller counts.
        activations, fresh = peak(stages)
        pixels, incoming = 2 * tokens * self.raw, 3 * tokens * self.x + 3 * self.of_latents
        working = pixels + incoming + activations + fresh
        return working, _remembered(stages), sum(stage.parameters for stage in stages)


def _remembered(stages: list[Stage]) -> int:
    return sum(stage.remembered for stage in stages)
