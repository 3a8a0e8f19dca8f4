"""Streaming: the group phase runs over slices of groups, whose pixels are read when it is their turn.

Kept are the data tokens between blocks (`kept.py`) and the latents; everything else is computed again in the backward
pass, slice by slice and global layer by global layer, under the same random state. There the gradients of the data
tokens take the place of the tokens. So memory holds one slice at a time, whatever the size of the input.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fitformer.errors import InputError
from fitformer.execution.kept import Keep, Kept, room
from fitformer.execution.work import ByWork, Work, embedded
from fitformer.trunk import Block, Trunk

# Tokens of a slice where its size is not given: what a local layer makes of them stays in a processor's cache.
SLICE_TOKENS = 4096


@dataclass(frozen=True)
class Streamed(ByWork):
    """Run the trunk over slices of groups.

    Attributes:
        groups: of a slice, over all examples of the batch alike; by default so many that they hold 4,096 data tokens.
        keep: where the data tokens between blocks are kept: in the `memory` of the device that computes, on the `host`,
            or on `disk`.
        precision: in which they are kept, that of the computation by default; in `bf16` results are no longer exact.
        folder: for the scratch file; the system's folder for temporary files by default.

    Raises:
        InputError: a slice of no groups, an unknown place or precision.
    """

    groups: int | None = None
    keep: Keep = "memory"
    precision: Literal["bf16"] | None = None
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and self.groups < 1:
            raise InputError(f"a slice of {self.groups} groups; it needs at least 1")
        if self.keep not in get_args(Keep):
            raise InputError(f"keep is {self.keep!r}; known are {', '.join(get_args(Keep))}")
        if self.precision not in (None, "bf16"):
            raise InputError(f"precision is {self.precision!r}; data tokens are kept as they are (None) or in 'bf16'")

    def __call__(
        self, trunk: Trunk, x: Tensor, latents: Tensor, condition: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the trunk on data tokens that are in memory, and put its tokens there; see `total` for others."""

        def read(groups: slice) -> tuple[Tensor, Tensor | None]:
            return x.detach()[:, groups], None if mask is None else mask[:, groups]

        work = Work(x.shape[1], latents, read, condition=condition)
        done = _Pass(trunk, self, work, tokens=x.shape[2], whole=True)
        return _Stream.apply(done, x, latents, condition, *trunk.parameters())

    def total(self, role: Any, work: Work) -> tuple[Tensor | None, Tensor]:
        """The sum of scores over slices and the latents, as `fitformer.execution.total` has it."""
        done = _Pass(role.trunk, self, work, role, tokens=role.tokens_per_group)
        return _Stream.apply(done, None, work.latents, work.condition, *role.parameters(), *work.depends_on)

    def slices(self, work: Work, tokens_per_group: int) -> list[slice]:
        """The slices of groups, in their order."""
        size = self.groups or max(1, SLICE_TOKENS // (tokens_per_group * work.latents.shape[0]))
        return [slice(k, min(k + size, work.groups)) for k in range(0, work.groups, size)]


class _Stream(torch.autograd.Function):
    """A `_Pass` as one node of autograd's graph; parameters are inputs, so that whatever hooks on to them is told."""

    @staticmethod
    def forward(ctx: Any, done: "_Pass", x: Tensor | None, latents: Tensor, condition: Any, *parameters: Tensor) -> Any:
        ctx.done = done
        return done.forward(x, latents, condition, parameters, graph=done.learns and any(ctx.needs_input_grad))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor | None, g_latents: Tensor) -> Any:
        return None, *ctx.done.backward(g_out, g_latents)


