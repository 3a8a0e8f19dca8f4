"""Cached decoding: the two phases of an autoregressive trunk, a token or a group at a time.

What later tokens can see of a finished group is its m latents. So decoding remembers the keys and values of the current
group's tokens in each local layer, those of all latents in each global layer, and nothing else: n + t * m tokens, where
a dense transformer remembers t * n. A token costs the same wherever it stands, but for one global phase a group.

Tokens inside a group go through local layers one by one (`CachedTrunk.run_tokens`), on a GPU as one graph; whole groups
at a group's start run side by side through the blocks' own two phases (`CachedTrunk.run_groups`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fitformer.errors import InputError
from fitformer.execution._fused_layers import FusedLayer, FusedWrite, Places
from fitformer.execution._token_graph import TokenGraph


@dataclass
class Cache:
    """What a trunk remembers of the tokens that each row has read.

    Attributes:
        position: data tokens read by each row.
        tensors: rows first. `BLOCK.local.LAYER` keys and values `(b, 2, h, n, e)` of the current group; `BLOCK.tokens`
            data tokens `(b, n, c)` of the current group as `read` will see them; `BLOCK.latents.LAYER` keys and values
            `(b, 2, h, s, e)` of the latents so far, with room for more; `BLOCK.before` latents `(b, m, d)` of the group
            before, and `BLOCK.write` their keys and values `(b, 2, h, m, e)` for the write of this block.
    """

    position: list[int]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, room for more included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def select(self, rows: Sequence[int]) -> "Cache":
        """A copy of some rows, in any order, any of them several times."""
        index = torch.tensor(rows, dtype=torch.int64)
        tensors = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()}
        return Cache([self.position[row] for row in rows], tensors)

    @torch.inference_mode()
    def put(self, rows: Sequence[int], other: "Cache") -> None:
        """Replace some rows by those of another cache."""
        for row, position in zip(rows, other.position, strict=True):
            self.position[row] = position
        for name, tensor in other.tensors.items():
            if ".latents." in name:
                self.tensors[name] = _with_room(self.tensors[name], tensor.shape[3])
                self.tensors[name][list(rows), :, :, : tensor.shape[3]] = tensor
            else:
                self.tensors[name][list(rows)] = tensor


class CachedTrunk:
    """A causal trunk run with a cache. The trunk must be in eval mode, or have no dropout.

    The fused weights of local layers are copies: later changes of the trunk's weights are not seen.

    Args:
        trunk: a `Trunk` with `causal="all"`.

    Raises:
        InputError: a trunk that is not causal inside its groups, or one in training mode with dropout.
    """

    def __init__(self, trunk: Any) -> None:
        if not trunk.shifts_write:
            raise InputError(
                "the trunk is not causal inside its groups: only autoregressive decoders are run with a cache"
            )
        if trunk.training and trunk.drops_out:
            raise InputError("the decoder is in training mode and drops out at random; call decoder.eval() first")
        self.trunk, self.window = trunk, trunk.config.global_window
        self.n, self.m = trunk.tokens_per_group, trunk.latents_per_group
        self.last = len(trunk.blocks) - 1
        self.local = [[FusedLayer(layer) for layer in block.local_layers] for block in trunk.blocks]
        self.graph = TokenGraph(self.n)
        self.writes = [None if block.write is None else FusedWrite(block.write) for block in trunk.blocks]

    def start(self, batch: int) -> Cache:
        """The cache of `batch` rows that have read nothing."""
        like, tensors = next(self.trunk.parameters()), {}
        latents = self.trunk.initial_latents(batch, 1)[:, 0]
        for i, block in enumerate(self.trunk.blocks):
            for j, layer in enumerate(self.local[i]):
                if layer.heads:
                    tensors[f"{i}.local.{j}"] = like.new_zeros(batch, 2, layer.heads, self.n, layer.width)
            if i:
                tensors[f"{i}.before"] = torch.zeros_like(latents)
                tensors[f"{i}.write"] = torch.stack(block.write.project(torch.zeros_like(latents)), dim=1)
            if i < self.last:
                tensors[f"{i}.tokens"] = like.new_zeros(batch, self.n, self.trunk.config.dim)
                for j, layer in enumerate(block.global_layers):
                    heads = layer.attention.heads
                    tensors[f"{i}.latents.{j}"] = like.new_empty(batch, 2, heads, 0, latents.shape[-1] // heads)
        return Cache([0] * batch, tensors)

    def run_tokens(self, cache: Cache, x: Tensor) -> Tensor:
        """Read the next tokens of each row's current group; the cache moves on.

        Args:
            cache: where the rows stand: anywhere, if one token is read, else at one place.
            x: data tokens `(b, k, c)`, no more than the group has room for.

        Returns:
            data tokens `(b, k, c)` as they leave the trunk.
        """
        starts = [position % self.n for position in cache.position]
        if x.is_cuda and x.shape[1] == 1:
            x = self.graph(self.through_blocks, cache.tensors, x, starts)
        else:
            x = self.through_blocks(cache.tensors, x, Places.of(starts, x.shape[1], x.device))
        cache.position = [position + x.shape[1] for position in cache.position]
        self._finish_groups(cache)
        return x

    def through_blocks(self, tensors: dict[str, Tensor], x: Tensor, at: "Places") -> Tensor:
        """Writes and local layers of all blocks on new tokens `(b, k, c)` of the current groups.

        Nothing but tensors is read and written, so that it can be captured and compiled.
        """
        for i, (write, local) in enumerate(zip(self.writes, self.local, strict=True)):
            x = x if write is None else write(x, tensors[f"{i}.write"])
            for j, layer in enumerate(local):
                x = layer(x, tensors.get(f"{i}.local.{j}"), at)
            if i < self.last:
                at.put(tensors[f"{i}.tokens"], x, dim=1)
        return x

    def run_groups(self, cache: Cache, x: Tensor) -> Tensor:
        """Read whole groups side by side; the cache moves on.

        Args:
            cache: rows that stand at the start of one group.
            x: data tokens `(b, t, n, c)`.

        Returns:
            data tokens `(b, t, n, c)` as they leave the trunk.
        """
        groups, first = x.shape[1], cache.position[0] // self.n
        latents = self._initial_latents(len(x), first, groups)
        for i, block in enumerate(self.trunk.blocks):
            before = cache.tensors[f"{i}.before"].unsqueeze(1) if i else torch.zeros_like(latents[:, :1])
            write_latents = torch.cat([before, latents[:, :-1]], dim=1)
            if i:
                self._remember_before(cache, i, latents[:, -1])
            x, latents = block.group_phase(x, latents, write_latents)
            if i < self.last:
                latents = self._global_phase(cache, i, latents, first, None)
        cache.position = [position + groups * self.n for position in cache.position]
        return x

    def _finish_groups(self, cache: Cache) -> None:
        """Run the global phase for the rows whose group is complete."""
        ended: dict[int, list[int]] = {}
        for row, position in enumerate(cache.position):
            if position % self.n == 0:
                ended.setdefault(position // self.n - 1, []).append(row)
        for group, rows in ended.items():
            self._finish_group(cache, group, None if len(rows) == len(cache.position) else rows)

    def _finish_group(self, cache: Cache, group: int, rows: list[int] | None) -> None:
        """The latents of one group, of some rows or of all: what the whole groups' phases do after local layers."""
        batch = len(cache.position) if rows is None else len(rows)
        latents = self._initial_latents(batch, group, 1)[:, 0]
        for i, block in enumerate(self.trunk.blocks[: self.last]):
            latents = block.read(latents, _rows(cache.tensors[f"{i}.tokens"], rows))
            latents = self._global_phase(cache, i, latents.unsqueeze(1), group, rows)[:, 0]
            self._remember_before(cache, i + 1, latents, rows)

    def _remember_before(self, cache: Cache, i: int, latents: Tensor, rows: list[int] | None = None) -> None:
        """Keep the latents `(b, m, d)` that block i's write of the next group attends to."""
        to = slice(None) if rows is None else rows
        before, write = cache.tensors[f"{i}.before"], cache.tensors[f"{i}.write"]
        before[to] = latents.to(before.dtype)
        write[to] = torch.stack(self.trunk.blocks[i].write.project(latents), dim=1).to(write.dtype)

    def _initial_latents(self, batch: int, first: int, groups: int) -> Tensor:
        places = torch.arange(first, first + groups, device=next(self.trunk.parameters()).device)
        return self.trunk.initial_latents(batch, groups, places=places)

    def _global_phase(self, cache: Cache, i: int, latents: Tensor, first: int, rows: list[int] | None) -> Tensor:
        """The global phase of block i on latents `(b, t, m, d)` of groups from `first` on, and on earlier ones."""
        block, groups = self.trunk.blocks[i], latents.shape[1]
        numbers = {id(layer): j for j, layer in enumerate(block.global_layers)}
        places = torch.arange(first, first + groups, device=latents.device)

        def call(layer: Any, latents: Tensor, mask: None, band: Any, random: None, positions: Tensor | None) -> Tensor:
            memory = partial(self._memory, cache, f"{i}.latents.{numbers[id(layer)]}", first, rows)
            # The latents of one group attend to all that are handed out. Where the document began is not asked.
            band = replace(band, starts=None) if groups > 1 else 0
            return layer(latents, mask, band, random, positions, memory)

        return block.global_phase(latents, places=places, call=call)

    def _memory(
        self, cache: Cache, name: str, first: int, rows: list[int] | None, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of latents of groups from `first` on; returns all that these latents attend to."""
        # Mixed precision computes some of them in another type.
        added = torch.stack([key.to(value.dtype), value], dim=1).to(cache.tensors[name].dtype)
        end = first + key.shape[2] // self.m
        begin, after = self._begin(first), self._begin(end)
        reach = begin if self.window is None else max(begin, first - self.window + 1)
        to = slice(None) if rows is None else rows
        kept = cache.tensors[name] = _with_room(cache.tensors[name], (end - after) * self.m, self._most_places())
        if after == begin:
            kept[to, :, :, (first - begin) * self.m : (end - begin) * self.m] = added
            known = _rows(kept[:, :, :, : (end - begin) * self.m], rows)
        else:
            known = torch.cat([_rows(kept[:, :, :, : (first - begin) * self.m], rows), added], dim=3)
            kept[to, :, :, : (end - after) * self.m] = known[:, :, :, (after - begin) * self.m :]
        return known[:, :, :, (reach - begin) * self.m :].unbind(1)  # type: ignore[return-value]

    def _begin(self, groups: int) -> int:
        """The first group whose latents are kept after so many: with a window, room for two windows is used up, and
        then the last of them is moved to the front."""
        if self.window is None:
            return 0
        return max(-(-(groups - 2 * self.window) // (self.window + 1)), 0) * (self.window + 1)

    def _most_places(self) -> int | None:
        """Places for latents that are enough; None if there is no end."""
        limits = [self.trunk.most_groups, None if self.window is None else 2 * self.window]
        most = min((limit for limit in limits if limit is not None), default=None)
        return None if most is None else most * self.m


def _rows(tensor: Tensor, rows: list[int] | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _with_room(kept: Tensor, places: int, most: int | None = None) -> Tensor:
    """Keys and values `(b, 2, h, s, e)` with at least so many places; they grow by a quarter, to `most`."""
    if kept.shape[3] >= places:
        return kept
    grown = max(places, kept.shape[3] * 5 // 4)
    grown = grown if most is None else max(places, min(grown, most))
    wider = kept.new_zeros(*kept.shape[:3], grown, kept.shape[4])
    wider[:, :, :, : kept.shape[3]] = kept
    return wider
