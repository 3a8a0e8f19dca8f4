"""Sequences of any length: positions that extrapolate, rotary, a window over groups, documents packed into one row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import fitformer
from fitformer.errors import InputError
from fitformer.execution import Streamed
from fitformer.models import block_causal
from fitformer.models.block_causal import Band, block_causal_attention, chunks
from fitformer.models.config import TrunkConfig
from fitformer.models.layers import Attention, TransformerLayer
from fitformer.models.positions import rotate
from fitformer.models.trunk import Trunk
from fitformer.patching import pack_documents, pad_to_groups, sequence_to_groups, shift_right, unpack_documents
from fitformer.profiling import StepConfig, flops, memory, on_meta
from small_models import SIZES

N, VOCABULARY = 6, 11
ANY_LENGTH = ["index", "shared"]


def decoder(num_groups=None, **options):
    torch.manual_seed(0)
    wide = {"latent_dim": 12, "latent_heads": 3, "layers": "(1)2(1)1(1)", **options}
    model = fitformer.FITDecoder.from_config(
        {**SIZES, **wide}, num_groups=num_groups, tokens_per_group=N, vocab_size=VOCABULARY
    )
    for parameter in model.parameters():  # away from zero biases, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens_of(batch, groups, seed=1):
    return torch.randint(0, VOCABULARY, (batch, groups, N), generator=torch.Generator().manual_seed(seed))


# ---- rotary ----


def test_rotary_products_depend_on_the_difference_of_positions_alone():
    query, key = torch.randn(2, 1, 3, 1, 8, dtype=torch.float64)
    at = [(5, 2), (1_000_003, 1_000_000), (3, 0)]
    products = [(rotate(query, torch.tensor([q])) * rotate(key, torch.tensor([k]))).sum(-1) for q, k in at]
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], rtol=1e-9, atol=1e-9)
    other = (rotate(query, torch.tensor([6])) * rotate(key, torch.tensor([2]))).sum(-1)
    assert (other - products[0]).abs().max() > 1e-3


def test_rotary_turns_pairs_of_channels_by_the_angles_of_the_paper():
    x, positions = torch.randn(2, 3, 4, 6), torch.tensor([0, 1, 5, 700])
    turned = rotate(x, positions)
    for k, position in enumerate(positions.tolist()):
        for i in range(3):
            angle = torch.tensor(position / 10000 ** (2 * i / 6), dtype=torch.float64)
            turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float32)
            torch.testing.assert_close(turned[:, :, k, [i, i + 3]], x[:, :, k, [i, i + 3]] @ turn.T)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_positions_may_differ_by_row_and_keys_can_be_kept_turned():
    attention = Attention(12, 2, rotary=True)
    x = torch.randn(3, 5, 12)
    rows = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [0, 1, 0, 1, 2]])
    together = attention(x, x, positions=rows)
    for k, positions in enumerate(rows):
        torch.testing.assert_close(together[k : k + 1], attention(x[k : k + 1], x[k : k + 1], positions=positions))
    assert torch.equal(attention(x, x), attention(x, x, positions=torch.arange(5)))
    # A cache keeps keys as they are turned, and asks for the next token alone.
    whole = attention(x, x, causal=1)
    key, value = attention.project(x)
    last = attention.attend(x[:, 4:], key, value, positions=torch.tensor([4]))
    torch.testing.assert_close(whole[:, 4:], last)


def test_a_shift_of_all_positions_changes_nothing():
    layer = TransformerLayer(12, 2, rotary=True).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x, positions=torch.arange(5) + 1000), layer(x))


def test_rotary_adds_no_parameters_and_draws_the_same_weights():
    torch.manual_seed(0)
    plain = fitformer.FITDecoder.from_preset("tiny", num_groups=3, tokens_per_group=4, vocab_size=11)
    torch.manual_seed(0)
    turned = fitformer.FITDecoder.from_preset("tiny", num_groups=3, tokens_per_group=4, vocab_size=11, rotary=True)
    assert plain.state_dict().keys() == turned.state_dict().keys()
    assert all(map(torch.equal, plain.state_dict().values(), turned.state_dict().values()))
    tokens = torch.zeros(1, 3, 4, dtype=torch.int64)
    assert not torch.allclose(plain(tokens), turned(tokens))


# ---- positions of any number of groups ----


@pytest.mark.parametrize("kind", ANY_LENGTH)
@pytest.mark.parametrize("rotary", [False, True])
def test_a_model_built_for_some_groups_runs_at_four_times_as_many(kind, rotary):
    model = decoder(3, latent_position=kind, rotary=rotary, latent_heads=2)
    assert model.trunk.most_groups is None
    tokens = tokens_of(2, 12)
    logits = model(tokens)
    # Groups that come later change nothing of the earlier ones.
    torch.testing.assert_close(model(tokens[:, :3]), logits[:, :3], rtol=1e-5, atol=1e-5)
    free = decoder(latent_position=kind, rotary=rotary, latent_heads=2)
    assert torch.equal(free(tokens), logits)


def test_index_tells_groups_apart_and_shared_does_not():
    indexed, shared = (decoder(latent_position=kind).trunk.initial_latents(1, 5)[0] for kind in ANY_LENGTH)
    assert torch.equal(shared, shared[:1].expand_as(shared))
    assert all((indexed[g] - indexed[h]).abs().max() > 1e-3 for g in range(5) for h in range(g))
    fresh = fitformer.FITDecoder.from_preset(
        "tiny", num_groups=None, tokens_per_group=4, vocab_size=11, latent_position="index"
    )
    code = fresh.trunk.initial_latents(1, 4096)[0] - fresh.trunk.latent_position.slots
    assert 0.015 < code.std().item() < 0.025


def test_a_table_knows_its_number_of_groups():
    model = decoder(4)
    assert model.trunk.most_groups == 4
    with pytest.raises(InputError, match=r"5 groups, the model positions for 4; .*index"):
        model(tokens_of(1, 5))
    with pytest.raises(InputError, match=r"'learned' is a table: give num_groups .* 'index'"):
        decoder(None)


def test_positions_inside_a_group_may_be_rotary_alone():
    model = decoder(latent_position="shared", position="none", rotary=True, latent_heads=2)
    assert not model.trunk.position.at().any()
    tokens = tokens_of(1, 2)
    swapped = tokens.clone()
    swapped[0, 0, :2] = tokens[0, 0, :2].flip(0)
    assert tokens[0, 0, 0] != tokens[0, 0, 1]
    assert (model(tokens) - model(swapped))[0, 0, 2:].abs().max() > 1e-3


@pytest.mark.parametrize("role", ["encoder", "denoiser"])
def test_encoder_and_denoiser_take_any_number_of_groups(role):
    options = {**SIZES, "latent_dim": 8, "latent_heads": 2, "latent_position": "index", "rotary": True}
    geometry = {"layers": "(1)1(1)", "num_groups": None, "tokens_per_group": N}
    if role == "encoder":
        model = fitformer.FITEncoder.from_config(options, **geometry, in_channels=5).eval()
        outputs = [model(torch.ones(2, t, N, 5)) for t in (2, 9)]
    else:
        model = fitformer.FITDenoiser.from_config(options, **geometry, out_dim=5).eval()
        outputs = [model(torch.ones(2, t, N, 5), torch.ones(2)) for t in (2, 9)]
    assert [x.shape[1] for x, _ in outputs] == [2, 9]
    assert [latents.shape[1] for _, latents in outputs] == [2, 9]


REFUSED = [
    ({"position": "none"}, {}, "position is 'none'"),
    ({"position": "none", "rotary": True, "x_self_attention": False}, {}, "position is 'none'"),
    ({"rotary": True, "latent_position": "row_column"}, {}, "rotary .*row_column"),
    ({"rotary": True, "dim": 6, "heads": 2}, {}, "2 heads of dim 6 have 3 each; take a dim of 8"),
    ({"rotary": True, "latent_dim": 12, "latent_heads": 4}, {}, "4 heads of latent_dim 12 have 3 each; .* of 16"),
    ({"global_window": 2}, {}, "global_window is 2"),
    ({"global_window": 0}, {"causal": "all"}, "global_window is 0"),
    ({"latent_position": "sin_cos2d"}, {}, "latent_position is 'sin_cos2d'"),
]


@pytest.mark.parametrize(("options", "of_role", "message"), REFUSED)
def test_options_that_exclude_each_other(options, of_role, message):
    sizes = {"layers": "(1)1(1)", "dim": 8, "latent_dim": 16, "heads": 2, "latent_heads": 4}
    with pytest.raises(InputError, match=message):
        Trunk(TrunkConfig(**{**sizes, **options}), 3, 4, **of_role)


def test_options_of_layers_that_are_not_there_do_not_matter():
    Trunk(TrunkConfig("(2)", 8, 12, 2, 4, rotary=True), 3, 4)
    Trunk(TrunkConfig("(0)2", 6, 8, 2, 4, rotary=True), 3, 4)
    with pytest.raises(InputError, match="images of any size need 'row_column'"):
        fitformer.FITImageEncoder.from_preset(
            "tiny", image_size=None, group_size=4, patch_size=2, latent_position="index"
        )


def test_saved_models_are_taken_at_another_number_of_groups(tmp_path):
    model = decoder(3, latent_position="index", rotary=True, latent_heads=2)
    model.save_pretrained(tmp_path)
    tokens = tokens_of(1, 8)
    for options in ({}, {"num_groups": None}, {"num_groups": 8}):
        taken = fitformer.from_pretrained(tmp_path, **options)
        assert torch.equal(taken(tokens), model(tokens))
        assert "as they were saved" in str(taken.loading_report)
    with pytest.raises(InputError, match="rotary is True there and False here"):
        fitformer.from_pretrained(tmp_path, rotary=False)
    windowed = fitformer.from_pretrained(tmp_path, global_window=1)
    assert not torch.allclose(windowed(tokens), model(tokens))


def test_the_reference_has_none_of_these(tmp_path):
    for options in ({"rotary": True, "latent_heads": 2}, {"latent_position": "shared"}):
        with pytest.raises(InputError, match="reference has no"):
            fitformer.official.variables(decoder(3, **options))


# ---- a window over groups ----


def dense(band, tokens):
    """The mask of a band, `(r, 1, s, s)`, group by group."""
    block = torch.arange(tokens) // band.block
    mask = block[:, None] >= block
    if band.window is not None:
        mask &= block[:, None] - block < band.window
    if band.starts is None:
        return mask
    starts = torch.atleast_2d(band.starts)
    return torch.stack([mask & (start[block][:, None] <= block) for start in starts])[:, None]


BANDS = {
    "window": Band(2, window=3),
    "one group": Band(2, window=1),
    "documents": Band(2, starts=torch.tensor([[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 5, 5]])),
    "window of documents": Band(2, window=2, starts=torch.tensor([0, 0, 0, 3, 3, 3, 3])),
}


@pytest.mark.parametrize("most", [1, 40, 10**6])
@pytest.mark.parametrize("band", BANDS.values(), ids=list(BANDS))
def test_attention_in_a_band_is_that_of_the_dense_mask(band, most, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(block_causal, "MOST_MASK", most)
    monkeypatch.setattr(block_causal, "LEAST_QUERIES", 2)
    given = [torch.randn(2, 3, 14, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = block_causal_attention(*given, band)
    wanted = torch.nn.functional.scaled_dot_product_attention(*given, dense(band, 14))
    torch.testing.assert_close(ours, wanted)
    gradients = torch.autograd.grad(ours.sin().sum(), given)
    for gradient, other in zip(gradients, torch.autograd.grad(wanted.sin().sum(), given), strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("queries", [1, 2, 7, 30])
def test_the_last_queries_of_a_window_attend_as_among_all(queries, monkeypatch):
    torch.manual_seed(0)
    given = [torch.randn(1, 2, 60, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    whole = block_causal_attention(*given, Band(2, window=3))
    for least in (4, 256):
        monkeypatch.setattr(block_causal, "LEAST_QUERIES", least)
        last = block_causal_attention(given[0][:, :, -2 * queries :], *given[1:], Band(2, window=3))
        torch.testing.assert_close(last, whole[:, :, -2 * queries :])
        gradients = (torch.autograd.grad(out[:, :, -2:].sin().sum(), given, retain_graph=True) for out in (last, whole))
        for ours, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, wanted)


@given(
    tokens=st.integers(0, 3000), block=st.integers(1, 40), window=st.none() | st.integers(1, 90), rows=st.integers(1, 3)
)
@settings(max_examples=100, deadline=None)
def test_chunks_follow_one_another_and_hold_every_key_of_their_queries(tokens, block, window, rows):
    band, tokens = Band(block, window), tokens // block * block
    found = list(chunks(tokens, band, rows))
    assert [chunk.start for chunk in found] == [0, *(chunk.stop for chunk in found[:-1])]
    assert found[-1].stop == tokens
    for chunk in found:
        assert chunk.begin <= max(0, chunk.start - (tokens if window is None else (window - 1) * block))
        assert chunk.pairs * rows <= max(block_causal.MOST_MASK, block * tokens * rows)


def test_a_long_leading_run_of_masked_keys_is_as_if_it_were_not_there():
    # Attention runs over blocks of keys: of the queries of a late document the first blocks are masked as a whole.
    torch.manual_seed(0)
    given = [torch.randn(1, 2, 1600, 8) for _ in range(3)]
    starts = torch.tensor([0] * 700 + [700] * 100)
    together = block_causal_attention(*given, Band(2, starts=starts))
    alone = block_causal_attention(*(each[:, :, 1400:] for each in given), 2)
    torch.testing.assert_close(together[:, :, 1400:], alone)
    given[1][:, :, :1400], given[2][:, :, :1400] = 100.0, -100.0
    assert torch.equal(block_causal_attention(*given, Band(2, starts=starts))[:, :, 1400:], together[:, :, 1400:])


@pytest.mark.parametrize("window", [1, 8, 100])
def test_a_window_costs_as_many_pairs_as_its_length_allows(window):
    block, costs = 4, []
    for groups in (4096, 8192):
        found = list(chunks(groups * block, Band(block, window)))
        costs.append(sum(chunk.pairs for chunk in found))
        assert max(chunk.pairs for chunk in found) <= 2 * max(window * block, block_causal.LEAST_QUERIES) ** 2
    assert costs[1] < 2.05 * costs[0]
    # Of the pairs that are computed, at least a third is attended to, where windows are not small.
    if window * block > block_causal.LEAST_QUERIES:
        assert costs[1] < 3 * 8192 * block * window * block


def test_a_window_holds_no_mask_of_all_tokens_and_keeps_its_inputs_alone(monkeypatch):
    masks, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, mask, *rest):
        masks.append((mask.numel(), key.shape[2]))
        return real(query, key, value, mask, *rest)

    monkeypatch.setattr(block_causal.F, "scaled_dot_product_attention", watched)
    kept = []
    given = [torch.randn(1, 1, 8192, 4, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = block_causal_attention(*given, Band(4, window=4))
    out.sum().backward()
    assert max(numbers for numbers, _ in masks) <= 2 * 256 * 256
    assert max(keys for _, keys in masks) <= 2 * 256
    assert kept == [8192 * 4] * 3


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_latent_sees_its_window_through_each_global_layer(window):
    # One global layer and one write: a token hears of its own group's earlier tokens and of the window behind it.
    model = decoder(layers="(1)1(1)", latent_position="index", global_window=window)
    tokens = tokens_of(1, 7)
    for group in range(7):
        changed = tokens.clone()
        changed[:, group] = (tokens[:, group] + 1) % VOCABULARY
        heard = ((model(changed) - model(tokens)).abs().amax(dim=(0, 2, 3)) > 0).nonzero().flatten().tolist()
        assert heard == [g for g in range(7) if group <= g <= group + window]


@pytest.mark.parametrize("latents_per_group", [1, 2])
def test_a_window_of_all_groups_is_no_window(latents_per_group):
    wide = decoder(latent_position="index", global_window=9, latents_per_group=latents_per_group)
    tokens = tokens_of(2, 9)
    free = decoder(latent_position="index", latents_per_group=latents_per_group)
    torch.testing.assert_close(wide(tokens), free(tokens), rtol=1e-5, atol=1e-5)


def test_encoders_that_are_causal_know_a_window():
    sizes = {**SIZES, "latent_dim": 12, "latent_heads": 3, "layers": "(1)1"}
    geometry = {"num_groups": None, "tokens_per_group": N, "in_channels": 5, "latent_position": "index"}
    torch.manual_seed(0)
    model = fitformer.FITEncoder.from_config(sizes, **geometry, mask="causal", global_window=2).eval()
    x = torch.randn(1, 6, N, 5)
    changed = x.clone()
    changed[:, 1] += torch.randn(N, 5)
    difference = (model(x)[1] - model(changed)[1]).abs().amax(dim=(0, 2, 3))
    assert (difference > 0).tolist() == [False, True, True, False, False, False]
    with pytest.raises(InputError, match=r"global_window is 2, .*mask='causal'"):
        fitformer.FITEncoder.from_config(sizes, **geometry, global_window=2)


@pytest.mark.parametrize("groups", [3, 300])
def test_the_plan_counts_the_pairs_that_a_window_computes(groups):
    sizes = {**SIZES, "latents_per_group": 8, "latent_heads": 2, "latent_position": "index", "rotary": True}
    geometry = {"num_groups": None, "tokens_per_group": N, "vocab_size": VOCABULARY, "layers": "(1)2(1)"}
    with torch.device("meta"):
        models = [fitformer.FITDecoder.from_config(sizes, **geometry, global_window=window) for window in (4, None)]
        tokens = torch.zeros(1, groups, N, dtype=torch.int64)
    counted = []
    for model in models:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens)
        counted.append(counter.get_total_flops())
    found = [flops(model, num_groups=groups).total for model in models]
    assert found[0] == counted[0]
    assert found[0] < found[1] / 2 if groups == 300 else found[0] == found[1]
    with pytest.raises(InputError, match="any number of groups"):
        flops(models[0])


def test_a_step_over_a_window_is_planned_to_take_memory_in_proportion_to_its_length():
    model = on_meta("FITDecoder", {"num_groups": None, "tokens_per_group": 8, "vocab_size": VOCABULARY, "rotary": True,
                    "latent_position": "index", "global_window": 16}, preset="tiny")  # fmt: skip
    working = [memory(model, StepConfig(num_groups=groups, execution="streamed")).working for groups in (2**15, 2**16)]
    assert 1.9 < working[1] / working[0] < 2.1


# ---- documents packed into one row ----

LENGTHS = [5, 13, 6, 1, 24, 12, 2]
WAYS = {
    "plain": "plain",
    "checkpointed": "checkpointed",
    "streamed": Streamed(2),
    "local": Streamed(3, recompute="local"),
}
OPTIONS = {
    "table": {"num_groups": 4},
    "index": {"latent_position": "index"},
    "rows": {"latent_position": "row_column"},
    "one latent": {"latent_position": "shared", "latents_per_group": 1},
    "all": {"latent_position": "index", "rotary": True, "latent_heads": 2, "global_window": 2, "qk_norm": True},
    "separate": {"latent_position": "index", "shared_embedding": False, "output_bias": False},
}  # fmt: skip


def some_documents(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def losses(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")


def packed_outcome(model, documents, groups=7):
    """Logits of every document, and gradients of parameters, of one packed batch."""
    packed = pack_documents(documents, N, groups)
    logits = model(shift_right(packed.tokens, packed.documents), documents=packed.documents)
    (losses(logits, packed.tokens) * packed.mask.flatten()).sum().backward()
    return unpack_documents(logits.detach(), packed.documents, packed.mask), gradients_of(model)


def alone_outcome(model, documents):
    found = []
    for document in documents:
        logits = model.logits(document[None])[0]
        losses(logits, document).sum().backward()
        found.append(logits.detach())
    return found, gradients_of(model)


def gradients_of(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_packed_document_is_what_it_is_alone(options, way, dtype):
    model, documents = decoder(**options).to(dtype), some_documents()
    model.set_execution(way)
    together = packed_outcome(model, documents)
    model.set_execution("plain")
    logits, gradients = alone_outcome(model, documents)
    close = 1e-5 if dtype == torch.float32 else 1e-10
    for ours, wanted in zip(together[0], logits, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=close, atol=close * max(1.0, wanted.abs().max().item()))
    largest = max(wanted.abs().max().item() for wanted in gradients.values() if wanted is not None)
    for name, wanted in gradients.items():
        if wanted is not None:
            torch.testing.assert_close(together[1][name], wanted, rtol=close, atol=close * largest, msg=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_perturbing_a_document_leaves_the_others_as_they_are_bit_for_bit(options):
    model, documents = decoder(**options), some_documents()
    before, _ = packed_outcome(model, documents)
    for k, document in enumerate(documents):
        others = [*documents[:k], (document % (VOCABULARY - 1)) + 1, *documents[k + 1 :]]
        after, _ = packed_outcome(model, others)
        changed = [not torch.equal(ours, wanted) for ours, wanted in zip(after, before, strict=True)]
        # A document of one token is drawn from nothing: its logits know no token at all.
        assert changed == [place == k and len(document) > 1 for place in range(len(documents))]


def test_a_row_may_hold_more_groups_than_a_table_has_places():
    model = decoder(4)
    packed = pack_documents([torch.ones(24, dtype=torch.int64), torch.ones(9, dtype=torch.int64)], N, 12)
    assert packed.documents.tolist() == [[0] * 4 + [1] * 2 + [-1] * 6]
    assert model(packed.tokens, documents=packed.documents).isfinite().all()
    with pytest.raises(InputError, match="7 groups, the model positions for 4"):
        model(packed.tokens, documents=torch.tensor([[0] * 5 + [1] * 7]))
    with pytest.raises(InputError, match=r"documents \(1, 3\) .* \(1, 12\)"):
        model(packed.tokens, documents=torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_every_way_to_run_knows_every_option(way):
    model = decoder(latent_position="index", rotary=True, latent_heads=2, global_window=2, position="none").double()
    tokens, found = tokens_of(2, 7), []
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 2, 2, -1, -1]])
    for each in ("plain", way):
        model.set_execution(each)
        logits = model(tokens, documents=documents)
        logits.sin().sum().backward()
        found.append((logits.detach(), gradients_of(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-10, atol=1e-10)
    for name, wanted in found[0][1].items():
        if wanted is not None:
            torch.testing.assert_close(found[1][1][name], wanted, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("options", [OPTIONS["index"], OPTIONS["all"]], ids=["index", "all"])
def test_a_token_hears_of_earlier_tokens_of_its_document_only(options):
    model = decoder(**options)
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    tokens = tokens_of(1, 5)
    before = model(tokens, documents=documents)
    for place in range(5 * N):
        changed = tokens.clone()
        changed.view(-1)[place] = (tokens.view(-1)[place] + 1) % VOCABULARY
        heard = (model(changed, documents=documents) - before).abs().amax(dim=(0, 3)).flatten() > 0
        end = 2 * N if place < 2 * N else 5 * N
        assert not heard[:place].any()
        assert not heard[end:].any()
        assert heard[place]


# ---- lengths that fill no group ----


@pytest.mark.parametrize("length", [1, 5, 6, 7, 20])
def test_logits_of_a_sequence_of_any_length(length):
    model = decoder(latent_position="index")
    tokens = tokens_of(2, 4).flatten(1)[:, :length]
    logits = model.logits(tokens)
    assert logits.shape == (2, length, VOCABULARY)
    longer = model.logits(torch.cat([tokens, torch.ones(2, 3, dtype=torch.int64)], dim=1))
    torch.testing.assert_close(longer[:, :length], logits)
    grouped = model(shift_right(sequence_to_groups(pad_to_groups(tokens, N), N)))
    assert torch.equal(grouped.flatten(1, 2)[:, :length], logits)


# ---- train at one length, run at another ----

EXTRAPOLATING = [{"latent_position": "shared", "rotary": True, "global_window": 4}, {"latent_position": "index"}]


def repeated(batch, groups, generator):
    """Sequences that repeat one random word, a group long."""
    word = torch.randint(0, 4, (batch, 1, 4), generator=generator)
    return word.expand(batch, groups, 4).contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("options", EXTRAPOLATING, ids=["shared, rotary, window", "index"])
def test_what_is_learned_at_four_groups_holds_at_sixteen(options, one_thread):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = fitformer.FITDecoder.from_config(
        layers="(1)1(1)", dim=32, latent_dim=32, heads=2, latent_heads=2, latents_per_group=2, num_groups=None,
        tokens_per_group=4, vocab_size=4, **options,
    )  # fmt: skip
    adamw = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        tokens = repeated(32, 4, generator)
        adamw.zero_grad()
        losses(model(shift_right(tokens)), tokens).mean().backward()
        adamw.step()
    tokens = repeated(128, 16, generator)
    with torch.no_grad():
        by_group = losses(model.eval()(shift_right(tokens)), tokens).view(tokens.shape).mean(dim=(0, 2))
    assert by_group[0] > 1.3
    assert by_group[1:4].max() < 0.3
    assert by_group[4:].max() < 0.4


# ---- on a GPU ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_packed_documents_on_a_gpu_are_what_they_are_alone_and_nothing_waits_for_it(options, way):
    model = decoder(**options).double().cuda()
    packed = pack_documents([document.cuda() for document in some_documents()], N, 7)
    inputs = shift_right(packed.tokens, packed.documents)
    model.set_execution("plain")
    wanted = [model.logits(document[None].cuda())[0] for document in some_documents()]
    model.set_execution(way)
    table = model.most_groups is not None
    torch.cuda.set_sync_debug_mode("default" if table or way != "plain" else "error")
    try:
        logits = model(inputs, documents=packed.documents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, other in zip(unpack_documents(logits, packed.documents, packed.mask), wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("band", [Band(4, window=16), Band(4, starts=torch.arange(1024) // 100 * 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_band_on_a_gpu_is_that_of_the_dense_mask(band, dtype):
    torch.manual_seed(0)
    band = Band(band.block, band.window, None if band.starts is None else band.starts.cuda())
    given = [torch.randn(2, 4, 4096, 32, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    ours = block_causal_attention(*given, band)
    cpu = Band(band.block, band.window, None if band.starts is None else band.starts.cpu())
    wanted = torch.nn.functional.scaled_dot_product_attention(*given, dense(cpu, 4096).cuda())
    close = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, wanted, rtol=close, atol=close)
    gradients = (torch.autograd.grad(out.float().sin().sum(), given) for out in (ours, wanted))
    for gradient, other in zip(*gradients, strict=True):
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, other, rtol=10 * close, atol=10 * close)
