from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer.data.order import (
    EvaluationBatches,
    StepBatches,
    example_generator,
    hold_out,
    permutation,
    step_batch,
)
from fitformer.errors import InputError

sizes = {
    "length": st.integers(1, 40),
    "batch_size": st.integers(1, 9),
    "world_size": st.integers(1, 4),
    "seed": st.integers(-5, 2**63),
}


@settings(deadline=None, max_examples=30)
@given(**sizes)
def test_ranks_together_walk_through_whole_epochs_without_repeats(length, batch_size, world_size, seed):
    steps = -(-3 * length // (batch_size * world_size))
    row = [
        pair
        for step in range(steps)
        for rank in range(world_size)
        for pair in step_batch(step, length, batch_size, seed, rank, world_size)
    ]
    assert [epoch for epoch, _ in row] == sorted(epoch for epoch, _ in row)
    for epoch in range(3):
        assert sorted(index for e, index in row if e == epoch) == list(range(length))


@settings(deadline=None, max_examples=30)
@given(**sizes, start=st.integers(0, 12))
def test_a_run_taken_up_at_a_step_sees_exactly_the_tail(length, batch_size, world_size, seed, start):
    rank = seed % world_size
    whole = list(StepBatches(length, batch_size, seed, rank, world_size, total_steps=12))
    tail = StepBatches(length, batch_size, seed, rank, world_size, start, total_steps=12)
    assert list(tail) == whole[start:]
    assert len(tail) == len(whole) == 12
    tail.start_step = 0
    assert list(tail) == whole


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    np.random.seed(0)
    assert tuple(permutation.__wrapped__(50, 1, 2)) == tuple(permutation(50, 1, 2))


def test_the_random_numbers_of_examples_are_their_own():
    draws = {example_generator(s, e, i).random() for s in range(4) for e in range(4) for i in range(4)}
    assert len(draws) == 64
    assert example_generator(1, 2, 3).random() == example_generator(1, 2, 3).random()


@settings(deadline=None, max_examples=30)
@given(length=sizes["length"], batch_size=sizes["batch_size"], world_size=sizes["world_size"])
def test_evaluation_sees_each_example_once_over_all_ranks(length, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        batches = EvaluationBatches(length, batch_size, rank, world_size)
        assert len(list(batches)) == len(batches)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        seen += [index for batch in batches for _, index in batch]
    assert sorted(seen) == list(range(length))


@settings(deadline=None, max_examples=30)
@given(
    labels=st.lists(st.integers(0, 4), min_size=5, max_size=80), share=st.floats(0.15, 0.85), seed=st.integers(0, 99)
)
def test_a_held_out_part_is_a_partition_and_spreads_the_classes(labels, share, seed):
    labels = np.array(labels)
    kept, held = hold_out(len(labels), share, seed, labels)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert len(held) == round(share * len(labels))
    for label in set(labels.tolist()):
        expected = len(held) / len(labels) * (labels == label).sum()
        assert abs((labels[held] == label).sum() - expected) <= 1
    assert np.array_equal(held, hold_out(len(labels), share, seed, labels)[1])


def test_another_seed_holds_out_others():
    assert not np.array_equal(hold_out(100, 0.2, 0)[1], hold_out(100, 0.2, 1)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "empty"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 is outside 0 .. 1"),
        ({"start_step": 9}, "start_step is 9.*5"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    good = {"length": 5, "batch_size": 2, "seed": 0, "total_steps": 5}
    with pytest.raises(InputError, match=message):
        StepBatches(**(good | arguments))


@pytest.mark.parametrize(("length", "share"), [(10, 0.0), (10, 1.0), (10, 1.5), (10, -0.1), (3, 0.01), (1, 0.5)])
def test_a_split_that_empties_a_side_is_refused(length, share):
    with pytest.raises(InputError, match=f"{length} examples"):
        hold_out(length, share, seed=0)


def test_many_steps_are_cheap():
    batches = StepBatches(60_000, 128, 0, total_steps=10**9, start_step=10**8)
    assert len(list(islice(batches, 50))) == 50
