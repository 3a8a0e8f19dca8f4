"""Odd recipes and odd command lines: an answer or one line of error, in bounded time and memory. Slow."""

import argparse
import importlib
import os
import resource
import shutil
import signal
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fitformer.cli import VERBS, main
from fitformer.config import load as config
from fitformer.data.wav import write_sound
from fitformer.errors import InputError
from helpers import untrained_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

MOST_BYTES, MOST_SECONDS = 10**9, 60
ONE_STEP = [f"--trainer.{key}" for key in ("steps=1", "batch_size=2", "validate_batches=0", "accelerator=cpu")]
TINY = ["dim=16", "latent_dim=16", "heads=2", "latent_heads=2", "latents_per_group=2"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Warnings are for the user; downloads fail at once; nothing is written but in a folder of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FITFORMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def bounded():
    """A gigabyte more of address space than now, and an alarm."""

    def late(*_):
        raise AssertionError(f"takes more than {MOST_SECONDS} seconds")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)


# --- recipes

ODD = [None, "", "x", "4", -1, 0, 1.5, 10**18, 2**64, 1e300, float("nan"), float("inf"), True, [], {}, [4], [1, 2, 3],
       {"a": 1}, "null", "48x64", "-3x5", "\u2603", "(1)1", "(0)0", "(1)999999", [[1]], "none", "auto"]  # fmt: skip


def pick(values, random):
    """One of some values, as it is: numpy's own choice makes its own texts of them."""
    return values[random.integers(len(values))]


def mutated(text, random):
    """A recipe with some keys, values, types or letters changed."""
    if random.random() < 0.25:
        letters = list(text)
        for _ in range(random.integers(1, 4)):
            at = random.integers(len(letters))
            letters[at] = pick([":", "-", "\t", "{", "[", "&", "*", "!", "'", "\x00", "\n", "x", "%", "|"], random)
        return "".join(letters)
    given = yaml.safe_load(text)
    for _ in range(random.integers(1, 4)):
        section = given[pick(list(given), random)] if random.random() < 0.9 else given
        if not isinstance(section, dict) or not section:
            continue
        key, value = pick(list(section), random), ODD[random.integers(len(ODD))]
        match random.integers(0, 4):
            case 0 | 1:
                section[key] = value
            case 2:
                section[f"{key}s"] = section.pop(key)
            case 3:
                section[key] = {key: value}
    return yaml.safe_dump(given)


@pytest.mark.parametrize("name", config.names())
def test_an_odd_recipe_is_read_as_it_says_or_refused_in_one_line(name, bounded, tmp_path, capsys):
    random, text = np.random.default_rng(len(name)), config.read_text(name)
    read = refused = 0
    for case in range(120):
        changed = mutated(text, random)
        signal.alarm(MOST_SECONDS)
        recipe, said = None, ""
        try:
            recipe = config.parse(changed, where="odd.yaml")
        except InputError as error:
            said = str(error)
        signal.alarm(0)
        if recipe is None:
            assert "odd.yaml" in said, changed
            assert "\n" not in said, changed
            refused += 1
            continue
        read += 1
        again = config.parse(config.dump(recipe))
        assert asdict(again) == asdict(recipe) or "nan" in changed.lower(), changed
        if case % 10 == 0:
            (tmp_path / "odd.yaml").write_text(changed)
            check(["train", tmp_path / "odd.yaml", "--run-dir", tmp_path / str(case), *ONE_STEP], capsys)
    assert read > 5
    assert refused > 20


# --- the command line


