"""Recipes: every packaged one loads, all spellings of an override agree, each mistake has its one message."""

import pytest
import yaml

from fitformer._support.suggest import suggest
from fitformer.config import load as config
from fitformer.config.schema import ByteRecipe, ClassifyRecipe, DiffuseRecipe, PixelRecipe, SegmentRecipe
from fitformer.errors import InputError


@pytest.mark.parametrize("name", config.names())
def test_packaged_recipes_survive_a_round_trip(name):
    recipe = config.load(name)
    assert config.parse(config.dump(recipe)) == recipe


@pytest.mark.parametrize("name", config.names())
def test_packaged_recipes_say_how_to_run_them_and_what_came_out(name):
    head = [line for line in config.read_text(name).splitlines() if line.startswith("#")]
    assert f"# command: fitformer train {name}" in "\n".join(head)
    assert any(line.startswith("# result: ") for line in head)


def test_every_kind_of_recipe_is_packaged():
    kinds = {type(config.load(name)) for name in config.names()}
    assert kinds == {ClassifyRecipe, SegmentRecipe, DiffuseRecipe, PixelRecipe, ByteRecipe}


@pytest.mark.parametrize("spelling", [["--trainer.steps=5"], ["--trainer.steps", "5"], ["trainer.steps=5"]])
def test_overrides_have_three_spellings(spelling):
    recipe = config.load("digits-classify", [*spelling, "--optimizer.lr=1e-4"])
    assert recipe.trainer.steps == 5
    assert recipe.optimizer.lr == 1e-4
    assert recipe.model == config.load("digits-classify").model


def test_values_take_the_type_of_their_key():
    text = "task: diffuse\nmodel: {group_size: [8, 4]}\noptimizer: {betas: [0.9, 0.95], lr: 1e-3}\ndata:\n"
    recipe = config.parse(text, ["--data.path=7", "--model.layers=(1)2(1)", "--trainer.compile=true"])
    assert recipe.model.group_size == (8, 4)
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.optimizer.lr == 1e-3
    assert recipe.data.path == "7"
    assert recipe.model.layers == "(1)2(1)"
    assert recipe.trainer.compile is True


def test_a_recipe_may_be_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: bytes\n")
    assert isinstance(config.load(str(path)), ByteRecipe)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("digits-classify", "--trainer.step=5", "unknown key 'trainer.step'; did you mean 'trainer.steps'?"),
        ("digits-classify", "--traner.steps=5", "did you mean 'trainer.steps'?"),
        ("digits-classify", "--steps=5", "did you mean 'trainer.steps'?"),
        ("digits-classify", "--objective.sampler=ddim", "unknown key 'objective.sampler'"),
        ("digits-classify", "--trainer=5", "trainer is a section"),
        ("digits-classify", "nonsense", "write --section.key=value"),
        ("digits-classify", "--trainer.steps=abc", "trainer.steps is 'abc'; expected int"),
        ("digits-classify", "--trainer.steps=0", "steps is 0; it must be at least 1"),
        ("digits-classify", "--trainer.ema=1", "ema is 1"),
        ("digits-classify", "--trainer.precision=16", "trainer.precision is '16'; expected Literal[32, 'bf16']"),
        ("digits-classify", "--model.drop_path=2", "drop_path is 2"),
        ("digits-classify", "--optimizer.lr=0", "lr is 0"),
        ("digits-classify", "--optimizer.betas=[0.9,1]", "betas are (0.9, 1.0)"),
        ("digits-classify", "--optimizer.eps=-1", "eps is -1"),
        ("digits-diffuse", "--objective.class_conditional=false", "there is no condition to drop"),
        ("digits-diffuse", "--objective.condition_dropout=0", "guidance is 1.0, which needs"),
        ("digits-classfy", "", "did you mean 'digits-classify'?"),
        ("nowhere/recipe.yaml", "", "no recipe file 'nowhere/recipe.yaml'"),
    ],
)
def test_a_mistake_has_one_clear_line(name, override, message):
    with pytest.raises(InputError) as caught:
        config.load(name, [override] if override else [])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys"),
        ("task: [", "is not YAML"),
        ("task: " + "[" * 10**4, "nests deeper"),
        ("task: clasify", "did you mean 'classify'?"),
        ("task: byte", "did you mean 'bytes'?"),
        ("task: classify\nmodel: {heds: 2}", "did you mean 'model.heads'?"),
        ("task: classify\nmodel: 3", "model is a section"),
        ("task: classify\ntrainer: {steps: 2.5}", "trainer.steps is '2.5'; expected int"),
    ],
)
def test_a_broken_file_has_one_clear_line(text, message):
    with pytest.raises(InputError) as caught:
        config.parse(text, where="mine.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_has_one_clear_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"task: \xff")
    with pytest.raises(InputError, match="UTF-8"):
        config.load(str(path))


def test_differences_name_keys_and_values_but_not_harmless_ones():
    old = config.load("digits-classify")
    new = config.load("digits-classify", ["--trainer.seed=3", "--trainer.log_every=7", "--data.num_workers=2"])
    assert config.differences(old, new) == {"trainer.seed": (0, 3)}
    assert not config.differences(old, old)


def test_harmless_keys_exist():
    keys = dict(config.flatten(yaml.safe_load(config.dump(config.load("digits-classify")))))
    assert keys.keys() >= config.HARMLESS


def test_only_similar_names_are_suggested():
    assert suggest("cats.csv", ["cat.csv", "dogs.csv"]) == "; did you mean 'cat.csv'?"
    assert suggest("wxyz.tif", ["0123456789.tif"], "; nothing is similar") == "; nothing is similar"


@pytest.mark.parametrize(
    ("recipe", "option", "value"),
    [
        ("digits-classify", "objective.label_smoothing", "1"),
        ("digits-classify", "data.max_unreadable", "-1"),
        ("digits-classify", "data.split_seed", "-1"),
        ("digits-classify", "data.num_workers", "-1"),
        ("digits-classify", "optimizer.clip", "1e400"),
        ("digits-classify", "optimizer.lr", "nan"),
        ("digits-classify", "optimizer.weight_decay", "inf"),
        ("digits-classify", "trainer.seed", str(2**64)),
        ("digits-diffuse", "objective.condition_dropout", "1"),
        ("digits-diffuse", "objective.guidance", "1e30"),
        ("digits-diffuse", "objective.guidance", "-5"),
        ("digits-diffuse", "objective.guidance", "nan"),
        ("digits-diffuse", "objective.b_scale", "inf"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(recipe, option, value):
    with pytest.raises(InputError, match=option.rsplit(".", 1)[1]):
        config.load(recipe, [f"--{option}={value}"])


@pytest.mark.parametrize("key", ["trainer.steps", "data.split_seed", "optimizer.lr"])
def test_null_is_refused_where_no_key_may_be_null(key):
    section, _, name = key.partition(".")
    recipe = yaml.safe_load(config.dump(config.load("digits-classify")))
    recipe[section][name] = None
    with pytest.raises(InputError, match=f"{key} is null; expected"):
        config.parse(yaml.safe_dump(recipe))
