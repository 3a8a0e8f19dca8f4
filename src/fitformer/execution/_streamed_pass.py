"""A pass through the trunk in slices, forward and backward: what `Streamed` does, apart from autograd's graph."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fitformer._support.rng import random_state, set_random_state
from fitformer._support.system_memory import trim_heap
from fitformer.execution.base import Work, embedded
from fitformer.execution.prefetch import prefetch
from fitformer.execution.selective_checkpoint import SAVE_POLICIES, checkpointing, contexts
from fitformer.execution.token_store import TokenStore, make_stores
from fitformer.models.trunk import Block, Trunk

if TYPE_CHECKING:
    from fitformer.execution.streamed import Streamed

# So many slices take so long that it costs nothing to give back, after them, what they have freed.
MANY_SLICES = 16

# A slice of groups, its tokens, their mask, and in the backward pass a gradient.
Found = tuple[slice, Tensor, Tensor | None, Tensor | None]


class Pass:
    """One pass through the trunk, forward and backward, in slices.

    With `whole`, data tokens come from and go to a tensor in memory; else they are read, embedded and scored by slice.
    """

    def __init__(
        self, trunk: Trunk, how: "Streamed", work: Work, role: Any = None, *, tokens: int, whole: bool = False
    ) -> None:
        self.trunk, self.how, self.work, self.role, self.whole = trunk, how, work, role, whole
        self.device = work.latents.device
        self.slices = how.slices(work, tokens)
        self.last = len(trunk.blocks) - 1
        self.remembered = SAVE_POLICIES[how.recompute]
        self.keys = trunk.group_keys(work.latents.shape[0], work.groups)
        self.kept: Sequence[TokenStore] = []
        self.entered: list[Tensor] = []
        self.graphs: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.states: dict[tuple[int, int], Any] = {}
        self.recalls: dict[tuple[int, int], AbstractContextManager] = {}
        self.masks: dict[int, Tensor | None] = {}
        self.sums: dict[int, Tensor] = {}
        self.g_condition: Tensor | None = None
        self.learns = torch.is_grad_enabled()
        self.autocast = _autocast(self.device)

    def forward(
        self, x: Tensor | None, latents: Tensor, condition: Tensor | None, parameters: Sequence[Tensor], graph: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Tokens of the input's shape or the sum of scores, and the latents; `graph` if a backward pass will follow."""
        self.x, self.condition, self.parameters, self.graph = x, condition, parameters, graph
        self.wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
        self.out = None if x is None else torch.empty_like(x)
        try:
            for i in range(self.last + 1):
                if graph:
                    self.entered.append(latents)
                latents = self._global(i, self._groups(i, latents))
                self._tidy()
        except BaseException:
            self._close()
            raise
        if not graph:
            self._close()
        out, self.out = self.out, None
        return out, latents

    def _groups(self, i: int, latents: Tensor) -> Tensor:
        """The group phase of block i: latents in and out."""
        source, parts = self.trunk.write_source(latents), []
        with closing(self._tokens(i)) as found:
            for k, (groups, tokens, mask, _) in enumerate(found, start=1):
                if self.graph and self._calls_back(i):
                    self.states[i, groups.start] = random_state(self.device)
                x = self._enter(i, groups, tokens)
                x, part = self._remembering(i, groups, x, latents[:, groups], source[:, groups], mask)
                parts.append(part)
                self._leave(i, groups, x, mask)
                if k % MANY_SLICES == 0:
                    self._tidy()
        return torch.cat(parts, dim=1)

    def _calls_back(self, i: int) -> bool:
        """Whether block i runs functions of the caller's own, which may draw random numbers: embedding, scores."""
        return i in (0, self.last) and not self.whole

    def _enter(self, i: int, groups: slice, tokens: Tensor) -> Tensor:
        """A slice's data tokens as they enter block i."""
        return tokens if i or self.whole else embedded(self.role, self.work, groups, tokens)

    def _leave(self, i: int, groups: slice, x: Tensor, mask: Tensor | None) -> None:
        """A slice's data tokens as they leave block i: kept for the next one, or handed out."""
        if i < self.last:
            self._keep(i, groups, x)
        elif self.out is not None and self.whole:
            self.out[:, groups] = x
        elif self.work.score is not None:
            score = self._score(groups, x, mask)
            self.out = score if self.out is None else self.out + score

    def _score(self, groups: slice, x: Tensor, mask: Tensor | None) -> Tensor:
        assert self.work.score is not None
        return self.work.score(groups, self.role.finish(x), mask)

    def _group(
        self, i: int, groups: slice, x: Tensor, latents: Tensor, source: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keys = None if self.keys is None else self.keys[:, groups]
        return self.trunk.group_phase(i, x, latents, source, mask, keys)

    def _remembering(
        self, i: int, groups: slice, x: Tensor, latents: Tensor, source: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The group phase in the forward pass, remembering what the backward pass is not to compute again."""
        if not self.graph or not self.remembered.groups:
            return self._group(i, groups, x, latents, source, mask)
        remembering, self.recalls[i, groups.start] = contexts(self.remembered.groups)
        # With a graph, though nothing of it is kept: whether there is one decides how attention is computed on a GPU.
        with torch.enable_grad(), saved_tensors_hooks(_forgotten, _forgotten), remembering:
            x, latents, source = (each.detach().requires_grad_() for each in (x, latents, source))
            x, latents = self._group(i, groups, x, latents, source, mask)
        return x.detach(), latents.detach()

    def _global(self, i: int, latents: Tensor) -> Tensor:
        """The global phase, with a graph that keeps the inputs of its layers alone."""
        if not self.graph:
            return self.trunk.global_phase(i, latents, self.condition)
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            condition = None if self.condition is None else self.condition.detach().requires_grad_()
            out = self.trunk.global_phase(i, leaf, condition, call=checkpointing(self.remembered.latents))
        self.graphs.append((leaf, condition, out))
        return out.detach()

    def _keep(self, i: int, groups: slice, x: Tensor) -> None:
        """Keep a slice's tokens as they leave block i.

        All room is taken with the first slice, so that a lack of it shows at once.
        """
        if not self.kept:
            b, _, n, c = x.shape
            dtype = torch.bfloat16 if self.how.precision == "bf16" else x.dtype
            folder = None if self.how.folder is None else Path(self.how.folder)
            count = self.last if self.graph else 1
            self.kept = make_stores(count, self.how.keep, (b, self.work.groups, n, c), dtype, x, folder)
        self._room(i).put(groups, x)

    def _room(self, i: int) -> TokenStore:
        """Of the tokens that leave block i; without a backward pass one room does for all blocks."""
        return self.kept[i if self.graph else 0]

    def _tokens(self, i: int, backward: bool = False) -> Generator[Found, None, None]:
        """What enters block i, slice by slice, with its mask; the next one is read while this one is computed on.

        Backward, the slices come last first, with the gradient of what left the block, where the block was not the
        last.
        """

        def fetch(groups: slice) -> Found:
            if i == 0:
                tokens, self.masks[groups.start] = self.work.read(groups)
            else:
                tokens = self._room(i - 1).get(groups)
            g_x = self._room(i).get(groups) if backward and i < self.last else None
            return groups, tokens, self.masks[groups.start], g_x

        slices = self.slices[::-1] if backward else self.slices
        near = self.how.keep == "memory" and (i > 0 or self.whole)
        yield from map(fetch, slices) if near else prefetch(fetch, slices, self.device)

    def _tidy(self) -> None:
        """Give back the holes that freed tensors left between those that stay, or between others of another phase."""
        if self.device.type == "cpu" and len(self.slices) >= MANY_SLICES:
            trim_heap()

    def _close(self) -> None:
        for kept in self.kept:
            kept.close()

    def backward(self, g_out: Tensor | None, g_latents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the data tokens in memory, of latents, condition and parameters, in the order of `forward`."""
        state = random_state(self.device)
        self.g_x = None if self.x is None or not self.x.requires_grad else torch.empty_like(self.x)
        try:
            for i in reversed(range(self.last + 1)):
                g_latents = self._global_backward(i, g_latents)
                self._tidy()
                g_latents = self._groups_backward(i, g_out, g_latents)
                self._tidy()
        finally:
            self._close()
            set_random_state(state, self.device)
        sums = tuple(self.sums.get(id(parameter)) for parameter in self.parameters)
        return self.g_x, g_latents, self.g_condition, *sums

    def _global_backward(self, i: int, g_latents: Tensor | None) -> Tensor | None:
        leaf, condition, out = self.graphs.pop()
        if g_latents is None:
            return None
        block: Block = self.trunk.blocks[i]  # type: ignore[assignment]
        parameters = self._learning([*block.global_layers, block.condition])
        inputs = [leaf, *([] if condition is None else [condition]), *parameters]
        g_leaf, *others = torch.autograd.grad(out, inputs, g_latents, allow_unused=True)
        if condition is not None:
            g_condition = others.pop(0)
            if g_condition is not None:
                self.g_condition = g_condition if self.g_condition is None else self.g_condition + g_condition
        self._add(parameters, others, own=True)
        return g_leaf

    def _groups_backward(self, i: int, g_out: Tensor | None, g_parts: Tensor | None) -> Tensor | None:
        """Gradient of the latents that entered block i, from that of the latents its group phase gave."""
        latents = self.entered.pop()
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            source = self.trunk.write_source(leaf)
        g_own: Tensor | None = None
        g_source: Tensor | None = None
        with closing(self._tokens(i, backward=True)) as found:
            for groups, tokens, mask, g_left in found:
                if i == self.last:
                    g_left = g_out[:, groups] if self.whole and g_out is not None else g_out
                g_part = None if g_parts is None else g_parts[:, groups]
                own, of = latents[:, groups], source[:, groups]
                g_slice, g_of = self._slice_backward(i, groups, tokens, mask, own, of, g_part, g_left)
                g_own, g_source = _put(g_own, groups, g_slice, latents), _put(g_source, groups, g_of, latents)
        if i < self.last:
            self._room(i).close()
        if g_source is not None and source is not leaf:
            (g_source,) = torch.autograd.grad(source, leaf, g_source)
        if g_own is None or g_source is None:
            return g_source if g_own is None else g_own
        return g_own.add_(g_source)

    def _slice_backward(
        self,
        i: int,
        groups: slice,
        tokens: Tensor,
        mask: Tensor | None,
        latents: Tensor,
        source: Tensor,
        g_part: Tensor | None,
        g_left: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the latents and of the source of a slice, from those of its latents and of what left it.

        What left it are the tokens of block i, or at the end the score.
        """
        with torch.enable_grad(), self.autocast():
            if (i, groups.start) in self.states:
                set_random_state(self.states.pop((i, groups.start)), self.device)
            own, of = (each.detach().requires_grad_() for each in (latents, source))
            entered = [] if i == 0 and not self.whole else [tokens.detach().requires_grad_()]
            x = entered[0] if entered else self._enter(i, groups, tokens)
            with self.recalls.pop((i, groups.start), nullcontext()):
                left, part = self._group(i, groups, x, own, of, mask)
            if i == self.last and not self.whole and g_left is not None:
                left = self._score(groups, left, mask)
        parameters = self._group_parameters(i)
        outputs = [(part, g_part), (left, g_left)]
        g_own, g_of, *others = _gradients(outputs, [own, of, *entered, *parameters])
        if entered:
            self._pass_down(i, groups, x, others.pop(0))
        self._add(parameters, others)
        return g_own, g_of

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
        if self._calls_back(i):
            inside = {id(parameter) for parameter in self.trunk.blocks.parameters()}
            found += [each for each in self.parameters if id(each) not in inside and id(each) in self.wanted]
        return found

    def _learning(self, modules: Iterable[torch.nn.Module | None]) -> list[Tensor]:
        return [p for module in modules if module is not None for p in module.parameters() if id(p) in self.wanted]

    def _add(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], own: bool = False) -> None:
        """Add to the sums; `own` where nobody else holds these gradients."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if id(parameter) in self.sums:
                self.sums[id(parameter)] += gradient
            else:
                # A gradient may be broadcast, or the very tensor that somebody else holds.
                self.sums[id(parameter)] = gradient if own else gradient.clone()


def _put(whole: Tensor | None, groups: slice, part: Tensor | None, like: Tensor) -> Tensor | None:
    """Put the part of a slice of groups in its place; what no slice has a part of stays None."""
    if part is None:
        return whole
    whole = torch.zeros_like(like) if whole is None else whole
    whole[:, groups] = part
    return whole


def _gradients(outputs: Sequence[tuple[Tensor, Tensor | None]], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the inputs from those of the outputs; None where nothing leads from one to the other."""
    reached = [(out, g.to(out.dtype)) for out, g in outputs if g is not None and out.requires_grad]
    if not reached:
        return [None] * len(inputs)
    ends, gradients = zip(*reached, strict=True)
    return list(torch.autograd.grad(ends, inputs, gradients, allow_unused=True))


def _forgotten(_: Any) -> Any:
    """What autograd keeps of a graph that nobody goes back through."""


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager]:
    """The mixed precision of the moment, or that there is none, to be entered again in the backward pass."""
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    return lambda: torch.autocast(device.type, dtype, enabled=enabled)
