import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fitformer import FITDecoder, FITDenoiser, FITEncoder, FITImageEncoder, FITImageSegmenter, profiling
from fitformer._support.bytesize import format_bytes, parse_bytes
from fitformer.errors import InputError
from fitformer.models.config import TrunkConfig, preset
from fitformer.profiling import (
    Geometry,
    StepConfig,
    check_fits,
    count_parameters,
    flops,
    group_plan,
    memory,
    on_meta,
    parts,
    slice_for,
    streaming_for,
)
from fitformer.profiling.activations import Numerics, dense_stage, layer_stage
from fitformer.profiling.geometry import candidate_group_sizes
from fitformer.profiling.memory import MOST_BYTES, TRAINER, _Step
from fitformer.profiling.planner import RECOMPUTES
from fitformer.profiling.probes import build_layer
from fitformer.tasks._pixel_sums import loss_sums

SIZE = {"dim": 16, "latent_dim": 24, "heads": 2, "latent_heads": 3, "latents_per_group": 3}
GROUPS = {"num_groups": 4, "tokens_per_group": 6}

# Each: the model, how to call it on one example, and what `parts` must be told.
CASES = {
    "encoder": lambda: (
        FITEncoder.from_config(layers="(2)1(1)2", **GROUPS, in_channels=5, **SIZE),
        (torch.rand(1, 4, 6, 5),),
        {},
    ),
    "encoder with y": lambda: (
        FITEncoder.from_config(layers="(1)2", **GROUPS, in_channels=5, y_channels=7, mask="causal", **SIZE),
        (torch.rand(1, 4, 6, 5), torch.rand(1, 4, 2, 7)),
        {"extra_tokens": 2},
    ),
    "image encoder": lambda: (
        FITImageEncoder.from_config(
            layers="(1)1(1)", image_size=8, group_size=4, patch_size=2, channels=1, num_classes=10, **SIZE
        ),
        (torch.rand(1, 8, 8, 1),),
        {},
    ),
    "segmenter": lambda: (
        FITImageSegmenter.from_config(
            layers="(1)1(1)", image_size=8, group_size=4, patch_size=2, channels=1, num_classes=3, refinement=4, **SIZE
        ),
        (torch.rand(1, 8, 8, 1),),
        {},
    ),
    "denoiser": lambda: (
        FITDenoiser.from_config(layers="(1)2(1)", **GROUPS, out_dim=5, self_cond="latent", xattn_with_mlp=True, **SIZE),
        (torch.rand(1, 4, 6, 5), torch.rand(1)),
        {},
    ),
    "conditional denoiser": lambda: (
        FITDenoiser.from_config(
            layers="(0)2(1)", **GROUPS, out_dim=5, cond_dim=10, extra_time=1, x_self_attention=False, **SIZE
        ),
        (torch.rand(1, 4, 6, 5), torch.rand(1, 2), torch.rand(1, 3, 10)),
        {"condition_tokens": 3},
    ),
    "decoder": lambda: (
        FITDecoder.from_config(layers="(1)2(1)", **GROUPS, vocab_size=17, **SIZE),
        (torch.zeros(1, 4, 6, dtype=torch.long),),
        {},
    ),
    "untied decoder": lambda: (
        FITDecoder.from_config(
            layers="(1)2(1)", **GROUPS, vocab_size=17, shared_embedding=False, output_bias=False, **SIZE
        ),
        (torch.zeros(1, 4, 6, dtype=torch.long),),
        {},
    ),
    "conditional decoder": lambda: (
        FITDecoder.from_config(layers="(1)2(1)", **GROUPS, vocab_size=17, num_classes=5, **SIZE),
        (torch.zeros(1, 4, 6, dtype=torch.long), None, torch.zeros(1, dtype=torch.long)),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_that_torch_counts(name):
    model, inputs, told = CASES[name]()
    # The counter knows the products that plain attention is made of, not every fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.requires_grad_(False)(*inputs)
    assert flops(model, **told).total == counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_parts_hold_every_parameter_once(name):
    model, _, told = CASES[name]()
    assert sum(part.parameters for part in parts(model, **told)) == count_parameters(model)


@pytest.mark.parametrize("name", CASES)
def test_a_model_without_memory_costs_the_same(name):
    model, _, told = CASES[name]()
    assert parts(on_meta(type(model).__name__, model.config), **told) == parts(model, **told)


def test_the_group_plan_says_how_the_input_is_cut():
    plan = group_plan(
        on_meta("FITImageEncoder", dict(layers="(2)1(2)", image_size=(8, 16), group_size=4, patch_size=2, **SIZE))
    )
    assert (plan.num_groups, plan.tokens_per_group, plan.latents_per_group) == (8, 4, 3)
    assert (plan.dim, plan.latent_dim, plan.layers) == (16, 24, "(2)1(2)")


def test_attention_of_local_layers_grows_linearly_and_of_global_ones_quadratically_with_the_image():
    def attention(side, kind):
        config = dict(layers="(1)1(1)", image_size=side, group_size=8, patch_size=2, **SIZE)
        model = on_meta("FITImageEncoder", config)
        return sum(part.flops.attention for part in parts(model) if kind in part.name)

    assert attention(32, "local") == 4 * attention(16, "local")
    assert attention(32, "global") == 16 * attention(16, "global")


def test_an_unknown_role_is_named():
    with pytest.raises(InputError, match=r"no role 'FITEncodr'.*FITEncoder"):
        on_meta("FITEncodr", {})


def kept_by_autograd(model, run):
    """Bytes that autograd keeps for the backward pass of `run()`, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    return sum(storage.nbytes() for storage in found.values()), out


WIDE = {"dim": 64, "latent_dim": 96, "heads": 4, "latent_heads": 4, "latents_per_group": 4}
KEPT = {
    "plain": (FITEncoder, {"in_channels": 24}),
    "denoiser": (FITDenoiser, {"out_dim": 24}),
    "decoder": (FITDecoder, {"vocab_size": 40}),
    "dropout": (FITEncoder, {"in_channels": 24, "drop_units": 0.2, "drop_att": 0.2, "drop_path": 0.1}),
    "rotary": (FITEncoder, {"in_channels": 24, "rotary": True}),
    "window": (FITDecoder, {"vocab_size": 40, "rotary": True, "latent_position": "index", "global_window": 2}),
}


def run_of(model):
    batch, groups, n = 2, 6, 32
    if isinstance(model, FITDecoder):
        tokens = torch.randint(40, (batch, groups, n))
        return lambda: torch.nn.functional.cross_entropy(model(tokens).flatten(0, 2), tokens.flatten())
    x, other = torch.randn(batch, groups, n, 24), torch.randn(batch, groups, n, 24)
    if isinstance(model, FITDenoiser):
        return lambda: (model(x, torch.rand(batch))[0] - other).square().mean()
    return lambda: model(x)[1].mean()


def kept_and_predicted(role, precision=32, **own):
    """Bytes that autograd keeps of a pass, copies of weights left out, and those that are predicted."""
    layers = "(2)2(1)1" if role is FITEncoder else "(2)2(1)"
    model = role.from_config(layers=layers, num_groups=6, tokens_per_group=32, **WIDE, **own)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        kept, _ = kept_by_autograd(model, run_of(model))
    step = _Step(model, StepConfig(batch=2, precision=precision))
    # The last norm is no activation of the layers.
    copies = 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2) if precision == "bf16" else 0
    stages = [step.stem(step.tokens), *(s for i in range(2) for s in (*step.group_phase(i, 12), *step.global_phase(i)))]
    predicted = sum(stage.kept for stage in [*stages, *step.head(step.tokens)]) + step.initial_latents()
    return kept - copies, predicted


@pytest.mark.parametrize("precision", [32, "bf16"])
@pytest.mark.parametrize("name", KEPT)
def test_activations_are_those_that_autograd_keeps(name, precision):
    role, own = KEPT[name]
    kept, predicted = kept_and_predicted(role, precision, **own)
    assert kept == pytest.approx(predicted, rel=0.06)


OPTIONS = [{"qk_norm": True}, {"xattn_with_mlp": True}, {"drop_units": 0.2}, {"mlp_ratio": 2}, {"drop_att": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_of_the_trunk_is_priced_without_a_formula_of_its_own(options):
    with_option, without = (kept_and_predicted(FITEncoder, in_channels=24, **each) for each in (options, {}))
    kept, predicted = (now - before for now, before in zip(with_option, without, strict=True))
    assert kept != 0
    assert predicted == pytest.approx(kept, rel=0.03)
    model = FITEncoder.from_config(
        layers="(2)2(1)1", num_groups=6, tokens_per_group=32, in_channels=24, **WIDE, **options
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.requires_grad_(False).eval()(torch.rand(1, 6, 32, 24))
    assert flops(model).total == counter.get_total_flops()
    files = (Path(profiling.__file__).parent / f"{name}.py" for name in ("flops", "probes", "activations", "memory"))
    assert not any(option in file.read_text() for file in files for option in options)


@pytest.mark.parametrize("options", [{}, {"drop_units": 0.1}, {"qk_norm": True, "xattn_enc_ln": False}], ids=str)
def test_a_layer_is_counted_to_the_byte(options):
    config = TrunkConfig(dim=32, latent_dim=48, heads=4, latent_heads=4, **options)
    x, latents = torch.randn(3, 10, 32, requires_grad=True), torch.randn(3, 4, 48, requires_grad=True)
    layer = build_layer(config, "global")
    kept, _ = kept_by_autograd(layer, lambda: layer(latents))
    # The input is counted by the layer that made it; the output, as large, is kept by the layer that takes it.
    assert layer_stage(config, "global", 3, 4, 0, Numerics()).kept == kept
    read = build_layer(config, "read")
    kept, _ = kept_by_autograd(read, lambda: read(latents, x))
    assert layer_stage(config, "read", 3, 4, 10, Numerics()).kept == kept - x.nbytes


def segmenter(**options):
    cut = {"image_size": None, "group_size": 160, "patch_size": 16, "latent_position": "row_column"}
    return FITImageSegmenter.from_preset("tiny", **cut, num_classes=5, **options)


@pytest.mark.parametrize("refinement", [0, 16])
def test_pixels_that_a_segmenter_decodes_are_counted_to_the_percent(refinement):
    model = segmenter(refinement=refinement)
    grid, labels = model.patch_grid, torch.zeros(2, 3, 160, 160, dtype=torch.uint8)
    x = torch.randn(2, 3, grid.tokens_per_group, 32, requires_grad=True)
    patches = torch.randn(2, 3, grid.tokens_per_group, grid.token_dim)
    kept, _ = kept_by_autograd(model.head, lambda: loss_sums(model.head(x, patches), labels))
    predicted = dense_stage(model, 6, 2, 32)
    assert predicted.kept == pytest.approx(kept - x.nbytes, rel=0.01)


def test_a_slice_of_pixels_is_kept_whole_and_worked_on_in_pieces():
    model = segmenter()
    few, many = (dense_stage(model, groups, 1, 32) for groups in (model.groups_at_once(1), 100))
    assert many.kept / few.kept == pytest.approx(100 / model.groups_at_once(1), rel=0.01)
    assert many.moment == few.moment
    more, less = (memory(segmenter(refinement=k), StepConfig(num_groups=100)).working for k in (16, 0))
    assert more > 2 * less


def small(**setup):
    config = dict(asdict(preset("small")), image_size=None, group_size=256, patch_size=16, latent_position="row_column")
    return on_meta("FITImageEncoder", config), StepConfig(**{"num_groups": 100, **setup})


def test_streaming_needs_less_than_checkpointing_and_that_less_than_plain():
    peaks = [memory(*small(execution=way)).total for way in ("plain", "checkpointed", "streamed")]
    assert peaks == sorted(peaks, reverse=True)
    kept = [memory(*small(execution="streamed", keep=keep, kept_precision=half)) for keep, half in PLACES]
    assert kept[0].kept > kept[1].kept > kept[2].kept
    assert kept[2].scratch == 2 * (kept[0].kept - kept[1].kept) == 100 * 256 * 256 * 4


PLACES = (("memory", None), ("memory", "bf16"), ("disk", None))


def test_the_working_set_of_streaming_does_not_grow_with_the_image():
    few, many = (memory(*small(execution="streamed", keep="disk", slice_groups=8, num_groups=t)) for t in (100, 400))
    latents = 300 * 16 * 512 * 4
    assert many.working - few.working < 40 * latents
    plain = [memory(*small(num_groups=t)).working for t in (100, 400)]
    assert plain[1] / plain[0] == pytest.approx(4, rel=0.02)


def test_a_run_of_training_counts_its_libraries_and_the_tiles_of_all_images():
    model, setup = small(execution="streamed", num_groups=10)
    one = memory(model, setup).process
    assert memory(model, replace(setup, trainer=True)).process == one + TRAINER
    image = 10 * 256 * 256 * 3
    assert memory(model, replace(setup, data_bytes=5 * image)).process == one + 4 * image
    # Of which the cache keeps no more than it may.
    assert memory(model, replace(setup, data_bytes=500 * image)).process == one - image + MOST_BYTES


def test_a_slice_is_the_largest_that_fits_a_budget():
    model, setup = small(execution="streamed")
    most = slice_for(model, setup)
    assert most == 4096 // 256
    budget = memory(model, replace(setup, slice_groups=6)).total
    found = slice_for(model, setup, budget)
    assert 4 <= found <= 6
    assert memory(model, replace(setup, slice_groups=found)).total <= budget
    assert slice_for(model, setup, 1) == 1


@given(gigabytes=st.floats(0.5, 12), recompute=st.sampled_from([None, "full", "selective"]))
@settings(max_examples=30, deadline=None)
def test_what_is_remembered_fits_and_grows_with_the_budget(gigabytes, recompute):
    model, setup = small(execution="streamed")
    budget = int(gigabytes * 10**9)
    found = streaming_for(model, setup, budget, recompute)
    assert recompute is None or found.recompute == recompute
    needed = memory(model, found).total
    assert needed <= budget or found.slice_groups == 1
    if found.recompute != "full" and recompute is None:
        assert needed <= 0.9 * budget
        assert found.slice_groups == slice_for(model, setup)
    more = streaming_for(model, setup, 2 * budget, recompute)
    assert RECOMPUTES.index(more.recompute) <= RECOMPUTES.index(found.recompute)


def test_what_is_remembered_is_asked_for_or_needs_a_budget():
    model, setup = small(execution="streamed")
    assert streaming_for(model, setup) == replace(setup, slice_groups=16)
    assert streaming_for(model, setup, 10**11) == replace(setup, slice_groups=16, recompute="light")
    assert streaming_for(model, setup, None, "local", 3) == replace(setup, slice_groups=3, recompute="local")


def test_what_has_no_room_says_what_it_needs_and_what_would_do():
    model, setup = small(execution="plain")
    assert check_fits(model, setup, 10**11).total < 10**11
    with pytest.raises(InputError, match=r"needs .* GB of memory and the budget is 1.2 GB.*streamed .* fits, from"):
        check_fits(model, setup, 12 * 10**8)
    with pytest.raises(InputError, match=r"take a smaller model"):
        check_fits(model, setup, 10**7)
    with pytest.raises(InputError, match="execution is 'fast'; it must be one of plain"):
        StepConfig(execution="fast")


def test_groups_of_the_fewest_operations_are_chosen_and_their_attention_grows_as_the_paper_says():
    def attention(side):
        best, *others = candidate_group_sizes(Geometry.of_preset("encoder", "small", side))
        assert all(best.flops().total <= other.flops().total for other in others)
        return best.flops().attention

    growth = math.log(attention(6400) / attention(1600)) / math.log(16)
    assert growth <= 4 / 3


@pytest.mark.parametrize("size", [6400, (40000, 30000), (1600, 1200), (2000, 1024), 800, 224, 48, 10])
@pytest.mark.parametrize("role", ["encoder", "denoiser"])
def test_groups_of_images_that_are_no_strips_are_squares(size, role):
    geometry = Geometry.of_preset(role, "tiny", size)
    largest = max(-(-side // 16) for side in geometry.image_size)
    sides = [side for side in range(4, 65) if side <= largest] or [largest]
    squares = [replace(geometry, group_size=16 * side) for side in sides]
    assert list(candidate_group_sizes(geometry)) == sorted(squares, key=lambda candidate: candidate.flops().total)


@given(sides=st.tuples(st.integers(1, 3000), st.integers(1, 100000)), upright=st.booleans())
@settings(max_examples=8, deadline=None)
def test_groups_of_strips_do_not_reach_beyond_them_for_nothing(sides, upright):
    geometry = Geometry.of_preset("encoder", "tiny", sides if upright else sides[::-1])
    extent = [-(-side // 16) for side in geometry.image_size]
    for candidate in candidate_group_sizes(geometry):
        high, wide = candidate.patch_grid.patches
        assert high == wide or (high <= extent[0] and wide <= extent[1])
        assert high * wide <= 64 * 65 or high == wide
        assert high * wide >= min(16, math.prod(extent))


def test_a_strip_is_hardly_filled_up():
    best = next(candidate_group_sizes(Geometry.of_preset("encoder", "small", (3, 100000))))
    assert best.patch_grid.patches[0] == 1
    assert best.num_groups * best.tokens_per_group < 1.05 * best.length


def test_what_files_decode_at_once_counts_as_memory():
    model, setup = small(num_groups=2, execution="streamed")
    tiles, picture = (memory(model, replace(setup, decode_bytes=piece)) for piece in (10**4, 10**9))
    assert tiles == memory(model, setup)
    assert picture.total - tiles.total == pytest.approx(2.5e9, rel=0.06)
    assert picture.process - tiles.process == picture.total - tiles.total
    on_gpu = replace(setup, device="cuda")
    assert memory(model, replace(on_gpu, decode_bytes=10**9)) == memory(model, on_gpu)


def test_a_model_of_any_size_wants_to_know_the_number_of_groups():
    model, _ = small()
    with pytest.raises(InputError, match="say how many"):
        flops(model)
    assert flops(model, num_groups=200).linear == pytest.approx(2 * flops(model, num_groups=100).linear, rel=1e-3)


@pytest.mark.parametrize(("text", "count"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), (7, 7)])
def test_amounts_of_memory_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["16", "999999", " 7.5 "])
def test_a_unit_that_was_forgotten_is_asked_for(text):
    with pytest.raises(InputError, match=f"{text.strip()}.* write {text.strip()}GB"):
        parse_bytes(text)
    assert parse_bytes("16 B") == parse_bytes(16) == 16
    assert parse_bytes("16000000") == 16 * 10**6


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1GB", "0"])
def test_no_amounts_of_memory_are_refused(text):
    with pytest.raises(InputError, match="memory"):
        parse_bytes(text)


def test_amounts_are_said_in_units_of_a_thousand():
    assert [format_bytes(count) for count in (999, 1234567, 2e9, 1e13)] == ["999 B", "1.23 MB", "2 GB", "10 TB"]
