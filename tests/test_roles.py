"""The three roles: shapes, causality, precision, copies, export, presets, feature maps and bad input."""

import copy
import pickle

import pytest
import torch

import fitformer
from fitformer import FITDecoder, FITDenoiser, FITEncoder, FITImageEncoder
from fitformer.errors import InputError
from fitformer.execution import checkpointed
from fitformer.models.config import PRESETS, preset

T, N, M, V = 4, 6, 2, 11
SIZE = {"layers": "(1)1(1)1(1)", "dim": 16, "latent_dim": 24, "heads": 2, "latent_heads": 4, "latents_per_group": M}
GROUPED = {**SIZE, "num_groups": T, "tokens_per_group": N}
ROLES = ["encoder", "denoiser", "decoder", "images"]


def randomize(model):
    """Move every weight away from its initial value: zeros (a bias, self-conditioning) would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(role, **options):
    torch.manual_seed(0)
    if role == "encoder":
        return randomize(FITEncoder.from_config(**{**GROUPED, "in_channels": 5, "y_channels": 3, **options}))
    if role == "denoiser":
        return randomize(
            FITDenoiser.from_config(**{**GROUPED, "out_dim": 5, "cond_dim": 3, "self_cond": "latent", **options})
        )
    if role == "decoder":
        return randomize(FITDecoder.from_config(**{**GROUPED, "vocab_size": V, **options}))
    sizes = {**SIZE, "image_size": (16, 24), "group_size": 8, "patch_size": 4}
    return randomize(FITImageEncoder.from_config(**{**sizes, "num_classes": 7, **options}))


def make_inputs(role, batch=3):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(batch, *shape, generator=generator)

    if role == "encoder":
        return randn(T, N, 5), randn(T, 1, 3)
    if role == "denoiser":
        time = torch.randint(64, (batch,), generator=generator) / 64  # exact in half precision too
        return randn(T, N, 5), time, randn(3), randn(T, M, 24)
    if role == "decoder":
        return (torch.randint(V, (batch, T, N), generator=generator),)
    return (torch.rand(batch, 16, 24, 3, generator=generator),)


def parts(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def trunk_of(model):
    return model.encoder.trunk if isinstance(model, FITImageEncoder) else model.trunk


# What all roles promise -----------------------------------------------------------------------------------------------

SHAPES = {
    "encoder": [(3, T, 1 + N, 16), (3, T, M, 24)],
    "denoiser": [(3, T, N, 5), (3, T, M, 24)],
    "decoder": [(3, T, N, V)],
    "images": [(3, 7)],
}


@pytest.mark.parametrize("role", ROLES)
def test_shapes(role):
    assert [tuple(part.shape) for part in parts(build(role)(*make_inputs(role)))] == SHAPES[role]


@pytest.mark.parametrize("role", ROLES)
def test_an_example_does_not_depend_on_the_others(role):
    model, inputs = build(role), make_inputs(role)
    for whole, one in zip(parts(model(*inputs)), parts(model(*(x[1:2] for x in inputs))), strict=True):
        torch.testing.assert_close(whole[1:2], one, rtol=1e-5, atol=1e-5)
    for none in parts(model(*(x[:0] for x in inputs))):
        assert none.shape[0] == 0


@pytest.mark.parametrize("role", ROLES)
def test_eval_is_deterministic_and_training_is_not(role):
    model, inputs = build(role, drop_path=0.3, drop_units=0.3, drop_att=0.3), make_inputs(role)
    assert torch.equal(parts(model(*inputs))[0], parts(model(*inputs))[0])
    model.train()
    assert not torch.equal(parts(model(*inputs))[0], parts(model(*inputs))[0])


@pytest.mark.parametrize("role", ROLES)
def test_checkpointed_is_plain(role):
    model = build(role, drop_path=0.3, drop_units=0.2, drop_att=0.1).train()
    other = copy.deepcopy(model)
    other.set_execution(checkpointed)
    for one in (model, other):
        torch.manual_seed(3)
        sum(part.sin().sum() for part in parts(one(*make_inputs(role)))).backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("role", ROLES)
def test_half_precision_is_near(role, dtype):
    inputs = make_inputs(role)
    half = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    expected, out = parts(build(role)(*inputs)), parts(build(role).to(dtype)(*half))
    for ours, value in zip(out, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.float() - value).abs().max() < 16 * torch.finfo(dtype).eps * value.abs().max()


@pytest.mark.parametrize("role", ROLES)
def test_autocast_is_near(role):
    model, inputs = build(role), make_inputs(role)
    with torch.autocast("cpu", torch.bfloat16):
        out = parts(model(*inputs))
    for ours, value in zip(out, parts(model(*inputs)), strict=True):
        assert (ours.float() - value).abs().max() < 0.1 * value.abs().max()


@pytest.mark.parametrize("role", ROLES)
def test_float64_is_near(role):
    inputs = make_inputs(role)
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    for ours, value in zip(parts(build(role).double()(*double)), parts(build(role)(*inputs)), strict=True):
        torch.testing.assert_close(ours.float(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("role", ROLES)
def test_copies_and_pickles(role):
    model, inputs = build(role, latent_position="sin_cos"), make_inputs(role)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config
        assert torch.equal(parts(other(*inputs))[0], parts(model(*inputs))[0])
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(next(other.parameters()), next(model.parameters()))


@pytest.mark.parametrize("role", ROLES)
def test_state_dict_round_trip(role):
    model, other, inputs = build(role), build(role), make_inputs(role)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert torch.equal(parts(other(*inputs))[0], parts(model(*inputs))[0])


@pytest.mark.parametrize("role", ROLES)
def test_export_with_any_batch(role):
    options = {} if role == "decoder" else {"mask": "causal"}
    model, inputs = build(role, layers="(1)1(1)", position="sin_cos", **options), make_inputs(role)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    for size in (2, 5):
        other = make_inputs(role, size)
        for ours, value in zip(parts(program.module()(*other)), parts(model(*other)), strict=True):
            torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself, within torch
def test_compiled_layers_are_the_plain_ones():
    model, inputs = build("encoder", layers="(1)1(1)"), make_inputs("encoder")
    expected = parts(model(*inputs))
    for layer in trunk_of(model).layers():
        layer.compile()
    for ours, value in zip(parts(model(*inputs)), expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-4)


# Each role ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", range(T))
def test_causal_encoder_by_perturbation(group):
    model, (x, y) = build("encoder", mask="causal"), make_inputs("encoder")
    changed = x.clone()
    changed[:, group] += torch.randn(3, N, 5)
    for before, after in zip(model(x, y), model(changed, y), strict=True):
        moved = [g for g in range(T) if (before - after)[:, g].abs().max() > 1e-5]
        assert moved == list(range(group, T))


@pytest.mark.parametrize(("group", "place"), [(0, 0), (0, N - 1), (1, 3), (T - 1, 0), (T - 1, N - 1)])
@pytest.mark.parametrize("layers", ["(1)1(1)2(1)", "(0)1(0)1(1)", "(2)1", "(1)1(0)"])
def test_decoder_hears_the_past_alone_and_all_of_it(layers, group, place):
    model, (tokens,) = build("decoder", layers=layers), make_inputs("decoder")
    changed = tokens.clone()
    changed[:, group, place] = (changed[:, group, place] + 1) % V
    moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 3)) > 1e-5
    at = torch.arange(T * N).view(T, N)
    first = group * N + place
    assert not moved[at < first].any()
    assert moved[group, place]
    if layers.startswith(("(1)1(1)", "(2)")):  # local layers carry it to the rest of its group
        assert moved[group, place:].all()
    if layers.count("(") > 1:  # write carries it to the groups after, and to nowhere else
        assert moved[group + 1 :].all()


def test_decoder_of_fewer_groups_is_the_beginning():
    model, (tokens,) = build("decoder"), make_inputs("decoder")
    torch.testing.assert_close(model(tokens[:, :2]), model(tokens)[:, :2], rtol=1e-5, atol=1e-5)


def test_decoder_takes_any_whole_numbers():
    model, (tokens,) = build("decoder"), make_inputs("decoder")
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(model(tokens.to(dtype)), model(tokens))


def test_self_conditioning_is_nothing_at_first_and_absent_means_zeros():
    x, time, cond, latents = make_inputs("denoiser")
    fresh = FITDenoiser.from_config(**GROUPED, out_dim=5, cond_dim=3, self_cond="latent").eval()
    assert torch.equal(fresh(x, time, cond, latents)[0], fresh(x, time, cond)[0])
    model = build("denoiser")
    assert torch.equal(model(x, time, cond)[0], model(x, time, cond, torch.zeros_like(latents))[0])
    assert not torch.allclose(model(x, time, cond)[0], model(x, time, cond, latents)[0])


def test_denoiser_takes_one_token_of_condition_with_or_without_its_axis():
    (x, time, cond, _), model = make_inputs("denoiser"), build("denoiser")
    torch.testing.assert_close(model(x, time, cond)[0], model(x, time, cond[:, None])[0])
    torch.testing.assert_close(model(x, time[:, None], cond)[0], model(x, time, cond)[0])
    two = torch.stack([cond, cond.flip(0)], dim=1)
    torch.testing.assert_close(model(x, time, two)[0], model(x, time, two.flip(1))[0])  # a set, without order


def test_low_precision_time_keeps_its_sharpness():
    model, time = build("denoiser").time, torch.tensor([0.5, 0.75])
    torch.testing.assert_close(model(time), model(time.bfloat16()))  # both numbers are exact in bfloat16


# Images ---------------------------------------------------------------------------------------------------------------


def test_the_map_has_each_patch_at_its_place():
    """Without layers between patches a changed patch changes one cell of the map, the one under it."""
    model = build("images", layers="(1)", heads=2)
    for layer in model.trunk.blocks[0].local_layers:
        torch.nn.init.zeros_(layer.attention.output.weight)
    image = torch.rand(1, 16, 24, 3)
    before = model.forward_features(image)
    assert before.shape == (1, 16, 4, 6)
    for row, column in [(0, 0), (1, 2), (3, 5), (2, 4)]:
        changed = image.clone()
        changed[:, row * 4 + 1, column * 4 + 3] += 1
        moved = (model.forward_features(changed) - before).abs().amax(dim=(0, 1)) > 1e-6
        assert moved.nonzero().tolist() == [[row, column]]


def test_without_global_layers_only_the_own_group_hears():
    model, image = build("images", layers="(2)"), torch.rand(1, 16, 24, 3)
    changed = image.clone()
    changed[:, 9, 17] += 1  # group (1, 2): rows 2-3 and columns 4-5 of the map
    moved = (model.forward_features(changed) - model.forward_features(image)).abs().amax(dim=(0, 1)) > 1e-6
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[2:, 4:] = True
    assert torch.equal(moved, expected)


def test_intermediates_end_in_the_features():
    model, (images,) = build("images"), make_inputs("images")
    maps = model.forward_intermediates(images)
    assert [tuple(one.shape) for one in maps] == [(3, 16, 4, 6)] * 3
    torch.testing.assert_close(maps[-1], model.forward_features(images), rtol=1e-5, atol=1e-5)
    chosen = model.forward_intermediates(images, [-1, 0])
    assert torch.equal(chosen[0], maps[2])
    assert torch.equal(chosen[1], maps[0])
    assert model.forward_intermediates(images, []) == []
    for absent in (3, -4):
        with pytest.raises(InputError, match=f"no block {absent}: the layer string has 3"):
            model.forward_intermediates(images, [absent])


@pytest.mark.parametrize(("layers", "width"), [("(1)1", 24), ("(1)1(1)", 16)])
def test_the_head_stands_on_what_the_layer_string_ends_in(layers, width):
    (images,) = make_inputs("images")
    assert build("images", layers=layers).head.in_features == width
    assert build("images", layers=layers, num_classes=0)(images).shape == (3, width)


def test_images_of_any_channels_and_positions():
    model = build("images", channels=1, position="sin_cos2d", latent_position="sin_cos")
    assert model(torch.rand(2, 16, 24, 1)).shape == (2, 7)


# Presets --------------------------------------------------------------------------------------------------------------


def count(name):
    with torch.device("meta"):
        model = FITEncoder.from_preset(name, num_groups=16, tokens_per_group=64, in_channels=768)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def test_presets_have_the_sizes_they_say():
    sizes = {name: count(name) for name in PRESETS}
    assert list(sizes) == ["tiny", "slide", "small", "base", "large"]
    assert sizes["tiny"] < 1 < sizes["slide"] < 2
    assert 20 <= sizes["small"] < 90 <= sizes["base"] <= 130 < sizes["large"]


@pytest.mark.parametrize("name", PRESETS)
def test_roles_that_answer_in_tokens_end_in_local_layers(name):
    grouped = {"num_groups": 4, "tokens_per_group": 16}
    with torch.device("meta"):
        denoiser = FITDenoiser.from_preset(name, **grouped, out_dim=3)
        decoder = FITDecoder.from_preset(name, **grouped, vocab_size=256)
        images = FITImageEncoder.from_preset(name, image_size=64, group_size=32, patch_size=8, num_classes=10)
    assert denoiser.trunk.block_depths[-1][1] == decoder.trunk.block_depths[-1][1] == 0
    assert images.trunk.block_depths[-1][1] > 0
    assert denoiser.trunk.block_depths[:-1] == images.trunk.block_depths


def test_a_preset_can_be_overridden():
    model = FITDecoder.from_preset("tiny", num_groups=2, tokens_per_group=4, vocab_size=5, dim=64, layers="(1)1(1)")
    assert model.embedding.weight.shape == (5, 64)
    assert model.config["layers"] == "(1)1(1)"
    with pytest.raises(InputError, match="no preset 'huge'; there are tiny, slide, small, base, large"):
        preset("huge")


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "options", "message"),
    [
        ("encoder", {"mask": "block"}, "unknown mask 'block'; known are 'none' and 'causal'"),
        ("encoder", {"in_channels": 0}, "channels is 0"),
        ("encoder", {"y_channels": 0}, "channels is 0"),
        ("encoder", {"dim": 0}, "dim is 0"),
        ("encoder", {"heads": 3}, "3 heads do not divide the width 16 of local layers, dim; the nearest, 2 or 4"),
        ("denoiser", {"self_cond": "x"}, "unknown self_cond 'x'; known are none, latent"),
        ("denoiser", {"cond_proj": False}, "cond_proj=False needs cond_dim equal to latent_dim, not 3 and 24"),
        ("denoiser", {"cond_dim": 0}, "cond_dim is 0"),
        ("denoiser", {"latent_dim": 4, "latent_heads": 2}, "latent_dim is 4; a denoiser needs at least 8"),
        ("denoiser", {"out_dim": -1}, "out_dim is -1"),
        ("decoder", {"vocab_size": 0}, "vocab_size is 0"),
        ("images", {"patch_size": 3}, "3"),
        ("images", {"group_size": 10}, "10"),
        ("images", {"num_classes": -1}, "num_classes is -1"),
        ("images", {"position": "sin_cos2d", "group_size": (8, 24)}, "square number of tokens in a group, not 12"),
    ],
)
def test_what_a_role_is_not_built_of(role, options, message):
    with pytest.raises(InputError, match=message):
        build(role, **options)


X, TIME, COND, PREV = make_inputs("denoiser")
ENCODED, Y = make_inputs("encoder")
TOKENS = make_inputs("decoder")[0]


@pytest.mark.parametrize(
    ("role", "options", "inputs", "message"),
    [
        ("encoder", {}, (ENCODED,), "y are missing, and the encoder was built with y_channels"),
        ("encoder", {"y_channels": None}, (ENCODED, Y), "y are given, and the encoder was built without y_channels"),
        ("encoder", {}, (ENCODED, Y[:, :2]), r"y \(3, 2, 1, 3\) do not belong to the groups of x"),
        ("encoder", {}, (ENCODED, Y[..., :2]), "tokens of 2 channels given to a model built for 3"),
        ("encoder", {}, (ENCODED[..., :4], Y), "tokens of 4 channels given to a model built for 5"),
        ("encoder", {}, (ENCODED[:, :, :5], Y), "groups of 5 tokens given to a model built for 6"),
        ("encoder", {}, (ENCODED[0], Y), r"expected a tensor \(b, t, n, channels\), got one of shape \(4, 6, 5\)"),
        ("encoder", {}, (torch.cat([ENCODED] * 2, 1), torch.cat([Y] * 2, 1)), "8 groups, the model positions for 4"),
        ("encoder", {}, (ENCODED.byte(), Y), "tokens are torch.uint8; turn pixels into floats"),
        ("denoiser", {}, (X, TIME), "a condition of width None given to a denoiser built with cond_dim=3"),
        ("denoiser", {"cond_dim": None}, (X, TIME, COND), "width 3 given to a denoiser built with cond_dim=None"),
        ("denoiser", {}, (X, TIME, COND[:, :2]), "width 2 given to a denoiser built with cond_dim=3"),
        ("denoiser", {}, (X, TIME, COND[:1]), r"cond \(1, 3\) needs one row for each of the 3 examples"),
        ("denoiser", {}, (X, TIME[:1], COND), r"time \(1,\) needs one row for each of the 3 examples"),
        ("denoiser", {}, (X, TIME[0], COND), r"time \(\) needs one row for each of the 3 examples"),
        ("denoiser", {"extra_time": 1}, (X, TIME, COND), r"time has shape \(3,\), the denoiser was built for \(b, 2\)"),
        ("denoiser", {}, (X, TIME.expand(2, 3).T, COND), r"shape \(3, 2\), the denoiser was built for \(b, 1\)"),
        (
            "denoiser",
            {},
            (X, TIME, COND, PREV[:, :2]),
            r"latents_prev has shape \(3, 2, 2, 24\), wanted \(3, 4",
        ),
        ("denoiser", {"self_cond": "none"}, (X, TIME, COND, PREV), "latents_prev given to a denoiser built with"),
        ("decoder", {}, (TOKENS + V,), "outside the vocabulary of 11"),
        ("decoder", {}, (TOKENS - V,), r"token -\d+ is outside the vocabulary of 11 \(0 to 10\)"),
        ("decoder", {}, (TOKENS.float(),), "tokens are torch.float32; they are whole numbers below 11"),
        ("decoder", {}, (TOKENS[..., :3],), "groups of 3 tokens given to a model built for 6"),
        ("decoder", {}, (TOKENS.flatten(1),), r"expected a tensor \(b, t, n\), got one of shape \(3, 24\)"),
        ("decoder", {}, (torch.cat([TOKENS] * 2, 1),), "8 groups, the model positions for 4"),
        ("images", {}, (torch.rand(2, 16, 16, 3),), "16"),
        ("images", {}, (torch.rand(2, 16, 24, 1),), "1"),
        ("images", {}, (torch.zeros(2, 16, 24, 3, dtype=torch.uint8),), "turn pixels into floats"),
    ],
)
def test_what_a_role_is_not_given(role, options, inputs, message):
    model = build(role, **options)
    with pytest.raises(InputError, match=message):
        model(*inputs)


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_images_of_any_precision_take_that_of_the_weights(weights, given):
    sizes = {"image_size": 8, "group_size": 4, "patch_size": 2}
    model = fitformer.FITImageEncoder.from_preset("tiny", **sizes, num_classes=3).to(weights).eval()
    images = torch.rand(2, 8, 8, 3).to(torch.bfloat16)
    answer = model(images.to(given))
    assert answer.dtype == weights
    assert torch.equal(answer, model(images.to(weights)))


def test_a_denoiser_of_images_takes_classes_by_number():
    from fitformer import diffusion

    sizes = {"image_size": 8, "group_size": 4, "patch_size": 2, "num_classes": 5}
    model = fitformer.FITImageDenoiser.from_preset("tiny", **sizes).eval()
    x, time, classes = torch.randn(2, 4, 4, 12), torch.full((2,), 0.5), torch.tensor([3, -1])
    wanted = model(x, time, model.condition(classes))[0]
    assert torch.equal(model(x, time, classes)[0], wanted)
    # Without a condition is -1, and not class 0.
    by_number = diffusion.guided(model, x, time, classes, None, 2.0)[0]
    assert torch.equal(by_number, diffusion.guided(model, x, time, model.condition(classes), None, 2.0)[0])
    assert diffusion.drop_condition(classes, 1.0).tolist() == [-1, -1]
    with pytest.raises(InputError, match="class 5 is out of range: classes are 0 to 4"):
        model(x, time, torch.tensor([5, 0]))
    with pytest.raises(InputError, match="FITImageDenoiser, which takes their numbers"):
        model.denoiser(x, time, classes)
