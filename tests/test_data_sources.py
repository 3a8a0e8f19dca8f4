import csv
import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fitformer.data.datasets.arrays import read_arrays, read_digits, read_idx
from fitformer.data.datasets.folders import Columns, image_files, read_folder, read_manifest
from fitformer.data.decoding import UnreadableImageError, decode, header_channels
from fitformer.errors import InputError
from fitformer.patching.any_size import to_signal

REAL = Path(__file__).parents[2] / "shared" / "data"
random = np.random.default_rng(0)


def paint(file, shape=(6, 5, 3), colour=None, **options):
    """Write an image file and give back its pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.integers(0, 256, shape, dtype=np.uint8) if colour is None else np.full(shape, colour, np.uint8)
    Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels).save(file, **options)
    return pixels


def truncate(file, keep=0.6):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


# --- arrays


def test_digits_keep_their_seventeen_values():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    digits, raw = read_digits()["train"], load_digits()
    assert len(digits) == 1797
    assert digits.classes == tuple("0123456789")
    assert digits.images.shape == (1797, 8, 8, 1)
    assert np.array_equal(np.rint(digits.images[..., 0] * (16 / 255)), raw.images)
    assert np.array_equal(digits.labels, raw.target)


def write_idx(file, array):
    data = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_mnist(folder, suffix="", counts=(7, 3), names=("train", "t10k")):
    arrays = {}
    for part, count in zip(names, counts):
        images = random.integers(0, 256, (count, 4, 5), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
        arrays[part] = images, labels
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_whole(tmp_path, suffix):
    arrays = write_mnist(tmp_path, suffix)
    parts = read_idx(str(tmp_path), (), None)
    for part, stored in (("train", "train"), ("test", "t10k")):
        images, labels = arrays[stored]
        assert np.array_equal(parts[part].images[..., 0], images)
        assert np.array_equal(parts[part].labels, labels)
        assert parts[part].classes == ("0", "1", "2")
        pixels, label = parts[part][2]
        assert pixels.shape == (4, 5, 1)
        assert label == 2


def test_idx_test_files_may_lack_and_grey_may_become_colour(tmp_path):
    write_mnist(tmp_path, names=("emnist-letters-train",))
    parts = read_idx(str(tmp_path), ("a", "b", "c"), 3)
    assert list(parts) == ["train"]
    assert parts["train"][0][0].shape == (4, 5, 3)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_truncated_idx_file_is_one_error_with_both_counts(tmp_path, suffix):
    write_mnist(tmp_path, suffix, counts=(700, 3))
    truncate(tmp_path / f"train-images-idx3-ubyte{suffix}")
    with pytest.raises(InputError, match=r"truncated: it has \d{4} bytes and .*14016"):
        read_idx(str(tmp_path), (), None)


def test_bad_idx_folders(tmp_path):
    with pytest.raises(InputError, match=r"lacks idx files.*train-images-idx3-ubyte.*nothing"):
        read_idx(str(tmp_path), (), None)
    write_mnist(tmp_path)
    with pytest.raises(InputError, match=r"label 2.*2 classes, 0 \.\. 1"):
        read_idx(str(tmp_path), ("a", "b"), None)
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels, np.zeros(6, np.uint8))
    with pytest.raises(InputError, match=r"7 images and labels of shape \(6,\)"):
        read_idx(str(tmp_path), (), None)
    labels.write_bytes(labels.read_bytes() + b"x")
    with pytest.raises(InputError, match="more than 14 bytes"):
        read_idx(str(tmp_path), (), None)
    labels.write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"not an idx file.*3c 68 74 6d"):
        read_idx(str(tmp_path), (), None)
    write_idx(tmp_path / "other-train-labels-idx1-ubyte", np.zeros(6, np.uint8))
    with pytest.raises(InputError, match="several files"):
        read_idx(str(tmp_path), (), None)


@pytest.mark.skipif(not REAL.is_dir(), reason="no data folder beside the repository")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_real_idx_files(name):
    test = read_idx(str(REAL / name), (), None)["test"]
    assert np.bincount(test.labels).tolist()[:10] == (
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009] if name == "mnist" else [1000] * 10
    )


def test_npz_files(tmp_path):
    file = tmp_path / "toys.npz"
    images = random.integers(0, 256, (4, 3, 3, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=[0, 1, 1, 0], categories=["car", "doll"])
    toys = read_arrays(str(file), (), None)["train"]
    assert toys.classes == ("car", "doll")
    assert np.array_equal(toys[2][0], images[2])
    np.savez(file, images=images)
    assert read_arrays(str(file), (), 1)["train"].channels == 1
    np.savez(file, images=images / 2)
    with pytest.raises(InputError, match=r"float64: they must be .* uint8"):
        read_arrays(str(file), (), None)
    np.savez(file, pictures=images)
    with pytest.raises(InputError, match="no array 'images'; it has pictures"):
        read_arrays(str(file), (), None)
    truncate(file)
    with pytest.raises(InputError, match=r"not a whole \.npz"):
        read_arrays(str(file), (), None)


# --- decoding


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tiff", ".gif", ".jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats_decode_to_the_channels_asked_for(tmp_path, suffix, channels):
    paint(tmp_path / f"a{suffix}", (6, 5, 3))
    assert decode(tmp_path / f"a{suffix}", "a", channels).shape == (6, 5, channels)


def test_lossless_formats_keep_their_pixels(tmp_path):
    for channels in (1, 3, 4):
        pixels = paint(tmp_path / "a.png", (6, 5, channels))
        assert np.array_equal(decode((tmp_path / "a.png").read_bytes(), "a"), pixels)
        assert header_channels(tmp_path / "a.png", "a") == channels


def test_alpha_is_laid_on_white(tmp_path):
    paint(tmp_path / "a.png", (4, 4, 4), colour=(10, 20, 30, 0))
    assert np.all(decode(tmp_path / "a.png", "a", 3) == 255)


def test_sixteen_bits_are_scaled_and_orientation_is_applied(tmp_path):
    Image.fromarray(np.full((2, 3), 65535, np.uint16)).save(tmp_path / "a.png")
    assert np.all(decode(tmp_path / "a.png", "a") == 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (7, 3)).save(tmp_path / "a.jpg", exif=turned)
    assert decode(tmp_path / "a.jpg", "a").shape == (7, 3, 3)


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm"])
@pytest.mark.parametrize("levels", [(0, 0), (255, 255), (256, 256), (200, 300), (4095, 0), (60000, 1), (65535, 128)])
def test_sixteen_bits_are_scaled_by_their_type_and_never_by_a_file_s_own_maximum(tmp_path, kind, levels):
    tifffile = pytest.importorskip("tifffile")
    pixels, file = np.array([levels] * 3, np.uint16), tmp_path / f"a.{kind.split()[-1]}"
    if kind == "png":
        Image.fromarray(pixels).save(file)
    elif kind == "pgm":
        file.write_bytes(b"P5 2 3 65535\n" + pixels.astype(">u2").tobytes())
    else:
        tifffile.imwrite(file, pixels, byteorder=">" if kind.startswith("big") else "<")
    found = decode(file, "a")
    assert found.shape == (3, 2, 1)
    assert found[..., 0].tolist() == np.rint(pixels / 257).astype(int).tolist()
    # The other path keeps sixteen bits, and a network sees the same to half a level.
    apart = to_signal(torch.from_numpy(found[..., 0])) - to_signal(torch.from_numpy(pixels))
    assert float(apart.abs().max()) <= 1 / 255 + 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint32, np.int16])
def test_numbers_without_a_range_are_refused(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.linspace(0, 1, 6).reshape(2, 3).astype(dtype))
    with pytest.raises(UnreadableImageError, match=r"range.*uint8 or uint16"):
        decode(tmp_path / "a.tif", "a.tif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".gif"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6])
def test_truncated_files_are_unreadable_and_named(tmp_path, suffix, keep):
    file = tmp_path / f"a{suffix}"
    paint(file, (64, 64, 3))
    truncate(file, keep)
    with pytest.raises(UnreadableImageError, match=f"a{suffix}"):
        decode(file, str(file))


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImageError, match="no such file"):
        decode(tmp_path / "none.png", "none.png")


# --- folders


def test_a_folder_of_classes(tmp_path):
    for name in ("10", "9", "2"):
        for number in range(2):
            paint(tmp_path / name / "deep" / f"{number}.PNG")
    paint(tmp_path / ".hidden" / "x.png")
    (tmp_path / "9" / "notes.txt").write_text("not an image")
    source = read_folder(str(tmp_path), (), None)["train"]
    assert source.classes == ("2", "9", "10")
    assert source.labels.tolist() == [2, 2, 0, 0, 1, 1]
    assert len(image_files(tmp_path)) == 6
    assert source.name(4).endswith("0.PNG")


def test_a_flat_folder_has_no_classes(tmp_path):
    paint(tmp_path / "b.png")
    first = paint(tmp_path / "a.png")
    source = read_folder(str(tmp_path), (), None)["train"]
    assert source.classes == ()
    assert source.labels.tolist() == [-1, -1]
    assert np.array_equal(source[0][0], first)


def test_parts_share_one_numbering(tmp_path):
    for where in ("train/cat", "train/dog", "train/emu", "test/emu", "val/cat"):
        paint(tmp_path / where / "0.png")
    parts = read_folder(str(tmp_path), (), None)
    assert sorted(parts) == ["test", "train", "val"]
    assert {part.classes for part in parts.values()} == {("cat", "dog", "emu")}
    assert parts["test"].labels.tolist() == [2]


def test_given_classes_set_the_order_and_refuse_others(tmp_path):
    for name in ("cat", "dog"):
        paint(tmp_path / name / "0.png")
    assert read_folder(str(tmp_path), ("dog", "cat"), None)["train"].labels.tolist() == [1, 0]
    with pytest.raises(InputError, match="unknown label 'dog'; did you mean 'dogs'"):
        read_folder(str(tmp_path), ("cat", "dogs"), None)


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="no images"):
        read_folder(str(tmp_path), (), None)
    with pytest.raises(InputError, match=r"set data.path"):
        read_folder(None, (), None)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match="did you mean 'pictures'"):
        read_folder(str(tmp_path / "picture"), (), None)
    paint(tmp_path / "cat" / "0.png")
    paint(tmp_path / "dog" / "0.png")
    with pytest.warns(UserWarning, match="pictures has no images"):
        read_folder(str(tmp_path), (), None)
    (tmp_path / "pictures").rmdir()
    paint(tmp_path / "stray.png")
    with pytest.warns(UserWarning, match=r"left out: .*stray\.png"):
        assert len(read_folder(str(tmp_path), (), None)["train"]) == 2


def test_mixed_channels_are_refused_or_converted(tmp_path):
    paint(tmp_path / "a.png", (4, 4, 3))
    paint(tmp_path / "b.png", (4, 4, 1))
    with pytest.raises(InputError, match=r"b\.png has 1 and others .* have 3; set channels"):
        read_folder(str(tmp_path), (), None)
    source = read_folder(str(tmp_path), (), 3)["train"]
    assert [source[index][0].shape[2] for index in range(2)] == [3, 3]


def test_mixed_channels_beyond_the_headers_looked_at_are_found_when_read(tmp_path, monkeypatch):
    for number in range(3):
        paint(tmp_path / f"{number}.png", (4, 4, 3))
    source = read_folder(str(tmp_path), (), None)["train"]
    paint(tmp_path / "1.png", (4, 4, 4))
    with pytest.raises(InputError, match=r"1\.png has 4"):
        source[1]


def test_a_folder_of_broken_images_is_one_error(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("no")
    with pytest.raises(InputError, match=r"no image is readable, e\.g\. .*0\.png \(it is no image"):
        read_folder(str(tmp_path), (), None)


# --- manifests


def write_manifest(folder, rows, head=("path", "label"), suffix=".csv"):
    file = folder / f"table{suffix}"
    if suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({name: [row[i] for row in rows] for i, name in enumerate(head)}), file)
    else:
        with open(file, "w", newline="") as stream:
            csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",").writerows([head, *rows])
    return str(file)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_manifests(tmp_path, suffix):
    first = paint(tmp_path / "images" / "a.png")
    paint(tmp_path / "b, c.png")
    rows = [("images/a.png", "dog", "train"), (str(tmp_path / "b, c.png"), "cat", "test")]
    parts = read_manifest(write_manifest(tmp_path, rows, ("path", "label", "split"), suffix), Columns(), (), None)
    assert sorted(parts) == ["test", "train"]
    assert np.array_equal(parts["train"][0][0], first)
    assert parts["train"].classes == ("cat", "dog")
    assert parts["train"].labels.tolist() == [1]


def test_manifest_labels_may_be_numbers_of_given_classes(tmp_path):
    for name in "abc":
        paint(tmp_path / f"{name}.png")
    file = write_manifest(tmp_path, [("a.png", 1), ("b.png", 0), ("c.png", "cat")])
    assert read_manifest(file, Columns(), ("cat", "dog"), None)["train"].labels.tolist() == [1, 0, 0]
    file = write_manifest(tmp_path, [("a.png", 1), ("b.png", 2)])
    with pytest.raises(InputError, match=r"image 1 of .* has the label 2, and there are 2 classes"):
        read_manifest(file, Columns(), ("cat", "dog"), None)


def test_bad_manifests(tmp_path):
    paint(tmp_path / "a.png")
    file = write_manifest(tmp_path, [("a.png", "cat")])
    with pytest.raises(InputError, match=r"no column 'lable'; did you mean 'label'\? \(it has path, label\)"):
        read_manifest(file, Columns(label="lable"), (), None)
    file = write_manifest(tmp_path, [("a.png", "cat"), ("a.png", "")])
    with pytest.raises(InputError, match="1 of 2 images have no label"):
        read_manifest(file, Columns(), (), None)
    file = write_manifest(tmp_path, [("a.png", "cat")] + [(f"{number}.png", "cat") for number in range(3)])
    with pytest.raises(InputError, match=r"3 of the 4 files .* \(at most 2 may be missing\)"):
        read_manifest(file, Columns(), (), None, most_missing=2)
    assert len(read_manifest(file, Columns(), (), None, most_missing=3)["train"]) == 4
    with pytest.raises(InputError, match=r"no column for the images; set data.image_column to one of x, y"):
        read_manifest(write_manifest(tmp_path, [(1, 2)], ("x", "y")), Columns(), (), None)
    with pytest.raises(InputError, match="no rows"):
        read_manifest(write_manifest(tmp_path, []), Columns(), (), None)
    with pytest.raises(InputError, match="row 3 has 1 fields and the head 2"):
        read_manifest(write_manifest(tmp_path, [("a.png", "cat"), ("a.p",)]), Columns(), (), None)
    (tmp_path / "table.csv").write_text("")
    with pytest.raises(InputError, match="empty"):
        read_manifest(file, Columns(), (), None)


def test_a_truncated_parquet_table(tmp_path):
    paint(tmp_path / "a.png")
    file = write_manifest(tmp_path, [("a.png", "cat")], suffix=".parquet")
    truncate(Path(file))
    with pytest.raises(InputError, match="not a whole Parquet file"):
        read_manifest(file, Columns(), (), None)


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "VALID"), ("training", "Validation")])
def test_parts_are_read_whatever_their_case(tmp_path, names):
    for part in names:
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("L", (3, 3)).save(tmp_path / part / label / "0.png")
    found = read_folder(str(tmp_path), (), None)
    assert set(found) == {name.lower() for name in names}
    assert all(source.classes == ("a", "b") for source in found.values())


def test_parts_beside_other_folders_are_refused_unless_they_are_classes(tmp_path):
    for name in ("train", "test", "unlabeled"):
        (tmp_path / name).mkdir()
        Image.new("L", (3, 3)).save(tmp_path / name / "0.png")
    with pytest.raises(InputError, match=r"parts test, train .*unlabeled"):
        read_folder(str(tmp_path), (), None)
    (source,) = read_folder(str(tmp_path), ("test", "train", "unlabeled"), None).values()
    assert source.classes == ("test", "train", "unlabeled")
    # One such name among others is a class: trains are pictures, too.
    (tmp_path / "test").rename(tmp_path / "bus")
    (source,) = read_folder(str(tmp_path), (), None).values()
    assert source.classes == ("bus", "train", "unlabeled")


def test_one_class_is_warned_of(tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.new("L", (3, 3)).save(tmp_path / "photos" / label / "0.png")
    with pytest.warns(UserWarning, match="one class, 'photos'.* one level deeper"):
        read_folder(str(tmp_path), (), None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_links_that_go_round_and_pipes_make_no_examples(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label / "deep").mkdir(parents=True)
        for k in range(3):
            Image.new("L", (3, 3), 10 * k).save(tmp_path / label / "deep" / f"{k}.png")
    (tmp_path / "a" / "deep" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a" / "deep")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    source = read_folder(str(tmp_path), (), None)["train"]
    assert np.bincount(source.labels).tolist() == [3, 3]
    assert len(image_files(tmp_path)) == 6
    with pytest.raises(UnreadableImageError, match=r"pipe\.png .*pipe or a device"):
        decode(tmp_path / "b" / "pipe.png", "pipe.png")
