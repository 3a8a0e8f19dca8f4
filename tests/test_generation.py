"""Drawing tokens, against decoders whose conditional distributions are known, and with the real one."""

import math

import pytest
import torch

from fitformer import FITDecoder, generation
from fitformer.errors import InputError


class Counting:
    """Predicts, with certainty, the sum of all tokens before plus one, so any token misplaced or missed shows."""

    num_groups, tokens_per_group, vocab_size = 3, 4, 11

    def __init__(self):
        self.groups = []

    def __call__(self, tokens):
        self.groups.append(tokens.shape[1])
        assert tokens.shape[1] <= self.num_groups
        assert tokens.shape[2] == self.tokens_per_group
        answer = (tokens.flatten(1).cumsum(1) + 1) % self.vocab_size
        return 100.0 * torch.nn.functional.one_hot(answer, self.vocab_size).unflatten(1, tokens.shape[1:])


class Chain:
    """A Markov chain over 3 tokens; the token before the first is 0."""

    num_groups, tokens_per_group, vocab_size = 4, 5, 3
    table = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5], [0.9, 0.1, 0.0]])

    def __call__(self, tokens):
        return self.table.log()[tokens]


def counted(prompt, length):
    row = list(prompt)
    while len(row) < length:
        row.append((sum(row) + 1) % Counting.vocab_size)
    return row


@pytest.fixture(scope="module")
def real():
    torch.manual_seed(0)
    decoder = FITDecoder.from_config(
        layers="(1)1(1)1(1)",
        num_groups=3,
        tokens_per_group=4,
        latents_per_group=2,
        vocab_size=13,
        dim=16,
        latent_dim=16,
        heads=2,
        latent_heads=2,
    ).eval()
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return decoder


# ---- the loop ----


@pytest.mark.parametrize("begun", range(13))
def test_every_token_follows_from_all_before_it(begun):
    prompt = torch.randint(0, 11, (2, begun), generator=torch.Generator().manual_seed(begun))
    given = generation.generate(Counting(), prompt, 12)
    assert given.dtype == torch.int64
    assert given.tolist() == [counted(row, 12) for row in prompt.tolist()]


def test_only_groups_begun_are_run():
    decoder = Counting()
    generation.generate(decoder, None, 12)
    assert decoder.groups == [1] * 4 + [2] * 4 + [3] * 4


def test_samples_follow_the_conditional_distribution():
    given = generation.generate(Chain(), None, 20, count=400, seed=5)
    before = torch.cat([torch.zeros(400, 1, dtype=torch.int64), given[:, :-1]], dim=1)
    for token in range(3):
        found = torch.bincount(given[before == token], minlength=3).float()
        torch.testing.assert_close(found / found.sum(), Chain.table[token], atol=0.03, rtol=0)
        assert (found[Chain.table[token] == 0] == 0).all()


def test_sample_depends_on_seed_and_number_alone(real):
    whole = generation.generate(real, None, 12, count=5, seed=3)
    parts = [generation.generate(real, None, 12, count=k, first=first, seed=3) for first, k in [(0, 1), (1, 3), (4, 1)]]
    assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 5
    assert not torch.equal(generation.generate(real, None, 12, count=5, seed=4), whole)


def test_a_sequence_goes_on_the_same_from_any_of_its_beginnings(real):
    whole = generation.generate(real, None, 12, count=2)
    for begun in range(1, 13):
        assert torch.equal(generation.generate(real, whole[:, :begun], 12), whole)


def test_greedy_is_the_argmax_of_the_whole_sequence(real):
    given = generation.generate(real, torch.tensor([[3, 1], [7, 12]]), 12, temperature=0)
    shifted = torch.nn.functional.pad(given, (1, -1)).reshape(2, 3, 4)
    assert torch.equal(real(shifted).argmax(-1).flatten(1)[:, 2:], given[:, 2:])
    assert torch.equal(given, generation.generate(real, given[:, :2], 12, temperature=0, seed=9))


def test_step_sees_nothing_of_the_future(real):
    step, tokens = generation.uncached(real), torch.randint(0, 13, (1, 12))
    for position in range(12):
        shifted = torch.nn.functional.pad(tokens, (1, -1))
        shifted[:, position + 1 :] = torch.randint(0, 13, (1, 11 - position))
        whole = real(shifted.reshape(1, 3, 4)).flatten(1, 2)[:, position]
        torch.testing.assert_close(step(tokens[:, :position]), whole, atol=1e-4, rtol=1e-4)


def test_step_may_be_replaced():
    lengths = []

    def step(tokens):
        lengths.append(tokens.shape[1])
        return torch.eye(11)[[4, 5]] * 100

    given = generation.generate(Counting(), torch.tensor([[1], [2]]), 4, step=step)
    assert given.tolist() == [[1, 4, 4, 4], [2, 5, 5, 5]]
    assert lengths == [1, 2, 3]


