"""Run directories: whole training runs on real data, stopped, killed, continued, and refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

from helpers import patch_task

pytest.importorskip("lightning", reason="needs the extra train")

from fitformer.cli import main
from fitformer.config import load as config
from fitformer.errors import InputError
from fitformer.tasks import classify, task_of
from fitformer.tasks.optimizers import rate
from fitformer.training import run_dir as run_dirs
from fitformer.training.run_dir import Run

# Everything that could tell a resumed run from an uninterrupted one: average, dropout, accumulation, shuffled data,
# augmentation, validation in between, and checkpoints that are no multiple of it.
SMALL = [
    "--trainer.batch_size=4",
    "--trainer.accumulate=2",
    "--trainer.steps=6",
    "--trainer.checkpoint_every=2",
    "--trainer.validate_every=3",
    "--trainer.validate_batches=2",
    "--trainer.log_every=1",
    "--trainer.previews=2",
    "--trainer.ema=0.9",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--model.layers=(1)1(1)",
    "--model.drop_units=0.1",
    "--model.drop_path=0.1",
    "--optimizer.warmup_steps=2",
]
MORE = {
    "digits-classify": [],
    "digits-diffuse": ["--objective.sample_steps=2"],
    "digits-pixels": [],
    "python-bytes-demo": [
        "--data.source=files",
        "--data.length=32",
        # The run is killed in its last whole step of short examples.
        "--data.short_length=8",
        "--data.short_share=0.8",
        "--data.glob=*.txt",
        "--model.tokens_per_group=8",
        "--objective.preview_length=8",
    ],
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        (folder / f"{i}.txt").write_text("".join(f"line {i} {k}: to be or not to be\n" for k in range(200)))
    return folder


def words(name, text, run_dir, *more):
    path = [f"--data.path={text}"] if name == "python-bytes-demo" else []
    return ["train", name, *SMALL, *MORE[name], *path, *more, "--run-dir", str(run_dir)]


def weights(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["current_model_state"] | {f"mean {k}": v for k, v in checkpoint["state_dict"].items()}


def measured(run_dir):
    timed = {"time", "train/examples_per_second", "train/memory_mb"}
    return [{k: v for k, v in line.items() if k not in timed} for line in Run.open(run_dir).metrics()]


def stop_after(monkeypatch, step, how):
    from fitformer.training.checkpoint import CheckpointCallback

    real = CheckpointCallback.on_train_batch_end

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == step:
            how()
        real(self, trainer, *rest)

    monkeypatch.setattr(CheckpointCallback, "on_train_batch_end", on_train_batch_end)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", MORE)
def test_a_killed_run_continues_as_if_nothing_had_happened(name, text, tmp_path, monkeypatch, capsys):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(words(name, text, straight)) == 0

    def die():
        raise Killed

    with monkeypatch.context() as patch:
        stop_after(patch, 5, die)
        with pytest.raises(Killed):
            main(words(name, text, broken))
    capsys.readouterr()
    assert main(words(name, text, broken)) == 0
    said = capsys.readouterr().out
    assert "goes on from step 4 of 6" in said
    about = json.loads((broken / "data.json").read_text())
    assert f"training: {about['train']}\nheld out: {about['held_out']}\n" in said

    ours, theirs = weights(straight), weights(broken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert measured(straight) == measured(broken)
    assert (straight / "model/model.safetensors").read_bytes() == (broken / "model/model.safetensors").read_bytes()
    # And again: there is nothing left to do.
    assert main(words(name, text, broken)) == 0
    assert "is complete" in capsys.readouterr().out


def test_a_run_directory_explains_itself(text, tmp_path):
    run_dir = tmp_path / "run"
    assert main(words("digits-diffuse", text, run_dir, "--trainer.keep_best=true", "--data.validation=0.1")) == 0
    run = Run.open(run_dir)
    assert run.recipe.trainer.keep_best
    assert run.recipe.objective == config.load("digits-diffuse", MORE["digits-diffuse"]).objective
    assert run.classes == tuple("0123456789")
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert {path.name for path in run.samples.iterdir()} == {"step-0000003.png", "step-0000006.png"}
    assert any((run_dir / "tensorboard").iterdir())
    assert (run_dir / "csv/version_0/metrics.csv").read_text().startswith("step,")
    (start,) = json.loads((run_dir / "environment.json").read_text())["starts"]
    assert start["versions"]["torch"] == torch.__version__
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 3, 4, 5, 6, 6]
    model = run.model()
    assert not model.training
    assert task_of(run.recipe).preview(model, run.recipe, 2).images.shape == (2, 16, 16, 1)
    assert run.dataset("test")[0]["image"].shape == (16, 16, 1)
    averaged = {key: value for key, value in weights(run_dir).items() if key.startswith("mean ")}
    assert all(torch.equal(value, averaged[f"mean network.{key}"]) for key, value in model.state_dict().items())


# No checkpoint is due before the end: what is there earlier was saved on the way out.
RARELY_SAVED = ["--trainer.accumulate=3", "--trainer.steps=4", "--trainer.checkpoint_every=100"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, one_thread):
    """A run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    return run_dir


