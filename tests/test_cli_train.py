"""The command line up to the point where training starts: help, lists, dry runs, errors."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fitformer import cli
from fitformer.config import load as config
from fitformer.errors import InputError


def test_help_imports_nothing_slow():
    code = (
        "import sys\nfrom fitformer import cli\n"
        "for words in (['--help'], ['train', '--help']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
        "cli.main(['train', '--list'])\ncli.main(['train', 'digits-classify', '--dry-run', '--trainer.steps=3'])\n"
        "print({'torch', 'lightning', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"
    for verb in cli.VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("allocate", [np.empty, torch.empty])
def test_memory_that_does_not_suffice_is_one_line(allocate, capsys, monkeypatch):
    monkeypatch.setattr("fitformer.cli.info.run", lambda arguments: allocate(2**55))
    assert cli.main(["info", "tiny"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fitformer: error: the memory does not suffice; a smaller batch")
    assert said.count("\n") == 1

    def fails(arguments):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("fitformer.cli.info.run", fails)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["info", "tiny"])


def test_list_shows_every_recipe(capsys):
    assert cli.main(["train", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in config.names())


def test_dry_run_prints_the_resolved_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "digits-diffuse", "--trainer.steps", "3", "--dry-run"]) == 0
    assert config.parse(capsys.readouterr().out) == config.load("digits-diffuse", ["--trainer.steps=3"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no verb 'trian'; did you mean 'train'?"),
        (["train"], "name a recipe"),
        (["train", "digits-classfy"], "did you mean 'digits-classify'?"),
        (["train", "digits-classify", "--trainer.step=3"], "did you mean 'trainer.steps'?"),
        (["evaluate"], "the following arguments are required: run; see `fitformer evaluate --help`"),
        (["sample", "run", "--steps", "few"], "argument --steps: 'few' is not a whole number"),
        (["evaluate", "run", "--splt", "test"], "unrecognized arguments: --splt test"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, message, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("fitformer: error: ")
    assert message in error
    assert error.count("\n") == 1


class Failure:
    def __len__(self):
        return 1

    def __getitem__(self, where):
        raise InputError("image 0 is broken")


def test_an_error_in_a_worker_process_is_one_line_too(capsys, monkeypatch):
    def train(arguments):
        list(DataLoader(Failure(), num_workers=1))

    monkeypatch.setattr("fitformer.cli.train.run", train)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fitformer: error: image 0 is broken\n"


def test_a_warning_of_a_recipe_is_one_line(capsys, tmp_path):
    pytest.importorskip("lightning", reason="needs the extra train")
    sizes = ("dim", "latent_dim", "heads", "latent_heads")
    words = [f"--model.{name}=4" for name in sizes] + ["--data.path=nowhere", "--trainer.steps=1"]
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        assert cli.main(["train", "digits-classify", *words, "--run-dir", str(tmp_path / "run")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "nowhere" in line or "warning" in line.lower()]
    assert said == ["fitformer: warning: data source 'digits' does not read path: ignored"]
    assert warnings.showwarning is shown


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_warning_of_any_verb_is_one_line(verb, capsys, monkeypatch):
    """Names no file and no category, whatever the verb and whoever warns."""
    module = SimpleNamespace(add_arguments=lambda parser: None, run=warn)
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main([verb]) == 0
    assert capsys.readouterr().err == "fitformer: warning: two lines\n"


def warn(arguments):
    warnings.warn("two\n lines", FutureWarning, stacklevel=1)
    return 0


@pytest.mark.parametrize("package", ["lightning", "tensorboard"])
def test_a_missing_extra_is_one_line(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["train", "digits-classify"]) == 2
    message = f"this needs the package '{package}': pip install 'fitformer[train]'"
    assert capsys.readouterr().err == f"fitformer: error: {message}\n"
