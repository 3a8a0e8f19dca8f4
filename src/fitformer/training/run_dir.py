"""Run directories: a folder that says what was run, on what, how it went, and from which the same command goes on.

recipe.yaml         the resolved recipe            environment.json    every start: command, versions, machine
data.json           what the data were             metrics.jsonl       a line a measurement
checkpoints/        last.ckpt (and best.ckpt)      model/              the exported weights, `from_pretrained`
samples/            previews by step               tensorboard/, csv/  the same measurements
initial_weights.json   with --init-from: source and digest of the first weights
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from fitformer._support.atomic_files import write_atomically
from fitformer._support.device import processor_name
from fitformer._support.json_text import parse_json
from fitformer.config import load as config
from fitformer.config.schema import Recipe
from fitformer.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from fitformer.models.base import FITModel

LOCK = ".lock"
_PACKAGES = ("fitformer", "torch", "lightning", "numpy")


@dataclass(frozen=True)
class Run:
    """A run directory and the recipe in it. `Run.open` reads one, `start_run` begins or resumes one."""

    path: Path
    recipe: Recipe

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open an existing run directory.

        Raises:
            InputError: there is none at `path`, or its recipe does not parse.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"there is no run directory {path}; `fitformer train RECIPE --run-dir {path}` makes one")
        recipe = path / "recipe.yaml"
        if not recipe.is_file():
            raise InputError(f"{path} is not a run directory: it has no recipe.yaml")
        try:
            return cls(path, config.parse(recipe.read_text(encoding="utf-8"), where=str(recipe)))
        except UnicodeDecodeError as error:
            raise InputError(f"{recipe} is not the recipe of a run ({type(error).__name__}); write it anew") from error

    @property
    def last_checkpoint(self) -> Path:
        """Where training goes on from; absent before the first checkpoint."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The one of the best validation, of a recipe with `trainer.keep_best`."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def model_folder(self) -> Path:
        """The exported model, written with every checkpoint: averaged weights if the recipe averages."""
        return self.path / "model"

    @property
    def initial_weights(self) -> Path:
        """Where a run began that did not begin from random weights: source, digest, what was resized."""
        return self.path / "initial_weights.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line, each with `step`."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Folder of previews, by step."""
        return self.path / "samples"

    def metrics(self) -> list[dict[str, Any]]:
        """All measurements so far, in order; a line that a crash cut off is left out."""
        return read_metrics(self.metrics_file)

    def describe_data(self) -> dict[str, Any]:
        """What was learned from: `classes`, `channels`, the type of `pixels`, one line on each part.

        Raises:
            InputError: it is not there, not whole, or says something else.
        """
        path = self.path / "data.json"
        if not path.is_file():
            raise InputError(f"{self.path} has no data.json: its training never started; train it first")
        found = _read_json(path)
        names = found.get("classes") if isinstance(found, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"{path} does not name the classes of a run; remove it, and the same training writes it anew"
            )
        if found.get("pixels") not in (None, "uint8", "uint16", "float32", "float64", "float16"):
            raise InputError(f"{path} says that pixels are {found['pixels']!r}, which images are not; remove it")
        return found

    def describe_start(self) -> dict[str, str]:
        """From which weights it began: `source`, `sha256`; empty if from random ones.

        Raises:
            InputError: the note of them is not whole.
        """
        found = _read_json(self.initial_weights) if self.initial_weights.is_file() else {}
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise InputError(f"{self.initial_weights} does not say from which weights the run began; remove it")
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by number; empty without classes."""
        return tuple(self.describe_data()["classes"])

    @property
    def pixels(self) -> "np.dtype | None":
        """The type of the pixels that were trained on; None of bytes, or where it was not written down."""
        import numpy as np

        written = (self.path / "data.json").is_file()
        name = self.describe_data().get("pixels") if written else None
        return None if name is None else np.dtype(name)

    def check_pixels(self, dataset: Any) -> None:
        """Check that images of any size hold such numbers as those that were trained on.

        Raises:
            InputError: one are floats and the other whole numbers.
        """
        from fitformer.patching.any_size import check_pixels

        image, trained = getattr(dataset, "reference_image", None), self.pixels
        if image is not None and trained is not None:
            check_pixels(image.path, image.dtype, trained)

    def model(self, checkpoint: str | Path = "last") -> Any:
        """The trained model in eval mode, loaded strictly; its class is the `model` of the recipe's task.

        Args:
            checkpoint: `last`, the exported model; `best`, that of the best validation; or the path of a checkpoint of
                this run. Of a recipe that averages, all give the averaged weights.

        Raises:
            InputError: no model was exported yet, no such checkpoint; another role or weights that do not fit, or that
                are NaN or infinite.
        """
        from fitformer.tasks import set_execution, task_of
        from fitformer.training.checkpoint_file import load_network

        if not (self.model_folder / "model.safetensors").is_file():
            raise InputError(f"{self.path} has no model yet: no checkpoint was reached; train it further")
        network = task_of(self.recipe).model.from_pretrained(self.model_folder)
        if checkpoint != "last":
            path = self.best_checkpoint if checkpoint == "best" else Path(checkpoint)
            if not path.is_file():
                way = "train with trainer.keep_best=true, or take --checkpoint last" if checkpoint == "best" else ""
                raise InputError(f"there is no checkpoint {path}{'; ' * bool(way)}{way}")
            load_network(network, path)
        if wrong := [name for name, value in network.state_dict().items() if not bool(value.isfinite().all())]:
            raise InputError(
                f"the model of {self.path} has NaN or infinite weights ({wrong[0]}, the first of {len(wrong)}): its "
                "training diverged; train again with a lower optimizer.lr"
            )
        set_execution(network, self.recipe.trainer)
        return network

    def dataset(self, split: Literal["train", "val", "test"] = "test") -> Any:
        """The run's data, `split` being `train`, `val` or `test`, in the order and split that training had."""
        from fitformer import data

        return data.build_dataset(self.recipe.data, split, seed=self.recipe.trainer.seed)


