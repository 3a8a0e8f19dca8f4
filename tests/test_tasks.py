"""The tasks' plain functions, without Lightning: what they measure, that they learn, what they refuse."""

import copy
import math
from itertools import pairwise

import pytest
import torch

from fitformer import diffusion
from fitformer.config import load as config
from fitformer.config.schema import Optimizer
from fitformer.errors import InputError
from fitformer.models.decoder import FITDecoder
from fitformer.models.image_denoiser import one_hot
from fitformer.models.positions import PositionTable
from fitformer.patching import PatchGrid
from fitformer.tasks import build_model, bytes, classify, diffuse, optimizers, pixels, task_of
from fitformer.tasks.image_outputs import outputs_of
from fitformer.tasks.preview import Preview, grid, save


class Shapes:
    """What a task asks of a dataset."""

    def __init__(self, classes=10, channels=1):
        self.classes, self.channels = tuple(map(str, range(classes))), channels

    def describe(self):
        return "shapes"


def recipe_of(name, *overrides):
    return config.load(name, ["--model.layers=(1)1(1)", *overrides])


def batch_of(recipe, k=8):
    random = torch.Generator().manual_seed(0)
    if recipe.task == "bytes":
        tokens = torch.randint(256, (k, recipe.data.length), generator=random)
        return {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool), "index": torch.arange(k)}
    side, high = recipe.data.image_size, recipe.data.levels or 256
    image = torch.randint(high, (k, side, side, 1), generator=random, dtype=torch.uint8)
    return {"image": image, "label": torch.arange(k) % 10, "index": torch.arange(k)}


NAMES = ["digits-classify", "digits-diffuse", "digits-pixels", "python-bytes-demo"]
SHORT = {"python-bytes-demo": ["--data.length=64", "--model.tokens_per_group=16", "--objective.preview_length=70"]}


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "adamw") for name in NAMES), ("digits-classify", "muon")])
def test_a_few_steps_lower_the_held_out_loss_of_a_memorised_batch(name, optimizer):
    torch.manual_seed(0)
    recipe = recipe_of(name, *SHORT.get(name, []))
    task, network, batch = task_of(recipe), build_model(recipe, Shapes()), batch_of(recipe)
    stepped, _ = optimizers.build(network, Optimizer(optimizer, lr=3e-3, warmup_steps=0), 30)

    def held_out():
        with torch.no_grad():
            return float(task.measure(network.eval(), batch, recipe)[0]["loss"])

    before = held_out()
    assert held_out() == before
    for _ in range(30):
        loss, metrics = task.loss(network.train(), batch, recipe)
        assert not any(value.requires_grad for value in metrics.values())
        stepped.zero_grad()
        loss.backward()
        stepped.step()
    assert held_out() < 0.9 * before


@pytest.mark.parametrize("name", NAMES)
def test_measuring_the_parts_of_a_batch_is_measuring_the_whole(name):
    recipe = recipe_of(name, *SHORT.get(name, []), "--model.preset=tiny")
    task, network, batch = task_of(recipe), build_model(recipe, Shapes()).eval(), batch_of(recipe)
    if "mask" in batch:
        batch["mask"][5:, 40:] = False
    with torch.no_grad():
        whole, weight = task.measure(network, batch, recipe)
        parts = [task.measure(network, {key: value[part] for key, value in batch.items()}, recipe) for part in PARTS]
    assert sum(count for _, count in parts) == weight
    for key, value in whole.items():
        mean = sum(float(means[key]) * count for means, count in parts) / weight
        assert mean == pytest.approx(float(value), rel=1e-4)


PARTS = (slice(0, 3), slice(3, 8))


def test_untrained_decoders_need_the_bits_of_their_vocabulary():
    recipe = recipe_of("digits-pixels")
    network = build_model(recipe, Shapes()).eval()
    torch.nn.init.zeros_(network.embedding.weight)
    with torch.no_grad():
        metrics, count = pixels.measure(network, batch_of(recipe), recipe)
    assert float(metrics["bits_per_dim"]) == pytest.approx(math.log2(17), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(math.log(17), rel=1e-5)
    assert count == 8 * 64


def test_bytes_that_fill_no_group_are_padded_and_padding_counts_nowhere():
    recipe = recipe_of("python-bytes-demo", "--data.length=50", "--model.tokens_per_group=16")
    network, batch = build_model(recipe, Shapes(0)).eval(), batch_of(recipe)
    assert network.num_groups == 4
    targets = bytes.sequence_targets(batch, recipe)
    assert targets["tokens"].shape == targets["mask"].shape == (8, 4, 16)
    assert targets["mask"].sum() == 8 * 50
    assert targets["documents"] is None
    with torch.no_grad():
        metrics, count = bytes.measure(network, batch, recipe)
        logits = network.logits(batch["tokens"])
    assert count == 8 * 50
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten())
    torch.testing.assert_close(metrics["loss"], wanted)


