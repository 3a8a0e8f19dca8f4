"""Bits that a run's model needs for files of one's own, exactly, beside what compressors need."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fitformer.data.datasets.text import ByteBuffer
from fitformer.errors import InputError
from fitformer.evaluation.compressors import compressed_sizes
from fitformer.evaluation.likelihood import token_log_likelihoods
from fitformer.tasks import TaskSpec, task_of
from fitformer.training.run_dir import Run

Measures = dict[str, float | int]
OnTokens = Callable[[int, int], None]


def evaluate_files(
    run: Run,
    files: Sequence[str | Path],
    *,
    context: int | None = None,
    stride: int | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    checkpoint: str = "last",
    baselines: bool = True,
    on_tokens: OnTokens = lambda done, total: None,
) -> Iterator[tuple[str, Measures]]:
    """Measure each file as a sequence of its own: `bytes` runs read any file, `pixels` runs
    images, `audio` runs WAV files.

    Args:
        run: the run. files: their paths.
        context, stride: see `evaluation.likelihood.Windows.of`.
        device: where to run. batch_size: windows at once.
        checkpoint: `last`, `best` or a path, see `Run.model`.
        baselines: also compress the same bytes, see `evaluation.compressors`.
        on_tokens: called after every piece with the tokens done and those of all files.

    Yields:
        the file's name; its `tokens`, the bits per token under the name of the task's unit, such as `bits_per_byte`,
        and those of the compressors, such as `gzip_bits_per_byte`. After several files, what holds for all, as `all`.

    Raises:
        InputError: a task that reads no files as tokens, or with classes; a file that is not there, is empty, or
            becomes shorter; what `token_log_likelihoods` refuses.
        MissingDependencyError: zstandard is not installed.
    """
    task = task_of(run.recipe)
    if task.file_tokens is None:
        raise InputError(
            f"{run.path} is a {run.recipe.task} run, which gives files no likelihood; give a bytes, pixels or audio run"
        )
    network = run.model(checkpoint).to(device)
    if network.num_classes:
        raise InputError(f"{run.path} is class-conditional, and files have no class; evaluate its data, without files")
    sequences = {str(file): task.file_tokens(network, run.recipe, Path(file)) for file in files}
    _check(sequences)
    total, sums, done = sum(map(len, sequences.values())), dict[str, float](), 0
    for name, sequence in sequences.items():
        found = {"": 0.0}
        for piece in token_log_likelihoods(network, sequence, context=context, stride=stride, batch_size=batch_size):
            found[""] -= float(piece.sum()) / math.log(2)
            done += len(piece)
            on_tokens(done, total)
        if baselines:
            found |= {each: 8.0 * size for each, size in compressed_sizes(sequence)}
        sums = {each: sums.get(each, 0.0) + value for each, value in found.items()}
        yield name, _per_token(found, len(sequence), task)
    if len(sequences) > 1:
        yield "all", _per_token(sums, total, task)


def _per_token(bits: dict[str, float], tokens: int, task: TaskSpec) -> Measures:
    named = {f"{name}_{task.unit}".removeprefix("_"): value / tokens for name, value in bits.items()}
    return {"tokens": tokens, **named}


def _check(sequences: dict[str, ByteBuffer]) -> None:
    for name, sequence in sequences.items():
        if not len(sequence):
            raise InputError(f"{name} is empty, and nothing has no bits per token; leave it out")
