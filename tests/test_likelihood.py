"""Exact likelihoods: against the decoder on all of the sequence, and as a probability distribution over sequences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer import FITDecoder
from fitformer.data.datasets.text import ByteBuffer, Piece
from fitformer.errors import InputError
from fitformer.evaluation import likelihood
from fitformer.evaluation.likelihood import Windows, log_likelihood, token_log_likelihoods
from fitformer.patching import shift_right

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"latents_per_group": 2, "dim": 8, "latent_dim": 8, "heads": 2, "latent_heads": 2}


def decoder(groups, n=4, vocab=3, **options):
    torch.manual_seed(0)
    position = "index" if groups is None else "learned"
    made = FITDecoder.from_config(
        layers="(1)1(1)1(1)", num_groups=groups, tokens_per_group=n, vocab_size=vocab, latent_position=position,
        **{**SIZES, **options},
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.4 * torch.randn_like(weight))
    return made


FIXED, ANY = decoder(3), decoder(None)


def plainly(model, tokens, start, stop):
    """Log-likelihoods of tokens `start` to `stop` by the decoder on all of `tokens`."""
    n = model.tokens_per_group
    if not len(tokens):
        return torch.zeros(0).double()
    padded = torch.nn.functional.pad(tokens, (0, -len(tokens) % n)).view(1, -1, n)
    found = model(shift_right(padded)).detach().double().log_softmax(-1).flatten(0, 2)
    return found[: len(tokens)].gather(1, tokens[:, None])[start:stop, 0]


def scored(model, tokens, **options):
    return torch.cat([torch.zeros(0).double(), *token_log_likelihoods(model, tokens, **options)])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 11, 12])
def test_a_sequence_that_fits_is_the_decoder_on_all_of_it(length):
    tokens = torch.randint(0, 3, (length,), generator=torch.Generator().manual_seed(length))
    for model in (FIXED, ANY):
        torch.testing.assert_close(scored(model, tokens), plainly(model, tokens, 0, length), atol=1e-5, rtol=1e-5)


def test_any_number_of_groups_is_one_sequence_in_pieces(monkeypatch):
    tokens = torch.randint(0, 3, (203,))
    whole = plainly(ANY, tokens, 0, 203)
    for most in (4, 40, 10**6):
        monkeypatch.setattr(likelihood, "MOST_LOGITS", most)
        torch.testing.assert_close(scored(ANY, tokens), whole, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(0, 40), context=st.integers(0, 11), stride=st.integers(1, 12), batch=st.integers(1, 5))
def test_windows_score_every_token_once_with_its_context(length, context, stride, batch):
    tokens = torch.randint(0, 3, (length,), generator=torch.Generator().manual_seed(length))
    for model in (FIXED, ANY):
        if model is FIXED and context + stride > 12:
            with pytest.raises(InputError, match=rf"context of {context} tokens and a stride of {stride} .* 12 \(3"):
                scored(model, tokens, context=context, stride=stride)
            continue
        found = scored(model, tokens, context=context, stride=stride, batch_size=batch)
        assert found.shape == (length,)
        for place in range(length):
            # The window that scores it: the first, or the one whose last `stride` tokens it is among.
            start = max(-(-(place - context - stride + 1) // stride), 0) * stride
            assert place - start >= min(context, place)
            own = plainly(model, tokens[start : start + context + stride], place - start, place - start + 1)
            torch.testing.assert_close(found[place : place + 1], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"context": 1, "stride": 2}])
def test_probabilities_of_all_sequences_add_up_to_one(options):
    for model in (decoder(3, vocab=2), decoder(None, vocab=2)):
        sequences = itertools.product(range(2), repeat=5)
        total = math.fsum(math.exp(log_likelihood(model, torch.tensor(each), **options)) for each in sequences)
        assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "given", "found"),
    [
        (FIXED, {}, (8, 4)),
        (FIXED, {"context": 5}, (5, 7)),
        (FIXED, {"stride": 3}, (9, 3)),
        (FIXED, {"context": 2, "stride": 3}, (2, 3)),
        (decoder(1), {}, (0, 4)),
        (ANY, {"context": 5}, (5, 5)),
        (ANY, {"stride": 3}, (3, 3)),
        (ANY, {"context": 0}, (0, 4)),
    ],
)
def test_windows_by_default(model, given, found):
    windows = Windows.of(model, **given)
    assert (windows.context, windows.stride) == found
    assert Windows.of(ANY) is None


def test_bytes_files_and_tensors_are_the_same(tmp_path):
    model, text = decoder(None, vocab=256), b"caf\xc3\xa9 \xff\x00" * 9
    (tmp_path / "file").write_bytes(text)
    pieces = ByteBuffer([Piece(str(tmp_path / "file"), 0, len(text))])
    values = {log_likelihood(model, tokens) for tokens in (text, torch.tensor(list(text)), pieces)}
    assert len(values) == 1
    assert log_likelihood(model, b"") == 0


def test_memory_does_not_grow_with_the_sequence(monkeypatch):
    read = []
    monkeypatch.setattr(ByteBuffer, "window", lambda self, a, b: read.append(b - a) or bytes_of(self, a, b))
    bytes_of = lambda self, a, b: torch.zeros(b - a, dtype=torch.uint8).numpy()  # noqa: E731
    monkeypatch.setattr(likelihood, "MOST_LOGITS", 64)
    long = ByteBuffer([Piece("zeros", 0, 1200, bytes(1200))])
    assert sum(len(piece) for piece in token_log_likelihoods(ANY, long)) == 1200
    assert sum(len(piece) for piece in token_log_likelihoods(FIXED, long, batch_size=4)) == 1200
    assert max(read) <= 64


def test_bad_input():
    with pytest.raises(InputError, match="vocabulary of 3"):
        scored(ANY, torch.tensor([1, 3]))
    with pytest.raises(InputError, match="vocabulary of 3"):
        scored(ANY, torch.tensor([-1]))
    with pytest.raises(InputError, match=r"\(1, 2\); give integer tokens"):
        scored(ANY, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="float32"):
        scored(ANY, torch.zeros(2))
    for options in ({"context": -1}, {"stride": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            scored(ANY, torch.zeros(2, dtype=torch.int64), **options)
    with pytest.raises(InputError, match="latents of 2500000000000 groups"):
        scored(ANY, torch.zeros(1, dtype=torch.uint8).expand(10**13))
    broken = decoder(None)
    broken.output_bias.data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        scored(broken, torch.zeros(2, dtype=torch.int64))
