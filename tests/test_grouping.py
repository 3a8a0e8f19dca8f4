"""Images become groups where they are read: in workers, scanned once, never from a stale cache."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from torch.utils.data import DataLoader

from fitformer.data import build_dataset, foreground_cache, grouping
from fitformer.data.grouping import Grouping
from fitformer.data.readers import open_image
from fitformer.data.readers.lazy import LazyImage
from fitformer.data.settings import ImageData
from fitformer.errors import EmptyImageError, InputError
from fitformer.patching import PatchGrid
from fitformer.patching.any_size import GroupedImage, PixelArray

PATCH_GRID = PatchGrid(None, 32, 16, 3)
WHITE = ImageData(background="white", image_size=None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FITFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def slides(tmp_path):
    random = np.random.default_rng(0)
    for k in range(6):
        pixels = np.full((70, 96 + k, 3), 255, dtype=np.uint8)
        pixels[32 * (k % 2) : 32 * (k % 2) + 20, 5:25] = random.integers(0, 200, (20, 20, 3))
        path = tmp_path / "slides" / f"{k % 2}" / f"{k}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb")
    return tmp_path / "slides"


def dataset_of(folder, **options):
    settings = ImageData(
        source="folder", path=str(folder), image_size=None, holdout=0.34, background="white", **options
    )
    dataset = build_dataset(settings, "train")
    dataset.group_for(PATCH_GRID, 1, settings)
    return dataset


def scans(monkeypatch):
    found, real = [], grouping.foreground_groups_transformed
    monkeypatch.setattr(grouping, "foreground_groups_transformed", lambda *a, **k: (found.append(1), real(*a, **k))[1])
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("augmentation", ["none", "dihedral"])
def test_workers_scan_and_read_and_the_batches_are_the_same(slides, monkeypatch, augmentation):
    dataset, here = dataset_of(slides, augmentation=augmentation), os.getpid()
    windows, real = [], LazyImage.window
    monkeypatch.setattr(
        LazyImage, "window", lambda image, *where: (windows.append(os.getpid()), real(image, *where))[1]
    )
    batches = []
    for workers in (0, 2):
        windows.clear()
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=dataset.collate)
        images = [image for batch in loader for image in batch["image"]]
        batches.append([image.read(slice(None)) for image in images])
        assert all(isinstance(image, GroupedImage) for image in images)
        # In this process not one pixel is read where there are workers.
        assert (here in windows) == (workers == 0)
    for (tokens, mask), (others, other_mask) in zip(*batches, strict=True):
        assert torch.equal(tokens, others)
        assert (mask is None and other_mask is None) or torch.equal(mask, other_mask)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_leaves_large_images_in_their_files(slides, monkeypatch):
    monkeypatch.setattr(grouping, "MOST_READ_AHEAD", 1000)
    dataset = dataset_of(slides)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=dataset.collate)
    image = next(iter(loader))["image"][0]
    assert image._pixels is None
    assert len(pickle.dumps(image)) < 3000
    assert image.read(slice(0, 2))[0].shape == (1, 2, 4, 768)


def test_an_image_is_scanned_once_whatever_the_run_until_it_changes(slides, monkeypatch):
    counted, path = scans(monkeypatch), slides / "0" / "0.tif"
    first = Grouping(PATCH_GRID, 0, WHITE)(open_image(path))
    again = Grouping(PATCH_GRID, 2, WHITE)(open_image(path))
    assert len(counted) == 1
    assert again.coords[2:].tolist() == first.coords.tolist() == [[0, 0]]
    Grouping(PATCH_GRID, 0, ImageData(background="white", tolerance=0.2))(open_image(path))
    Grouping(PatchGrid(None, 16, 16, 3), 0, WHITE)(open_image(path))
    assert len(counted) == 3
    pixels = np.full((70, 96, 3), 255, dtype=np.uint8)
    pixels[64:, 70:] = 0
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb")
    assert Grouping(PATCH_GRID, 0, WHITE)(open_image(path)).coords.tolist() == [[2, 2]]
    assert len(counted) == 4


def test_a_mask_that_changes_is_scanned_anew(slides, tmp_path, monkeypatch):
    counted, masks = scans(monkeypatch), tmp_path / "masks"
    masks.mkdir()
    settings = ImageData(masks=str(masks), image_size=None)
    for corner in (0, 40):
        mask = np.zeros((70, 96), dtype=np.uint8)
        mask[corner : corner + 4, corner : corner + 4] = 1
        tifffile.imwrite(masks / "0.tif", mask)
        found = Grouping(PATCH_GRID, 0, settings)(open_image(slides / "0" / "0.tif"))
        assert found.coords.tolist() == [[corner // 32, corner // 32]]
    assert len(counted) == 2


def test_a_broken_cache_is_mended_and_one_that_cannot_be_written_stops_nothing(slides, cache, monkeypatch):
    counted, path = scans(monkeypatch), slides / "1" / "1.tif"
    wanted = Grouping(PATCH_GRID, 0, WHITE)(open_image(path)).coords.tolist()
    (kept,) = cache.rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:40])
    assert Grouping(PATCH_GRID, 0, WHITE)(open_image(path)).coords.tolist() == wanted
    assert len(counted) == 2
    assert Grouping(PATCH_GRID, 0, WHITE)(open_image(path)).coords.tolist() == wanted
    assert len(counted) == 2
    (cache.parent / "file").write_text("in the way")
    monkeypatch.setenv("FITFORMER_CACHE", str(cache.parent / "file"))
    assert Grouping(PATCH_GRID, 0, WHITE)(open_image(path)).coords.tolist() == wanted
    assert len(counted) == 3
    assert foreground_cache.cache_folder() == cache.parent / "file"


def test_read_ahead_gives_what_reading_gives():
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    image, ahead = (GroupedImage(PixelArray(pixels), PATCH_GRID, glimpses=1) for _ in range(2))
    ahead.read_ahead()
    ahead.source = None
    for groups in (slice(0, 1), slice(1, 4), slice(None)):
        for ours, wanted in zip(ahead.read(groups), image.read(groups), strict=True):
            assert torch.equal(ours, wanted) if wanted is not None else ours is None
    assert image.nbytes == 7 * 32 * 32 * 3


@pytest.mark.parametrize("augmentation", ["none", "dihedral"])
@pytest.mark.parametrize("least", [0.0, 0.05])
def test_patches_of_background_are_absent_and_what_is_read_is_what_they_hold(slides, augmentation, least):
    options = {"background_patches": True, "min_foreground": least, "augmentation": augmentation}
    dataset = dataset_of(slides, **options)
    groups_alone = dataset_of(slides, min_foreground=least, augmentation=augmentation)
    for each in (dataset, groups_alone):
        each._grouping = replace(each._grouping, patch_grid=PatchGrid(None, 32, 8, 3))
    for k in range(len(dataset)):
        image, whole = dataset[k]["image"], groups_alone[k]["image"]
        # A glimpse stands for the whole, and all of it is there.
        tokens, mask = image.read(slice(None))
        assert mask is not None
        assert mask[0, 0].all()
        assert torch.equal(mask[0, 1:], (tokens[0, 1:] != 255).any(-1) & whole_mask(whole)[0, 1:])
        assert image.coords.tolist() == whole.coords.tolist()
        assert torch.equal(tokens, whole.read(slice(None))[0])
        assert image.count() == int(mask.sum()) < whole.count()


def whole_mask(image):
    mask = image.mask(slice(None))
    return torch.ones(1, image.num_groups, 16, dtype=torch.bool) if mask is None else mask


def test_patches_are_absent_by_a_mask_too_and_a_group_without_any_is_skipped(slides, tmp_path):
    mask = np.zeros((70, 96), np.uint8)
    mask[:16, 16:32] = mask[64:, 70:] = 1
    (tmp_path / "masks").mkdir()
    tifffile.imwrite(tmp_path / "masks" / "0.tif", mask)
    image = open_image(slides / "0" / "0.tif")
    for background, found in [("none", [[0, 0], [2, 2]]), ("white", [[0, 0]])]:
        settings = ImageData(
            source="folder", background=background, masks=str(tmp_path / "masks"), background_patches=True
        )
        grouped = Grouping(PATCH_GRID, 0, settings)(image)
        assert grouped.coords.tolist() == found
        assert grouped.mask(slice(None))[0, 0].tolist() == [False, True, False, False]


def test_patches_of_another_number_than_the_image_has_are_refused():
    source = PixelArray(np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(InputError, match="3 x 3 patches, and `patches` has 2 x 3"):
        GroupedImage(source, PATCH_GRID, patches=np.ones((2, 3), bool))
    with pytest.raises(EmptyImageError, match="none is occupied"):
        GroupedImage(source, PATCH_GRID, patches=np.zeros((3, 3), bool))


def test_patches_of_background_need_a_background_or_masks(slides):
    with pytest.raises(InputError, match="set one of them"):
        build_dataset(ImageData(source="folder", path=str(slides), image_size=None, background_patches=True), "train")
