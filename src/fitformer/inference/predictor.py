"""A trained classifier as a function of a batch of image paths, as Ray's and Spark's `map_batches` take it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fitformer._support.checks import checked, whole
from fitformer._support.device import usable_device
from fitformer.data.decoding import UnreadableImageError
from fitformer.errors import InputError
from fitformer.execution.token_store import Keep
from fitformer.inference.labelling import Labeller
from fitformer.tasks import task_of
from fitformer.tasks.answers import Answer
from fitformer.training.run_dir import Run


class Predictor:
    """Adds answers to batches of image paths, in any process: a pickle of it holds a path and options, never weights.

    A batch is a dict of columns, each an array or a list of one length, or a pandas DataFrame. It comes back with
    `label`, `probability`, a column `p_NAME` for each class, or, of a run that gives numbers, a column for each (see
    `tasks.answers`), and with `error`: why an image has no answer, else empty. Where there is an error, the label is
    empty and numbers are NaN. The model is loaded by the first batch.

    Args:
        run: run directory of a classifier, or of another task of the verb `predict`; every process needs it under this
            path.
        checkpoint: as `Run.model`.
        device: such as `cpu` or `cuda:0`; by default a GPU if the process has one.
        batch_size: how many images of one size the model takes at once.
        column: the column of paths.
        keep, scratch: as `Labeller.stream`, of a run that takes images of any size.

    Raises:
        InputError: no run at `run`, one of another task, or an argument of another kind.
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
    ) -> None:
        # Absolute, since a worker may stand in another folder.
        self.run = os.path.abspath(run)
        whole("batch_size", batch_size)
        self.checkpoint, self.device, self.batch_size, self.column = checkpoint, device, batch_size, column
        self.keep, self.scratch = keep, scratch
        self._labeller: Labeller | None = None
        opened = Run.open(run)
        if task_of(opened.recipe).answers is None:
            raise InputError(
                f"{run} is a run of the task {opened.recipe.task}: Predictor answers on images, and takes a run of "
                "classify, regress, multilabel or survival"
            )
        self.classes = opened.classes

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a batch gets; the model is loaded to tell them."""
        return (*self._load().answers.batch_columns, "error")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_labeller": None}

    def __call__(self, batch: Any) -> Any:
        """The batch with columns added, as a dict of arrays or a DataFrame, as it came; see the class.

        Raises:
            InputError: something else than a batch, no column of paths, or columns that are there already.
        """
        self._check(batch)
        answers = self._answers(list(batch[self.column]))
        rows = [None if isinstance(each, str) else each.row for each in answers]
        added: dict[str, np.ndarray] = {}
        for k, name in enumerate(self._load().answers.batch_columns):
            empty, dtype = ("", object) if name == "label" else (np.nan, np.float64)
            added[name] = np.array([empty if row is None else row[k] for row in rows], dtype=dtype)
        added["error"] = np.array([each if isinstance(each, str) else "" for each in answers], dtype=object)
        if isinstance(batch, dict):
            return {**batch, **added}
        return batch.assign(**added)

    def _check(self, batch: Any) -> None:
        """Check a batch, which has columns by name.

        Raises:
            InputError: it has none, lacks that of paths, or has one that would be added.
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

    def _answers(self, cells: Sequence[Any]) -> list[Answer | str]:
        """An answer for each cell, or why there is none."""
        paths = [Path(str(cell)) if isinstance(cell, str | os.PathLike) and str(cell) else None for cell in cells]
        files = list(dict.fromkeys(path for path in paths if path is not None))
        found = self._load().label_each(files, self.batch_size) if files else {}
        answers: list[Answer | str] = []
        for cell, path in zip(cells, paths, strict=True):
            if path is None:
                answers.append(f"no path: {type(cell).__name__} {cell!r:.40}")
                continue
            answer = found[str(path)]
            answers.append(str(answer) if isinstance(answer, UnreadableImageError) else answer)
        return answers

    def _load(self) -> Labeller:
        if self._labeller is None:
            run = Run.open(self.run)
            labeller = Labeller(run, run.model(self.checkpoint).to(usable_device(self.device)))
            if labeller.takes_any_size:
                labeller.stream(self.keep, self.scratch)
            elif self.keep or self.scratch:
                raise InputError(f"keep and scratch are for a run that takes images of any size; {run.path} takes one")
            self._labeller = labeller
        return self._labeller
