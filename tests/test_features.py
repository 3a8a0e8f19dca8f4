"""Files of patch features are images: the same pixels from every file, absent patches nowhere, clear errors."""

import pickle

import h5py
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer.data.readers import open_image
from fitformer.data.readers.features import Rows
from fitformer.data.readers.levels import Placement
from fitformer.errors import EmptyImageError, InputError
from fitformer.inference.find import find
from helpers import TRIDENT, slide_of_features, write_features

FILES = {
    "a.h5": {},
    "a.hdf5": {"chunks": (7, 5), "compression": "gzip"},
    "rows.h5": {"chunks": (1, 5)},
    "a.zarr": {"chunks": (7, 5)},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("name", FILES)
def test_the_grid_of_patches_is_an_image(name, dtype, tmp_path):
    picture, features, coords = slide_of_features(dtype=dtype)
    path = write_features(tmp_path / name, features, coords, **FILES[name])
    with open_image(path) as image:
        assert (image.shape, image.dtype) == (picture.shape, np.float32)
        assert np.isnan(image.nodata).all()
        assert image.placement == Placement(2048, 1024, 512)
        for top, left, height, width in [(0, 0, 9, 12), (3, 5, 1, 1), (2, 1, 6, 8), (8, 11, 1, 1)]:
            found = image.window(top, left, height, width)
            expected = picture[top : top + height, left : left + width]
            np.testing.assert_array_equal(found, expected)
            there = image.presence.window(top, left, height, width)
            np.testing.assert_array_equal(there[..., 0], np.isfinite(expected[..., 0]))
        again = pickle.loads(pickle.dumps(image))
        np.testing.assert_array_equal(again.window(0, 0, 9, 12), picture)
        again.close()
        small = image.thumbnail(3, 4)
        np.testing.assert_allclose(small[0, 0], np.nanmean(picture[:3, :3], axis=(0, 1)), rtol=1e-5)


def test_a_batch_of_one_is_read_as_its_slide(tmp_path):
    picture, features, coords = slide_of_features()
    with open_image(write_features(tmp_path / "a.h5", features[None], coords)) as image:
        np.testing.assert_array_equal(image.window(0, 0, 9, 12), picture)


def test_only_the_patches_of_a_window_are_read(tmp_path, monkeypatch):
    _, features, coords = slide_of_features(rows=20, columns=20, share=1)
    order = np.lexsort((coords[:, 1], coords[:, 0]))
    read, real = [], Rows.window
    monkeypatch.setattr(Rows, "window", lambda rows, *where: (read.append(where[2]), real(rows, *where))[1])
    with open_image(write_features(tmp_path / "a.h5", features[order], coords[order])) as image:
        assert read == []
        image.window(4, 8, 3, 5)
    # Columns of the slide, one after the other.
    assert read == [3] * 5


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_order_of_patches_and_where_the_slide_begins_do_not_matter(seed, tmp_path_factory):
    random = np.random.default_rng(seed)
    rows, columns = random.integers(1, 12, 2).tolist()
    step, corner = int(random.integers(1, 900)), random.integers(0, 9000, 2).tolist()
    picture, features, coords = slide_of_features(rows, columns, step=step, corner=corner, seed=seed)
    path = write_features(tmp_path_factory.mktemp("slides") / "a.h5", features, coords, {"patch_size_level0": step})
    with open_image(path) as image:
        np.testing.assert_array_equal(image.window(0, 0, rows, columns), picture)
        assert image.placement == Placement(corner[1], corner[0], step)


def test_overlapping_patches_are_a_finer_grid(tmp_path):
    picture, features, coords = slide_of_features(step=256)
    said = write_features(tmp_path / "said.h5", features, coords, {**TRIDENT, "overlap": 128})
    seen = write_features(tmp_path / "seen.h5", features, coords)
    for path in (said, seen):
        with open_image(path) as image:
            np.testing.assert_array_equal(image.window(0, 0, 9, 12), picture)
            # A cell is about the middle of its patch.
            assert image.placement == Placement(2048 + 128, 1024 + 128, 256)


def test_the_first_row_and_column_of_tridents_overlap_stand_apart(tmp_path):
    # Its second patch begins where the first one ends, 1.6 steps away, and only those after it overlap.
    places = np.array([0, 512, 832, 1152])
    coords = np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)
    features = np.arange(32, dtype="float32").reshape(16, 2)
    with open_image(write_features(tmp_path / "a.h5", features, coords, {**TRIDENT, "overlap": 96})) as image:
        assert image.shape == (5, 5, 2)
        cells = np.array([0, 2, 3, 4])
        np.testing.assert_array_equal(image.window(0, 0, 5, 5)[cells[:, None], cells], features.reshape(4, 4, 2))


def test_patches_beside_the_grid_take_the_nearest_cell(tmp_path):
    picture, features, coords = slide_of_features(share=1)
    moves = np.random.default_rng(1).integers(-100, 100, coords.shape)
    moves[np.arange(len(coords)) % 9 != 0] = 0
    with open_image(write_features(tmp_path / "a.h5", features, coords + moves)) as image:
        np.testing.assert_array_equal(image.window(0, 0, 9, 12), picture)
        assert image.placement == Placement(2048, 1024, 512)


