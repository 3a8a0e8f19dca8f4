"""Which example comes when: pure functions of (seed, epoch, rank, index), so that any run can be taken up anywhere.

Every random number comes from numpy's counter-based Philox, keyed by (seed, epoch); the upper words of its counter say
what the numbers are for, so that no two uses share a stream.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import numpy as np

from fitformer.errors import InputError

_ORDER, _EXAMPLE, _SPLIT, _PART, _BALANCED = range(5)
_WORD = 2**64
_DRAWN_AT_ONCE = 4096


def _philox(seed: int, epoch: int, purpose: int, stream: int = 0) -> np.random.Generator:
    key = np.array([seed % _WORD, epoch % _WORD], dtype=np.uint64)
    counter = np.array([0, 0, purpose, stream % _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def example_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one example in one epoch: its crop, its window."""
    return _philox(seed, epoch, _EXAMPLE, index)


@lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `length` examples in an epoch, int64 (length,), read-only."""
    order = _philox(seed, epoch, _ORDER).permutation(length)
    order.setflags(write=False)
    return order


def step_batch(
    step: int,
    length: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    order: Callable[[int], np.ndarray] | None = None,
) -> list[tuple[int, int]]:
    """The batch of one training step on one rank, as `(epoch, index)` pairs.

    The epochs' orders stand one after the other in one endless row, and every step takes its next
    `world_size * batch_size` places, `batch_size` for each rank in turn. So within an epoch nothing repeats and nothing
    is left out, and a data set smaller than a batch simply goes on into the next epoch. `order` gives the order of an
    epoch, int64 (length,); by default a permutation.
    """
    order = order or (lambda epoch: permutation(length, seed, epoch))
    first = (step * world_size + rank) * batch_size
    coords = (divmod(place, length) for place in range(first, first + batch_size))
    return [(epoch, int(order(epoch)[position])) for epoch, position in coords]


def _check(length: int, batch_size: int, rank: int, world_size: int) -> None:
    if length < 1:
        raise InputError("there are no examples to put in order: the data set is empty")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1")
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} is outside 0 .. {world_size - 1}, the ranks of a world of {world_size}")


class StepBatches:
    """Batch sampler of one endless run of training steps: the batch of step s depends on s alone.

    Iterating gives steps `start_step` to `total_steps - 1`. `len` is `total_steps` whatever `start_step` is, because
    Lightning counts the steps before a resume into the length of its one long epoch. `start_step` may be set later.
    With `labels` (length,) every class comes equally often, see `balanced_order`.

    Raises:
        InputError: an empty data set, a batch size below 1, a rank outside the world, a start after the end.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        *,
        total_steps: int,
        labels: np.ndarray | None = None,
    ):
        _check(length, batch_size, rank, world_size)
        if not 0 <= start_step <= total_steps:
            raise InputError(f"start_step is {start_step}: it must lie between 0 and total_steps, {total_steps}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_step, self.total_steps = start_step, total_steps
        self._order = None if labels is None else lru_cache(maxsize=2)(partial(balanced_order, labels, seed))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start_step, self.total_steps):
            yield step_batch(step, self.length, self.batch_size, self.seed, self.rank, self.world_size, self._order)

    def __len__(self) -> int:
        return self.total_steps


def spread_part(length: int, count: int, seed: int) -> np.ndarray:
    """The places of `count` of `length` examples, drawn by seed, int64 (count,) and ascending; all if there are fewer.

    Examples are often sorted by class: the first of them would be all of one.
    """
    if count >= length:
        return np.arange(length)
    return np.sort(_philox(seed, 0, _PART).permutation(length)[:count])


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch in which every class comes equally often, to within one: int64 (len(labels),).

    Each class goes through its own examples in turn, in a new order each time, and on from one epoch to the next; those
    of a rare class come several times in an epoch, and some of a common one in a later epoch.
    """
    length, (names, sizes) = len(labels), np.unique(labels, return_counts=True)
    # Which class each place has: whole rounds of all classes, so that none falls behind over the epochs.
    places = np.arange(epoch * length, (epoch + 1) * length)
    which, turns = places % len(names), places // len(names)
    order = np.empty(length, dtype=np.int64)
    for number, (name, size) in enumerate(zip(names, sizes.tolist())):
        own, mine = np.flatnonzero(labels == name), np.flatnonzero(which == number)
        # Of a rare class, many rounds through its examples are drawn at once.
        rounds = max(1, _DRAWN_AT_ONCE // size)
        blocks = turns[mine] // (size * rounds)
        for block in range(int(blocks[0]) if len(blocks) else 0, int(blocks[-1]) + 1 if len(blocks) else 0):
            shuffled = np.argsort(_philox(seed, block, _BALANCED, int(name)).random((rounds, size)), axis=1).ravel()
            chosen = mine[blocks == block]
            order[chosen] = own[shuffled[turns[chosen] % (size * rounds)]]
    return order[permutation(length, seed, epoch)]


class EvaluationBatches:
    """Batch sampler of one pass in order: each rank takes every `world_size`-th example, each exactly once.

    With `places` it is a pass over these examples alone.

    Nothing is padded, so ranks may differ by one example and even by one batch: sum over examples on each rank and
    reduce the sums once, at the end. (A collective call per batch would wait for ever on the longest rank.)

    Raises:
        InputError: an empty data set, a batch size below 1, a rank outside the world.
    """

    def __init__(
        self, length: int, batch_size: int, rank: int = 0, world_size: int = 1, places: np.ndarray | None = None
    ):
        _check(length, batch_size, rank, world_size)
        chosen = range(length) if places is None else places.tolist()
        self.indices, self.batch_size = chosen[rank::world_size], batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first : first + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)


def hold_out(
    length: int, share: float, seed: int, labels: np.ndarray | None = None, contents: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split `length` examples by seed into the kept and the held-out ones, each int64 and ascending.

    `round(share * length)` are held out; with `labels` (length,) each class gives its share, to within one. Examples
    of equal `contents` (length,) stay together: they go where the first of them goes, beside that number.

    Raises:
        InputError: `share` is not between 0 and 1, or leaves one side empty.
    """
    count = round(share * length)
    if not 0 < share < 1 or not 0 < count < length:
        raise InputError(
            f"holding out {share:g} of {length} examples leaves {count} held out and {length - count} to train on: "
            "choose a share between 0 and 1 that leaves some on both sides"
        )
    shuffled = _philox(seed, 0, _SPLIT).permutation(length)
    classes = np.zeros(length, dtype=np.int64) if labels is None else np.asarray(labels)
    held = np.zeros(length, dtype=bool)
    for label, quota in _quotas(classes, count):
        held[shuffled[classes[shuffled] == label][:quota]] = True
    if contents is not None:
        _, first, group = np.unique(contents, return_index=True, return_inverse=True)
        held = held[first][group]
        if held.all() or not held.any():
            raise InputError(f"all {length} examples have the same content, so none can be held out from the others")
    return np.flatnonzero(~held), np.flatnonzero(held)


def _quotas(labels: np.ndarray, count: int) -> list[tuple[int, int]]:
    """How many of `count` each label gives: its share rounded down, the rest to the largest remainders."""
    names, sizes = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(sizes * count, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: count - quotas.sum()]] += 1
    return list(zip(names.tolist(), quotas.tolist()))
