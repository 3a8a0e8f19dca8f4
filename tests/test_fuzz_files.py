"""Thousands of damaged image files: each is pixels or one clear error, in bounded memory and time. Slow."""

import gzip
import json
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from fitformer.data.decoding import UnreadableImageError, decode
from fitformer.data.readers import open_image
from fitformer.errors import InputError

CASES, MOST_BYTES, MOST_SECONDS = 250, 2**30, 20


def seeds(folder):
    """One whole file of each kind."""
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    grey = random.integers(0, 65536, (40, 50), dtype=np.uint16)
    tifffile.imwrite(folder / "tiles.tif", colour, tile=(16, 16), compression="zlib", predictor=True)
    tifffile.imwrite(folder / "lzw.tif", grey, rowsperstrip=8, compression="lzw")
    tifffile.imwrite(folder / "plain.tif", colour, photometric="rgb", extratags=[(42113, 2, 1, "0", True)])
    tifffile.imwrite(folder / "jpeg.tif", colour, tile=(16, 16), compression="jpeg")
    tifffile.imwrite(folder / "planes.tif", np.moveaxis(colour, 2, 0), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(folder / "palette.tif", colour[..., 0], photometric="palette",
                     colormap=random.integers(0, 65536, (3, 256), dtype=np.uint16))  # fmt: skip
    tifffile.imwrite(folder / "image.ome.tif", grey[None], metadata={"axes": "CYX"})
    with tifffile.TiffWriter(folder / "pyramid.tif") as file:
        for step in (1, 2):
            file.write(colour[::step, ::step], tile=(16, 16), subfiletype=step - 1, photometric="rgb", metadata=None)
    shutil.copy(folder / "pyramid.tif", folder / "pyramid.svs")
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "ico", "tga", "pcx", "ppm", "icns", "dds", "sgi", "im"):
        Image.fromarray(colour).resize((48, 48)).save(folder / f"picture.{suffix}")
    Image.fromarray(colour).quantize(20).save(folder / "palette.png")
    (folder / "deep.png").write_bytes(imagecodecs.png_encode(np.stack([grey] * 3, -1)))
    (folder / "deep.jp2").write_bytes(imagecodecs.jpeg2k_encode(np.stack([grey] * 3, -1), level=0))
    np.save(folder / "array.npy", colour)
    for name, zarr_format in (("two.zarr", 2), ("three.zarr", 3)):
        array = zarr.create_array(str(folder / name), shape=colour.shape, chunks=(16, 16, 3), dtype="u1",
                                  zarr_format=zarr_format)  # fmt: skip
        array[:] = colour
    for codec, name in ((zarr.codecs.GzipCodec(), "gzip.zarr"), (zarr.codecs.BloscCodec(), "blosc.zarr")):
        array = zarr.create_array(str(folder / name), shape=(40, 50), chunks=(16, 16), dtype="u2", compressors=codec)
        array[:] = grey
    places = np.argwhere(random.random((12, 14)) < 0.5)
    patches = {"features": random.normal(size=(len(places), 8)).astype("f4"), "coords": places * 512}
    with h5py.File(folder / "slide.h5", "w") as file:
        for name, array in patches.items():
            file.create_dataset(name, data=array, chunks=(16, array.shape[1]), compression="gzip")
        file["coords"].attrs["patch_size_level0"] = 512
    group = zarr.open_group(str(folder / "slide.zarr"), mode="w")
    for name, array in patches.items():
        group.create_array(name, shape=array.shape, chunks=(16, array.shape[1]), dtype=array.dtype)[:] = array


def damaged(content, random):
    """Bytes with a fault of one of the kinds that disks, transfers and attackers make."""
    changed, length = bytearray(content), len(content)
    for _ in range(random.integers(1, 6)):
        at = int(random.integers(0, max(1, len(changed))))
        near = at % min(len(changed), 200) if random.random() < 0.6 and changed else at
        match random.integers(0, 7):
            case 0:
                changed[near : near + 1] = bytes([random.integers(256)])
            case 1:
                changed[near : near + 4] = b"\xff\xff\xff\x7f"
            case 2:
                changed[near : near + 4] = int(random.integers(0, 2**32)).to_bytes(4, "little")
            case 3:
                del changed[at:]
            case 4:
                changed[near:near] = bytes(random.integers(0, 256, random.integers(1, 9), dtype=np.uint8))
            case 5:
                changed[near : near + 2] = b"\0\0"
            case _:
                changed[at : at + 50] = changed[: min(50, length)]
    return bytes(changed)


def damage(path, random):
    """Damage a file, or one of the files of a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        path = files[random.integers(len(files))]
        if path.name in ("zarr.json", ".zarray") and random.random() < 0.7:
            about = json.loads(path.read_text())
            key = sorted(about)[random.integers(len(about))]
            about[key] = [None, -1, 2**40, "x", [], {}, [2**40, 2**40], 1.5][random.integers(8)]
            path.write_text(json.dumps(about))
            return
        if random.random() < 0.1:
            path.write_bytes(gzip.compress(bytes(2**26)))
            return
    path.write_bytes(damaged(path.read_bytes(), random))


def look(path):
    """Everything that is read of an image; the one clear error, or None."""
    try:
        with open_image(path) as image:
            rows, columns, _ = image.shape
            image.window(0, 0, min(rows, 64), min(columns, 64))
            image.window(rows // 2, columns // 2, 1, 1)
            if rows * columns < 2**24:
                image.thumbnail(4, 4)
    except InputError as error:
        return str(error)
    try:
        if path.is_file():
            decode(path, str(path))
    except UnreadableImageError:
        return None
    return None


def attack(kind, folder):
    """Damage and read a file of a kind `CASES` times; prints what went wrong as JSON."""
    warnings.simplefilter("ignore")
    whole, random = folder / kind, np.random.default_rng(abs(hash_of(kind)))
    look(whole)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, slowest = [], 0.0
    for case in range(CASES):
        copy = folder / f"{case}-{kind}"
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, copy)
        damage(copy, random)
        start = time.monotonic()
        try:
            said = look(copy)
            if said is not None and ("\n" in said or str(case) not in said):
                wrong.append(f"{copy.name}: {said}")
        except Exception as error:
            wrong.append(f"{copy.name}: {type(error).__name__}: {error}")
        slowest = max(slowest, time.monotonic() - start)
        (shutil.rmtree if copy.is_dir() else Path.unlink)(copy)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps({"wrong": wrong, "grown": grown, "slowest": slowest}))


def hash_of(text):
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 2**32


KINDS = ["tiles.tif", "lzw.tif", "plain.tif", "jpeg.tif", "planes.tif", "palette.tif", "image.ome.tif", "pyramid.tif",
         "pyramid.svs", *(f"picture.{suffix}" for suffix in ("png", "jpg", "gif", "bmp", "webp", "ico", "tga", "pcx",
         "ppm", "icns", "dds", "sgi", "im")), "palette.png", "deep.png", "deep.jp2", "array.npy", "two.zarr",
         "three.zarr", "gzip.zarr", "blosc.zarr", "slide.h5",
         "slide.zarr"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_pixels_or_one_clear_error_in_bounded_memory(kind, tmp_path):
    seeds(tmp_path)
    done = subprocess.run([sys.executable, __file__, kind, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["grown"] < MOST_BYTES
    assert found["slowest"] < MOST_SECONDS


if __name__ == "__main__":
    attack(sys.argv[1], Path(sys.argv[2]))