class _Pass:
    """One pass through the trunk, forward and backward, in slices.

    With `whole`, data tokens come from and go to a tensor in memory; else they are read, embedded and scored by slice.
    """

    def __init__(
        self, trunk: Trunk, how: Streamed, work: Work, role: Any = None, *, tokens: int, whole: bool = False
    ) -> None:
        self.trunk, self.how, self.work, self.role, self.whole = trunk, how, work, role, whole
        self.slices = how.slices(work, tokens)
        self.last = len(trunk.blocks) - 1
        self.keys = trunk.group_keys(work.latents.shape[0], work.groups)
        self.kept: list[Kept | None] = []
        self.entered: list[Tensor] = []
        self.graphs: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.states: dict[tuple[int, int], Any] = {}
        self.masks: dict[int, Tensor | None] = {}
        self.learns = torch.is_grad_enabled()
        self.autocast = _autocast(work.latents.device)

    def forward(
        self, x: Tensor | None, latents: Tensor, condition: Tensor | None, parameters: Sequence[Tensor], graph: bool
    ) -> tuple[Tensor | None, Tensor]:
        self.x, self.condition, self.parameters, self.graph = x, condition, parameters, graph
        self.wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
        out: Tensor | None = torch.empty_like(x) if self.whole and x is not None else None
        for i in range(self.last + 1):
            source, parts = self.trunk.write_source(latents), []
            for groups, tokens, mask in self._tokens(i, self.slices):
                with self._noting(i, groups):
                    y, part = self._group(i, groups, self._enter(i, groups, tokens), latents, source, mask)
                    parts.append(part)
                    if i < self.last:
                        self._keep(i, groups, y)
                    elif self.whole and out is not None:
                        out[:, groups] = y
                    elif self.work.score is not None:
                        score = self.work.score(groups, self.role.finish(y), mask)
                        out = score if out is None else out + score
            self.entered.append(latents if graph else latents[:0])
            latents = self._global(i, torch.cat(parts, dim=1))
        if not graph:
            self._close()
        return out, latents

    def _enter(self, i: int, groups: slice, tokens: Tensor) -> Tensor:
        """A slice's data tokens as they enter block i."""
        return tokens if i or self.whole else embedded(self.role, self.work, groups, tokens)

    def _group(
        self, i: int, groups: slice, x: Tensor, latents: Tensor, source: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keys = None if self.keys is None else self.keys[:, groups]
        return self.trunk.group_phase(i, x, latents[:, groups], source[:, groups], mask, keys)

    def _global(self, i: int, latents: Tensor) -> Tensor:
        """The global phase, with a graph that keeps the inputs of its layers alone."""
        if not self.graph:
            return self.trunk.global_phase(i, latents, self.condition)
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            condition = None if self.condition is None else self.condition.detach().requires_grad_()
            out = self.trunk.global_phase(i, leaf, condition, call=_checkpoint)
        self.graphs.append((leaf, condition, out))
        return out.detach()

    def _keep(self, i: int, groups: slice, x: Tensor) -> None:
        """Keep a slice's tokens as they leave block i; without a backward pass one room does for all blocks."""
        if not self.kept or (self.graph and i == len(self.kept)):
            b, _, n, c = x.shape
            dtype = torch.bfloat16 if self.how.precision == "bf16" else x.dtype
            folder = None if self.how.folder is None else Path(self.how.folder)
            self.kept.append(room(self.how.keep, (b, self.work.groups, n, c), dtype, x, folder))
        self._room(i).put(groups, x)

    def _room(self, i: int) -> Kept:
        kept = self.kept[i if self.graph else 0]
        assert kept is not None
        return kept

    def _tokens(self, i: int, slices: Sequence[slice]) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """What enters block i, slice by slice; the next one is read while this one is computed on."""

        def fetch(groups: slice) -> tuple[slice, Tensor, Tensor | None]:
            if i == 0:
                tokens, mask = self.work.read(groups)
                self.masks[groups.start] = mask
                return groups, tokens, mask
            return groups, self._room(i - 1).get(groups), self.masks[groups.start]

        near = self.whole if i == 0 else self.how.keep == "memory"
        yield from map(fetch, slices) if near else ahead(fetch, slices)

    @contextmanager
    def _noting(self, i: int, groups: slice) -> Iterator[None]:
        """Note the random state in which a caller's own functions run."""
        if self.graph and i in (0, self.last) and not self.whole:
            self.states[i, groups.start] = _random_state(self.work.latents.device)
        yield

    def _close(self) -> None:
        for kept in self.kept:
            if kept is not None:
                kept.close()
        self.kept = []

    def backward(self, g_out: Tensor | None, g_latents: Tensor) -> tuple[Tensor | None, ...]:
        if not self.entered:
            raise RuntimeError("the backward pass of a streamed pass can run once only: it overwrites what was kept")
        device = self.work.latents.device
        state = _random_state(device)
        self.sums: dict[int, Tensor] = {}
        self.g_x = torch.empty_like(self.x) if self.whole and self.x is not None else None
        self.g_condition: Tensor | None = None
        try:
            for i in reversed(range(self.last + 1)):
                g_latents = self._global_backward(i, g_latents)
                g_latents = self._group_backward(i, g_out, g_latents)
        finally:
            self._close()
            self.entered, self.graphs = [], []
            _set_random_state(state, device)
        sums = tuple(self.sums.get(id(parameter)) for parameter in self.parameters)
        return self.g_x, g_latents, self.g_condition, *sums

    def _global_backward(self, i: int, g_latents: Tensor) -> Tensor:
        leaf, condition, out = self.graphs.pop()
        if out is leaf or out.grad_fn is None:
            return g_latents
        block: Block = self.trunk.blocks[i]  # type: ignore[assignment]
        parameters = self._learning([*block.global_layers, block.condition])
        inputs = [leaf, *([] if condition is None else [condition]), *parameters]
        g_leaf, *others = torch.autograd.grad(out, inputs, g_latents, allow_unused=True)
        if condition is not None:
            g_condition = others.pop(0)
            if g_condition is not None:
                self.g_condition = g_condition if self.g_condition is None else self.g_condition + g_condition
        self._add(parameters, others)
        return g_leaf

    def _group_backward(self, i: int, g_out: Tensor | None, g_parts: Tensor) -> Tensor:
        """Gradient of the latents that entered block i, from that of the latents its group phase gave."""
        latents = self.entered.pop()
        with torch.enable_grad():
            whole = latents.detach().requires_grad_()
            whole_source = self.trunk.write_source(whole)
        g_entered, g_source = torch.zeros_like(latents), torch.zeros_like(latents)
        source = whole_source.detach()
        parameters = self._group_parameters(i)
        for groups, tokens, mask in self._tokens(i, self.slices[::-1]):
            with torch.enable_grad(), self.autocast(), self._replaying(i, groups):
                own, of = (each[:, groups].detach().requires_grad_() for each in (latents, source))
                x = tokens.detach().requires_grad_() if i or self.whole else self._enter(i, groups, tokens)
                keys = None if self.keys is None else self.keys[:, groups]
                y, part = self.trunk.group_phase(i, x, own, of, mask, keys)
                outputs = [(part, g_parts[:, groups])]
                if i < self.last:
                    outputs.append((y, self._room(i).get(groups)))
                elif self.whole and g_out is not None:
                    outputs.append((y, g_out[:, groups]))
                elif self.work.score is not None and g_out is not None:
                    outputs.append((self.work.score(groups, self.role.finish(y), mask), g_out))
            inputs = [own, of, *([x] if i or self.whole else []), *parameters]
            g_part, g_src, *others = _gradients(outputs, inputs)
            if g_part is not None:
                g_entered[:, groups] = g_part
            if g_src is not None:
                g_source[:, groups] = g_src
            if i or self.whole:
                self._pass_down(i, groups, x, others.pop(0))
            self._add(parameters, others)
        if i < self.last:
            self._room(i).close()
            self.kept[i] = None
        (back,) = torch.autograd.grad(whole_source, whole, g_source) if whole_source is not whole else (g_source,)
        return g_entered + back

    def _pass_down(self, i: int, groups: slice, x: Tensor, g_x: Tensor | None) -> None:
        """The gradient of a slice's tokens, to the block before or to the caller."""
        g_x = torch.zeros_like(x) if g_x is None else g_x
        if i:
            self._room(i - 1).put(groups, g_x)
        elif self.g_x is not None:
            self.g_x[:, groups] = g_x

    def _group_parameters(self, i: int) -> list[Tensor]:
        """The parameters, and other tensors with gradients, that the group phase of block i may use."""
        block: Block = self.trunk.blocks[i]  # type: ignore[assignment]
        found = self._learning([*block.local_layers, block.write, block.read])
        if not self.whole and i in (0, self.last):
            inside = {id(parameter) for parameter in self.trunk.blocks.parameters()}
            found += [each for each in self.parameters if id(each) not in inside and id(each) in self.wanted]
        return found

    def _learning(self, modules: Iterable[torch.nn.Module | None]) -> list[Tensor]:
        return [p for module in modules if module is not None for p in module.parameters() if id(p) in self.wanted]

    def _add(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if id(parameter) in self.sums:
                self.sums[id(parameter)] += gradient
            else:
                # A gradient may be broadcast, or the very tensor that somebody else holds.
                self.sums[id(parameter)] = gradient.clone()

    @contextmanager
    def _replaying(self, i: int, groups: slice) -> Iterator[None]:
        if (i, groups.start) in self.states:
            _set_random_state(self.states.pop((i, groups.start)), self.work.latents.device)
        yield


def _gradients(outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the inputs from those of the outputs; None where nothing leads from one to the other."""
    reached = [(out, gradient.to(out.dtype)) for out, gradient in outputs if out.requires_grad]
    if not reached:
        return [None] * len(inputs)
    ends, gradients = zip(*reached, strict=True)
    return list(torch.autograd.grad(ends, inputs, gradients, allow_unused=True))


def _checkpoint(layer: torch.nn.Module, *inputs: Tensor | None) -> Tensor:
    return checkpoint(layer, *inputs, use_reentrant=False)


def ahead(fetch: Callable[[slice], Any], slices: Sequence[slice]) -> Iterator[Any]:
    """What `fetch` gives for each slice; another thread fetches the next one while the caller is busy with this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="fitformer-read") as pool:
        following = pool.submit(fetch, slices[0])
        for groups in slices[1:]:
            found, following = following.result(), pool.submit(fetch, groups)
            yield found
        yield following.result()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager]:
    """The mixed precision of the moment, to be entered again in the backward pass."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype)
