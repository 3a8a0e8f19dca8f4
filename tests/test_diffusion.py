"""Schedules, predictions, samplers, sampling, denoisers of images: the reference's numbers, then properties.

`conformance/diffusion.npz` was computed by the authors' TensorFlow release (see `spec/conformance.md` for its keys).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st

from fitformer import FITImageDenoiser, diffusion, profiling
from fitformer.diffusion import samplers
from fitformer.errors import InputError
from fitformer.models.image_denoiser import one_hot

FILE = dict(np.load(Path(__file__).parent / "conformance" / "diffusion.npz"))
GOOD_SCHEDULES = ["cosine", "cosine@0,1,1", "cosine@0.2,1,0.7", "sigmoid@-3,3,0.9", "simple_linear", "log@1,100,t"]


def stored(key):
    return torch.from_numpy(FILE[key])


def keys(prefix):
    found = sorted(key.removeprefix(prefix) for key in FILE if key.startswith(prefix))
    assert found
    return found


def close(given, expected, tolerance=1e-5):
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


def parsed_clip(text):
    return tuple(float(end) for end in text.split(",")) if text else None


# ---- the reference's numbers ----


@pytest.mark.parametrize("schedule", keys("gamma/"))
def test_schedule_as_the_reference(schedule):
    close(diffusion.gamma(schedule, stored("gamma_t")), stored(f"gamma/{schedule}"), 1e-6)


@pytest.mark.parametrize("case", keys("pred/"))
def test_prediction_as_the_reference(case):
    kind, clip, truncate, what = case.split("/")
    clip, truncate = parsed_clip(clip.removeprefix("clip=")), truncate == "truncate=1"
    x0, eps = diffusion.predict(
        kind, stored("step/xt"), stored("step/denoise_out"), stored("step/gamma").flatten(), clip, truncate
    )
    close({"data_pred": x0, "noise_pred": eps}[what], stored(f"pred/{case}"))


@pytest.mark.parametrize("sampler", keys("transition/"))
def test_transition_as_the_reference(sampler):
    xt, level = stored("step/xt"), stored("step/gamma")
    x0, eps = diffusion.predict("eps", xt, stored("step/denoise_out"), level, truncate=True)
    given = diffusion.transition(sampler, xt, x0, eps, level, stored("step/gamma_prev"), stored("step/noise"))
    close(given, stored(f"transition/{sampler}"))


def stand_in(x, level, cond, latents_prev, with_latents):
    """The denoiser of the file: linear in x, halved without a condition, and moved by the mean of its hidden state."""
    output = torch.einsum("btnc,cd->btnd", x, stored("loop/W"))
    output = output * (0.5 if cond is not None and not cond.any() else 1.0) + level.reshape(-1, 1, 1, 1)
    if not with_latents:
        assert latents_prev is None
        return output, None
    hidden = torch.zeros(len(x), 2, 3) if latents_prev is None else latents_prev
    return output + 0.1 * hidden.mean(), x.mean(2) + 0.5 * hidden


@pytest.mark.parametrize("case", [key.removesuffix("/samples") for key in keys("loop/") if key.endswith("/samples")])
def test_loop_as_the_reference(case):
    sampler, prediction, *settings = case.split("/")
    setting = {name: float(value) for name, value in (pair.split("=") for pair in settings)}
    with_latents = bool(setting["latent_self_cond"])
    given = diffusion.sample(
        lambda *arguments: stand_in(*arguments, with_latents),
        stored("loop/init"),
        int(setting["iterations"]),
        sampler=sampler,
        prediction=prediction,
        guidance=setting["guidance"],
        td=setting["td"],
        cond=torch.ones(2, 3),
        self_cond=with_latents,
        noise=stored(f"loop/{case}/noise"),
    )
    close(given, stored(f"loop/{case}/samples"), 1e-4)


# ---- schedules ----


@pytest.mark.parametrize("schedule", GOOD_SCHEDULES)
def test_gamma_falls_from_one_to_zero(schedule):
    levels = diffusion.gamma(schedule, torch.linspace(0, 1, 101))
    assert (levels.diff() < 0).all()
    assert abs(levels[0] - 1) < 1e-5
    assert abs(levels[-1]) < 1e-5


def test_gamma_keeps_shape_and_widens_half_precision():
    assert diffusion.gamma("cosine", torch.rand(2, 3, dtype=torch.float64)).dtype == torch.float64
    assert (
        diffusion.gamma("simple_linear", torch.ones(2, 3, dtype=torch.bfloat16)).tolist()
        == [[pytest.approx(1e-9)] * 3] * 2
    )
    assert diffusion.gamma("simple_linear", 0.25).item() == 0.75


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosin", "'cosin'"),
        ("", "''"),
        ("linear@0,1,1", "'linear@0,1,1'"),
        ("sigmoid", "'sigmoid'"),
        ("sigmoid@-3,3", "'sigmoid@-3,3'"),
        ("cosine@0,one,1", "'one'"),
        ("cosine@0,nan,1", "'nan'"),
        ("cosine@0,2,1", "0 to 2"),
        ("cosine@0.5,0.5,1", "does not fall"),
        ("sigmoid@-3,3,0", "tau 0"),
        ("log@0,100,f", "logarithm of 0"),
        ("log@1,100,1", "reverse '1'"),
    ],
)
def test_bad_schedule(schedule, message):
    with pytest.raises(InputError, match=message) as error:
        diffusion.gamma(schedule, torch.rand(3))
    assert "cosine@start,end,tau" in str(error.value)


# ---- noising, predictions, loss ----


@pytest.fixture
def noised():
    torch.manual_seed(0)
    x0, eps = torch.rand(5, 2, 3, 4, dtype=torch.float64) * 2 - 1, torch.randn(5, 2, 3, 4, dtype=torch.float64)
    level = torch.linspace(0.02, 0.98, 5, dtype=torch.float64)
    return x0, eps, level, diffusion.add_noise(x0, level, eps)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("kind", diffusion.PREDICTIONS)
def test_a_perfect_network_predicts_data_and_noise(noised, kind, truncate):
    x0, eps, level, xt = noised
    output = diffusion.target(kind, x0, eps, level)
    for given, expected in zip(diffusion.predict(kind, xt, output, level, truncate=truncate), (x0, eps)):
        close(given, expected, 1e-9)


@pytest.mark.parametrize("kind", diffusion.PREDICTIONS)
def test_truncated_predictions_add_up_to_the_input(noised, kind):
    _, _, level, xt = noised
    x0, eps = diffusion.predict(kind, xt, 3 * torch.randn_like(xt), level, clip=(-0.5, 0.5), truncate=True)
    assert x0.abs().max() <= 0.5
    close(diffusion.add_noise(x0, level, eps), xt, 1e-9)


@pytest.mark.parametrize("kind", diffusion.PREDICTIONS)
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_predictions_stay_finite_where_gamma_is_zero_or_one(kind, level):
    xt, levels = torch.randn(2, 3), torch.full((2,), level)
    for clip in [(-1.0, 1.0), None]:
        for part in diffusion.predict(kind, xt, xt, levels, clip, truncate=True):
            assert part.isfinite().all()
    for sampler in diffusion.SAMPLERS:
        x0, eps = diffusion.predict(kind, xt, xt, levels, truncate=True)
        assert diffusion.transition(sampler, xt, x0, eps, levels, levels, torch.randn(2, 3)).isfinite().all()


@pytest.mark.parametrize("kind", diffusion.PREDICTIONS)
@pytest.mark.parametrize("on", [None, *diffusion.PREDICTIONS])
def test_loss_is_zero_for_a_perfect_network_and_reaches_the_output(noised, kind, on):
    x0, eps, level, xt = noised
    output = diffusion.target(kind, x0, eps, level).clone().requires_grad_()
    assert diffusion.loss(kind, output, xt, x0, eps, level, on).item() < 1e-12
    error = diffusion.loss(kind, output + 0.1, xt, x0, eps, level, on)
    error.backward()
    assert output.grad.isfinite().all()
    assert (output.grad != 0).all()
    if on in (None, kind):
        assert error.item() == pytest.approx(0.01)


def test_loss_on_data_is_in_units_of_b_scale(noised):
    x0, eps, level, xt = noised
    whole, half = (diffusion.loss("x", x0 + 0.1, xt, x0, eps, level, b_scale=scale) for scale in (1.0, 0.5))
    assert half.item() == pytest.approx(4 * whole.item())


def test_normalize_gives_each_example_unit_deviation():
    x = torch.randn(4, 2, 3, 5) * torch.tensor([0.1, 1, 7, 0]).reshape(4, 1, 1, 1)
    given = diffusion.normalize(x)
    close(given.flatten(1).std(dim=1, correction=0), torch.tensor([1.0, 1, 1, 0]))
    close(given[2], x[2] / np.std(x[2].numpy()))


@pytest.mark.parametrize("b_scale", [1.0, 0.5])
def test_pixels_come_back_from_their_signal(b_scale):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1)
    signal = diffusion.pixels_to_signal(pixels, b_scale)
    assert (signal.min(), signal.max()) == (-b_scale, b_scale)
    assert torch.equal(diffusion.signal_to_pixels(signal, b_scale), pixels)
    assert torch.equal(diffusion.signal_to_pixels(3 * signal, b_scale)[0], torch.zeros(16, 1, dtype=torch.uint8))


@pytest.mark.parametrize("kind", diffusion.PREDICTIONS)
@for_all(level=st.tuples(*[st.floats(0.05, 3.0)] * 2), seed=st.integers(0, 2**32 - 1))
def test_predictions_round_trip_at_any_alpha_and_sigma(kind, level, seed):
    class Fixed:
        def scales(self, _):
            return diffusion.Level(*(torch.tensor(scale, dtype=torch.float64) for scale in level))

    random = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64, generator=random)
    unused = torch.zeros(3)
    xt = diffusion.add_noise(x0, unused, eps, Fixed())
    output = diffusion.target(kind, x0, eps, unused, Fixed())
    found = diffusion.predict(kind, xt, output, unused, clip=None, process=Fixed())
    close(torch.stack(found), torch.stack([x0, eps]), 1e-9)
    assert diffusion.loss(kind, output, xt, x0, eps, unused, on="x", process=Fixed()).item() < 1e-18


# ---- training ----


def counting(calls):
    def denoise(x, level, cond, latents_prev):
        assert latents_prev is None
        assert not torch.is_grad_enabled()
        calls.append(len(x))
        return x, x.mean(1, keepdim=True) + level.reshape(-1, 1, 1) + cond.reshape(-1, 1, 1)

    return denoise


def test_first_half_is_fed_its_own_latents():
    calls, x, level, cond = [], torch.randn(4, 4, 2, requires_grad=True), torch.rand(4), torch.rand(4)
    before = torch.get_rng_state()
    latents = diffusion.self_condition_half(counting(calls), x, level, cond)
    assert calls == [2]
    assert torch.equal(torch.get_rng_state(), before), "an even split draws no random number"
    assert not latents.requires_grad
    close(latents[:2], (x.mean(1, keepdim=True) + level.reshape(-1, 1, 1) + cond.reshape(-1, 1, 1))[:2].detach())
    assert not latents[2:].any()
    assert diffusion.self_condition_half(counting(calls), x, level, cond, rate=0.0) is None
    assert calls == [2]


@pytest.mark.parametrize(
    ("batch", "rate", "counts"), [(1, 0.5, {0, 1}), (5, 0.5, {2, 3}), (3, 0.9, {2, 3}), (10, 0.3, {3})]
)
def test_the_rate_of_self_conditioning_holds_at_any_batch_size(batch, rate, counts):
    calls, ones, random = [], torch.ones(batch), torch.Generator().manual_seed(0)
    x = torch.ones(batch, 4, 2)
    for _ in range(2000):
        diffusion.self_condition_half(counting(calls), x, ones, ones, rate, random)
    assert set(calls) == counts - {0}
    assert sum(calls) / 2000 == pytest.approx(batch * rate, abs=0.03)


def test_masking_keeps_latents_at_the_given_rate():
    calls, count = [], 4000
    x, ones = torch.ones(count, 4, 2), torch.ones(count)
    given = diffusion.self_condition_masked(counting(calls), x, ones, ones, 0.9, torch.Generator().manual_seed(0))
    assert calls == [count]
    kept = given.flatten(1).all(dim=1)
    assert torch.equal(kept, given.flatten(1).any(dim=1))
    assert abs(kept.float().mean() - 0.9) < 0.02


def test_first_pass_under_autocast_leaves_the_second_its_gradients():
    network = torch.nn.Linear(3, 3)
    x = torch.randn(4, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        diffusion.self_condition_half(lambda x, *_: (network(x), network(x)), x, torch.rand(4))
        network(x).sum().backward()
    assert network.weight.grad is not None


def test_conditions_are_dropped_whole_at_the_given_rate():
    cond = torch.rand(4000, 2, 3) + 0.1
    given = diffusion.drop_condition(cond, 0.25, torch.Generator().manual_seed(0))
    dropped = (given == 0).flatten(1).all(dim=1)
    assert torch.equal(given[~dropped], cond[~dropped])
    assert abs(dropped.float().mean() - 0.25) < 0.03
    assert torch.equal(diffusion.drop_condition(cond, 0.0), cond)
    assert not diffusion.drop_condition(cond, 1.0).any()


# ---- sampling ----

MEAN, INIT_STD = 0.3, 0.2


def gaussian(prediction):
    """The best possible denoiser of data that are normal with MEAN and INIT_STD in each place."""

    def denoise(x, level, cond, latents_prev):
        g = level.reshape(-1, 1)
        x0 = MEAN + g.sqrt() * INIT_STD**2 / (g * INIT_STD**2 + 1 - g) * (x - g.sqrt() * MEAN)
        return diffusion.target(prediction, x0, (x - g.sqrt() * x0) / (1 - g).sqrt(), level), None

    return denoise


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "ddpm@small"])
def test_sampling_reaches_the_distribution_of_the_data(sampler, prediction):
    init = diffusion.seeded_noise(0, range(4), (1000,)).double()
    torch.manual_seed(0)
    given = diffusion.sample(gaussian(prediction), init, 250, sampler=sampler, prediction=prediction, clip=None)
    assert abs(given.mean() - MEAN) < 0.02
    assert abs(given.std() - INIT_STD) < 0.02


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
def test_a_sampler_by_name_is_the_function(name):
    init = diffusion.seeded_noise(0, range(3), (6,))
    by_name, by_function = (
        diffusion.sample(
            gaussian("v"),
            init,
            4,
            sampler=sampler,
            prediction="v",
            noise=lambda k: diffusion.seeded_noise(k, range(3), (6,)),
        )
        for sampler in (name, diffusion.SAMPLERS[name])
    )
    assert torch.equal(by_name, by_function)
    level, noise = torch.tensor([0.2, 0.5, 0.8]), torch.randn(3, 6)
    steps = [
        diffusion.transition(sampler, init, init / 2, init / 3, level, level + 0.1, noise)
        for sampler in (name, diffusion.SAMPLERS[name])
    ]
    assert torch.equal(*steps)


def test_a_new_sampler_is_one_function(monkeypatch):
    def halfway(xt, x0, eps, now, after, draw):
        """Half the noise of ddim is drawn anew."""
        return after.alpha * x0 + after.sigma * math.sqrt(0.5) * (eps + draw())

    init = diffusion.seeded_noise(0, range(2), (1000,)).double()
    torch.manual_seed(0)
    found = diffusion.sample(gaussian("v"), init, 100, sampler=halfway, prediction="v", clip=None)
    assert abs(found.mean() - MEAN) < 0.02
    assert abs(found.std() - INIT_STD) < 0.03
    with pytest.raises(InputError, match="halfway"):
        diffusion.sample(gaussian("v"), init, 1, sampler="halfway")
    monkeypatch.setitem(diffusion.SAMPLERS, "halfway", halfway)
    torch.manual_seed(0)
    assert torch.equal(diffusion.sample(gaussian("v"), init, 100, sampler="halfway", prediction="v", clip=None), found)


@dataclass(frozen=True)
class Straight:
    """A process of straight paths: `x_t = level x0 + (1 - level) eps`."""

    def scales(self, level):
        return diffusion.Level(level, 1 - level)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "ddpm@small"])
def test_another_process_is_one_class(sampler, prediction):
    def denoise(x, level, cond, latents_prev):
        signal, spread = (scale.reshape(-1, 1) for scale in Straight().scales(level))
        x0 = MEAN + signal * INIT_STD**2 / (signal**2 * INIT_STD**2 + spread**2) * (x - signal * MEAN)
        return diffusion.target(prediction, x0, (x - signal * x0) / spread, level, Straight()), None

    init = diffusion.seeded_noise(0, range(4), (1000,)).double()
    torch.manual_seed(0)
    options = {"schedule": "simple_linear", "sampler": sampler, "prediction": prediction, "clip": None}
    found = diffusion.sample(denoise, init, 250, process=Straight(), **options)
    assert abs(found.mean() - MEAN) < 0.02
    assert abs(found.std() - INIT_STD) < 0.02


def test_sample_is_the_same_at_any_batch_size():
    def run(samples):
        return diffusion.sample(
            gaussian("v"),
            diffusion.seeded_noise(7, samples, (6,)),
            5,
            sampler="ddpm",
            prediction="v",
            noise=lambda k: diffusion.seeded_noise(7, samples, (6,), draw=k + 1),
        )

    close(torch.cat([run([0]), run([1, 2, 3])]), run(range(4)), 1e-6)


def test_seeded_noise_is_normal_and_differs_by_seed_sample_and_draw():
    given = diffusion.seeded_noise(3, range(2), (100, 200))
    assert abs(given.mean()) < 0.02
    assert abs(given.std() - 1) < 0.02
    keys = [(3, 0, 0), (3, 1, 0), (4, 0, 0), (3, 0, 1)]
    others = [diffusion.seeded_noise(seed, [sample], (8,), draw) for seed, sample, draw in keys]
    assert len({tuple(other.flatten().tolist()) for other in others}) == 4
    assert diffusion.seeded_noise(-1, [0], (2,)).shape == (1, 2)
    assert diffusion.seeded_noise(0, [], (2,)).shape == (0, 2)


def test_times_reach_the_data_and_skip_by_td():
    assert diffusion.times(4) == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]
    assert diffusion.times(4, 1.0) == [(1, 0.5), (0.75, 0.25), (0.5, 0), (0.25, 0)]


def test_momentum_averages_the_latents_handed_on():
    seen = []

    def denoise(x, level, cond, latents_prev):
        seen.append(latents_prev)
        return x, torch.full((1, 1), float(len(seen)))

    diffusion.sample(denoise, torch.randn(1, 2), 3, self_cond=True, momentum=0.75)
    assert seen[0] is None
    assert [latents.item() for latents in seen[1:]] == [0.25, 0.75 * 0.25 + 0.25 * 2]


def test_network_sees_normalized_input_and_every_step_is_reported():
    deviations, steps = [], []

    def denoise(x, level, cond, latents_prev):
        deviations.append(x.std(dim=1, correction=0))
        return torch.zeros_like(x), None

    given = diffusion.sample(
        denoise, 5 * torch.randn(3, 50), 4, normalize_input=True, on_step=lambda k, x0: steps.append((k, x0))
    )
    close(torch.stack(deviations), torch.ones(4, 3))
    assert [k for k, _ in steps] == [0, 1, 2, 3]
    assert torch.equal(steps[-1][1], given)


def test_samples_keep_dtype_and_stay_in_range():
    given = diffusion.sample(lambda x, *_: (x, None), torch.randn(2, 3).bfloat16(), 3, sampler="ddpm", clip=(-0.5, 0.5))
    assert given.dtype == torch.bfloat16
    assert given.abs().max() <= 0.5


def test_sampling_drives_the_real_denoiser():
    from fitformer import FITDenoiser

    torch.manual_seed(0)
    network = FITDenoiser.from_config(
        layers="(1)1(1)",
        num_groups=2,
        tokens_per_group=4,
        latents_per_group=2,
        out_dim=3,
        dim=8,
        latent_dim=16,
        heads=2,
        latent_heads=2,
        cond_dim=5,
        self_cond="latent",
    ).eval()
    given = diffusion.sample(
        network, torch.randn(2, 2, 4, 3), 3, cond=torch.eye(5)[:2], guidance=1.0, self_cond=True, sampler="ddpm"
    )
    assert given.shape == (2, 2, 4, 3)
    assert given.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"sampler": "dpm"}, "'dpm'.*ddpm@small"),
        ({"prediction": "score"}, "'score'"),
        ({"schedule": "linear"}, "'linear'"),
        ({"guidance": 2.0}, "guidance 2"),
        ({"cond": torch.ones(3, 1)}, "3 .* 2 samples"),
        ({"momentum": 1.0}, "momentum"),
        ({"td": math.nan}, "td is nan"),
        ({"td": -1.0}, "td is -1"),
        ({"sampler": "ddpm", "noise": torch.ones(3, 2, 3)}, "3 of 4 steps"),
        ({"sampler": "ddpm", "noise": torch.ones(4, 2, 1)}, r"\(2, 1\).*\(2, 3\)"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(InputError, match=message):
        diffusion.sample(lambda x, *_: (x, None), torch.randn(2, 3), **{"steps": 4, **options})


def test_other_bad_input():
    x, level = torch.randn(2, 3), torch.rand(2)
    with pytest.raises(InputError, match=r"\(2, 1\).*\(2, 3\)"):
        diffusion.predict("eps", x, x[:, :1], level)
    with pytest.raises(InputError, match="'y'"):
        diffusion.loss("eps", x, x, x, x, level, on="y")
    with pytest.raises(InputError, match=r"'ddpm' .*noise"):
        diffusion.transition("ddpm", x, x, x, level, level)
    with pytest.raises(InputError, match=r"1\.5"):
        diffusion.drop_condition(x, 1.5)
    with pytest.raises(InputError, match="rate"):
        diffusion.self_condition_half(lambda *_: None, x, level, rate=-0.1)


# ---- denoisers of images ----

CUT = {"image_size": (8, 16), "group_size": 8, "patch_size": 4, "channels": 3}


def image_denoiser(**options):
    torch.manual_seed(0)
    model = FITImageDenoiser.from_preset("tiny", **{**CUT, "num_classes": 5, "sample_steps": 3, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_a_saved_model_samples_by_itself(tmp_path):
    options = {"prediction": "v", "b_scale": 0.5, "normalize_input": True, "sampler": "ddpm", "self_cond": "latent"}
    model = image_denoiser(**options, sample_schedule="simple_linear", condition_dropout=0.1, guidance=0.5)
    model.save_pretrained(tmp_path)
    again = FITImageDenoiser.from_pretrained(tmp_path)
    assert again.diffusion == model.diffusion
    images = model.sample(4, seed=3)
    assert images.shape == (4, 8, 16, 3)
    assert images.dtype == torch.uint8
    assert torch.equal(again.sample(4, seed=3), images)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in options} == options
    assert not any(isinstance(value, dict) for value in config.values()), "the configuration is flat"


@pytest.mark.parametrize(
    "change",
    [
        {"prediction": "eps"},
        {"b_scale": 0.5},
        {"sample_schedule": "simple_linear"},
        {"normalize_input": True},
        {"sampler": "ddpm"},
    ],
    ids=str,
)
def test_what_training_fixed_changes_the_samples_of_the_same_weights(change, tmp_path):
    image_denoiser(prediction="v").save_pretrained(tmp_path)
    model = FITImageDenoiser.from_pretrained(tmp_path)
    other = FITImageDenoiser.from_config({**model.config, **change}).eval()
    other.load_state_dict(model.state_dict())
    if not change.keys() <= FITImageDenoiser.free:
        with pytest.raises(InputError, match=next(iter(change))):
            FITImageDenoiser.from_pretrained(tmp_path, **change)
    assert model.diffusion.prediction == "v"
    assert not torch.equal(model.sample(4), other.sample(4))


def test_a_sampler_of_a_model_is_a_name_or_a_function():
    model = image_denoiser()
    assert torch.equal(model.sample(2, sampler="ddpm"), model.sample(2, sampler=samplers.ddpm_large))
    assert not torch.equal(model.sample(2, sampler="ddpm"), model.sample(2))
    assert not torch.equal(model.sample(2, steps=1), model.sample(2))


def test_images_of_a_model_depend_on_their_number_and_class_alone():
    model, steps = image_denoiser(sampler="ddpm"), []
    together = model.sample(7, seed=5, on_step=lambda k, x0: steps.append((k, tuple(x0.shape))))
    assert steps == [(k, (7, 2, 4, 48)) for k in range(3)]
    in_turn = torch.cat([model.sample(3, seed=5, batch_size=2), model.sample(4, seed=5, first=3)])
    given = model.sample(7, [0, 1, 2, 3, 4, 0, 1], seed=5)
    for other in (in_turn, given):
        torch.testing.assert_close(other, together, atol=1, rtol=0)
    assert not torch.equal(model.sample(1, [-1]), model.sample(1, [0]))


def test_a_model_takes_and_returns_images_and_tokens():
    model = image_denoiser(b_scale=0.5, self_cond="latent")
    images = torch.randint(0, 256, (2, 8, 16, 3), dtype=torch.uint8)
    tokens = model.tokens(images)
    assert tokens.shape == (2, 2, 4, 48)
    assert tokens.abs().max() <= 0.5
    assert torch.equal(model.images(tokens), images)
    cond = model.condition(torch.tensor([2, -1]))
    assert cond.tolist() == one_hot(torch.tensor([2, -1]), 5).tolist() == [[0, 0, 1, 0, 0], [0] * 5]
    x, latents = model(tokens, torch.rand(2), cond)
    assert x.shape == tokens.shape
    again, _ = model(tokens, torch.rand(2), cond, latents)
    assert again.shape == tokens.shape
    free = image_denoiser(num_classes=0)
    assert free.condition(torch.tensor([1])) is None
    assert free.sample(2).shape == (2, 8, 16, 3)


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({"prediction": "score"}, {}, "'score'"),
        ({"sampler": "dpm"}, {}, "'dpm'"),
        ({"train_schedule": "linear"}, {}, "'linear'"),
        ({"sample_schedule": "linear"}, {}, "'linear'"),
        ({"b_scale": 0.0}, {}, "b_scale is 0"),
        ({"sample_steps": 0}, {}, "sample_steps is 0"),
        ({"condition_dropout": 2.0}, {}, "condition_dropout is 2"),
        ({"num_classes": -1}, {}, "num_classes is -1"),
        ({"patch_size": 3}, {}, "3"),
        ({"score_scale": 1}, {}, "score_scale"),
        ({}, {"guidance": 1.0}, "guidance 1"),
        ({}, {"count": 0}, "count is 0"),
        ({}, {"steps": 0}, "steps is 0"),
        ({}, {"sampler": "dpm"}, "'dpm'"),
        ({}, {"classes": [5, 0]}, "class 5 .* 0 to 4"),
        ({}, {"classes": [0]}, "1 classes .* 2"),
        ({"num_classes": 0}, {"classes": [0, 0]}, "without classes"),
    ],
)
def test_bad_image_denoisers_and_samples(options, asked, message):
    with pytest.raises(InputError, match=message):
        image_denoiser(**options).sample(**{"count": 2, **asked})


def test_costs_of_a_model_are_those_of_its_denoiser():
    model = image_denoiser()
    on_meta = profiling.on_meta("FITImageDenoiser", model.config)
    assert profiling.count_parameters(on_meta) == sum(parameter.numel() for parameter in model.parameters())
    assert profiling.flops(on_meta) == profiling.flops(model.denoiser)
