"""A pass through the trunk in slices, forward and backward: what `Streamed` does, apart from autograd's graph."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fitformer._support.checks import check_fields, whole
from fitformer._support.rng import random_state, set_random_state
from fitformer._support.system_memory import trim_heap
from fitformer.execution._gradients import gradients_of, plus, put_slice
from fitformer.execution.base import Inputs, Trunk, exchange, run_blocks
from fitformer.execution.prefetch import prefetch
from fitformer.execution.selective_checkpoint import SAVE_POLICIES, Recompute, checkpointing, contexts
from fitformer.execution.token_store import Keep, TokenStore, make_stores

# From this many slices on, the time that trimming the heap takes does not count.
MANY_SLICES = 16

# A slice of groups, its tokens, their mask, and in the backward pass the gradient of what left the block.
Fetched = tuple[slice, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class StreamOptions:
    """What a streamed pass is told, see `fitformer.execution.Streamed`."""

    slice_groups: int | None = None
    keep: Keep = "memory"
    precision: Literal["bf16"] | None = None
    folder: str | Path | None = None
    recompute: Recompute = "full"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.slice_groups is not None:
            whole("slice_groups", self.slice_groups)


class StreamedPass:
    """One pass through a trunk, forward and backward, in slices of groups; `run_blocks` drives the forward half.

    Args:
        trunk, inputs: what is run, on what.
        options: the `Streamed` that asks for it.
        slices: of groups, in their order.
    """

    def __init__(self, trunk: Trunk, options: StreamOptions, inputs: Inputs, slices: Sequence[slice]) -> None:
        self.trunk, self.options, self.inputs, self.slices = trunk, options, inputs, slices
        self.device = inputs.latents.device
        self.last = len(trunk.blocks) - 1
        self.policy = SAVE_POLICIES[options.recompute]
        self.keys = trunk.dropout_keys(inputs.latents.shape[0], inputs.groups)
        self.stores: Sequence[TokenStore] = []
        self.entered: list[Tensor] = []
        self.graphs: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.states: dict[tuple[int, int], Any] = {}
        self.replays: dict[tuple[int, int], AbstractContextManager] = {}
        self.masks: dict[int, Tensor | None] = {}
        self.score: Tensor | None = None
        self.wanted: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.g_condition: Tensor | None = None
        self.learns = torch.is_grad_enabled()
        self.autocast = _autocast(self.device)

    def forward(
        self, tokens: Tensor | None, latents: Tensor, condition: Tensor | None, *parameters: Tensor, graph: bool
    ) -> tuple[Tensor | None, ...]:
        """The latents, the sum of scores, the tokens of `inputs.blocks`; `graph` if a backward pass will follow."""
        self.tokens, self.condition, self.parameters, self.graph = tokens, condition, parameters, graph
        self.learning = {id(parameter) for parameter in parameters if parameter.requires_grad}
        try:
            latents = run_blocks(self.trunk, self, latents)
        except BaseException:
            self._close()
            raise
        if not graph:
            self._close()
        score, wanted = self.score, [self.wanted[i] for i in self.inputs.blocks]
        self.score, self.wanted = None, {}
        return latents, score, *wanted

    def run_groups(self, i: int, latents: Tensor) -> Tensor:
        """The group phase of block i, slice by slice: latents in and out."""
        if self.graph:
            self.entered.append(latents)
        write_latents, parts = self.trunk.write_latents(latents, self.inputs.places), []
        with closing(self._fetch(i)) as fetched:
            for k, (groups, tokens, mask, _) in enumerate(fetched, start=1):
                if self.graph and i in (0, self.last):
                    # The caller's own functions run here, embedding and score, and may draw random numbers.
                    self.states[i, groups.start] = random_state(self.device)
                x = tokens if i else self.inputs.embed(groups, tokens)
                x, part = self._remembering(i, groups, x, latents[:, groups], write_latents[:, groups], mask)
                parts.append(part)
                self._leave(i, groups, x, mask)
                if k % MANY_SLICES == 0:
                    self._trim()
        return torch.cat(parts, dim=1)

    def exchange_latents(self, i: int, latents: Tensor) -> Tensor:
        """The global phase of block i, with a graph that keeps the inputs of its layers alone."""
        global_phase = self.trunk.blocks[i].global_phase
        if not self.graph:
            latents = exchange(global_phase, self.inputs, latents, self.condition)
        else:
            with torch.enable_grad():
                leaf = latents.detach().requires_grad_()
                condition = None if self.condition is None else self.condition.detach().requires_grad_()
                out = exchange(global_phase, self.inputs, leaf, condition, checkpointing(self.policy.latents))
            self.graphs.append((leaf, condition, out))
            latents = out.detach()
        self._trim()
        return latents

    def _leave(self, i: int, groups: slice, x: Tensor, mask: Tensor | None) -> None:
        """Hand out a slice's data tokens as they leave block i: to the next block, to the score, to the caller."""
        if i in self.inputs.blocks:
            if i not in self.wanted:
                self.wanted[i] = x.new_empty(x.shape[0], self.inputs.groups, *x.shape[2:])
            self.wanted[i][:, groups] = x
        if i < self.last:
            self._store(i, groups, x)
        elif self.inputs.score is not None:
            score = self.inputs.score(groups, x, mask)
            self.score = score if self.score is None else self.score + score

    def _group_phase(
        self, i: int, groups: slice, x: Tensor, latents: Tensor, write_latents: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keys = None if self.keys is None else self.keys[:, groups]
        return self.trunk.blocks[i].group_phase(x, latents, write_latents, mask, keys)

    def _remembering(
        self, i: int, groups: slice, x: Tensor, latents: Tensor, write_latents: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The group phase in the forward pass, remembering what the backward pass does not compute again."""
        if not self.graph or not self.policy.groups:
            return self._group_phase(i, groups, x, latents, write_latents, mask)
        remembering, self.replays[i, groups.start] = contexts(self.policy.groups)
        # With a graph, though nothing of it is kept: whether there is one decides how attention is computed on a GPU.
        with torch.enable_grad(), saved_tensors_hooks(_forget, _forget), remembering:
            x, latents, write_latents = (each.detach().requires_grad_() for each in (x, latents, write_latents))
            x, latents = self._group_phase(i, groups, x, latents, write_latents, mask)
        return x.detach(), latents.detach()

    def _store(self, i: int, groups: slice, x: Tensor) -> None:
        """Keep a slice's tokens as they leave block i.

        The whole space is taken with the first slice, so that a lack of it shows at once.
        """
        if not self.stores:
            b, _, n, c = x.shape
            dtype = torch.bfloat16 if self.options.precision == "bf16" else x.dtype
            folder = None if self.options.folder is None else Path(self.options.folder)
            count, shape = self.last if self.graph else 1, (b, self.inputs.groups, n, c)
            self.stores = make_stores(count, self.options.keep, shape, dtype, x, folder)
        self._store_of(i).put(groups, x)

    def _store_of(self, i: int) -> TokenStore:
        """The store of the tokens that leave block i; without a backward pass one serves all blocks."""
        return self.stores[i if self.graph else 0]

    def _fetch(self, i: int, backward: bool = False) -> Generator[Fetched, None, None]:
        """What enters block i, slice by slice, with its mask; the next one is read while this one is computed on.

        Backward, the slices come last first, with the gradient of what left the block, where the block was not the
        last.
        """

        def fetch(groups: slice) -> Fetched:
            if i == 0:
                tokens, self.masks[groups.start] = self.inputs.read(groups)
            else:
                tokens = self._store_of(i - 1).get(groups)
            g_x = self._store_of(i).get(groups) if backward and i < self.last else None
            return groups, tokens.detach(), self.masks[groups.start], g_x

        slices = self.slices[::-1] if backward else self.slices
        near = self.options.keep == "memory" and (i > 0 or self.tokens is not None)
        yield from map(fetch, slices) if near else prefetch(fetch, slices, self.device)

    def _trim(self) -> None:
        """Give the holes between live tensors back to the system, where there are many slices."""
        if self.device.type == "cpu" and len(self.slices) >= MANY_SLICES:
            trim_heap()

    def _close(self) -> None:
        for store in self.stores:
            store.close()

    def backward(
        self, g_latents: Tensor | None, g_score: Tensor | None, *g_wanted: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of tokens in memory, latents, condition and parameters, in the order of `forward`."""
        state = random_state(self.device)
        self.g_score, self.g_wanted = g_score, dict(zip(self.inputs.blocks, g_wanted, strict=True))
        learns = self.tokens is not None and self.tokens.requires_grad
        self.g_tokens = torch.empty_like(self.tokens) if learns else None  # type: ignore[arg-type]
        try:
            for i in reversed(range(self.last + 1)):
                g_latents = self._exchange_backward(i, g_latents)
                self._trim()
                g_latents = self._groups_backward(i, g_latents)
                self._trim()
        finally:
            self._close()
            set_random_state(state, self.device)
        sums = tuple(self.sums.get(id(parameter)) for parameter in self.parameters)
        return self.g_tokens, g_latents, self.g_condition, *sums

    def _exchange_backward(self, i: int, g_latents: Tensor | None) -> Tensor | None:
        leaf, condition, out = self.graphs.pop()
        if g_latents is None:
            return None
        block = self.trunk.blocks[i]
        parameters = self._learning([*block.global_layers, block.condition])
        inputs = [leaf, *([] if condition is None else [condition]), *parameters]
        g_leaf, *others = torch.autograd.grad(out, inputs, g_latents, allow_unused=True)
        if condition is not None:
            self.g_condition = plus(self.g_condition, others.pop(0))
        self._add(parameters, others, own=True)
        return g_leaf

    def _groups_backward(self, i: int, g_parts: Tensor | None) -> Tensor | None:
        """Gradient of the latents that entered block i, from that of the latents its group phase gave."""
        latents = self.entered.pop()
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            write_latents = self.trunk.write_latents(leaf, self.inputs.places)
        g_own: Tensor | None = None
        g_write: Tensor | None = None
        with closing(self._fetch(i, backward=True)) as fetched:
            for groups, tokens, mask, g_left in fetched:
                g_part = None if g_parts is None else g_parts[:, groups]
                entering = tokens, latents[:, groups], write_latents[:, groups]
                g_slice, g_of = self._slice_backward(i, groups, entering, mask, g_part, g_left)
                g_own, g_write = put_slice(g_own, groups, g_slice, latents), put_slice(g_write, groups, g_of, latents)
        if i < self.last:
            self._store_of(i).close()
        if g_write is not None and write_latents is not leaf:
            (g_write,) = torch.autograd.grad(write_latents, leaf, g_write)
        if g_own is None or g_write is None:
            return g_write if g_own is None else g_own
        return g_own.add_(g_write)

    def _slice_backward(
        self,
        i: int,
        groups: slice,
        entering: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        g_part: Tensor | None,
        g_left: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a slice's latents and write latents, from those of its latents and of what left the block."""
        with torch.enable_grad(), self.autocast():
            if (i, groups.start) in self.states:
                set_random_state(self.states.pop((i, groups.start)), self.device)
            tokens, own, write = (each.detach() for each in entering)
            inputs = [own.requires_grad_(), write.requires_grad_()]
            if i or self.g_tokens is not None:
                inputs.append(tokens.requires_grad_())
            x = tokens if i else self.inputs.embed(groups, tokens)
            with self.replays.pop((i, groups.start), nullcontext()):
                left, part = self._group_phase(i, groups, x, own, write, mask)
            outputs = [(part, g_part), *self._left(i, groups, left, mask, g_left)]
        parameters = self._group_parameters(i)
        g_own, g_write, *others = gradients_of(outputs, [*inputs, *parameters])
        if len(inputs) == 3:
            self._pass_down(i, groups, tokens, others.pop(0))
        self._add(parameters, others)
        return g_own, g_write

    def _left(
        self, i: int, groups: slice, x: Tensor, mask: Tensor | None, g_left: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """What a slice's data tokens became as they left block i, each with its gradient."""
        if i == self.last and self.inputs.score is not None and self.g_score is not None:
            outputs = [(self.inputs.score(groups, x, mask), self.g_score)]
        else:
            outputs = []
        g_wanted = self.g_wanted.get(i)
        return [*outputs, (x, plus(g_left, None if g_wanted is None else g_wanted[:, groups]))]

    def _pass_down(self, i: int, groups: slice, tokens: Tensor, g_tokens: Tensor | None) -> None:
        """Hand the gradient of a slice's tokens to the block before or to the caller."""
        g_tokens = torch.zeros_like(tokens) if g_tokens is None else g_tokens
        if i:
            self._store_of(i - 1).put(groups, g_tokens)
        elif self.g_tokens is not None:
            self.g_tokens[:, groups] = g_tokens

    def _group_parameters(self, i: int) -> list[Tensor]:
        """The parameters, and other tensors with gradients, that the group phase of block i may use."""
        block = self.trunk.blocks[i]
        parameters = self._learning([*block.local_layers, block.write, block.read])
        if i in (0, self.last):
            inside = {id(parameter) for parameter in self.trunk.blocks.parameters()}
            outside = (each for each in self.parameters if id(each) not in inside)
            parameters += [each for each in outside if id(each) in self.learning]
        return parameters

    def _learning(self, modules: Iterable[torch.nn.Module | None]) -> list[Tensor]:
        return [p for module in modules if module is not None for p in module.parameters() if id(p) in self.learning]

    def _add(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], own: bool = False) -> None:
        """Add to the sums; `own` where nothing else holds these gradients."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if id(parameter) in self.sums:
                self.sums[id(parameter)] += gradient
            else:
                # A gradient may be broadcast, or the very tensor that somebody else holds.
                self.sums[id(parameter)] = gradient if own else gradient.clone()


def _forget(_: Any) -> Any:
    """Keep nothing of a graph that is never gone back through."""


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager]:
    """The mixed precision of the moment, or that there is none, to be entered again in the backward pass."""
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    return lambda: torch.autocast(device.type, dtype, enabled=enabled)
