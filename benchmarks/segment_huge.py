"""A class for every pixel of a huge image: memory and time of a training step and of a label map, and what borders do.

    python benchmarks/limited.py 8GB python benchmarks/segment_huge.py --side 65536 --preset small --folder SCRATCH
    python benchmarks/segment_huge.py --side 2048 --preset tiny --compare
    python benchmarks/segment_huge.py --side 2048 --preset tiny --compare --monai

Weights are random, or a run's (`--run`), which then says classes and sizes. `--compare` sets the label map of the
streamed run beside that of the plain run, and beside those of tiles that are answered alone: how many pixels differ,
and how often two neighbours have different classes, across the border of two groups (of two tiles) and elsewhere.
`--monai` has MONAI's sliding window, as it is by default, answer with the same network in windows of a tile's size in
place of the label map; with `--compare`, the label map follows, and beside it that of windows.
Prints JSON, a line a measurement.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitformer import FITImageSegmenter
from fitformer.data.labels import UNLABELLED
from fitformer.data.readers import open_image
from fitformer.execution import Streamed
from fitformer.inference.segmentation.label_map import labels_of
from fitformer.patching.any_size import PixelArray, to_signal
from fitformer.profiling.synthetic_image import write_image
from fitformer.tasks._pixel_sums import loss_sums, losses
from fitformer.training.run_dir import Run


class Squares:
    """Generated classes in squares of 1,000 pixels, as a label image of any size."""

    dtype = np.dtype(np.uint8)

    def __init__(self, side: int, classes: int) -> None:
        self.shape, self.classes = (side, side, 1), classes

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        rows, columns = (np.arange(first, first + count) // 1000 for first, count in ((top, height), (left, width)))
        return ((rows[:, None] + columns) % self.classes).astype(np.uint8)[..., None]


@contextmanager
def measured(name: str, **about: Any) -> Iterator[dict[str, Any]]:
    """Prints how long a block took, on the clock and of all threads' processors, the highest memory of the process so
    far, and what the block adds.
    """
    start, busy = time.perf_counter(), time.process_time()
    yield about
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
    times = {key: round(value, 2) for key, value in times.items()}
    print(json.dumps({"what": name, **times, "peak_gb": round(peak, 2), **about}), flush=True)


def built(arguments: argparse.Namespace) -> FITImageSegmenter:
    if arguments.run is not None:
        network: FITImageSegmenter = Run.open(arguments.run).model()
        return network
    torch.manual_seed(0)
    cut = {"image_size": None, "group_size": arguments.group_size, "patch_size": arguments.patch_size}
    rest = {"num_classes": arguments.classes, "latent_position": "row_column", "glimpses": 1}
    return FITImageSegmenter.from_preset(arguments.preset, **cut, **rest).eval()


def step(network: FITImageSegmenter, image: Any) -> float:
    """The loss of one step, forward and backward."""
    grouped, labels = network.grouped(image), Squares(image.shape[0], network.num_classes)

    def score(groups: slice, logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return loss_sums(logits, torch.from_numpy(grouped.beside(labels, groups, UNLABELLED))[None])

    cross, dice, _ = losses(network.score([grouped], score))
    (cross + dice).backward()
    return float((cross + dice).detach())


def compare(network: FITImageSegmenter, image: Any, streamed: np.ndarray, tile: int) -> dict[str, Any]:
    """The streamed label map beside the plain one and that of tiles."""
    network.set_execution("plain")
    plain = labels_of(network, network.grouped(image)).labels
    rows, columns, _ = image.shape
    tiles = np.full((rows, columns), UNLABELLED, np.uint8)
    for top in range(0, rows, tile):
        for left in range(0, columns, tile):
            part = image.window(top, left, min(tile, rows - top), min(tile, columns - left))
            found = labels_of(network, network.grouped(PixelArray(part))).labels
            tiles[top : top + tile, left : left + tile] = found
    group, patch = (size[1] for size in (network.patch_grid.group_size, network.patch_grid.patch_size))
    return {
        "pixels_unlike_plain": int((streamed != plain).sum()),
        "tiles_unlike_plain": round(float((tiles != plain).mean()), 6),
        "changes_across_groups": changes(plain, range(0, columns, group), patch),
        "changes_across_tiles": changes(tiles, range(0, columns, tile), patch),
    }


def changes(labels: np.ndarray, borders: Iterable[int], patch: int) -> dict[str, float]:
    """The share of neighbours in a row with different classes: across borders, and across other edges of patches."""
    differ = (labels[:, 1:] != labels[:, :-1]).mean(axis=0)
    places = np.arange(1, labels.shape[1])
    at = np.isin(places, list(borders))
    other = (places % patch == 0) & ~at
    return {"there": round(float(differ[at].mean()), 6), "elsewhere": round(float(differ[other].mean()), 6)}


def sliding_window() -> Any:
    """MONAI's function, which only `--monai` needs."""
    try:
        from monai.inferers import sliding_window_inference
    except ImportError as error:
        raise SystemExit(f"--monai needs MONAI, which cannot be imported ({error}): pip install monai") from None
    return sliding_window_inference


