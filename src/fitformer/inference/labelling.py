"""What a run of images is used for: labels or numbers of image files, and explanations of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fitformer.data.build import open_options
from fitformer.data.datasets.folders import read_patients
from fitformer.data.datasets.patients import opened_together
from fitformer.data.decoding import UnreadableImageError, decode, suffixes
from fitformer.data.pixels import fit
from fitformer.errors import InputError
from fitformer.inference.explain.batch import Slides
from fitformer.inference.explain.explanation import Method
from fitformer.inference.find import Shard, Slide, find
from fitformer.inference.identity import identity
from fitformer.inference.image_run import ImageRun, Made, Ways, as_json
from fitformer.inference.predict import expand, finite, predict, predict_readable
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

    def label_each(self, files: Sequence[Path], batch_size: int) -> dict[str, Answer | UnreadableImageError]:
        """The answer on each file, or why there is none.

        Raises:
            InputError: masks that do not go with the images.
        """
        self._masks(files)
        faults: list[UnreadableImageError] = []
        reading = self._reading(batch_size)
        found = predict_readable(self.network, files, self.answers, **reading, on_unreadable=faults.append)
        answers: dict[str, Answer | UnreadableImageError] = {each.file: each for each in found}
        return {**answers, **{fault.name: fault for fault in faults}}

    def label_patients(self, table: Path, on_unreadable: Callable[[UnreadableImageError], None]) -> list[Answer]:
        """The answers on the patients of a table, each of whose images are one example; `file` is the patient's name.

        A patient of whose images one cannot be read is left out; `on_unreadable` is told of it.

        Raises:
            InputError: a run without `data.patient`, a table that `read_patients` refuses, or no patient to answer on.
        """
        data, options = self.recipe.data, open_options(self.recipe.data)
        if data.patient is None:
            raise InputError(
                f"{table} is a table, which says what images are of one patient, and {self.run.path} learned from "
                "single images (its recipe has no data.patient); give the images themselves"
            )
        patients, group, found = read_patients(table, data.image_column, data.patient), self._grouping(), []
        self._masks([path for paths in patients.values() for path in paths])
        for name, paths in patients.items():
            try:
                with ExitStack() as stack:
                    images = opened_together([str(path) for path in paths], options)
                    for image in images:
                        stack.callback(image.close)
                    found.append(self.answers.answer(name, finite(self.network, group(images))))
            except (InputError, UnreadableImageError, PermissionError) as error:
                on_unreadable(UnreadableImageError(f"patient {name}", str(error)))
        if not found:
            raise InputError(f"none of the {len(patients)} patients of {table} can be answered on")
        return found

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
        if method is not None:
            self.answers.check(target)
        grid = self.network.patch_grid
        if method == "leave-out" and grid.num_groups == 1:
            raise InputError(
                "this model cuts every image into 1 group, and to leave one out takes at least 2; take --explain "
                "gradient, or train with a smaller model.group_size"
            )
        how = self._of_any_size if self.takes_any_size else self._of_one_size
        slides, made_with, ways = how(paths, output)
        slides = slides if shard is None else shard.of(slides)
        made_with = {"model": identity(self.network), **made_with}
        ways |= {"alone": shard is None, **options}
        work = Slides(self.network, self.answers, output, made_with, method, target, **ways)
        return work, len(slides), work.run(slides)

    def _of_one_size(self, paths: Iterable[str | Path], output: Path) -> tuple[list[Slide], Made, Ways]:
        """The same of images that are brought to the model's size: the maps are of what it sees."""
        slides = find(paths, output, suffixes())
        made_with = {name: as_json(getattr(self.recipe.data, name)) for name in ("resize", "pixel_range")}
        return slides, made_with, {"open": self._fitted}

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


def answers_of(run: Run, network: FITImageEncoder) -> Answers:
    """What the outputs of a run's model mean.

    Raises:
        InputError: a run of a task that answers on no images.
    """
    answers = task_of(run.recipe).answers
    if answers is None:
        raise InputError(f"{run.path} is a run of the task {run.recipe.task}, which answers on no images")
    return answers(network, run.recipe, run.classes)
