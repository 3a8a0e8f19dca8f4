"""Label a folder of images, or of slides, on Ray Data: one model a worker, and a Parquet table of what they say.

python examples/ray_predict.py RUN IMAGES labels/ --workers 2

On a cluster, `ray.init()` joins it and everything else stays: the run and the images must lie where every machine sees
them. `--gpus 1` gives each worker a GPU.
"""

import argparse
from pathlib import Path

import ray

import fitformer
from fitformer.inference.predict import expand


def label(run: Path, images: Path, output: Path, workers: int, batch_size: int, gpus: float) -> int:
    """Label all images below a folder into a folder of Parquet files; returns how many there are."""
    paths = [str(path.resolve()) for path in expand([images])]
    # Small blocks, so that no worker waits for the one with the last large images.
    table = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=min(len(paths), 8 * workers))
    labelled = table.map_batches(
        fitformer.Predictor,
        fn_constructor_args=[str(run.resolve())],
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus,
    )
    labelled.write_parquet(str(output.resolve()), mode="overwrite")
    return len(paths)


def main() -> None:
    """Read the arguments and label."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a classify recipe")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("output", type=Path, help="folder for the Parquet files; what is in it is replaced")
    parser.add_argument("--workers", type=int, default=2, help="models that are loaded, each on one CPU core")
    parser.add_argument("--batch-size", type=int, default=64, help="images that a worker takes at once")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    arguments = parser.parse_args()
    ray.init(ignore_reinit_error=True)
    count = label(**vars(arguments))
    print(f"{arguments.output}: {count} images")


if __name__ == "__main__":
    main()