def test_without_attributes_the_smallest_spacing_is_the_step(tmp_path):
    picture, features, coords = slide_of_features(step=300)
    with open_image(write_features(tmp_path / "a.h5", features, coords, {})) as image:
        np.testing.assert_array_equal(image.window(0, 0, 9, 12), picture)
        assert image.placement == Placement(2048, 1024, 300)


def test_a_step_that_is_not_sure_is_told(tmp_path):
    _, features, coords = slide_of_features(step=300, share=1)
    coords[coords[:, 1] == coords[:, 1].max(), 0] += 40
    with pytest.warns(UserWarning, match=r"patch_size_level0.* 300 pixels.* 12 of 108 patches"):
        image = open_image(write_features(tmp_path / "a.h5", features, coords, {}))
    assert image.shape[:2] == (9, 12)


ALONE = np.array([[0, 0], [700, 900]])
FAULTS = {
    "collision": (np.ones((3, 4), "f4"), np.array([[0, 0], [512, 0], [600, 90]]), TRIDENT,
                  r"patches 1 \(x 512, y 0\) and 2 \(x 600, y 90\).* 512 pixels.*patch_size_level0"),
    "the same place": (np.ones((3, 4), "f4"), np.array([[0, 0], [512, 0], [0, 0]]), {}, r"patches 0 .* and 2 "),
    "no step": (np.ones((2, 4), "f4"), ALONE, {}, "no two patches are in one row or column.*patch_size_level0"),
    "lengths": (np.ones((3, 4), "f4"), ALONE, TRIDENT, r"features of 3 patches and coords of shape \(2, 2\)"),
    "axes": (np.ones((2, 4, 5, 6), "f4"), ALONE, TRIDENT, r"features of shape \(2, 4, 5, 6\)"),
    "a batch": (np.ones((2, 2, 4), "f4"), ALONE, TRIDENT, r"features of shape \(2, 2, 4\)"),
    "whole numbers": (np.ones((2, 4), "i4"), ALONE, TRIDENT, "features of type int32"),
    "nowhere": (np.ones((2, 4), "f4"), np.array([[0, 0], [0, np.nan]]), TRIDENT, "patch 1 has coordinates that are no"),
    "no grid": (np.ones((4, 4), "f4"), np.array([[0, 0], [1, 0], [10**6, 0], [0, 10**6]]), {"patch_size_level0": 1},
                r"1,000,001 x 1,000,001 cells for 4 patches.*patch_size_level0"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["h5", "zarr"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_slide_is_one_clear_error(fault, suffix, tmp_path):
    *arrays, message = FAULTS[fault]
    path = write_features(tmp_path / f"a.{suffix}", *arrays)
    with pytest.raises(InputError, match=f"a.{suffix}.*{message}"):
        open_image(path)


@pytest.mark.parametrize("gone", ["features", "coords"])
@pytest.mark.parametrize("suffix", ["h5", "zarr"])
def test_a_file_without_one_of_its_arrays_is_one_clear_error(gone, suffix, tmp_path):
    _, features, coords = slide_of_features()
    path = write_features(tmp_path / f"a.{suffix}", features, coords)
    if suffix == "h5":
        with h5py.File(path, "a") as file:
            del file[gone]
    else:
        del zarr.open_group(str(path))[gone]
    if (suffix, gone) != ("zarr", "features"):
        with pytest.raises(InputError, match=f"no array '{gone}'"):
            open_image(path)


@pytest.mark.parametrize("shape", [(0, 7), (0,), (1, 0, 7)])
def test_a_slide_without_patches_is_blank(shape, tmp_path):
    path = write_features(tmp_path / "a.h5", np.zeros(shape, "f4"), np.zeros((0, 2), "i8"))
    with pytest.raises(EmptyImageError, match="no patches"):
        open_image(path)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_file_is_one_clear_error(kept, tmp_path):
    _, features, coords = slide_of_features()
    path = write_features(tmp_path / "a.h5", features, coords)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(InputError, match=r"a\.h5 cannot be read: .*trunc"):
        open_image(path)


def test_features_that_are_no_numbers_are_named_with_their_patch(tmp_path):
    _, features, coords = slide_of_features()
    features[7, 2] = np.nan
    with (
        open_image(write_features(tmp_path / "a.h5", features, coords)) as image,
        pytest.raises(InputError, match=rf"patch 7 \(x {coords[7, 0]}, y {coords[7, 1]}\) are NaN or infinite"),
    ):
        image.window(0, 0, 9, 12)


def test_tensors_without_coordinates_are_refused(tmp_path):
    torch.save(torch.ones(3, 4), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt .*not where their patches lie.*\.h5.*coords"):
        open_image(tmp_path / "a.pt")


def test_tensors_beside_the_files_of_a_folder_are_no_images(tmp_path):
    _, features, coords = slide_of_features()
    write_features(tmp_path / "a.h5", features, coords)
    (tmp_path / "a.pt").write_bytes(b"\0" * 32)
    assert [found.name for found in find([tmp_path])] == ["a.h5"]
    (tmp_path / "a.h5").unlink()
    with pytest.raises(InputError, match=r"holds no images, such as .*\.h5"):
        find([tmp_path])
