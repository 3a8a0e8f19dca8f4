"""A decoder that remembers what it has read: `fitformer.execution.cached` from tokens to logits.

The caller feeds the decoder's inputs, tokens shifted right by one, and gets the very logits that the decoder gives at
their positions when it runs on all of them. Inputs may come in pieces of any length; whole groups run side by side.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fitformer._support.atomic_files import write_atomically
from fitformer._support.checks import checked, whole
from fitformer._support.json_text import parse_json
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.execution._fused_layers import Places
from fitformer.execution.cached import Cache, CachedTrunk
from fitformer.execution.streamed import default_slice
from fitformer.generation._compiled_token import kind_of, run_compiled
from fitformer.patching.sequence import check_vocabulary

# Of a class-conditional decoder, among the tensors of the cache: `(b, 1)`.
LABELS = "labels"


@dataclass
class DecodingState:
    """What a decoder remembers of the inputs that each row has read.

    Attributes:
        cache: of the trunk.
    """

    cache: Cache

    @property
    def position(self) -> list[int]:
        """Inputs read by each row."""
        return self.cache.position

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes

    def select(self, rows: "list[int] | Tensor") -> "DecodingState":
        """A copy of some rows, in any order, any of them several times.

        Raises:
            InputError: a row that there is not.
        """
        rows = [int(row) for row in rows]
        outside = [row for row in rows if not 0 <= row < len(self.position)]
        if outside:
            raise InputError(
                f"there is no row {outside[0]}: the state has {len(self.position)} (0 to {len(self.position) - 1})"
            )
        return DecodingState(self.cache.select(rows))

    def clone(self) -> "DecodingState":
        """A copy of all rows."""
        return self.select(list(range(len(self.position))))

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file; `CachedDecoder.load` reads it."""
        tensors = {name: tensor.contiguous() for name, tensor in self.cache.tensors.items()}
        with write_atomically(Path(path)) as scratch:
            save_file(tensors, scratch, metadata={"position": json.dumps(self.position)})