def test_window_goes_past_the_length_with_the_last_groups():
    decoder = Counting()
    given = generation.generate(decoder, torch.tensor([[5, 2]]), 30, window=True)[0].tolist()
    assert given[:12] == counted([5, 2], 12)
    for position in range(12, 30):
        start = (position // 4 - 2) * 4
        assert given[position] == (sum(given[start:position]) + 1) % 11
    assert max(decoder.groups) == 3


def test_window_with_a_prompt_longer_than_the_decoder():
    prompt = torch.randint(0, 11, (1, 23))
    given = generation.generate(Counting(), prompt, 24, window=True)
    assert given[0, 23] == (prompt[0, 12:].sum() + 1) % 11


def test_stop_ends_rows_one_by_one_and_then_the_run():
    seen = []
    # 1, 2, 4, 8 and then 5 follow from nothing; 3, 4, 8 and then 5 from a 3.
    prompt = torch.tensor([[1], [3]])
    given = generation.generate(
        Counting(), prompt, 12, stop=8, on_token=lambda p, column: seen.append((p, column.tolist()))
    )
    assert given.tolist() == [[1, 2, 4, 8], [3, 4, 8, 8]]
    assert seen == [(1, [2, 4]), (2, [4, 8]), (3, [8, 8])]
    assert generation.generate(Counting(), torch.tensor([[8]]), 3, stop=8).shape == (1, 3)


def test_stream_has_every_column_and_prompt_is_untouched():
    columns, prompt = [], torch.tensor([[2, 1]], dtype=torch.uint8)
    given = generation.generate(Chain(), prompt, 9, on_token=lambda p, column: columns.append(column))
    assert torch.equal(torch.stack(columns, 1), given[:, 2:])
    assert prompt.tolist() == [[2, 1]]
    assert torch.equal(generation.generate(Chain(), given, 9), given)


def test_gradients_are_not_kept(real):
    assert not generation.generate(real, None, 2).requires_grad


# ---- filters and the draw ----


def test_temperature_sharpens_and_flattens():
    logits = torch.randn(4, 9)
    torch.testing.assert_close(generation.filter_logits(logits, 0.5).softmax(-1), (2 * logits).softmax(-1))
    assert generation.filter_logits(logits, 1e-45).softmax(-1).isfinite().all()


def test_temperature_zero_keeps_the_first_of_the_likeliest():
    kept = generation.filter_logits(torch.tensor([[1.0, 3, 3, 2], [5, 5, 5, 5]]), 0).isfinite()
    assert kept.tolist() == [[False, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize("k", [1, 3, 9, 20])
def test_top_k_keeps_the_k_largest_even_among_equals(k):
    logits = torch.randint(0, 4, (50, 9)).float()
    given = generation.filter_logits(logits, top_k=k)
    kept = given.isfinite()
    assert (kept.sum(-1) == min(k, 9)).all()
    assert (logits.masked_fill(~kept, 99).amin(-1) >= logits.masked_fill(kept, -99).amax(-1)).all()
    torch.testing.assert_close(given[kept], (logits - logits.amax(-1, keepdim=True))[kept])


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 1.0])
def test_top_p_keeps_the_smallest_sufficient_set(p):
    probability = torch.randn(50, 9).mul(2).softmax(-1)
    kept = generation.filter_logits(probability.log(), top_p=p).isfinite()
    mass = (probability * kept).sum(-1)
    least = probability.masked_fill(~kept, 2).amin(-1)
    assert (mass >= p - 1e-5).all()
    assert (mass - least < p + 1e-5).all()
    assert (least >= probability.masked_fill(kept, -1).amax(-1)).all()


def test_keeping_all_changes_nothing():
    logits = 20 * torch.randn(50, 300)
    assert torch.equal(
        generation.filter_logits(logits, top_k=300, top_p=1.0).isfinite(), torch.ones(50, 300, dtype=torch.bool)
    )
    assert torch.equal(generation.filter_logits(logits, top_p=1.0), generation.filter_logits(logits))


def test_top_p_counts_within_top_k():
    given = generation.filter_logits(torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), top_k=2, top_p=0.56)
    assert given.isfinite().tolist() == [[True, False, False, False]]


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log().expand(6, 6)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert generation.draw(logits, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_draw_never_gives_an_impossible_token_at_the_edge():
    logits = torch.randn(500, 300).masked_fill(torch.rand(500, 300) < 0.5, -math.inf)
    logits[:, -1] = -math.inf
    for edge in (0.0, 1 - 2**-53):
        drawn = generation.draw(logits, torch.full((500,), edge, dtype=torch.float64))
        assert logits.gather(1, drawn.unsqueeze(1)).isfinite().all()


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, 13), {}, r"length of 13 is beyond the decoder's 12 \(3 groups of 4 tokens\).*window=True"),
        ((torch.zeros(1, 5, dtype=torch.int64), 4), {}, "prompt has 5 tokens, more than the length of 4"),
        ((torch.tensor([[1, 11]]), 4), {}, r"token 11, the vocabulary has 11 \(0 to 10\)"),
        ((torch.tensor([[-1]]), 4), {}, "token -1"),
        ((torch.tensor([1, 2]), 4), {}, r"\(2,\); give integer tokens"),
        ((torch.ones(1, 2), 4), {}, "float32"),
        ((None, 4), {"count": 0}, "count is 0"),
        ((None, 4), {"temperature": -1.0}, "temperature is -1"),
        ((None, 4), {"temperature": math.nan}, "temperature is nan"),
        ((None, 4), {"top_k": 0}, "top_k is 0"),
        ((None, 4), {"top_p": 0.0}, "top_p is 0"),
        ((None, 4), {"top_p": 1.5}, "top_p is 1.5"),
        ((None, 4), {"stop": 11}, "stop token 11"),
        ((None, 4), {"step": lambda tokens: torch.full((1, 11), math.nan)}, "not finite"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(InputError, match=message):
        generation.generate(Counting(), *arguments, **options)


def test_plain_step_refuses_what_the_decoder_cannot_reach():
    with pytest.raises(InputError, match="beyond the decoder's 12"):
        generation.uncached(Counting())(torch.zeros(1, 12, dtype=torch.int64))
