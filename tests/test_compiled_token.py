"""Compiled decoding equals decoding call by call: other weights, sizes, batches and places than those compiled for."""

import pytest
import torch
from tests.test_cached import build, inputs_of

import fitformer
from fitformer.errors import InputError
from fitformer.generation import CachedDecoder, _compiled_token

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Torch's own, while it compiles.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(_compiled_token, "_COMPILED", {})


def one_by_one(reader, inputs, start):
    """Logits of inputs that are fed one by one from `start` on, the others before them at once."""
    state = reader.start(len(inputs))
    if start:
        reader.feed(state, inputs[:, :start])
    return torch.cat([reader.feed(state, inputs[:, k : k + 1]) for k in range(start, inputs.shape[1])], dim=1)


def assert_equal(decoder, inputs, start=0):
    wanted = one_by_one(CachedDecoder(decoder), inputs, start)
    torch.testing.assert_close(one_by_one(CachedDecoder(decoder, compile=True), inputs, start), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "options"),
    [
        (1, {}),
        (6, {"qk_norm": True, "rotary": True, "latent_position": "index"}),
        (3, {"xattn_with_mlp": True, "xattn_enc_ln": False, "global_window": 1}),
        (2, {"x_self_attention": False}),
    ],
)
def test_code_compiled_at_one_place_serves_all_places_and_all_weights(first, options):
    decoder = build(n=8, **options)
    inputs = inputs_of(decoder, 1)
    assert_equal(decoder, inputs, start=first)
    assert len(_compiled_token._COMPILED) == 1
    # From the first group on, and with other weights.
    assert_equal(decoder, inputs)
    assert_equal(build(n=8, seed=1, **options), inputs)
    assert len(_compiled_token._COMPILED) == 1


@pytest.mark.slow
def test_each_batch_kind_of_decoder_and_precision_has_code_of_its_own():
    decoder = build(n=8)
    wide = inputs_of(decoder, 3)
    assert_equal(decoder, wide)
    # Columns of a wider table, as `generate` gives them: a layout that was not compiled for.
    assert_equal(decoder, torch.cat([wide, wide], dim=1)[:, : wide.shape[1]])
    assert_equal(decoder, wide[:1])
    assert_equal(build(n=8, dim=8), wide)
    assert_equal(build(n=8, dtype=torch.float64), wide)
    assert len(_compiled_token._COMPILED) == 4
    with torch.autocast("cpu", torch.bfloat16):
        wanted = one_by_one(CachedDecoder(decoder), wide, 1)
        found = one_by_one(CachedDecoder(decoder, compile=True), wide, 1)
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.1)
    assert len(_compiled_token._COMPILED) == 5


@pytest.mark.slow
def test_what_is_generated_is_the_same_compiled(tmp_path):
    decoder = build(n=8, num_groups=None, latent_position="index")
    options = {"max_new_tokens": 40, "do_sample": True, "num_return_sequences": 2, "seed": 3}
    for prompt in (None, torch.tensor([[1, 2, 3]]), [[1], [2, 3, 4, 5]]):
        wanted = fitformer.generation.generate(decoder, prompt, **options)
        found = fitformer.generation.generate(decoder, prompt, compile=True, **options)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_without_a_compiler_there_is_one_error(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    reader = CachedDecoder(build(n=8), compile=True)
    state = reader.start()
    reader.feed(state, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"compile does not work here: it needs a C\+\+ compiler .*/nowhere/g\+\+"):
        reader.feed(state, torch.zeros(1, 1, dtype=torch.int64))
    assert state.position == [3]


def test_compile_is_of_decoding_with_a_cache():
    with pytest.raises(InputError, match="compile is of generation with a cache, and use_cache is False"):
        build().generate(max_new_tokens=2, use_cache=False, compile=True)


def test_a_decoder_without_memory_is_not_compiled():
    with pytest.raises(InputError, match="compile is for a CPU, and the decoder is on meta"):
        CachedDecoder(build().to("meta"), compile=True)
