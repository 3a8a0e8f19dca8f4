"""Cached decoding equals the decoder on everything at once, however the inputs come."""

import random

import pytest
import torch

from fitformer import FITDecoder
from fitformer.errors import InputError
from fitformer.execution import cached
from fitformer.generation import CachedDecoder

LAYERS = ("(1)1(1)", "(2)1(1)2(1)", "(0)1(1)", "(1)2(0)1(2)", "(1)1(1)2", "(2)")
OPTIONS = (
    {},
    {"qk_norm": True},
    {"xattn_with_mlp": True, "xattn_enc_ln": False},
    {"position": "sin_cos", "latent_position": "sin_cos", "mlp_ratio": 2},
    {"x_self_attention": False},
    {"latent_position": "index", "rotary": True},
    {"latent_position": "shared", "position": "none", "rotary": True, "global_window": 2},
    {"latent_position": "index", "global_window": 1},
    {"global_window": 3, "qk_norm": True},
)


def build(layers="(1)1(1)", num_groups=5, n=4, m=2, seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    decoder = FITDecoder.from_config(
        {
            "layers": layers,
            "num_groups": num_groups,
            "tokens_per_group": n,
            "latents_per_group": m,
            "vocab_size": 13,
            "dim": 16,
            "latent_dim": 24,
            "heads": 2,
            "latent_heads": 4,
            **options,
        }
    )
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return decoder.eval().to(dtype)


def inputs_of(decoder, batch, length=None, seed=0):
    length = (decoder.num_groups or 5) * decoder.tokens_per_group if length is None else length
    tokens = torch.randint(0, decoder.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    return tokens.index_fill(1, torch.tensor([0]), 0)


def whole(decoder, inputs):
    n = decoder.tokens_per_group
    padded = torch.nn.functional.pad(inputs, (0, -inputs.shape[1] % n))
    return decoder(padded.unflatten(1, (-1, n))).flatten(1, 2)[:, : inputs.shape[1]].detach()


def fed(decoder, inputs, cuts):
    reader = CachedDecoder(decoder)
    state, pieces = reader.start(len(inputs)), inputs.split(cuts, dim=1)
    return torch.cat([reader.feed(state, piece) for piece in pieces], dim=1)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_are_those_of_the_whole_sequence(layers, options):
    decoder = build(layers, **options)
    inputs = inputs_of(decoder, 2)
    for cuts in ([1] * 20, [20], [3, 9, 8], [4, 4, 12], [7, 1, 1, 1, 10]):
        close(fed(decoder, inputs, cuts), whole(decoder, inputs))


def test_double_precision_agrees_to_rounding():
    decoder = build("(2)2(1)1(1)", dtype=torch.float64)
    inputs = inputs_of(decoder, 3)
    for cuts in ([1] * 20, [20], [5, 15]):
        torch.testing.assert_close(fed(decoder, inputs, cuts), whole(decoder, inputs), atol=1e-12, rtol=1e-12)


def mismatches(count, seed):
    """Of so many random decoders, those whose cached logits differ from the whole forward pass somewhere."""
    choose, found = random.Random(seed), []
    for number in range(count):
        n, groups = choose.randint(1, 9), choose.randint(1, 7)
        decoder = build(
            choose.choice(LAYERS),
            groups,
            n,
            choose.randint(1, 3),
            seed=number,
            **choose.choice(OPTIONS),
        )
        length, cuts = choose.randint(1, n * groups), []
        while sum(cuts) < length:
            cuts.append(choose.randint(1, min(length - sum(cuts), choose.choice([1, n, 3 * n]))))
        inputs = inputs_of(decoder, choose.randint(1, 4), length, seed=number)
        try:
            close(fed(decoder, inputs, cuts), whole(decoder, inputs))
        except AssertionError:
            found.append((number, cuts))
    return found


def test_random_decoders_and_pieces():
    assert mismatches(40, seed=1) == []


@pytest.mark.slow
def test_a_thousand_random_decoders_and_pieces():
    assert mismatches(1000, seed=2) == []


def test_whole_groups_run_in_slices(monkeypatch):
    decoder = build(num_groups=9)
    inputs = inputs_of(decoder, 2)
    monkeypatch.setattr("fitformer.generation.cached_decoder.default_slice", lambda device, n, batch: 2)
    close(fed(decoder, inputs, [36]), whole(decoder, inputs))


def test_last_logits_are_the_last_of_all():
    decoder = build()
    inputs, reader = inputs_of(decoder, 2), CachedDecoder(decoder)
    for length in (1, 3, 4, 11, 20):
        logits = reader.feed(reader.start(2), inputs[:, :length], last=True)
        close(logits, whole(decoder, inputs)[:, length - 1 : length])


def test_rows_at_several_positions_go_on_together():
    decoder = build("(2)1(1)2(1)", num_groups=6)
    reader, lengths = CachedDecoder(decoder), [1, 2, 7, 8, 12]
    inputs = inputs_of(decoder, len(lengths))
    expected, state = whole(decoder, inputs), reader.start(len(lengths))
    for row, length in enumerate(lengths):
        alone = reader.start(1)
        reader.feed(alone, inputs[row : row + 1, :length])
        state.cache.put([row], alone.cache)
    assert state.position == lengths
    for step in range(6):
        column = torch.stack([inputs[row, length + step] for row, length in enumerate(lengths)])[:, None]
        logits = reader.feed(state, column)[:, 0]
        close(logits, torch.stack([expected[row, length + step] for row, length in enumerate(lengths)]))
    pieces = torch.stack([inputs[row, length + 6 : length + 12] for row, length in enumerate(lengths)])
    found = reader.feed(state, pieces)
    close(found, torch.stack([expected[row, length + 6 : length + 12] for row, length in enumerate(lengths)]))


def test_rows_are_selected_and_go_on_by_themselves():
    decoder = build(num_groups=6)
    reader, inputs = CachedDecoder(decoder), inputs_of(decoder, 3)
    state, expected = reader.start(3), whole(decoder, inputs)
    reader.feed(state, inputs[:, :9])
    chosen = state.select([2, 0, 2])
    close(reader.feed(chosen, inputs[[2, 0, 2], 9:20]), expected[[2, 0, 2], 9:20])
    # The state they were taken from has not moved.
    copy = state.clone()
    close(reader.feed(state, inputs[:, 9:]), expected[:, 9:])
    assert copy.position == [9] * 3
    close(reader.feed(copy, inputs[:, 9:]), expected[:, 9:])


def test_saved_state_goes_on_in_another_process_of_the_same_weights(tmp_path):
    decoder = build("(1)1(1)1(1)", num_groups=6)
    inputs, expected = inputs_of(decoder, 2), None
    reader = CachedDecoder(decoder)
    for length in (1, 5, 8, 14):
        state = reader.start(2)
        reader.feed(state, inputs[:, :length])
        state.save(tmp_path / "state.safetensors")
        decoder.save_pretrained(tmp_path / "model")
        other = CachedDecoder(FITDecoder.from_pretrained(tmp_path / "model"))
        again = other.load(tmp_path / "state.safetensors")
        assert again.position == [length] * 2
        expected = reader.feed(state, inputs[:, length:])
        assert torch.equal(other.feed(again, inputs[:, length:]), expected)


def test_cache_grows_with_the_latents_alone():
    decoder = build("(1)2(2)1(1)", num_groups=64, n=8, m=2)
    reader, inputs = CachedDecoder(decoder), inputs_of(decoder, 1)
    state, sizes = reader.start(1), []
    for piece in inputs.split(8, dim=1):
        reader.feed(state, piece)
        sizes.append(state.nbytes)
    # Keys and values of 2 latents of width 24 in 3 global layers, 4 bytes each.
    a_group = 2 * 2 * 24 * 3 * 4
    fixed = reader.start(1).nbytes
    for groups, size in enumerate(sizes, start=1):
        assert groups * a_group <= size - fixed <= groups * a_group * 5 / 4 + a_group
    # At the end there is room for no more than there can be.
    assert sizes[-1] - fixed == 64 * a_group


def test_any_number_of_groups_beyond_those_built_for():
    for options in OPTIONS[5:8]:
        decoder = build("(1)1(1)1(1)", num_groups=None, **options)
        inputs = inputs_of(decoder, 2, 97)
        for cuts in ([97], [1] * 97, [13, 60, 24]):
            close(fed(decoder, inputs, cuts), whole(decoder, inputs))


@pytest.mark.parametrize("window", [1, 2, 5])
def test_cache_of_a_window_stops_growing(window):
    decoder = build("(1)2(1)", num_groups=None, latent_position="shared", rotary=True, global_window=window)
    reader, inputs = CachedDecoder(decoder), inputs_of(decoder, 2, 160)
    for cuts in ([1] * 160, [100, *[1] * 60], [40, 80, 40]):
        state, sizes, pieces = reader.start(2), [], []
        for piece in inputs.split(cuts, dim=1):
            pieces.append(reader.feed(state, piece))
            sizes.append(state.nbytes)
        close(torch.cat(pieces, dim=1), whole(decoder, inputs))
        # Two windows of 2 latents in 2 global layers of 2 rows.
        assert sizes[-1] - reader.start(2).nbytes <= 2 * 2 * window * 2 * (2 * 24 * 4) * 2


def test_rows_of_several_lengths_in_a_window():
    decoder = build("(1)1(1)", num_groups=None, latent_position="index", rotary=True, global_window=2)
    prompts = [[1], [2] * 9, list(range(13)) * 3]
    cached, plain = (decoder.generate(prompts, max_new_tokens=30, use_cache=use) for use in (True, False))
    assert [row.tolist() for row in cached] == [row.tolist() for row in plain]


@pytest.mark.parametrize("options", [{}, {"latent_position": "index", "rotary": True, "qk_norm": True}])
def test_mixed_precision_is_close_to_the_whole_sequence_in_it(options):
    decoder = build("(1)1(1)1(1)", **options)
    inputs, reader = inputs_of(decoder, 3), CachedDecoder(decoder)
    with torch.autocast("cpu", torch.bfloat16):
        expected = whole(decoder, inputs)
        state = reader.start(3)
        for row, length in enumerate((1, 6, 8)):
            alone = reader.start(1)
            reader.feed(alone, inputs[row : row + 1, :length])
            state.cache.put([row], alone.cache)
        for step in range(9):
            column = torch.stack([inputs[row, length + step] for row, length in enumerate((1, 6, 8))])
            logits = reader.feed(state, column[:, None])[:, 0]
            wanted = torch.stack([expected[row, length + step] for row, length in enumerate((1, 6, 8))])
            torch.testing.assert_close(logits, wanted, atol=0.05, rtol=0.05)
    assert decoder.to(torch.bfloat16).generate([[1], [2] * 9], max_new_tokens=9)[1].shape == (18,)


def test_steps_inside_a_group_leave_the_latents_alone():
    decoder = build("(1)1(1)", num_groups=8)
    reader, inputs = CachedDecoder(decoder), inputs_of(decoder, 1)
    state, before = reader.start(1), None
    for position in range(32):
        reader.feed(state, inputs[:, position : position + 1])
        latents = state.cache.tensors["0.latents.0"].clone()
        if (position + 1) % 4 and before is not None:
            assert torch.equal(latents, before)
        before = latents


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(1, 21, dtype=torch.int64), r"21 inputs are beyond the decoder's 20 \(5 groups of 4 tokens\)"),
        (torch.zeros(2, 1, dtype=torch.int64), r"inputs are \(2, 1\); the state has 1 rows"),
        (torch.zeros(1, 0, dtype=torch.int64), "k at least 1"),
        (torch.tensor([[13]]), "token 13 is outside the vocabulary of 13"),
        (torch.zeros(1, 1), "float32"),
    ],
)
def test_bad_inputs_leave_the_state_as_it_was(inputs, message):
    reader = CachedDecoder(build())
    state = reader.start(1)
    with pytest.raises(InputError, match=message):
        reader.feed(state, inputs)
    assert state.position == [0]


