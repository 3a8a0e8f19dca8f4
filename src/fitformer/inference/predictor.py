"""A trained model of images as a function of a batch of them, as Ray's and Spark's `map_batches` take it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from fitformer._support.checks import checked, whole
from fitformer._support.device import usable_device
from fitformer.data.decoding import UnreadableImageError
from fitformer.errors import InputError
from fitformer.execution.token_store import Keep
from fitformer.inference.labelling import Labeller
from fitformer.inference.predict import Example
from fitformer.inference.segmentation.label_map import LabelMap, class_shares
from fitformer.inference.segmentation.segmenting import Segmenter
from fitformer.tasks import task_of
from fitformer.tasks.answers import Answer, Prediction
from fitformer.training.run_dir import Run

Row = Sequence[Any]


class Predictor:
    """Adds answers to batches of images, in any process: a pickle of it holds a path and options, never weights.

    A batch is a dict of columns, each an array or a list of one length, or a pandas DataFrame. It comes back with the
    columns of the run's task and with `error`: why an image has no answer, else empty. Where there is an error, text is
    empty, numbers are NaN and arrays None. The model is loaded by the first batch.

    - `classify`: `label`, `probability`, and a column `p_NAME` for each class.
    - Other tasks that answer on whole images: a column for each number (see `tasks.answers`).
    - `segment`: `labels`, the class number of each pixel uint8 (H, W), 255 where there is none; with `probabilities`, a
      column of that name, uint8 (H, W, classes), 255 for 1; and `share_NAME`, the share of each class. They are what
      `fitformer predict` writes.

    A cell is a path, or pixels in memory (H, W) or (H, W, channels), which are read as the same pixels of a file are.
    Of a run with `data.patient` it may also be a list of these: all images of a patient, which have one answer.

    Args:
        run: run directory of a task of the verb `predict`; every process needs it under this path.
        checkpoint: as `Run.model`.
        device: such as `cpu` or `cuda:0`; by default a GPU if the process has one.
        batch_size: how many images of one size a model that answers on whole images takes at once.
        column: the column of images.
        keep, scratch: as `ImageRun.stream`, of a run that takes images of any size. Label maps above 256 MiB are files
            without a name in the folder `scratch`.
        probabilities: of a segmenter, also those of all classes.

    Raises:
        InputError: no run at `run`, one of another task, or an argument of another kind or for another task.
    """

    @checked
    def __init__(
        self,
        run: str | Path,
        *,
        checkpoint: str | Path = "last",
        device: str | None = None,
        batch_size: int = 64,
        column: str = "path",
        keep: Keep | None = None,
        scratch: str | None = None,
        probabilities: bool = False,
    ) -> None:
        # Absolute, since a worker may stand in another folder.
        self.run = os.path.abspath(run)
        whole("batch_size", batch_size)
        self.checkpoint, self.device, self.batch_size, self.column = checkpoint, device, batch_size, column
        self.keep, self.scratch, self.probabilities = keep, scratch, probabilities
        self._used: Labeller | Segmenter | None = None
        opened = Run.open(run)
        task = task_of(opened.recipe)
        if task.verb != "predict":
            raise InputError(
                f"{run} is a run of the task {task.name}: Predictor answers on images, and takes a run that `fitformer "
                "predict` serves"
            )
        if probabilities and task.answers is not None:
            raise InputError(f"probabilities are of pixels, and {run}, a run of the task {task.name}, labels images")
        self.classes = opened.classes

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a batch gets; the model is loaded to tell them."""
        return (*self._empty_row(), "error")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_used": None}

    def __call__(self, batch: Any) -> Any:
        """The batch with columns added, as a dict of arrays or a DataFrame, as it came; see the class.

        Raises:
            InputError: something else than a batch, no column of images, or columns that are there already.
        """
        self._check(batch)
        rows = self._answers(list(batch[self.column]))
        added: dict[str, np.ndarray] = {}
        for k, (name, empty) in enumerate(self._empty_row().items()):
            added[name] = _column(
                [empty if isinstance(row, str) else row[k] for row in rows],
                np.dtype(np.float64 if isinstance(empty, float) else object),
            )
        added["error"] = _column([row if isinstance(row, str) else "" for row in rows], np.dtype(object))
        if isinstance(batch, dict):
            return {**batch, **added}
        return batch.assign(**added)

    def _check(self, batch: Any) -> None:
        """Check a batch, which has columns by name.

        Raises:
            InputError: it has none, lacks that of images, or has one that would be added.
        """
        if not (isinstance(batch, dict) or (hasattr(batch, "columns") and hasattr(batch, "assign"))):
            raise InputError(
                f"a batch is a dict of columns or a pandas DataFrame, and this is {type(batch).__name__}; ask for "
                'batch_format="numpy" or "pandas"'
            )
        names = list(batch) if isinstance(batch, dict) else list(batch.columns)
        if self.column not in names:
            raise InputError(
                f"a batch needs a column {self.column!r} of image paths; it has {', '.join(map(str, names))}"
            )
        if taken := [name for name in self.columns if name in names]:
            raise InputError(f"the batch has a column {taken[0]!r} already, which would be added; rename it")

    def _answers(self, cells: Sequence[Any]) -> list[Row | str]:
        """A row for each cell, or why there is none."""
        read = [_example(cell) for cell in cells]
        # A file, or a patient of files, that is in several cells is answered on once; arrays are not compared.
        keys = [each if _is_of_files(each) else k for k, each in enumerate(read)]
        examples = {key: each for key, each in zip(keys, read, strict=True) if not isinstance(each, str)}
        found = dict(zip(examples, self._rows(list(examples.values())), strict=True)) if examples else {}
        return [each if isinstance(each, str) else found[key] for key, each in zip(keys, read, strict=True)]

    def _rows(self, examples: Sequence[Example]) -> Iterator[Row | str]:
        used = self._load()
        found: Iterable[LabelMap | Answer | UnreadableImageError]
        if isinstance(used, Segmenter):
            found = used.label_each(examples, probabilities=self.probabilities, scratch=self.scratch)
        else:
            found = used.answer_each(examples, self.batch_size)
        for each in found:
            if isinstance(each, UnreadableImageError):
                yield str(each)
            elif isinstance(each, LabelMap):
                shares = class_shares(each.labels, self.classes).values()
                yield [each.labels, *([each.probabilities] if self.probabilities else []), *shares]
            else:
                yield each.row

    def _empty_row(self) -> dict[str, Any]:
        """The columns that are added, but for errors, and what stands in them where there is no answer."""
        used = self._load()
        if isinstance(used, Segmenter):
            arrays = ("labels", "probabilities") if self.probabilities else ("labels",)
            return {**dict.fromkeys(arrays), **{f"share_{name}": nan for name in self.classes}}
        text = {"label": ""} if used.answers.kind is Prediction else {}
        return {**dict.fromkeys(used.answers.batch_columns, nan), **text}

    def _load(self) -> Labeller | Segmenter:
        if self._used is None:
            run = Run.open(self.run)
            network = run.model(self.checkpoint).to(usable_device(self.device))
            used = (Segmenter if task_of(run.recipe).answers is None else Labeller)(run, network)
            if used.takes_any_size:
                used.stream(self.keep, self.scratch)
            elif self.keep or self.scratch:
                raise InputError(f"keep and scratch are for a run that takes images of any size; {run.path} takes one")
            self._used = used
        return self._used