def by_windows(network: FITImageSegmenter, image: Any, tile: int) -> np.ndarray:
    """The label map of MONAI's sliding window: the whole image goes in, the logits of all its pixels come out."""
    network.set_execution("plain")
    pixels = to_signal(torch.from_numpy(image.window(0, 0, *image.shape[:2]))).movedim(-1, 0)[None]

    def answered(windows: torch.Tensor) -> torch.Tensor:
        return torch.stack(network(list(windows.movedim(1, -1))))

    with torch.inference_mode():
        logits = sliding_window()(pixels, (tile, tile), 1, answered)
        return logits[0].argmax(0).to(torch.uint8).numpy()


def window_borders(side: int, tile: int) -> list[int]:
    """Where windows begin and end that overlap by a quarter; the last one ends with the image."""
    begins = {min(begin, side - tile) for begin in range(0, side - tile // 4, tile - tile // 4)}
    return sorted((begins | {begin + tile for begin in begins}) - {0, side})


def label_map(network: FITImageSegmenter, image: Any, folder: str) -> np.ndarray:
    with measured("label map", side=image.shape[0]) as about:
        found = labels_of(network, network.grouped(image), folder=folder)
        about["groups"] = found.groups
    return found.labels


def beside_monai(network: FITImageSegmenter, streamed: Streamed, image: Any, arguments: argparse.Namespace) -> None:
    """MONAI's sliding window first, whose peak is then its own; the streamed label map only to compare."""
    side, tile = arguments.side, arguments.tile
    with measured("sliding window of MONAI", side=side, window=tile):
        windows = by_windows(network, image, tile)
    if not arguments.compare:
        return
    network.set_execution(streamed)
    whole = label_map(network, image, streamed.folder)
    with measured("compared", side=side, window=tile) as about:
        about["windows_unlike_whole"] = round(float((windows != whole).mean()), 6)
        for name, labels in {"windows": windows, "whole": whole}.items():
            about[f"changes_of_{name}"] = changes(labels, window_borders(side, tile), network.patch_grid.patch_size[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=65536, help="of the square image, in pixels")
    parser.add_argument("--run", help="run directory of a segmenter of images of any size")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--group-size", type=int, default=512)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--folder", help="of the image and of scratch (default: the system's temporary folder)")
    parser.add_argument("--tile", type=int, default=1024, help="of tiles that are answered alone, in pixels")
    parser.add_argument("--compare", action="store_true", help="beside the plain run and tiles, which must fit")
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--monai", action="store_true", help="MONAI's sliding window in place of the label map")
    arguments = parser.parse_args()
    if arguments.monai:
        sliding_window()
    network = built(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "image.tif"
        with measured("image written", side=arguments.side):
            write_image(path, arguments.side, arguments.side, network.patch_grid.channels)
        streamed = Streamed(keep="disk", folder=folder)
        with open_image(path) as image:
            if arguments.monai:
                beside_monai(network, streamed, image, arguments)
                return
            network.set_execution(streamed)
            if not arguments.no_step:
                with measured("training step", side=arguments.side) as about:
                    about["loss"] = step(network, image)
            found = label_map(network, image, folder)
            if arguments.compare:
                with measured("compared", side=arguments.side, tile=arguments.tile) as about:
                    about |= compare(network, image, found, arguments.tile)


if __name__ == "__main__":
    main()