def test_masked_bytes_do_not_count():
    recipe = recipe_of("python-bytes-demo", *SHORT["python-bytes-demo"])
    network, batch = build_model(recipe, Shapes(0)).eval(), batch_of(recipe)
    batch["mask"][:, 30:] = False
    with torch.no_grad():
        before, count = bytes.measure(network, batch, recipe)
        batch["tokens"][:, 30:] = 0
        after, _ = bytes.measure(network, batch, recipe)
    assert count == 8 * 30
    torch.testing.assert_close(before, after)


def test_a_training_begins_with_short_examples():
    short = ["--data.length=64", "--model.tokens_per_group=16", "--data.short_length=16", "--data.short_share=0.5"]
    recipe = recipe_of("python-bytes-demo", *short)
    network, batch = build_model(recipe, Shapes(0)).eval(), batch_of(recipe)
    pieces = torch.randint(256, (32, 16))
    batch["short"] = pieces.view(8, 4, 16)

    def cross_entropy(tokens):
        return torch.nn.functional.cross_entropy(network.logits(tokens).flatten(0, 1), tokens.flatten())

    with torch.no_grad():
        for done, seen in [(0.0, pieces), (0.49, pieces), (0.5, batch["tokens"]), (0.99, batch["tokens"])]:
            loss, _ = bytes.loss(network, {**batch, "done": done}, recipe)
            torch.testing.assert_close(loss, cross_entropy(seen))
        measured, _ = bytes.measure(network, batch, recipe)
        torch.testing.assert_close(measured["loss"], cross_entropy(batch["tokens"]))


def test_with_branches_at_zero_a_decoder_begins_as_a_table_of_pairs():
    recipe = recipe_of("python-bytes-demo", *SHORT["python-bytes-demo"], "--model.initialization=zero_branches")
    network, tokens = build_model(recipe, Shapes(0)).eval(), torch.randint(256, (1, 64))
    changed = torch.where(torch.arange(64) % 7 == 3, tokens, torch.randint(256, (1, 64)))
    with torch.no_grad():
        before, after = network.logits(tokens), network.logits(changed)
    # A logit is of the token before it alone.
    kept = torch.arange(64)[torch.arange(64) % 7 == 3] + 1
    torch.testing.assert_close(before[:, kept], after[:, kept])
    assert before.std() > 0.1


@pytest.mark.parametrize("name", ["digits-classify", "camvid-segment"])
@pytest.mark.parametrize("options", [[], ["--model.xattn_with_mlp=true"], ["--model.x_self_attention=false"]])
def test_with_branches_at_zero_a_model_of_images_begins_with_groups_that_do_not_meet(name, options):
    sizes = ["--data.image_size=16", "--model.group_size=8", "--model.patch_size=4", "--model.layers=(1)1(1)"]
    words = [*sizes, *options, "--model.initialization=zero_branches"]
    network = build_model(recipe_of(name, *words), Shapes(3)).eval()
    x = torch.rand(1, 4, 4, 16)
    changed = torch.cat([torch.rand(1, 1, 4, 16), x[:, 1:]], dim=1)
    with torch.no_grad():
        (tokens, latents), (others, read) = network.encoder(x), network.encoder(changed)
    assert torch.equal(tokens[:, 1:], others[:, 1:])
    assert torch.equal(latents[:, 1:], read[:, 1:])
    assert not torch.equal(latents[:, 0], read[:, 0])
    logits = network(torch.rand(2, 16, 16, 1))
    logits.square().sum().backward()
    # What is zero learns with the first step.
    assert network.trunk.blocks[0].local_layers[0].ffn.outer.weight.grad.any()


@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
@pytest.mark.parametrize("self_cond", ["none", "half", "masking"])
def test_every_way_to_diffuse_trains_and_samples(prediction, self_cond):
    recipe = recipe_of(
        "digits-diffuse",
        f"--objective.prediction={prediction}",
        f"--objective.self_cond={self_cond}",
        "--objective.loss_on=x",
        "--objective.b_scale=0.5",
        "--objective.normalize_input=true",
        "--objective.sample_steps=2",
        "--objective.sampler=ddpm",
    )
    network = build_model(recipe, Shapes())
    loss, _ = diffuse.loss(network, batch_of(recipe), recipe)
    loss.backward()
    used = [parameter for parameter in network.parameters() if parameter.grad is not None]
    assert all(bool(parameter.grad.isfinite().all()) for parameter in used)
    images = diffuse.preview(network.eval(), recipe, 3).images
    assert images.shape == (3, 16, 16, 1)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("loss_on", ["eps", "x", "v"])