def _example(cell: Any) -> Example | str:
    """What a cell asks to be answered on, or why it asks nothing."""
    is_list = isinstance(cell, list | tuple)
    if not is_list and not (isinstance(cell, np.ndarray) and cell.dtype.kind in "OU" and cell.ndim == 1):
        return _image(cell)
    if not len(cell):
        return "no images: an empty list"
    members = [_image(each) for each in cell]
    return next((each for each in members if isinstance(each, str)), None) or tuple(members)  # type: ignore[arg-type]


def _image(cell: Any) -> Path | np.ndarray | str:
    """One image, or why it is none."""
    if isinstance(cell, np.ndarray) and cell.dtype.kind in "buif" and cell.ndim > 1:
        return cell
    if isinstance(cell, str | os.PathLike) and str(cell):
        return Path(cell)
    return f"no path and no pixels: {type(cell).__name__} {cell!r:.40}"


def _is_of_files(example: Example | str) -> bool:
    return all(isinstance(each, Path) for each in (example if isinstance(example, tuple) else (example,)))


def _column(values: Sequence[Any], dtype: np.dtype) -> np.ndarray:
    """Values as a column, of which arrays are one each, also if all have one shape."""
    column = np.empty(len(values), dtype)
    for k, value in enumerate(values):
        column[k] = value
    return column