def test_bad_states(tmp_path):
    reader = CachedDecoder(build())
    state = reader.start(2)
    with pytest.raises(InputError, match="there is no row 2: the state has 2"):
        state.select([2])
    with pytest.raises(InputError, match="batch is 0"):
        reader.start(0)
    state.save(tmp_path / "state")
    with pytest.raises(InputError, match="of another size"):
        CachedDecoder(build(m=3)).load(tmp_path / "state")
    with pytest.raises(InputError, match="of another size"):
        CachedDecoder(build("(2)1(1)")).load(tmp_path / "state")
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no state of decoding"):
        reader.load(tmp_path / "other")


def test_only_causal_trunks_have_a_cache():
    from fitformer import FITEncoder

    encoder = FITEncoder.from_preset("tiny", num_groups=2, tokens_per_group=4, in_channels=3).eval()
    with pytest.raises(InputError, match="not causal inside its groups"):
        cached.CachedTrunk(encoder.trunk)


# ---- on a GPU ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS)
def test_cached_decoding_on_a_gpu_is_that_on_a_cpu(options, tmp_path):
    decoder = build("(1)1(1)1(1)", **options).double()
    inputs = inputs_of(decoder, 3)
    on_cpu, drawn = whole(decoder, inputs), {"max_new_tokens": 12, "do_sample": True, "seed": 3}
    prompts = [[1], [2] * 5, [4] * 8]
    rows = decoder.generate(prompts, **drawn)
    wanted = whole(decoder.cuda(), inputs.cuda()).cpu()
    # Codes of positions are computed in float32.
    torch.testing.assert_close(wanted, on_cpu, atol=1e-6, rtol=1e-6)
    for cuts in ([1] * 20, [20], [3, 9, 8]):
        found = fed(decoder, inputs.cuda(), cuts)
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-9, rtol=1e-9)
    assert [row.tolist() for row in decoder.generate(prompts, **drawn)] == [row.tolist() for row in rows]
    reader = CachedDecoder(decoder)
    state = reader.start(3)
    reader.feed(state, inputs[:, :7].cuda())
    state.save(tmp_path / "state.safetensors")
    again = reader.feed(reader.load(tmp_path / "state.safetensors"), inputs[:, 7:].cuda())
    assert torch.equal(again, reader.feed(state, inputs[:, 7:].cuda()))
    state = reader.start(3)
    by_token = torch.cat([reader.feed(state, column) for column in inputs.cuda().split(1, dim=1)], dim=1)
    assert reader.trunk.graph.graph is not None
    torch.testing.assert_close(by_token.cpu(), wanted, atol=1e-9, rtol=1e-9)
    with torch.autocast("cuda", torch.bfloat16):
        mixed = fed(decoder.float(), inputs.cuda(), [1] * 20)
    torch.testing.assert_close(mixed.float().cpu(), wanted.float(), atol=0.1, rtol=0.1)