def test_the_error_is_measured_on_any_target(loss_on):
    recipe = recipe_of("digits-diffuse", f"--objective.loss_on={loss_on}", "--objective.prediction=v")
    torch.manual_seed(0)
    loss, _ = diffuse.loss(build_model(recipe, Shapes()), batch_of(recipe), recipe)
    loss.backward()
    assert 0 < loss.item() < 1e4


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in():
    recipe = recipe_of("digits-diffuse", "--objective.sample_steps=3", "--objective.sampler=ddpm")
    network = build_model(recipe, Shapes()).eval()
    together = network.sample(4, [3, 1, 4, 1], seed=5)
    in_pairs = network.sample(4, [3, 1, 4, 1], seed=5, batch_size=2)
    alone = network.sample(1, [4], seed=5, first=2)
    torch.testing.assert_close(in_pairs, together, atol=1, rtol=0)
    torch.testing.assert_close(alone, together[2:3], atol=1, rtol=0)
    assert not torch.equal(together[1], together[3])


def test_an_unconditional_denoiser_knows_no_classes():
    free = ["--objective.class_conditional=false", "--objective.condition_dropout=0", "--objective.guidance=0"]
    recipe = recipe_of("digits-diffuse", *free, "--objective.sample_steps=2")
    network = build_model(recipe, Shapes(0)).eval()
    assert network.num_classes == 0
    assert diffuse.preview(network, recipe, 2).images.shape == (2, 16, 16, 1)
    with pytest.raises(InputError, match="without classes"):
        network.sample(1, [1])
    with pytest.raises(InputError, match=r"guidance 1 .* condition_dropout"):
        network.sample(1, guidance=1.0)


def test_labels_are_checked_before_sampling():
    recipe = recipe_of("digits-diffuse")
    network = build_model(recipe, Shapes())
    with pytest.raises(InputError, match=r"class 10 .* 0 to 9"):
        network.sample(2, [3, 10])
    with pytest.raises(InputError, match=r"1 classes .* 2 images"):
        network.sample(2, [3])


def test_one_hot_leaves_the_unknown_at_zero():
    condition = one_hot(torch.tensor([2, -1]), 3)
    assert condition.tolist() == [[0, 0, 1], [0, 0, 0]]


def test_previews_of_a_decoder_are_images_or_text_longer_than_it_was_trained_for():
    recipe = recipe_of("digits-pixels")
    images = pixels.preview(build_model(recipe, Shapes()).eval(), recipe, 3).images
    assert images.shape == (3, 8, 8, 1)
    assert set(images.unique().tolist()) <= {round(level * 255 / 16) for level in range(17)}
    recipe = recipe_of("python-bytes-demo", *SHORT["python-bytes-demo"])
    network = build_model(recipe, Shapes(0)).eval()
    (data,) = bytes.generate_bytes(network, [b"def "], 70, temperature=0)
    assert data.startswith(b"def ")
    assert len(data) == 74
    # Prompts of several lengths, each as it would be alone.
    several = bytes.generate_bytes(network, [b"a", b"", b"def "], 70, temperature=0)
    assert [len(text) for text in several] == [71, 70, 74]
    assert several[2] == data
    with pytest.raises(InputError, match=r"prompt has 65 tokens, and the model holds 64 \(4 groups of 16\)"):
        bytes.generate_bytes(network, [b"a" * 65], 1)
    long = bytes.generate_bytes(network, [b"def " * 30], 9, temperature=0, window=4)[0]
    assert len(long) == 129


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("digits-classify", ["--data.levels=17"], "data.levels is 17"),
        ("digits-diffuse", ["--objective.train_schedule=sigmiod@-3,3,1"], "is not a schedule"),
        ("digits-classify", ["--model.group_size=12"], "12"),
        ("python-bytes-demo", ["--model.tokens_per_group=0"], "tokens_per_group is 0"),
        ("python-bytes-demo", ["--data.short_length=32"], "short_length is 32; it must be whole groups .* 64"),
        ("python-bytes-demo", ["--data.short_length=100"], "short_length is 100; it must divide length, 512"),
        ("python-bytes-demo", ["--data.short_length=64", "--data.documents=true"], "documents are packed in rows"),
        ("python-bytes-demo", ["--data.short_length=64", "--data.short_share=1.5"], "short_share is 1.5"),
        ("digits-classify", ["--model.layers=4"], "does not parse"),
        ("digits-classify", ["--model.preset=huge"], "no preset 'huge'"),
    ],
)
def test_what_does_not_fit_together_is_refused_when_building(name, overrides, message):
    with pytest.raises(InputError, match=message):
        build_model(config.load(name, overrides), Shapes())


@pytest.mark.parametrize("name", ["digits-classify", "digits-diffuse"])
def test_tasks_that_need_classes_say_so(name):
    with pytest.raises(InputError, match="needs classes, and the data have none"):
        build_model(recipe_of(name), Shapes(0))