class CachedDecoder:
    """An autoregressive decoder run with a cache.

    Args:
        decoder: a `FITDecoder` in eval mode. Later changes of its weights are not seen.
        compile: compile what a token needs on a CPU, at the first token, which takes up to half a minute.

    Raises:
        InputError: the decoder is in training mode with dropout, or on a GPU with `compile`.
    """

    @checked
    def __init__(self, decoder: Any, *, compile: bool = False) -> None:
        self.decoder = decoder
        self.trunk = CachedTrunk(decoder.trunk)
        self.n: int = decoder.tokens_per_group
        device = next(decoder.parameters()).device
        if compile and device.type != "cpu":
            raise InputError(f"compile is for a CPU, and the decoder is on {device}: leave it out")
        self.kind = kind_of(decoder) if compile else None

    @torch.inference_mode()
    def start(self, batch: int = 1, labels: Tensor | None = None) -> DecodingState:
        """The state of `batch` rows that have read nothing; `labels (b,)` are classes, for a class-conditional decoder.

        Raises:
            InputError: a batch below 1, labels that do not go with the decoder.
        """
        self.decoder.check_labels(labels, whole("batch", batch))
        cache = self.trunk.start(batch)
        if labels is not None:
            cache.tensors[LABELS] = labels[:, None].to(next(self.decoder.parameters()).device, torch.int64, copy=True)
        return DecodingState(cache)

    @torch.inference_mode()
    def feed(self, state: DecodingState, inputs: Tensor, last: bool = False) -> Tensor:
        """Read the next inputs of every row; the state moves on.

        Args:
            state: of `start`; rows may stand at different positions.
            inputs: integer tokens shifted right by one `(b, k)`: the first input is 0, input p is token p - 1.
            last: give the logits of the last position alone.

        Returns:
            logits `(b, k, vocab)`, or `(b, 1, vocab)`: at each position those of the token there, given all before it.

        Raises:
            InputError: inputs of another shape or kind, outside the vocabulary, or beyond the decoder's length. The
                state is as before.
        """
        self._check(state, inputs)
        if inputs.shape[1] > 1 and len(set(state.position)) > 1:
            return self._feed_apart(state, inputs, last)
        if self.kind is not None and inputs.shape[1] == 1 and self._amid_group(state.position):
            return self._feed_compiled(state.cache, inputs, self.kind)
        pieces, done = [], 0
        while done < inputs.shape[1]:
            x = self._read(state.cache, inputs[:, done:] if done else inputs)
            done += x.shape[1]
            if done == inputs.shape[1] or not last:
                pieces.append(self.decoder.head(x[:, -1:] if last else x))
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def _amid_group(self, position: list[int]) -> bool:
        """Whether all rows stand at one place, neither the first nor the last of a group, which differ in shapes."""
        return len(set(position)) == 1 and 0 < position[0] % self.n < self.n - 1

    def _feed_compiled(self, cache: Cache, inputs: Tensor, kind: Hashable) -> Tensor:
        # Latents, which grow, are none of a token's business amid its group.
        tensors = {name: tensor for name, tensor in cache.tensors.items() if ".latents." not in name}
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        logits = run_compiled(kind, CachedDecoder._token, self, tensors, inputs, cache.position[0] % self.n)
        cache.position = [position + 1 for position in cache.position]
        return logits

    def _token(self, tensors: dict[str, Tensor], inputs: Tensor, place: int) -> Tensor:
        """Logits `(b, 1, vocab)` of one input `(b, 1)` of each row amid its group: what is compiled."""
        x = self.decoder.embed(inputs, place)
        return self.decoder.head(self.trunk.through_blocks(tensors, x, Places.together(place, 1, x.device)))

    def _read(self, cache: Cache, inputs: Tensor) -> Tensor:
        """Data tokens `(b, k, c)` of the first inputs, as they leave the trunk: of whole groups, or of part of one."""
        together = len(set(cache.position)) == 1
        place, length = cache.position[0] % self.n if together else -1, inputs.shape[1]
        if place == 0 and length >= self.n:
            groups = min(length // self.n, default_slice(inputs.device.type, self.n, len(inputs)))
            grouped = inputs[:, : groups * self.n].unflatten(1, (groups, self.n))
            return self.trunk.run_groups(cache, self._embed(cache, grouped, 0)).flatten(1, 2)
        if not together:
            places = torch.tensor([[each % self.n] for each in cache.position], device=inputs.device)
            return self.trunk.run_tokens(cache, self._embed(cache, inputs, places))
        inputs = inputs if length <= self.n - place else inputs[:, : self.n - place]
        return self.trunk.run_tokens(cache, self._embed(cache, inputs, place))

    def _embed(self, cache: Cache, inputs: Tensor, place: int | Tensor) -> Tensor:
        """As `decoder.embed`, with classes for rows that have read nothing yet."""
        labels = cache.tensors.get(LABELS)
        if labels is None or 0 not in cache.position:
            return self.decoder.embed(inputs, place)
        begun = torch.tensor(cache.position, device=labels.device) > 0
        return self.decoder.embed(inputs, place, labels[:, 0].masked_fill(begun, -1))

    def _feed_apart(self, state: DecodingState, inputs: Tensor, last: bool) -> Tensor:
        """Feed rows that stand at different positions, those at one position together."""
        pieces: list[Tensor] = [inputs] * len(inputs)
        for rows in rows_by(state.position).values():
            some = state.select(rows)
            for row, logits in zip(rows, self.feed(some, inputs[rows], last), strict=True):
                pieces[row] = logits
            state.cache.put(rows, some.cache)
        return torch.stack(pieces)

    def _check(self, state: DecodingState, inputs: Tensor) -> None:
        if inputs.ndim != 2 or not inputs.shape[1] or len(inputs) != len(state.position):
            rows = len(state.position)
            raise InputError(
                f"inputs are {tuple(inputs.shape)}; the state has {rows} rows: give ({rows}, k), k at least 1"
            )
        check_vocabulary(inputs, self.decoder.vocab_size)
        groups, end = self.decoder.most_groups, max(state.position) + inputs.shape[1]
        if groups is not None and end > groups * self.n:
            raise InputError(
                f"{end} inputs are beyond the decoder's {groups * self.n} ({groups} groups of {self.n} tokens); feed "
                "fewer, or start again with the last groups"
            )

    def check_room(self, batch: int, length: int) -> None:
        """Refuse rows of so many tokens whose latents this machine has no memory to remember.

        Raises:
            InputError: names both amounts.
        """
        config, trunk = self.trunk.trunk.config, self.trunk.trunk
        groups = min(-(-length // self.n), 2 * (config.global_window or length))
        layers = sum(len(block.global_layers) for block in trunk.blocks)
        numbers = 2 * batch * layers * groups * config.latents_per_group * config.latent_dim
        check_room(f"a cache of the latents of {groups} groups of {batch} rows, without a window of fewer,", numbers)

    def load(self, path: str | Path) -> DecodingState:
        """A state that `DecodingState.save` wrote for this decoder, on the decoder's device.

        Raises:
            InputError: a file that is no such state, or one of another decoder's shapes.
        """
        labels = torch.zeros(1, dtype=torch.int64) if self.decoder.num_classes else None
        device, like = next(self.decoder.parameters()).device, self.start(labels=labels).cache.tensors
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                position = parse_json((file.metadata() or {})["position"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} is no state of decoding ({error})") from error
        if any(_kind(tensors.get(name)) != _kind(tensor) for name, tensor in like.items()) or len(tensors) != len(like):
            raise InputError(
                f"{path} is the state of a decoder of another size; load it with the decoder that saved it"
            )
        return DecodingState(Cache(position, tensors))


def rows_by(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """The rows that each key belongs to."""
    rows: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return rows


def _kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What is the same in all states of a decoder: all axes but the rows and the growing places of latents."""
    return None if tensor is None else (tensor.dtype, tensor.ndim, *tensor.shape[1:3], tensor.shape[-1])
