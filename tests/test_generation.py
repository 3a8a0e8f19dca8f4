"""Drawing tokens, against decoders whose conditional distributions are known, and with the real one."""

import math

import pytest
import torch

import fitformer
from fitformer import FITDecoder, generation
from fitformer.errors import InputError


class Counting:
    """Predicts, with certainty, the sum of all tokens before plus one, so any token misplaced or missed shows."""

    most_groups, tokens_per_group, vocab_size = 3, 4, 11

    def __init__(self):
        self.groups = []

    def __call__(self, tokens):
        self.groups.append(tokens.shape[1])
        assert tokens.shape[1] <= self.most_groups
        assert tokens.shape[2] == self.tokens_per_group
        answer = (tokens.flatten(1).cumsum(1) + 1) % self.vocab_size
        return 100.0 * torch.nn.functional.one_hot(answer, self.vocab_size).unflatten(1, tokens.shape[1:])


class Chain:
    """A Markov chain over 3 tokens; the token before the first is 0."""

    most_groups, tokens_per_group, vocab_size = 4, 5, 3
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

PLAIN = {"use_cache": False}
DRAWN = {"do_sample": True, **PLAIN}


@pytest.mark.parametrize("begun", range(13))
def test_every_token_follows_from_all_before_it(begun):
    prompt = torch.randint(0, 11, (2, begun), generator=torch.Generator().manual_seed(begun))
    given = generation.generate(Counting(), prompt, max_new_tokens=12 - begun, **PLAIN)
    assert given.dtype == torch.int64
    assert given.tolist() == [counted(row, 12) for row in prompt.tolist()]


def test_only_groups_begun_are_run():
    decoder = Counting()
    generation.generate(decoder, max_new_tokens=12, **PLAIN)
    assert decoder.groups == [1] * 4 + [2] * 4 + [3] * 4


def test_samples_follow_the_conditional_distribution():
    given = generation.generate(Chain(), max_new_tokens=20, num_return_sequences=400, seed=5, **DRAWN)
    before = torch.cat([torch.zeros(400, 1, dtype=torch.int64), given[:, :-1]], dim=1)
    for token in range(3):
        found = torch.bincount(given[before == token], minlength=3).float()
        torch.testing.assert_close(found / found.sum(), Chain.table[token], atol=0.03, rtol=0)
        assert (found[Chain.table[token] == 0] == 0).all()