def test_a_classifier_refuses_to_be_measured_without_labels():
    recipe = recipe_of("digits-classify")
    batch = batch_of(recipe)
    batch["label"][2] = -1
    with pytest.raises(InputError, match="have no label"):
        classify.measure(build_model(recipe, Shapes()), batch, recipe)


def small_decoder():
    torch.manual_seed(0)
    return FITDecoder.from_config(
        layers="(1)1(1)",
        num_groups=2,
        tokens_per_group=4,
        latents_per_group=2,
        vocab_size=10,
        dim=8,
        latent_dim=8,
        heads=2,
        latent_heads=2,
    )


def step_of(network, optimizer, seed=0):
    """One step on gradients of random numbers."""
    random = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)
    optimizer.step()


def test_muon_is_for_the_matrices_inside_and_adamw_for_all_else():
    made = [small_decoder() for _ in "123"]
    before, by_muon, by_adamw = (dict(network.named_parameters()) for network in made)
    settings = {"lr": 0.01, "weight_decay": 0.0, "warmup_steps": 0}
    for name, network in (("muon", made[1]), ("adamw", made[2])):
        step_of(network, optimizers.optimizer_of(network, Optimizer(name, **settings)))
    differing = {name for name in before if not torch.equal(by_muon[name], by_adamw[name])}
    assert differing == {name for name in before if name.startswith("trunk.") and name.endswith(LINEARS)}
    assert differing
    for name in differing:
        change = (before[name] - by_muon[name]).detach()
        # All directions change about as much, in all about as much as by AdamW, which changes each number by `lr`.
        assert torch.linalg.cond(change) < 3
        assert 0.1 < float(change.square().mean().sqrt()) / settings["lr"] < 0.5


LINEARS = tuple(f"{name}.weight" for name in ("query", "key", "value", "output", "inner", "outer"))


def test_muon_goes_on_from_its_state_as_if_it_had_not_stopped():
    made = [small_decoder() for _ in "12"]
    first, second = ([network, *optimizers.build(network, Optimizer("muon", warmup_steps=2), 9)] for network in made)
    for seed in range(3):
        step_of(first[0], first[1], seed)
        first[2].step()
    second[0].load_state_dict(first[0].state_dict())
    for of, to in zip(first[1:], second[1:], strict=True):
        to.load_state_dict(copy.deepcopy(of.state_dict()))
    for network, optimizer, schedule in (first, second):
        for seed in range(3, 5):
            step_of(network, optimizer, seed)
            schedule.step()
    assert len(second[1].state) == len(list(made[1].parameters()))
    assert all(map(torch.equal, made[0].parameters(), made[1].parameters()))


def test_muon_without_a_matrix_to_learn_is_refused():
    network = small_decoder()
    network.trunk.requires_grad_(False)
    with pytest.raises(InputError, match=r"optimizer\.name=adamw trains what is"):
        optimizers.optimizer_of(network, Optimizer("muon"))


def test_only_matrices_decay():
    network = small_decoder()
    decayed, rest = optimizers.parameter_groups(network, 0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(list(network.parameters()))
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    kept = {id(parameter) for parameter in rest["params"]}
    tables = [module.weight for module in network.modules() if isinstance(module, PositionTable | torch.nn.Embedding)]
    assert len(tables) == 3
    assert kept >= {id(table) for table in tables}


def test_the_rate_warms_up_then_falls_to_its_end():
    settings = Optimizer(warmup_steps=10, lr_end=0.1)
    rates = [optimizers.rate(step, settings, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    constant = Optimizer(warmup_steps=0, schedule="constant")
    assert {optimizers.rate(step, constant, 10) for step in range(20)} == {1.0}


@pytest.mark.parametrize("name", NAMES)
def test_the_trunk_is_found_in_every_role(name):
    assert build_model(recipe_of(name), Shapes()).trunk.block_depths == [(1, 1), (1, 0)]


def test_previews_are_written_as_a_grid_or_as_text(tmp_path):
    images = torch.zeros(12, 8, 8, 3, dtype=torch.uint8)
    assert grid(images, enlarge=1).shape == (2 * 9 + 1, 10 * 9 + 1, 3)
    assert save(Preview(images=images), tmp_path / "step-1").suffix == ".png"
    assert save(Preview(text=("abc",)), tmp_path / "step-1").read_text() == "abc\n"


def test_pixels_go_to_the_network_between_minus_one_and_one():
    seen = []

    class Network:
        patch_grid = PatchGrid((1, 2), 1, 1, channels=1)

        def __call__(self, images):
            seen.append(images)

    outputs_of(Network(), torch.tensor([[[[0], [255]]]], dtype=torch.uint8))
    assert seen[0].flatten().tolist() == [-1, 1]
    assert diffusion.signal_to_pixels(seen[0]).flatten().tolist() == [0, 255]
