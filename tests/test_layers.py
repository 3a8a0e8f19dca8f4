"""The standard parts and the positions, each by what it promises. Their arithmetic is judged in test_reference.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer.errors import InputError
from fitformer.models.layers import (
    Attention,
    CrossLayer,
    DropPath,
    FeedForward,
    TransformerLayer,
    check_heads,
    check_sizes,
)
from fitformer.models.positions import grid_code, latent_positions, line_code, token_positions


@given(heads=st.integers(-3, 40), width=st.integers(1, 32))
@settings(max_examples=100, deadline=None)
def test_heads_that_do_not_divide_name_those_that_do(heads, width):
    divisors = [h for h in range(1, width + 1) if width % h == 0]
    if heads in divisors:
        return check_heads(heads, width)
    with pytest.raises(InputError, match=f"{heads} heads do not divide the width {width}") as error:
        check_heads(heads, width)
    named = [int(word) for word in str(error.value).split("nearest, ")[1].split() if word.isdigit()]
    assert set(named) <= set(divisors)
    assert min(divisors, key=lambda h: abs(h - heads)) in named


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", None])
def test_sizes_are_positive_whole_numbers(size):
    with pytest.raises(InputError, match=r"num_groups is .* at least 1"):
        check_sizes(num_groups=size)


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_rates_are_below_one(rate):
    for build in (
        lambda: DropPath(rate),
        lambda: Attention(8, 2, dropout=rate),
        lambda: FeedForward(8, dropout=rate),
        lambda: TransformerLayer(8, 2, drop_path=rate),
    ):
        with pytest.raises(InputError, match=r"a rate is at least 0 and below 1|is nan; it must be a number"):
            build()


@pytest.mark.parametrize("ratio", [0, -4, 0.1])
def test_a_feed_forward_needs_units(ratio):
    with pytest.raises(InputError, match="mlp_ratio"):
        FeedForward(8, ratio)


def test_drop_path_drops_whole_rows_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    rate, rows = 0.3, 20_000
    branch = torch.rand(rows, 2, 3) + 1
    out = DropPath(rate)(branch)
    dropped = (out == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    kept = ~dropped.any(1)
    torch.testing.assert_close(out[kept], branch[kept] / (1 - rate))
    assert abs(kept.float().mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / rows)


def test_drop_path_is_absent_in_eval_and_at_rate_zero():
    x = torch.randn(5, 2)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_a_masked_key_has_no_say():
    torch.manual_seed(0)
    attention, x, mask = Attention(8, 2), torch.randn(2, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    mask[:, 3] = False
    changed = x.clone()
    changed[:, 3] += 1
    torch.testing.assert_close(attention(x, x, mask), attention(x, changed, mask), rtol=0, atol=0)
    assert not torch.allclose(attention(x, x), attention(x, changed))


def test_self_attention_layer_follows_a_permutation_and_read_ignores_it():
    torch.manual_seed(0)
    x, latents, order = torch.randn(2, 6, 8), torch.randn(2, 3, 12), torch.randperm(6)
    layer, read = TransformerLayer(8, 2), CrossLayer(12, 8, width=8, heads=2)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))
    torch.testing.assert_close(read(latents, x), read(latents, x[:, order]))


def test_a_layer_without_attention_treats_tokens_alone():
    torch.manual_seed(0)
    layer, x = TransformerLayer(8, 3, self_attention=False), torch.randn(2, 6, 8)  # 3 heads would not divide 8
    torch.testing.assert_close(layer(x)[:, 2:3], layer(x[:, 2:3]))


def test_line_code_starts_at_zero_and_is_the_formula():
    code, width = line_code(5, 6), 6
    assert code[0].tolist() == [0, 0, 0, 1, 1, 1]
    u = 3 / 4 * 1000
    angles = [u / 10000 ** (2 * (i // 2) / width) for i in range(width)]
    expected = [math.sin(angles[i]) for i in (0, 2, 4)] + [math.cos(angles[i]) for i in (1, 3, 5)]
    torch.testing.assert_close(code[3], torch.tensor(expected), rtol=0, atol=1e-4)


def test_grid_code_is_row_beside_column():
    code = grid_code(3, 4, 8).unflatten(0, (3, 4))
    assert torch.equal(code[2, 1], torch.cat([line_code(3, 4)[2], line_code(4, 4)[1]]))
    assert torch.equal(grid_code(1, 5, 7), line_code(5, 7))
    assert torch.equal(grid_code(5, 1, 7), line_code(5, 7))


def test_learned_positions_are_a_cut_normal_and_fixed_ones_no_state():
    torch.manual_seed(0)
    table = token_positions("learned", 64, 256)
    assert 0.015 < table().std() < 0.02  # cut at two deviations: 0.88 of 0.02
    assert table().abs().max() <= 0.04
    assert not token_positions("sin_cos", 4, 8).state_dict()
    assert not list(token_positions("sin_cos", 4, 8).parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: token_positions("sine", 4, 8), "unknown positions 'sine'; known are learned, sin_cos, sin_cos2d"),
        (lambda: token_positions("sin_cos2d", 8, 8), "not 8; the nearest is 9"),
        (lambda: token_positions("sin_cos2d", 9, 7), "even width, not 7; 8 would do"),
        (lambda: latent_positions("sin_cos2d", 4, 4, 8), "latents know 'learned', 'sin_cos'"),
    ],
)
def test_positions_that_cannot_be(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_projecting_once_and_attending_is_the_layer():
    torch.manual_seed(0)
    layer = CrossLayer(8, 6, 6, 2, context_norm=True)
    x, context = torch.randn(3, 5, 8), torch.randn(3, 4, 6)
    key, value = layer.project(context)
    assert key.shape == value.shape == (3, 2, 4, 3)
    torch.testing.assert_close(x + layer.attention.attend(layer.norm(x), key, value), layer(x, context))


def test_qk_norm_bounds_what_a_query_and_a_key_can_agree():
    torch.manual_seed(0)
    attention = Attention(8, 2, qk_norm=True)
    x = 1e3 * torch.randn(3, 5, 8)
    scores = attention.queries(x) @ attention.project(x)[0].mT
    assert scores.abs().max() <= 4 * (1 + 1e-5)  # two vectors of 4 numbers with deviation 1
    assert Attention(8, 2).project(x)[0].abs().max() > 100
