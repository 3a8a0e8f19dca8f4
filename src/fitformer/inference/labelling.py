"""What a run of images is used for: labels or numbers of image files, and explanations of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fitformer.data.build import open_options
from fitformer.data.datasets.folders import read_patients
from fitformer.data.decoding import UnreadableImageError, decode, suffixes
from fitformer.data.pixels import fit
from fitformer.errors import InputError
from fitformer.inference.explain.batch import Slides
from fitformer.inference.explain.explanation import Method
from fitformer.inference.find import Items, Patient, Shard, find
from fitformer.inference.identity import identity
from fitformer.inference.image_run import ImageRun, Made, Ways, as_json
from fitformer.inference.predict import Example, expand, name_of, outputs_of_each, paths_of, predict
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.patching.any_size import PixelArray
from fitformer.tasks import task_of
from fitformer.tasks.answers import Answer, Answers
from fitformer.training.run_dir import Run


class Labeller(ImageRun):
    """A run that answers on images, and its model, on the device where the model is.

    Args:
        run: its recipe says how images are brought to one size, or which groups of images of any size are empty.
        network: the exported model of the run.
    """

    network: FITImageEncoder

    def __init__(self, run: Run, network: FITImageEncoder) -> None:
        super().__init__(run, network)
        self.answers = answers_of(run, network)

    def label(
        self, paths: Iterable[str | Path], batch_size: int, on_unreadable: Callable[[UnreadableImageError], None]
    ) -> list[Answer]:
        """The answers on image files, and of all image files below folders; see `predict`.

        Raises:
            InputError: no image file, none that can be read, or masks that do not go with them.
        """
        files = [slide.path for slide in find(paths)] if self.takes_any_size else expand(paths)
        self._masks(files)
        reading = self._reading(batch_size)
        return list(predict(self.network, files, self.answers, **reading, on_unreadable=on_unreadable))

    def answer_each(self, examples: Sequence[Example], batch_size: int) -> list[Answer | UnreadableImageError]:
        """The answer on each example, or why there is none.

        Raises:
            InputError: masks that do not go with the images.
        """
        self._masks([path for example in examples for path in paths_of(example)])
        refused = [self._refused(example) for example in examples]
        taken = [example for example, fault in zip(examples, refused, strict=True) if fault is None]
        outputs = outputs_of_each(self.network, taken, **self._reading(batch_size))
        answers: list[Answer | UnreadableImageError] = []
        for example, fault in zip(examples, refused, strict=True):
            found = next(outputs) if fault is None else fault
            if not isinstance(found, UnreadableImageError):
                answers.append(self.answers.answer(name_of(example), found))
            else:
                answers.append(found)
        return answers

    def _refused(self, example: Example) -> UnreadableImageError | None:
        """Why the run does not read such examples, if it does not."""
        if isinstance(example, tuple) and self.recipe.data.patient is None:
            return UnreadableImageError(name_of(example), f"several images are one patient, and the run {_ALONE}")
        return self._without_mask(example)

    def label_patients(self, table: Path, on_unreadable: Callable[[UnreadableImageError], None]) -> list[Answer]:
        """The answers on the patients of a table, each of whose images are one example; `file` is the patient's name.

        A patient of whose images one cannot be read is left out; `on_unreadable` is told of it.

        Raises:
            InputError: what `patients` refuses, or no patient to answer on.
        """
        patients, answers = self.patients(table), []
        examples = [tuple(slide.path for slide in patient.slides) for patient in patients]
        self._masks([path for paths in examples for path in paths])
        outputs = outputs_of_each(self.network, examples, **self._reading(1))
        for patient, found in zip(patients, outputs, strict=True):
            if isinstance(found, UnreadableImageError):
                on_unreadable(UnreadableImageError(f"patient {patient.title}", found.reason))
            else:
                answers.append(self.answers.answer(patient.title, found))
        if not answers:
            raise InputError(f"none of the {len(patients)} patients of {table} can be answered on")
        return answers

    def patients(self, table: Path) -> list[Patient]:
        """The patients of a table, in its order.

        Raises:
            InputError: a run without `data.patient`, or a table that `read_patients` refuses.
        """
        data = self.recipe.data
        if data.patient is None:
            raise InputError(
                f"{table} is a table, which says what images are of one patient, and {self.run.path} {_ALONE}"
            )
        return [Patient.of(*each) for each in read_patients(table, data.image_column, data.patient).items()]

    def _reading(self, batch_size: int) -> dict[str, Any]:
        """How the run's images are read."""
        data, options = self.recipe.data, open_options(self.recipe.data)
        return {"resize": data.resize, "options": options, "batch_size": batch_size, "group": self._grouping()}

    def explain(
        self,
        paths: Iterable[str | Path],
        output: Path,
        method: Method | None = "gradient",
        shard: Shard | None = None,
        target: str | None = None,
        **options: Any,
    ) -> tuple[Slides, int, int]:
        """Label images and write their maps into a folder; goes on where it was stopped.

        Args:
            paths: files and folders. output: the folder. method: see `explanation.explain`; None for labels alone.
            shard: the part of the images that is this process's; all by default.
            target: the name of the class, number or label that the maps explain; see `Answers`.
            options: `y`, `show` and `on_broken` of `Slides`.

        Returns:
            the work, how many images there are, and how many were made now.

        Raises:
            InputError: as `Slides.run`, masks that do not go with the images, or groups to be left out of a model of
                one, or a target that is none of the run's, or missing where there are several numbers.
        """
        if not self.takes_any_size:
            slides = find(paths, output, suffixes())
            made_with = {name: as_json(getattr(self.recipe.data, name)) for name in ("resize", "pixel_range")}
            # Maps are of what the model sees.
            return self._explain(slides, output, method, shard, target, made_with, {"open": self._fitted, **options})
        slides = find(paths, output)
        made_with, ways = self._of_any_size(slides)
        return self._explain(slides, output, method, shard, target, made_with, ways | options)

    def explain_patients(
        self,
        table: Path,
        output: Path,
        method: Method | None = "gradient",
        shard: Shard | None = None,
        *,
        target: str | None = None,
        **options: Any,
    ) -> tuple[Slides, int, int]:
        """Label the patients of a table, and write maps of each of their images, in that image's pixels, into a folder.

        Args, returns and raises as `explain`, of patients in place of images. All images of a patient are in one part.

        Raises:
            InputError: as `explain`, and what `patients` refuses.
        """
        patients = self.patients(table)
        made_with, ways = self._of_any_size([slide for patient in patients for slide in patient.slides])
        made_with["patients"] = True
        return self._explain(patients, output, method, shard, target, made_with, ways | options)

    def _explain(
        self,
        items: Sequence[Items],
        output: Path,
        method: Method | None,
        shard: Shard | None,
        target: str | None,
        made_with: Made,
        ways: Ways,
    ) -> tuple[Slides, int, int]:
        """What `explain` does, of images or of patients."""
        if method is not None:
            self.answers.check(target)
        if method == "leave-out" and self.network.patch_grid.num_groups == 1:
            raise InputError(
                "this model cuts every image into 1 group, and to leave one out takes at least 2; take --explain "
                "gradient, or train with a smaller model.group_size"
            )
        own = items if shard is None else shard.of(items)
        made_with = {"model": identity(self.network), **made_with}
        work = Slides(self.network, self.answers, output, made_with, method, target, alone=shard is None, **ways)
        return work, len(own), work.run(own)

    @contextmanager
    def _fitted(self, path: Path) -> Iterator[PixelArray]:
        """An image file as the model sees it, brought to its size.

        Raises:
            InputError: it is missing or no image.
        """
        grid = self.network.patch_grid
        try:
            pixels = decode(path, str(path), grid.channels, self.recipe.data.pixel_range)
        except UnreadableImageError as fault:
            raise InputError(str(fault)) from fault
        rows, columns = grid.image_size  # type: ignore[misc]
        # A copy: Pillow's own pixels cannot be written to, of which torch warns.
        yield PixelArray(np.array(fit(pixels, (rows, columns), self.recipe.data.resize)))


_ALONE = "learned from single images (its recipe has no data.patient); give the images themselves"


def answers_of(run: Run, network: FITImageEncoder) -> Answers:
    """What the outputs of a run's model mean.

    Raises:
        InputError: a run of a task that answers on no images.
    """
    answers = task_of(run.recipe).answers
    if answers is None:
        raise InputError(f"{run.path} is a run of the task {run.recipe.task}, which answers on no images")
    return answers(network, run.recipe, run.classes)
