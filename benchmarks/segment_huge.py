"""A class for every pixel of a huge image: memory and time of a training step and of a label map, and what borders do.

    python benchmarks/limited.py 8GB python benchmarks/segment_huge.py --side 65536 --preset small --folder SCRATCH
    python benchmarks/segment_huge.py --side 2048 --preset tiny --compare

Weights are random, or a run's (`--run`), which then says classes and sizes. `--compare` sets the label map of the
streamed run beside that of the plain run, and beside those of tiles that are answered alone: how many pixels differ,
and how often two neighbours have different classes, across the border of two groups (of two tiles) and elsewhere.
Prints JSON, a line a measurement.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
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
from fitformer.patching.any_size import PixelArray
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
    """Prints how long a block took and the highest memory of the process so far, and what the block adds."""
    start = time.perf_counter()
    yield about
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({"what": name, "seconds": seconds, "peak_gb": round(peak, 2), **about}), flush=True)


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
        "changes_across_groups": changes(plain, group, patch),
        "changes_across_tiles": changes(tiles, tile, patch),
    }


def changes(labels: np.ndarray, border: int, patch: int) -> dict[str, float]:
    """The share of neighbours in a row with different classes: across borders, and across other edges of patches."""
    differ = (labels[:, 1:] != labels[:, :-1]).mean(axis=0)
    places = np.arange(1, labels.shape[1])
    at, other = places % border == 0, (places % patch == 0) & (places % border != 0)
    return {"there": round(float(differ[at].mean()), 6), "elsewhere": round(float(differ[other].mean()), 6)}


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
    arguments = parser.parse_args()
    network = built(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "image.tif"
        with measured("image written", side=arguments.side):
            write_image(path, arguments.side, arguments.side, network.patch_grid.channels)
        network.set_execution(Streamed(keep="disk", folder=folder))
        with open_image(path) as image:
            if not arguments.no_step:
                with measured("training step", side=arguments.side) as about:
                    about["loss"] = step(network, image)
            with measured("label map", side=arguments.side) as about:
                found = labels_of(network, network.grouped(image), folder=folder)
                about["groups"] = found.groups
            if arguments.compare:
                with measured("compared", side=arguments.side, tile=arguments.tile) as about:
                    about |= compare(network, image, found.labels, arguments.tile)


if __name__ == "__main__":
    main()