def open_model(folder: str | Path, checkpoint: str | Path = "last") -> "tuple[FITModel, Run | None]":
    """The model of a run directory, and the run, or of a folder of a saved model alone; in eval mode.

    Args:
        folder: the run directory or the folder. checkpoint: as of `Run.model`.

    Raises:
        InputError: neither of them; a checkpoint that is not there, or of a saved model.
    """
    from fitformer.models.auto import from_pretrained

    folder = Path(folder)
    if (folder / "config.json").is_file():
        if checkpoint != "last":
            raise InputError(f"--checkpoint is for a run, and {folder} is a saved model; leave it out")
        return from_pretrained(folder), None
    run = Run.open(folder)
    return run.model(checkpoint), run


def check_run(path: str | Path, recipe: Recipe) -> None:
    """Refuse a directory that a recipe's run cannot use; the number of steps may change.

    Raises:
        InputError: the directory holds the run of another recipe (names the keys and both values), or something else.
    """
    path = Path(path)
    if path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()):
        differing = config.differences(Run.open(path).recipe, recipe)
        differing.pop("trainer.steps", None)
        if differing:
            pairs = ((key, _brief(old), _brief(new)) for key, (old, new) in differing.items())
            listed = "; ".join(f"{key} is {old} there, {new} here" for key, old, new in pairs)
            raise InputError(
                f"{path} holds the run of another recipe: {listed}; give another --run-dir, or remove that one"
            )
    elif path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; a run needs a directory")


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from training in a run directory; what killed ones left half-written is removed.

    The operating system frees the lock when this process ends, however it does.

    Raises:
        InputError: another process trains in it.
    """
    if not is_first_process():
        yield
        return
    path = Path(path)
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"{path} is being trained by another process; wait for it, or give another --run-dir"
        ) from None
    try:
        for folder in (path, path / "checkpoints", path / "model"):
            for left in (*folder.glob(".*.tmp"), *folder.glob(".tmp*")):
                left.unlink()
        yield
    finally:
        (path / LOCK).unlink(missing_ok=True)
        lock.release()
        if made and not any(path.iterdir()):
            path.rmdir()


def start_run(path: str | Path, recipe: Recipe, initial_weights: dict[str, str] | None = None) -> Run:
    """Make a run directory for a recipe, or go on with the one that is there; `initial_weights` is noted if given.

    Raises:
        InputError: as `check_run`.
    """
    check_run(path, recipe)
    path = Path(path)
    if is_first_process():
        _write(path / "recipe.yaml", config.dump(recipe))
        _note_start(path / "environment.json")
        if initial_weights is not None:
            _write(path / "initial_weights.json", json.dumps(initial_weights, indent=2) + "\n")
    return Run(path, recipe)


def write_data_card(run: Run, train: Any, test: Any) -> None:
    """Write data.json: what the training and the held-out part are."""
    if is_first_process():
        about = {
            "classes": list(getattr(train, "classes", ())),
            "channels": getattr(train, "channels", None),
            "pixels": getattr(train, "pixels", None),
            "train": train.describe(),
            "train_examples": len(train),
            "held_out": None if test is None else test.describe(),
            "held_out_examples": None if test is None else len(test),
        }
        _write(run.path / "data.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; those that are no measurement with a step (cut off by a crash, say) are left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    parsed = []
    for line in lines:
        try:
            found = parse_json(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            parsed.append(found)
    return parsed


def truncate_metrics(run: Run, step: int, validation_pending: bool = False) -> None:
    """Drop measurements that a run which goes on from `step` makes again: later ones, and a pending validation's."""
    if is_first_process() and run.metrics_file.is_file():
        kept = [line for line in run.metrics() if line["step"] <= step]
        if validation_pending:
            kept = [line for line in kept if line["step"] < step or not any(name.startswith("val/") for name in line)]
        _write(run.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))


def is_first_process() -> bool:
    """Whether this process speaks for all that train together: it alone writes and prints."""
    # Lightning starts the other processes of a machine with the same command and this variable set.
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


def place_before(path: str | Path) -> str | None:
    """Where a run was last trained, if it stood elsewhere then: it was moved or copied. None if it stood here.

    Raises:
        InputError: its environment.json is not whole.
    """
    starts = _starts(Path(path) / "environment.json")
    before = starts[-1].get("directory") if starts else None
    return None if before in (None, os.path.abspath(path)) else str(before)


def _starts(path: Path) -> list[dict[str, Any]]:
    found = _read_json(path) if path.is_file() else {"starts": []}
    starts = found.get("starts") if isinstance(found, dict) else None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise InputError(f"{path} is no list of starts; remove it, and the same training writes it anew")
    return starts


def _note_start(path: Path) -> None:
    start = {"directory": os.path.abspath(path.parent), **environment()}
    _write(path, json.dumps({"starts": [*_starts(path), start]}, indent=2) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        way = "remove it, and the same training writes it anew"
        raise InputError(f"{path} is not whole ({' '.join(str(error).split())}); {way}") from error


def environment() -> dict[str, Any]:
    """When, how and on what this process runs."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "machine": {"system": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()},
        "accelerators": _accelerators(),
        "git": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _accelerators() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _commit() -> str | None:
    """The commit of the library's own checkout, where it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _write(path: Path, text: str) -> None:
    with write_atomically(path, durable=True) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _brief(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
