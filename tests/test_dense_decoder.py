"""The dense opponent: cached equals whole at every position, it is causal, and it has as many parameters as FIT."""

import itertools

import pytest
import torch

import fitformer
from fitformer.errors import InputError
from fitformer.models.config import preset
from fitformer.profiling import dense_decoder
from fitformer.profiling.dense_decoder import CachedDense, DenseDecoder, dense_like
from fitformer.profiling.flops import count_parameters

VOCABULARY = 11


def decoder():
    torch.manual_seed(0)
    model = DenseDecoder(VOCABULARY, dim=24, depth=3, heads=2, hidden=40).eval()
    # Residual branches begin at zero, where no mistake of theirs would show.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("sizes", [(1,) * 14, (14,), (5, 1, 1, 7), (1, 12, 1)])
@pytest.mark.parametrize("most_mask", [2**24, 40])
def test_cached_equals_whole_at_every_position(sizes, most_mask, monkeypatch):
    monkeypatch.setattr(dense_decoder, "MOST_MASK", most_mask)
    model, inputs = decoder(), torch.randint(VOCABULARY, (3, 14))
    whole = model(inputs[:, None])[:, 0]
    for last in (False, True):
        cached = CachedDense(model, 20)
        state, ends = cached.start(3), list(itertools.accumulate(sizes))
        for size, end in zip(sizes, ends, strict=True):
            found = cached.feed(state, inputs[:, end - size : end], last=last)
            wanted = whole[:, end - 1 : end] if last else whole[:, end - size : end]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            assert state.position == [end] * 3
            assert state.nbytes == 3 * 2 * 3 * end * 24 * 4


def test_logits_depend_on_tokens_up_to_their_own_and_on_all_of_them():
    model, tokens = decoder(), torch.randint(VOCABULARY, (1, 2, 6))
    before = model(tokens).flatten(1, 2)
    for place in range(12):
        changed = tokens.clone()
        changed.view(-1)[place] = (changed.view(-1)[place] + 1) % VOCABULARY
        moved = (model(changed).flatten(1, 2) - before).abs().amax(-1)[0]
        assert (moved[:place] == 0).all()
        assert (moved[place:] > 1e-6).all()


def test_a_filled_state_stands_at_its_position_and_refuses_to_go_beyond():
    cached = CachedDense(decoder(), 10)
    state = cached.start(1)
    state.fill(9)
    cached.feed(state, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"11 .* 10"):
        cached.feed(state, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"11 .* 10"):
        state.fill(11)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_parameters_are_those_of_the_fit_to_two_percent(name):
    with torch.device("meta"):
        fit = fitformer.FITDecoder(preset(name, ends_local=True), 64, 128, 256)
        dense = dense_like(fit)
    tables = sum(count_parameters(part) for part in (fit.trunk.position, fit.trunk.latent_position))
    assert count_parameters(dense) == pytest.approx(count_parameters(fit) - tables, rel=0.02)


def test_the_task_of_bytes_trains_it():
    from fitformer.tasks._autoregression import bits

    model, tokens = decoder(), torch.randint(VOCABULARY, (4, 2, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = bits(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_odd_heads_and_sizes_are_refused():
    with pytest.raises(InputError, match="even"):
        DenseDecoder(4, 6, 1, 2, 4)
    with pytest.raises(InputError, match="do not divide"):
        DenseDecoder(4, 8, 1, 3, 4)
    with pytest.raises(InputError, match="depth"):
        DenseDecoder(4, 8, 0, 2, 4)
    tokens = torch.zeros(1, 2, 6, dtype=torch.int64)
    with pytest.raises(InputError, match="documents"):
        decoder()(tokens, documents=torch.tensor([[0, 1]]))
