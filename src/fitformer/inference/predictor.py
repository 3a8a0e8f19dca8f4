"""A classifier's run as a function of batches, for engines that spread work over processes and machines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitformer.data.decoding import UnreadableImageError
from fitformer.errors import InputError
from fitformer.inference.labelling import Labeller
from fitformer.inference.predict import Prediction
from fitformer.training.run_dir import Run


class Predictor:
    """Labels the images that batches name by their paths; Ray's and Spark's `map_batches` take it as it is.

    A batch is a mapping of columns (arrays or lists of equal length) or a pandas DataFrame, and comes back as the same
    kind with more columns: `label` (text), `probability` of it, `probability_NAME` of every class, and `error`, empty
    for an image that was labelled. One that cannot be read has the label "" and probabilities of NaN, and stops
    nothing. The numbers are those of `fitformer predict`.

    The model is loaded at the first batch, in the process where that is; pickled, a predictor is its arguments alone.

    Args:
        run: the run directory of a classifier, on a disk that every process sees.
        checkpoint: `last`, `best` or a path, see `Run.model`.
        device: where to run; `auto` for a GPU where there is one.
        batch_size: images of one size at once; images of any size are labelled one by one.
        path: the column of paths.

    Raises:
        InputError: no run of a classifier (at once); no such checkpoint, or a batch without the column (at a batch).
    """

    def __init__(
        self,
        run: str | Path,
        *,
        checkpoint: str = "last",
        device: str = "auto",
        batch_size: int = 64,
        path: str = "path",
    ) -> None:
        opened = Run.open(run)
        if opened.recipe.task != "classify":
            raise InputError(f"{run} is a {opened.recipe.task} run; predictions need a run of the task classify")
        self.run, self.checkpoint, self.device = str(Path(run).resolve()), checkpoint, device
        self.batch_size, self.path = batch_size, path
        self._labeller: Labeller | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_labeller": None}

    def __call__(self, batch: Any) -> Any:
        """The batch with the columns above.

        Raises:
            InputError: it has no column of paths.
        """
        columns = list(batch.columns) if hasattr(batch, "columns") else list(batch)
        if self.path not in columns:
            raise InputError(f"a batch has the columns {columns}, and no {self.path!r}: say which has paths (path=...)")
        added = self._label([str(path) for path in batch[self.path]])
        return {**batch, **added} if isinstance(batch, Mapping) else batch.assign(**added)

    def _label(self, paths: list[str]) -> dict[str, np.ndarray]:
        labeller = self._loaded()
        faults: dict[str, str] = {}

        def note(fault: UnreadableImageError) -> None:
            faults[str(fault.name)] = fault.reason

        found: list[Prediction] = []
        try:
            found.extend(labeller.label_files([Path(path) for path in paths], self.batch_size, note))
        except InputError:
            # Of a batch of broken images alone, each says so below.
            if any(str(Path(path)) not in faults for path in paths):
                raise
        by_file = {prediction.file: prediction for prediction in found}
        rows = [by_file.get(str(Path(path))) for path in paths]
        names = labeller.run.classes
        return {
            "label": np.array(["" if row is None else row.label for row in rows], dtype=object),
            "probability": np.array([np.nan if row is None else row.probability for row in rows]),
            **{
                f"probability_{name}": np.array([np.nan if row is None else row.probabilities[name] for row in rows])
                for name in names
            },
            "error": np.array([faults.get(str(Path(path)), "") for path in paths], dtype=object),
        }

    def _loaded(self) -> Labeller:
        if self._labeller is None:
            run = Run.open(self.run)
            device = self.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            self._labeller = Labeller(run, run.model(self.checkpoint).to(device))
            if self._labeller.takes_any_size:
                self._labeller.stream()
        return self._labeller