def assert_equal_runs(run_dir, wanted):
    ours, theirs = weights(run_dir), weights(wanted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    name = "model/model.safetensors"
    assert (run_dir / name).read_bytes() == (wanted / name).read_bytes()


def at_call(number, action, of):
    """A function that does as `of` does, and calls `action` before its `number`-th time."""
    calls = []

    def called(*given, **named):
        calls.append(given)
        if len(calls) == number:
            action()
        return of(*given, **named)

    return called


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_running_step_with_everything_saved(number, straight, tmp_path, monkeypatch, capsys):
    before, run_dir = signal.getsignal(number), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch_task(patch, classify, loss=at_call(7, lambda: os.kill(os.getpid(), number), classify.loss))
        assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 130
    captured = capsys.readouterr()
    assert "stopped at step 3 of 4; the same command goes on from there" in captured.out
    assert not captured.err
    assert signal.getsignal(number) is before
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    assert_equal_runs(run_dir, straight)


# Every third step is saved and validated, the last one too, and the best is kept.
COINCIDING = [
    "--trainer.checkpoint_every=3",
    "--trainer.validate_every=3",
    "--trainer.keep_best=true",
    "--data.validation=0.2",
]
IN_TRAINING = "fitformer.training."


@pytest.fixture(scope="module")
def coinciding(tmp_path_factory, one_thread):
    """Such a run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("coinciding") / "run"
    assert main(words("digits-classify", None, run_dir, *COINCIDING)) == 0
    return run_dir


def assert_read_alike(run_dir, wanted):
    """What a user reads of two runs is the same: measurements, weights, the best checkpoint, the files."""
    assert_equal_runs(run_dir, wanted)
    assert measured(run_dir) == measured(wanted)
    ours, theirs = (torch.load(each / "checkpoints/best.ckpt", weights_only=True) for each in (run_dir, wanted))
    assert ours["global_step"] == theirs["global_step"]
    assert all(torch.equal(ours["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"])
    names = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (run_dir, wanted)]
    # TensorBoard and CSV begin another file with every start.
    ours, theirs = ([name for name in each if not name.startswith(("tensorboard", "csv"))] for each in names)
    assert ours == theirs


@pytest.mark.parametrize("how", [Killed(), RuntimeError("the validation fails")], ids=["killed", "failing"])
@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize(
    ("where", "before"),
    [
        ("checkpoint.CheckpointCallback.on_train_batch_end", True),
        ("module.FITModule.validation_step", True),
        ("callbacks.MetricsLogger.on_validation_end", True),
        ("callbacks.MetricsLogger.on_validation_end", False),
        ("checkpoint.CheckpointCallback.on_validation_end", True),
        ("checkpoint.export", False),
        ("checkpoint.CheckpointCallback.on_validation_end", False),
    ],
)
def test_a_run_broken_off_at_a_validation_loses_none(where, before, step, how, coinciding, tmp_path, monkeypatch):
    from fitformer.training import checkpoint

    run_dir, trainers = tmp_path / "run", []
    path, name = (IN_TRAINING + where).rsplit(".", 1)
    owner = (
        checkpoint
        if where == "checkpoint.export"
        else getattr(sys.modules[path.rsplit(".", 1)[0]], where.split(".")[1])
    )
    of = getattr(owner, name)

    def broken(*given, **named):
        result = None if before else of(*given, **named)
        if trainers[0].global_step == step:
            raise how
        return of(*given, **named) if before else result

    with monkeypatch.context() as patch:
        real = checkpoint.CheckpointCallback.on_train_start
        patch.setattr(
            checkpoint.CheckpointCallback,
            "on_train_start",
            lambda self, trainer, *rest: (trainers.append(trainer), real(self, trainer, *rest))[1],
        )
        patch.setattr(owner, name, broken)
        with pytest.raises(type(how)):
            main(words("digits-classify", None, run_dir, *COINCIDING))
    assert main(words("digits-classify", None, run_dir, *COINCIDING)) == 0
    assert_read_alike(run_dir, coinciding)


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_at_a_validation_leaves_it_to_the_next_start(step, coinciding, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        ask = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        patch_task(patch, classify, loss=at_call(2 * step, ask, classify.loss))
        assert main(words("digits-classify", None, run_dir, *COINCIDING)) == 130
    assert f"stopped at step {step} of 6; the same command goes on from there" in capsys.readouterr().out
    assert not any("val/loss" in line for line in measured(run_dir) if line["step"] == step)
    assert main(words("digits-classify", None, run_dir, *COINCIDING)) == 0
    assert_read_alike(run_dir, coinciding)
    # The checkpoint was written again with the validation: nothing is left to do.
    assert main(words("digits-classify", None, run_dir, *COINCIDING)) == 0
    assert "is complete" in capsys.readouterr().out
    assert_read_alike(run_dir, coinciding)


TERMINATED = """
import sys
from dataclasses import replace
from fitformer.cli import main
from fitformer.tasks import classify

loss, calls = classify.loss, []

def counted(*given):
    calls.append(given)
    print("micro-batch", len(calls), flush=True)
    if len(calls) == 8:
        # Until the signal has been sent.
        sys.stdin.readline()
    return loss(*given)

classify.TASK = replace(classify.TASK, loss=counted)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_told_to_terminate_saves_the_running_step(straight, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", TERMINATED, *words("digits-classify", None, run_dir, *RARELY_SAVED)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        for line in process.stdout:
            if line == "micro-batch 8\n":
                break
        process.send_signal(signal.SIGTERM)
        said, error = process.communicate("\n")
    assert (process.returncode, error) == (130, "")
    assert said.splitlines()[-1] == "stopped at step 3 of 4; the same command goes on from there"
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    assert_equal_runs(run_dir, straight)


def last_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("where", "call", "error", "step"),
    [
        ("fitformer.tasks.classify.loss", 8, InputError("0.tif is broken"), 2),
        ("fitformer.tasks.classify.loss", 12, OSError(28, "No space left on device"), 3),
        # The average stands in the place of the weights, and is what must not be saved as them.
        ("fitformer.tasks.classify.measure", 2, InputError("0.tif is broken"), 3),
        # The step is taken, and its average is not.
        ("fitformer.training.callbacks.memory_mb", 2, OSError(5, "the terminal is gone"), 2),
    ],
)
def test_an_error_in_mid_run_loses_no_whole_step(where, call, error, step, straight, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    module, name = where.rsplit(".", 1)
    with monkeypatch.context() as patch:
        broken = at_call(call, raising(error), getattr(sys.modules[module], name))
        if module == "fitformer.tasks.classify":
            patch_task(patch, classify, **{name: broken})
        else:
            patch.setattr(where, broken)
        assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 2
    assert last_line(capsys) == f"fitformer: error: {error}; the same command goes on from step {step}"
    assert torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    assert f"goes on from step {step} of 4" in capsys.readouterr().out
    assert_equal_runs(run_dir, straight)


def test_an_error_that_comes_back_keeps_the_checkpoint(straight, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch_task(patch, classify, loss=at_call(8, raising(InputError("0.tif is broken")), classify.loss))
        assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 2
    kept = (run_dir / "checkpoints/last.ckpt").read_bytes()
    with monkeypatch.context() as patch:
        patch_task(patch, classify, loss=at_call(2, raising(InputError("0.tif is broken")), classify.loss))
        assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 2
    assert (
        capsys.readouterr().err.count("fitformer: error: 0.tif is broken; the same command goes on from step 2\n") == 2
    )
    assert (run_dir / "checkpoints/last.ckpt").read_bytes() == kept


def test_an_error_while_saving_after_an_error_keeps_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    from fitformer.training import checkpoint_file

    run_dir, more = tmp_path / "run", [*RARELY_SAVED, "--trainer.checkpoint_every=2"]
    kept = []

    def fail():
        kept.append((run_dir / "checkpoints/last.ckpt").read_bytes())
        monkeypatch.setattr(checkpoint_file.shutil, "disk_usage", lambda folder: type("", (), {"free": 1000})())
        raise InputError("0.tif is broken")

    patch_task(monkeypatch, classify, loss=at_call(11, fail, classify.loss))
    assert main(words("digits-classify", None, run_dir, *more)) == 2
    line = last_line(capsys)
    assert line.startswith("fitformer: error: 0.tif is broken; step 3 was not saved: could not write ")
    assert "no space on the disk; about " in line
    assert line.endswith("; the same command goes on from step 2")
    assert [(run_dir / "checkpoints/last.ckpt").read_bytes()] == kept
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"last.ckpt"}


def test_an_error_within_the_optimizers_step_saves_nothing(tmp_path, monkeypatch):
    from fitformer.training.module import FITModule

    run_dir, more = tmp_path / "run", [*RARELY_SAVED, "--trainer.checkpoint_every=1"]
    clip = at_call(3, raising(RuntimeError("half of the weights are new")), FITModule.configure_gradient_clipping)
    monkeypatch.setattr(FITModule, "configure_gradient_clipping", lambda *given, **named: clip(*given, **named))
    with pytest.raises(RuntimeError, match="half of the weights") as raised:
        main(words("digits-classify", None, run_dir, *more))
    assert raised.value.__notes__ == ["the same command goes on from step 2"]
    assert torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_weights_that_are_no_numbers_are_not_saved_after_an_error(tmp_path, monkeypatch, capsys):
    def poison():
        for network in networks:
            network.head.weight.data.fill_(float("nan"))
        raise InputError("0.tif is broken")

    networks, loss = [], classify.loss
    patch_task(
        monkeypatch, classify, loss=lambda network, *rest: (networks.append(network), counted(network, *rest))[1]
    )
    counted = at_call(8, poison, loss)
    assert main(words("digits-classify", None, tmp_path / "run", *RARELY_SAVED)) == 2
    assert "0.tif is broken; step 2 was not saved: training diverged: at step 2 some weights" in last_line(capsys)
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_a_run_that_diverges_stops_at_that_step_with_the_one_before(straight, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"

    def poisoned(*given):
        value, metrics = classify.loss(*given)
        return value * float("nan"), metrics

    calls = []
    with monkeypatch.context() as patch:
        loss = lambda *given: (calls.append(1), poisoned(*given) if len(calls) == 8 else classify.loss(*given))[1]  # noqa: E731
        patch_task(patch, classify, loss=loss)
        assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 2
    error = last_line(capsys)
    assert "training diverged at step 3: the gradient of" in error
    assert error.endswith("; the same command goes on from step 2")
    assert [line["step"] for line in measured(run_dir)] == [1, 2]
    assert all(value.isfinite().all() for value in weights(run_dir).values() if value.is_floating_point())
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    assert_equal_runs(run_dir, straight)
    assert measured(run_dir) == measured(straight)


def test_a_model_of_no_numbers_is_not_used(straight, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    state = load_file(run_dir / "model/model.safetensors")
    state["head.bias"][1] = float("nan")
    save_file(state, run_dir / "model/model.safetensors")
    for verb in (["evaluate", str(run_dir)], ["predict", str(run_dir), str(tmp_path)]):
        assert main(verb) == 2
        assert "NaN or infinite weights (head.bias, the first of 1)" in last_line(capsys)


def test_lines_that_are_no_measurements_are_passed_over(straight, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    file = run_dir / "metrics.jsonl"
    file.write_bytes(
        file.read_bytes() + b'\xff\xfe\n{"step": "x"}\n[1]\n3\n{"loss": 1}\n' + b"[" * 10**5 + b'\n{"step": 9'
    )
    assert measured(run_dir) == measured(straight)
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    assert measured(run_dir) == measured(straight)


@pytest.mark.parametrize("content", [b"task: \xff\xfe", b"[" * 10**4, b"", b"task: 3", b"- a"])
def test_a_recipe_that_is_none_is_one_clear_error(straight, tmp_path, capsys, content):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "recipe.yaml").write_bytes(content)
    for verb in (["evaluate", str(run_dir)], words("digits-classify", None, run_dir, *RARELY_SAVED)):
        assert main(verb) == 2
        assert "recipe.yaml" in last_line(capsys)


def test_metrics_are_json_whatever_they_are(tmp_path):
    from fitformer.training.callbacks import JsonLines

    JsonLines(tmp_path / "metrics.jsonl").log_metrics({"loss": float("nan"), "other": 1.0, "rate": float("inf")}, 3)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (found["loss"], found["other"], found["rate"]) == (None, 1.0, None)


def test_two_processes_cannot_train_in_one_directory(straight, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", "import sys; from fitformer.cli import main; sys.exit(main(sys.argv[1:]))"]
    found = []

    def meanwhile():
        other = subprocess.run(
            [*command, *words("digits-classify", None, run_dir, *RARELY_SAVED)], capture_output=True, text=True
        )
        found.append((other.returncode, other.stderr))

    with monkeypatch.context() as patch:
        patch_task(patch, classify, loss=at_call(8, meanwhile, classify.loss))
        assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    ((status, error),) = found
    assert status == 2
    assert error.endswith(f"{run_dir} is being trained by another process; wait for it, or give another --run-dir\n")
    assert_equal_runs(run_dir, straight)
    assert measured(run_dir) == measured(straight)


def test_what_a_killed_run_left_half_written_is_removed(straight, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    left = ["checkpoints/.last.ckpt.1234.tmp", "model/.model.safetensors.99.tmp", ".recipe.yaml.5.tmp", "model/.tmpabc"]
    for name in left:
        (run_dir / name).write_text("half")
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    assert not list(run_dir.rglob(".*"))


def test_a_refused_run_leaves_no_directory(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(words("digits-classify", None, run_dir, "--init-from", str(tmp_path / "absent"))) == 2
    assert not run_dir.exists()


def test_a_run_is_complete_only_with_its_model(straight, tmp_path, monkeypatch, capsys):
    from fitformer.training import checkpoint

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export", raising_export)
        assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 2
    assert last_line(capsys) == "fitformer: error: no room for the model"
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED)) == 0
    assert_equal_runs(run_dir, straight)


def raising_export(network, folder):
    raise OSError("no room for the model")


@pytest.mark.parametrize("option", ["--trainer.precision=bf16", "--trainer.execution=checkpointed"])
def test_options_that_change_how_a_step_is_computed_train_all_the_same(option, text, tmp_path):
    more = ["--trainer.steps=2", "--objective.self_cond=masking", "--objective.sample_steps=2", option]
    assert main(words("digits-diffuse", text, tmp_path / "run", *more)) == 0
    first, *_ = [line for line in Run.open(tmp_path / "run").metrics() if "train/loss" in line]
    assert 0 < first["train/loss"] < 10


@pytest.mark.slow
# Warnings of the compiler about itself, which Python does not show by default.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("more", [[], ["--objective.self_cond=masking", "--trainer.execution=checkpointed"]])
def test_layers_compile(more, text, tmp_path, capfd):
    name = "digits-diffuse" if more else "digits-classify"
    assert main(words(name, text, tmp_path / "run", "--trainer.compile=true", *more)) == 0
    assert "recompile_limit" not in capfd.readouterr().err, "some layers were left uncompiled"


@pytest.mark.slow
def test_two_processes_train_together(text, tmp_path):
    command = [sys.executable, "-m", "fitformer", *words("digits-classify", text, tmp_path / "run")]
    done = subprocess.run([*command, "--trainer.devices=2"], capture_output=True, text=True, check=True)
    assert done.stdout.count("is complete") == 1
    assert Run.open(tmp_path / "run").metrics()[-1]["step"] == 6


def test_a_run_measures_the_same_wherever_it_was_stopped(tmp_path, monkeypatch):
    """Means over three steps, of which a checkpoint falls into the middle, are over the same three."""
    more = ["--trainer.log_every=3", "--trainer.validate_every=4", "--trainer.checkpoint_every=5"]
    assert main(words("digits-classify", None, tmp_path / "straight", *more)) == 0
    for step in (1, 2, 4, 5):
        run_dir = tmp_path / str(step)
        with monkeypatch.context() as patch:
            broken = at_call(2 * step + 2, raising(InputError("0.tif is broken")), classify.loss)
            patch_task(patch, classify, loss=broken)
            assert main(words("digits-classify", None, run_dir, *more)) == 2
        assert main(words("digits-classify", None, run_dir, *more)) == 0
        assert measured(run_dir) == measured(tmp_path / "straight")


def test_a_run_with_muon_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    more = ["--optimizer.name=muon"]
    assert main(words("digits-classify", None, tmp_path / "straight", *more)) == 0
    with monkeypatch.context() as patch:
        patch_task(patch, classify, loss=at_call(8, raising(InputError("0.tif is broken")), classify.loss))
        assert main(words("digits-classify", None, tmp_path / "stopped", *more)) == 2
    assert main(words("digits-classify", None, tmp_path / "stopped", *more)) == 0
    assert measured(tmp_path / "stopped") == measured(tmp_path / "straight")
    of, to = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(of[name], to[name]) for name in of)


def test_the_learning_rate_of_a_step_is_the_one_that_it_used(straight):
    rates = [line["train/lr"] for line in measured(straight) if "train/lr" in line]
    settings = Run.open(straight).recipe.optimizer
    assert rates == [settings.lr * rate(step, settings, 4) for step in range(4)]
    assert rates[:2] == [settings.lr / 2, settings.lr]


@pytest.mark.parametrize("devices", [1, 3])
def test_steps_of_another_number_of_examples_are_refused(devices, straight, tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    last = run_dir / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    noted = checkpoint["callbacks"]["CheckpointCallback"]
    assert noted["global_batch"] == 12
    # As on two devices, one of which is gone, or to which another has come.
    noted["global_batch"] = 24
    torch.save(checkpoint, last)
    before = (run_dir / "metrics.jsonl").read_bytes()
    more = ["--trainer.steps=5", f"--trainer.devices={devices}"]
    assert main(words("digits-classify", None, run_dir, *RARELY_SAVED, *more)) == 2
    error = last_line(capsys)
    there = f"took steps of 24 examples, on 2 devices, and would take steps of {12 * devices} on {devices}"
    assert there in error
    assert "go on with --trainer.devices=2" in error
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_output_to_a_pipe_is_of_round_steps_with_the_time_that_is_left(tmp_path, capsys, monkeypatch):
    from fitformer.training import callbacks

    clock = iter(range(0, 10**6))
    # Every look at the clock is a second later than the one before.
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    more = ["--trainer.steps=30", "--trainer.accumulate=1", "--trainer.validate_every=30", "--trainer.previews=0"]
    assert main(words("digits-classify", None, tmp_path / "run", *more)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["10/30", "20/30", "30/30", "30/30"]
    assert [line.split("  ")[-1] for line in lines[:2]] == ["22 s left", "11 s left"]
    assert "left" not in lines[-1]


def test_durations_are_short():
    from fitformer.training.callbacks import round_interval, time_left

    assert [time_left(s) for s in (5, 99, 119, 5999, 12_345)] == [
        "5 s left",
        "99 s left",
        "2 min left",
        "1 h 40 min left",
        "3 h 26 min left",
    ]
    assert [round_interval(steps) for steps in (0.01, 1, 1.5, 3, 10, 11, 499, 501)] == [1, 1, 2, 5, 10, 20, 500, 1000]


def test_another_recipe_is_refused_but_harmless_keys_may_change(text, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(words("digits-classify", text, run_dir, "--trainer.steps=2")) == 0
    assert main(words("digits-classify", text, run_dir, "--trainer.steps=2", "--trainer.log_every=7")) == 0
    assert Run.open(run_dir).recipe.trainer.log_every == 7
    capsys.readouterr()
    assert main(words("digits-classify", text, run_dir, "--trainer.steps=2", "--optimizer.lr=0.5")) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr is 0.002 there, 0.5 here" in error
    assert "log_every" not in error
    assert main(words("digits-diffuse", text, run_dir)) == 2
    assert "task is classify there, diffuse here" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(text, tmp_path, capsys):
    small, large = tmp_path / "small", tmp_path / "large"
    for run_dir, layers in ((small, "(1)1"), (large, "(1)2")):
        more = [f"--model.layers={layers}", "--trainer.steps=1", "--trainer.validate_batches=0"]
        assert main(words("digits-classify", text, run_dir, *more)) == 0
    (small / "checkpoints/last.ckpt").write_bytes((large / "checkpoints/last.ckpt").read_bytes())
    (small / "model/model.safetensors").write_bytes((large / "model/model.safetensors").read_bytes())
    capsys.readouterr()
    more = ["--model.layers=(1)1", "--trainer.steps=1", "--trainer.validate_batches=0"]
    assert main(words("digits-classify", text, small, *more)) == 2
    error = capsys.readouterr().err
    assert "is a checkpoint of another architecture" in error
    assert error.count("\n") == 1
    with pytest.raises(InputError, match="does not fit this FITImageEncoder"):
        Run.open(small).model()


def test_a_torn_checkpoint_is_one_clear_error(text, tmp_path, capsys):
    more = ["--trainer.steps=1", "--trainer.validate_batches=0"]
    assert main(words("digits-classify", text, tmp_path / "run", *more)) == 0
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    assert main(words("digits-classify", text, tmp_path / "run", *more)) == 2
    assert "is not a whole checkpoint" in capsys.readouterr().err


def test_no_changed_byte_of_a_checkpoint_goes_unnoticed(coinciding, tmp_path):
    from fitformer.training.checkpoint_file import load

    whole, path = (coinciding / "checkpoints/last.ckpt").read_bytes(), tmp_path / "last.ckpt"
    wanted = load(coinciding / "checkpoints/last.ckpt")
    made, refused = random.Random(0), 0
    for _ in range(40):
        place = made.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << made.randrange(8)]) + whole[place + 1 :])
        try:
            found = load(path)
        except InputError:
            refused += 1
            continue
        # Bytes between the records, which nothing reads.
        leaves = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in leaves)
    assert refused > 20


def test_a_file_of_something_else_is_no_checkpoint(coinciding, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(coinciding, run_dir)
    torch.save({"weights": torch.zeros(3)}, run_dir / "checkpoints/last.ckpt")
    assert main(words("digits-classify", None, run_dir, *COINCIDING)) == 2
    assert "last.ckpt is not a checkpoint of a run: it has no state_dict" in last_line(capsys)


def test_the_best_checkpoint_is_read_by_name_and_by_path(coinciding, tmp_path, capsys):
    run = Run.open(coinciding)
    best = torch.load(run.best_checkpoint, weights_only=True)["state_dict"]
    for which in ("best", run.best_checkpoint):
        state = run.model(which).state_dict()
        assert all(torch.equal(value, best[f"network.{name}"]) for name, value in state.items())
    last = run.model().state_dict()
    assert not all(torch.equal(value, best[f"network.{name}"]) for name, value in last.items())
    with pytest.raises(InputError, match=r"there is no checkpoint nowhere\.ckpt"):
        run.model("nowhere.ckpt")
    found = {}
    for which in ("best", "last", str(run.best_checkpoint)):
        assert main(["evaluate", str(coinciding), "--checkpoint", which, "--split", "val", "--json"]) == 0
        found[which] = json.loads(capsys.readouterr().out)
    assert found["best"] == found[str(run.best_checkpoint)]
    assert found["best"]["loss"] != found["last"]["loss"]


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_run_that_was_moved_or_copied_says_so_and_loses_nothing(how, tmp_path, capsys):
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    assert main(words("digits-classify", None, first, "--trainer.steps=4")) == 0
    assert main(words("digits-classify", None, whole)) == 0
    (shutil.move if how == "moved" else shutil.copytree)(str(first), str(second))
    capsys.readouterr()
    assert main(words("digits-classify", None, second)) == 0
    said = "was moved from" if how == "moved" else "is a copy of"
    assert f"{second} {said} {first}, where it was trained before" in capsys.readouterr().out
    assert len(Run.open(second).metrics()) == len(Run.open(whole).metrics())
    assert Run.open(second).last_checkpoint.is_file()
    assert main(words("digits-classify", None, second)) == 0
    assert said not in capsys.readouterr().out


def test_without_keep_best_there_is_none(straight, capsys):
    for verb in (["evaluate"], ["predict"]):
        assert main([*verb, str(straight), *(["."] if verb == ["predict"] else []), "--checkpoint", "best"]) == 2
        assert "trainer.keep_best=true" in last_line(capsys)


def test_devices_that_are_not_there_are_one_clear_error(text, tmp_path, capsys):
    for more in ("--trainer.devices=0", "--trainer.accelerator=abacus"):
        assert main(words("digits-classify", text, tmp_path / "run", more)) == 2
        error = capsys.readouterr().err
        assert error.startswith("fitformer: error: these devices cannot be used: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["environment.json", "data.json"])
def test_a_torn_note_is_one_clear_error(name, tmp_path):
    recipe = config.load("digits-classify")
    run = run_dirs.start_run(tmp_path / "run", recipe)
    (run.path / name).write_text('{"starts": [')
    with pytest.raises(InputError, match=r"json is not whole .*; remove it"):
        run.classes if name == "data.json" else run_dirs.start_run(run.path, recipe)


def test_folders_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    recipe = config.load("digits-classify")
    with pytest.raises(InputError, match=r"has no recipe\.yaml"):
        run_dirs.start_run(tmp_path / "other", recipe)
    with pytest.raises(InputError, match="there is no run directory"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file"):
        run_dirs.start_run(tmp_path / "other/file", recipe)
    run = run_dirs.start_run(tmp_path / "new", recipe)
    with pytest.raises(InputError, match="has no model yet"):
        run.model()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from fitformer.training.checkpoint import export
from fitformer.training.checkpoint_file import AtomicCheckpointIO
from fitformer.errors import InputError
path = Path(sys.argv[1]) / "last.ckpt"
AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(10)}, path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(10**6)}, path)
except OSError as error:
    print(error)
print(sorted(entry.name for entry in path.parent.iterdir()))
print(AtomicCheckpointIO().load_checkpoint(path)["a"].shape)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no file size limits on this system")
def test_the_last_good_checkpoint_survives_a_failing_disk(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not write" in done.stdout
    assert "about 4.0 MB are needed" in done.stdout
    assert "['last.ckpt']" in done.stdout
    assert "torch.Size([10])" in done.stdout


def test_no_room_is_noticed_before_writing(tmp_path, monkeypatch):
    from fitformer.training import checkpoint_file

    monkeypatch.setattr(checkpoint_file.shutil, "disk_usage", lambda folder: type("", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"no space on the disk; about 4\.0 MB are needed, 0\.0 MB are free"):
        checkpoint_file.AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(10**6)}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_model_is_exported_whole_each_time(tmp_path):
    from fitformer.models.encoder import FITEncoder
    from fitformer.training.checkpoint import export

    network = FITEncoder.from_preset("tiny", layers="(1)1", num_groups=2, tokens_per_group=4, in_channels=3)
    export(network, tmp_path)
    file = tmp_path / "model.safetensors"
    whole, before = file.read_bytes(), file.stat()
    export(network, tmp_path)
    assert file.read_bytes() == whole
    assert file.stat().st_mode == before.st_mode
    assert file.stat().st_ino != before.st_ino, "written in place: a failing disk would leave half of it"


def test_checkpoints_hold_no_code(tmp_path):
    from fitformer.training.checkpoint_file import load

    torch.save({"state_dict": os.system}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="is not a whole checkpoint"):
        load(tmp_path / "last.ckpt")