@pytest.mark.parametrize("use_cache", [True, False])
def test_sample_depends_on_seed_and_number_alone(real, use_cache):
    def drawn(count, first=0, seed=3):
        options = {"num_return_sequences": count, "first": first, "seed": seed, "use_cache": use_cache}
        return real.generate(max_new_tokens=12, do_sample=True, **options)

    whole = drawn(5)
    assert torch.equal(torch.cat([drawn(k, first) for first, k in [(0, 1), (1, 3), (4, 1)]]), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 5
    assert not torch.equal(drawn(5, seed=4), whole)


def test_cached_and_uncached_draw_the_same(real):
    options = {"max_new_tokens": 12, "num_return_sequences": 7, "do_sample": True, "temperature": 1.3}
    assert torch.equal(real.generate(**options), real.generate(use_cache=False, **options))


def test_a_sequence_goes_on_the_same_from_any_of_its_beginnings(real):
    whole = real.generate(max_new_tokens=12, num_return_sequences=2, do_sample=True)
    for begun in range(1, 13):
        given = real.generate(whole[:, :begun], max_new_tokens=12 - begun, do_sample=True)
        assert torch.equal(given, whole)


def test_greedy_is_the_argmax_of_the_whole_sequence(real):
    given = real.generate(torch.tensor([[3, 1], [7, 12]]), max_new_tokens=10)
    shifted = torch.nn.functional.pad(given, (1, -1)).reshape(2, 3, 4)
    assert torch.equal(real(shifted).argmax(-1).flatten(1)[:, 2:], given[:, 2:])
    assert torch.equal(given, real.generate(given[:, :2], max_new_tokens=10, do_sample=True, temperature=0, seed=9))


def test_prompts_of_several_lengths_are_each_as_alone(real):
    prompts = [[], [3], [5, 6, 7, 8], [1, 2, 3, 4, 5, 6], [9] * 7]
    options = {"max_new_tokens": 5, "do_sample": True, "seed": 2}
    together = real.generate(prompts, **options)
    for k, (prompt, row) in enumerate(zip(prompts, together, strict=True)):
        alone = real.generate(torch.tensor([prompt], dtype=torch.int64), first=k, **options)[0]
        assert row.tolist() == alone.tolist()
        assert row[: len(prompt)].tolist() == prompt
    assert [row.tolist() for row in real.generate(prompts, use_cache=False, **options)] == [
        row.tolist() for row in together
    ]


def test_several_sequences_of_a_prompt_stand_together(real):
    prompt = torch.tensor([[3, 1], [7, 12]])
    given = real.generate(prompt, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert given[:, :2].tolist() == [[3, 1]] * 3 + [[7, 12]] * 3
    assert len({tuple(row) for row in given.tolist()}) == 6


def test_step_sees_nothing_of_the_future(real):
    step, tokens = generation.Uncached(real), torch.randint(0, 13, (1, 12))
    for position in range(12):
        shifted = torch.nn.functional.pad(tokens, (1, -1))
        shifted[:, position + 1 :] = torch.randint(0, 13, (1, 11 - position))
        whole = real(shifted.reshape(1, 3, 4)).flatten(1, 2)[:, position]
        torch.testing.assert_close(step(tokens[:, :position], [0]), whole, atol=1e-4, rtol=1e-4)


def test_step_may_be_replaced():
    lengths = []

    def step(tokens, starts):
        lengths.append(tokens.shape[1])
        return torch.eye(11)[[4, 5]] * 100

    given = generation.generate(Counting(), torch.tensor([[1], [2]]), max_new_tokens=3, step=step)
    assert given.tolist() == [[1, 4, 4, 4], [2, 5, 5, 5]]
    assert lengths == [1, 2, 3]


# ---- a window ----


def test_context_drops_half_of_its_groups_when_they_are_full():
    n, groups = 4, 6
    starts = [generation.context_start(position, n, groups) for position in range(100)]
    assert starts[: n * groups] == [0] * n * groups
    for position, start in enumerate(starts):
        assert start % n == 0
        assert 0 <= position // n - start // n < groups
        assert position < n * groups or position - start >= n * (groups // 2)
    assert set(starts) == {0, 12, 24, 36, 48, 60, 72, 84}
    assert generation.context_start(10**9, n, None) == 0


def test_window_goes_past_the_length_with_the_last_groups():
    decoder = Counting()
    given = generation.generate(decoder, torch.tensor([[5, 2]]), max_new_tokens=28, window=3, **PLAIN)[0].tolist()
    assert given[:12] == counted([5, 2], 12)
    for position in range(12, 30):
        start = generation.context_start(position, 4, 3)
        assert given[position] == (sum(given[start:position]) + 1) % 11
    assert max(decoder.groups) == 3


def test_window_with_a_prompt_longer_than_the_decoder():
    prompt = torch.randint(0, 11, (1, 23))
    given = generation.generate(Counting(), prompt, max_new_tokens=1, window=3, **PLAIN)
    assert given[0, 23] == (prompt[0, generation.context_start(23, 4, 3) :].sum() + 1) % 11


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_cached_window_is_the_uncached_one(real, window):
    prompts = [[3], list(range(9)), [5] * 14]
    options = {"max_new_tokens": 20, "window": window, "do_sample": True}
    cached, plain = (real.generate(prompts, use_cache=use_cache, **options) for use_cache in (True, False))
    assert [row.tolist() for row in cached] == [row.tolist() for row in plain]


# ---- ends ----


def test_end_token_ends_rows_one_by_one_and_then_the_run():
    # 1, 2, 4, 8 and then 5 follow from nothing; 3, 4, 8 and then 5 from a 3.
    options = {"max_new_tokens": 11, "eos_token_id": 8, **PLAIN}
    columns = list(generation.stream(Counting(), torch.tensor([[1], [3]]), **options))
    given = generation.generate(Counting(), torch.tensor([[1], [3]]), **options)
    assert given.tolist() == [[1, 2, 4, 8], [3, 4, 8, 8]]
    assert [column.tolist() for column in columns] == [[2, 4], [4, 8], [8, 8]]
    rows = generation.generate(Counting(), [[1], [3]], pad_token_id=9, **options)
    assert [row.tolist() for row in rows] == [[1, 2, 4, 8], [3, 4, 8]]
    assert generation.generate(Counting(), torch.tensor([[8]]), max_new_tokens=2, eos_token_id=8, **PLAIN).shape == (
        1,
        3,
    )
    both = generation.generate(Counting(), torch.tensor([[1]]), max_new_tokens=9, eos_token_id=[8, 4], **PLAIN)
    assert both.tolist() == [[1, 2, 4]]


def test_stop_strings_end_a_sequence_and_the_prompt_does_not_count():
    options = {"max_new_tokens": 8, "stop_strings": [b"\x02\x04", "\x05\x01"], **PLAIN}
    assert generation.generate(Counting(), [[1], [1, 2, 4]], **options)[0].tolist() == [1, 2, 4]
    # The stop string that the prompt ends in, or begins, is none.
    assert generation.generate(Counting(), [[1, 2, 4]], **options)[0].tolist() == counted([1, 2, 4], 11)
    assert generation.generate(Counting(), [[1, 2]], **options)[0].tolist() == counted([1, 2], 10)


def test_stopping_criteria_and_logits_processors_are_asked():
    seen = []

    def forbid_fours(tokens, logits):
        seen.append(tokens.tolist())
        return logits.index_fill(1, torch.tensor([4]), -math.inf)

    def long_enough(tokens, logits):
        return torch.tensor([tokens.shape[1] == 3, tokens.shape[1] == 4])

    given = generation.generate(
        Counting(),
        torch.tensor([[1], [2]]),
        max_new_tokens=9,
        logits_processor=[forbid_fours],
        stopping_criteria=[long_enough],
        **PLAIN,
    )
    assert given.shape == (2, 4)
    assert not (given == 4).any()
    assert seen[0] == [[1], [2]]
    assert given[0, 3] == 0


def test_repetition_penalty_forbids_what_was_there():
    prompt = torch.tensor([[0]])
    assert generation.generate(Chain(), prompt, max_new_tokens=2, **PLAIN).tolist() == [[0, 0, 0]]
    given = generation.generate(Chain(), prompt, max_new_tokens=2, repetition_penalty=1e3, **PLAIN)
    assert given.tolist() == [[0, 1, 2]]
    scores = generation.penalize_repetition(torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[True, True, False]]), 2.0)
    assert scores.tolist() == [[1.0, -4.0, 3.0]]


# ---- streaming ----


class Listener:
    def __init__(self):
        self.heard, self.ended = [], 0

    def put(self, tokens):
        self.heard.append(tokens)

    def end(self):
        self.ended += 1


def test_stream_has_every_column_and_prompt_is_untouched():
    listener, prompt = Listener(), torch.tensor([[2, 1]], dtype=torch.uint8)
    given = generation.generate(Chain(), prompt, max_new_tokens=7, streamer=listener, **DRAWN)
    assert torch.equal(torch.cat([listener.heard[0], *(each[:, None] for each in listener.heard[1:])], 1), given)
    assert listener.ended == 1
    assert prompt.tolist() == [[2, 1]]
    assert torch.equal(
        torch.stack(list(generation.stream(Chain(), prompt, max_new_tokens=7, **DRAWN)), 1), given[:, 2:]
    )
    assert torch.equal(generation.generate(Chain(), given, max_new_tokens=0, **DRAWN), given)


def test_seed_may_come_from_a_generator(real):
    options = {"max_new_tokens": 12, "do_sample": True}
    one, two = (real.generate(generator=torch.Generator().manual_seed(5), **options) for _ in range(2))
    assert torch.equal(one, two)
    random = torch.Generator().manual_seed(5)
    assert not torch.equal(real.generate(generator=random, **options), real.generate(generator=random, **options))


def test_what_is_given_can_be_trained_on(real):
    tokens = real.generate(max_new_tokens=12)
    assert not tokens.requires_grad
    assert not tokens.is_inference()
    real(tokens.reshape(1, 3, 4)).sum().backward()


def test_config_is_options_by_name(real):
    config = generation.GenerationConfig(max_new_tokens=9, do_sample=True, seed=4)
    assert torch.equal(real.generate(None, config), real.generate(max_new_tokens=9, do_sample=True, seed=4))
    assert real.generate(None, config, max_new_tokens=3).shape == (1, 3)


# ---- saved decoders ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    options = {"num_groups": 4, "tokens_per_group": 8, "vocab_size": 256, "drop_path": 0.1}
    folder = tmp_path_factory.mktemp("saved") / "decoder"
    FITDecoder.from_preset("tiny", **options).save_pretrained(folder)
    return folder


def test_a_folder_generates_text_from_text_and_bytes_from_bytes(saved):
    options = {"max_new_tokens": 5, "do_sample": True}
    decoder = fitformer.from_pretrained(saved)
    tokens = decoder.generate([b"ab", "ü"], num_return_sequences=2, **options)
    expected = [bytes(row.tolist()) for row in tokens]
    given = fitformer.generate(saved, [b"ab", "ü"], num_return_sequences=2, **options)
    assert given == [*expected[:2], *(text.decode(errors="replace") for text in expected[2:])]
    assert fitformer.generate(str(saved), b"ab", **options) == expected[0]
    assert fitformer.generate(saved, "ab", **options) == expected[0].decode(errors="replace")
    assert fitformer.generate(saved, "ab", num_return_sequences=2, **options) == [
        text.decode(errors="replace") for text in expected[:2]
    ]
    assert fitformer.generate(saved, **options).shape == (1, 5)
    assert torch.equal(fitformer.generate(saved, torch.tensor([[97, 98]]), **options)[0], tokens[0])


def test_only_decoders_generate(tmp_path):
    options = {"image_size": 8, "group_size": 4, "patch_size": 2, "channels": 1, "num_classes": 3}
    fitformer.FITImageEncoder.from_preset("tiny", **options).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a FITImageEncoder, which generates no tokens"):
        fitformer.generate(tmp_path, "x", max_new_tokens=3)


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


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_likely_enough(p):
    probability = torch.randn(50, 9).mul(2).softmax(-1)
    kept = generation.filter_logits(probability.log(), min_p=p).isfinite()
    share = probability / probability.amax(-1, keepdim=True)
    assert (kept | (share < p + 1e-6)).all()
    assert (~kept | (share > p - 1e-6)).all()
    assert kept.any(-1).all()


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
    ("prompt", "options", "message"),
    [
        (None, {"max_new_tokens": 13}, r"length of 13, beyond the decoder's 12 \(3 groups of 4 tokens\).*window=3"),
        (torch.tensor([[1, 11]]), {}, r"token 11, the vocabulary has 11 \(0 to 10\)"),
        ([[1], [-1]], {}, "token -1"),
        (torch.tensor([1, 2]), {}, r"\(2,\); give integer tokens"),
        (torch.ones(1, 2), {}, "float32"),
        (None, {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (None, {"num_return_sequences": 0}, "num_return_sequences is 0"),
        (None, {"temperature": -1.0}, "temperature is -1"),
        (None, {"temperature": math.nan}, "temperature is nan"),
        (None, {"top_k": 0}, "top_k is 0"),
        (None, {"top_p": 0.0}, "top_p is 0"),
        (None, {"top_p": 1.5}, "top_p is 1.5"),
        (None, {"min_p": 1.5}, "min_p is 1.5"),
        (None, {"do_sample": False, "top_k": 5}, "top_k is 5, but nothing is drawn without do_sample=True"),
        (None, {"do_sample": False, "temperature": 0.5}, "temperature is 0.5, but nothing is drawn"),
        (None, {"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        (None, {"eos_token_id": 11}, "eos_token_id has token 11"),
        (None, {"pad_token_id": -1}, "pad_token_id has token -1"),
        (None, {"stop_strings": "x"}, "stop_strings has token 120, outside the vocabulary of 11"),
        (None, {"stop_strings": ""}, "the stop string b'' has 0 bytes"),
        (None, {"stop_strings": b"12345"}, "has 5 bytes; .* max_new_tokens, which is 4"),
        (None, {"window": 0}, "window is 0"),
        (None, {"lenght": 5}, "no option 'lenght'"),
        (None, {"step": lambda tokens, starts: torch.full((1, 11), math.nan)}, "not finite"),
    ],
)
def test_bad_input(prompt, options, message):
    with pytest.raises(InputError, match=message):
        generation.generate(Counting(), prompt, **{"max_new_tokens": 4, **DRAWN, **options})


def test_number_of_tokens_must_be_said():
    with pytest.raises(InputError, match="give max_new_tokens"):
        generation.generate(Counting(), **PLAIN)


def test_cache_refuses_a_decoder_that_drops_out():
    decoder = FITDecoder.from_preset("tiny", num_groups=2, tokens_per_group=4, vocab_size=5, drop_path=0.5).train()
    with pytest.raises(InputError, match=r"training mode.*call decoder.eval\(\)"):
        decoder.generate(max_new_tokens=2)
    assert decoder.eval().generate(max_new_tokens=2).shape == (1, 2)