def check(words, capsys):
    """Run a command; it must end in time, with status 0 or 2, and with at most one line of error."""
    signal.alarm(MOST_SECONDS)
    try:
        status = main([str(word) for word in words])
    except SystemExit as error:
        status = error.code or 0
    finally:
        signal.alarm(0)
    said = capsys.readouterr().err
    assert status in (0, 2), (status, words)
    assert "Traceback" not in said, words
    assert (status == 2) == ("fitformer: error: " in said), (status, words, said)
    if status == 2:
        assert len(said[said.index("fitformer: error: ") :].splitlines()) == 1, (words, said)
    return status


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each task."""
    folder = tmp_path_factory.mktemp("runs")
    write_sound(folder / "sound.wav", np.arange(0, 256, dtype=np.uint8).repeat(4), 8000)
    (folder / "audio.yaml").write_text(f"task: audio\ndata: {{path: {folder / 'sound.wav'}, sample_rate: 8000}}\n")
    sides = [*TINY, "group_size=4", "patch_size=2"]
    kinds = {
        "one": ("digits-classify", sides, ["data.image_size=8"]),
        "any": ("digits-classify", [*sides, "latent_position=row_column"], ["data.image_size=8"]),
        "diffuse": ("digits-diffuse", sides, ["data.image_size=8"]),
        "pixels": ("digits-pixels", [*TINY, "patch_size=4"], ["data.image_size=8", "data.levels=17"]),
        "bytes": ("python-bytes-demo", [*TINY, "tokens_per_group=8"], ["data.length=32"]),
        "audio": (str(folder / "audio.yaml"), [*TINY, "tokens_per_group=8"], ["data.length=32"]),
    }
    return {
        name: untrained_run(folder / name, recipe, *(f"model.{key}" for key in model), *more)
        for name, (recipe, model, more) in kinds.items()
    }


@pytest.fixture
def things(runs, tmp_path):
    """Files and folders of many kinds, few of which are what is asked for."""
    root = tmp_path / "things"
    (root / "empty folder").mkdir(parents=True)
    (root / "images").mkdir()
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(root / "images" / "a.png")
    (root / "images" / "b.png").write_bytes(b"no image")
    (root / "text.txt").write_text("some text")
    (root / "empty.png").write_bytes(b"")
    write_sound(root / "sound.wav", np.zeros(100, np.uint8), 8000)
    os.mkfifo(root / "pipe.png")
    (root / "loop").symlink_to(root / "loop")
    found = [*runs.values(), *map(str, sorted(root.iterdir())), str(root / "missing"), "/dev/null", "/dev/zero"]
    return found, root


WORDS = ["", "x", "-1", "0", "1", "2", "3", "1.5", "nan", "inf", "-inf", "1e300", "99999999999999999999", "8x8", "0x0",
         "8x8x8", "(1)1", "(0)0", "cpu", "meta", "cuda:99", "last", "best", "none", "auto", "json", "csv", "1/2", "9/2",
         "\u2603", "\udcff", "a b", "--", "[]", "null", "../..", "%s", "{}"]  # fmt: skip


def options_of(verb):
    module = importlib.import_module(f"fitformer.cli.{verb}")
    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    firsts = [name for action in subparsers for name in action.choices]
    parsers = [parser, *(each for action in subparsers for each in action.choices.values())]
    options = [action for each in parsers for action in each._actions if action.option_strings]
    return options, firsts


def random_line(verb, found, random):
    options, firsts = options_of(verb)
    words = [verb, *([pick(firsts, random)] if firsts and random.random() < 0.95 else [])]
    for _ in range(pick([0, 1, 1, 1, 2], random)):
        words.append(found[random.integers(len(found))] if random.random() < 0.8 else pick(WORDS, random))
    chosen = [options[random.integers(len(options))] for _ in range(random.integers(0, 4))]
    for action in chosen:
        name = pick(action.option_strings, random)
        pool = [*WORDS, *found, *map(str, action.choices or ()), *map(str, action.choices or ())]
        value = pool[random.integers(len(pool))]
        words += [name] if action.nargs == 0 else [f"{name}={value}"] if name.startswith("--") else [name, value]
    if verb == "train":
        # Real training is tested elsewhere; here it ends before its first step, or after a few.
        words += ["--trainer.steps=1", "--trainer.batch_size=2", "--trainer.accelerator=cpu", "--run-dir", "run"]
    short = {"sample": ["--steps=2", "--count=1"], "generate": [], "bench": ["--steps=1", "--warmup=0"]}.get(verb, [])
    return words + [word for word in short if not any(each.startswith(word.split("=")[0]) for each in words)]


@pytest.mark.parametrize("verb", VERBS)
def test_an_odd_command_is_answered_or_refused_in_one_line(verb, things, bounded, capsys):
    found, _ = things
    random = np.random.default_rng(sum(map(ord, verb)))
    statuses = [check(random_line(verb, found, random), capsys) for _ in range(60)]
    assert 2 in statuses


# --- damaged runs

CONTENTS = [
    *(
        b"",
        b"\x00",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' * 1000,
        b"a: 1\n",
        b"task: x\n",
    ),
    *(b"task: [", b'{"layers": 5}', b'{"mlp_ratio": NaN}', b"PK\x03\x04 no archive"),
]
PARTS = ["recipe.yaml", "data.json", "model/config.json", "model/model.safetensors", "metrics.jsonl"]
PARTS += ["environment.json", "initial_weights.json", "checkpoints/last.ckpt"]


def damaged_run(run, target, part, random):
    shutil.copytree(run, target)
    path = target / part
    path.parent.mkdir(parents=True, exist_ok=True)
    match random.integers(0, 5):
        case 0 | 1 | 2:
            path.write_bytes(CONTENTS[random.integers(len(CONTENTS))])
        case 3 if path.is_file():
            content = path.read_bytes()
            path.write_bytes(content[: random.integers(len(content) + 1)])
        case _:
            path.unlink(missing_ok=True)
            path.mkdir()
            (path / "a").write_text("a")
    if part.endswith(".ckpt") and path.is_file() and random.random() < 0.5:
        odd = [{"a": 1}, torch.zeros(3), [1], {"state_dict": 5, "global_step": "x"}, {"global_step": -1}, None]
        torch.save(odd[random.integers(len(odd))], path)


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_run_is_used_or_refused_in_one_line(part, runs, things, bounded, tmp_path, capsys):
    _, root = things
    random = np.random.default_rng(sum(map(ord, part)))
    verbs = {
        "one": ["predict", "evaluate", "info", "train"], "any": ["predict", "info"], "diffuse": ["sample", "info"],
        "pixels": ["generate"], "bytes": ["generate", "info"], "audio": ["generate"],
    }  # fmt: skip
    for case in range(30):
        name = list(runs)[random.integers(len(runs))]
        target = tmp_path / f"run-{case}"
        damaged_run(runs[name], target, part, random)
        for verb in verbs[name]:
            words = {
                "predict": ["predict", target, root / "images" / "a.png"],
                "evaluate": ["evaluate", target, "--no-baselines", "--checkpoint", pick(["last", "best"], random)],
                "info": ["info", target],
                "sample": ["sample", target, "--count", "1", "--steps", "1"],
                "generate": ["generate", target, *(["--count", "1"] if name == "pixels" else ["--length", "16"])],
                "train": ["train", target / "recipe.yaml", "--run-dir", target, *ONE_STEP],
            }[verb]  # fmt: skip
            check(words, capsys)


@pytest.mark.parametrize("part", ["tensorboard", "csv", "checkpoints", "model", "samples", "metrics.jsonl", "."])
def test_a_file_where_a_run_needs_a_folder(part, tmp_path, capsys):
    run = tmp_path / "run"
    if part == ".":
        run.write_text("a file")
    elif part == "metrics.jsonl":
        (run / part).mkdir(parents=True)
    else:
        run.mkdir()
        (run / part).write_text("a file")
    words = ["train", "digits-diffuse", "--run-dir", run, "--trainer.steps=2", "--trainer.batch_size=2",
             *(f"--model.{key}" for key in [*TINY, "group_size=4", "patch_size=2"]), "--data.image_size=8",
             "--trainer.validate_every=1", "--trainer.previews=1", "--objective.sample_steps=1",
             "--trainer.accelerator=cpu", "--trainer.validate_batches=1"]  # fmt: skip
    assert check(words, capsys) == 2
