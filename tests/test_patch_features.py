"""Features of slides: each patch's in its place, whatever the encoder, the scale and the reader; resumed."""

import json
import os
import shutil
import sys
import types

import h5py
import numpy as np
import pytest
import tifffile
import torch
import yaml
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fitformer import FITImageEncoder
from fitformer.cli import main
from fitformer.data.foreground import foreground_windows
from fitformer.data.patches import PatchCut, Patches, patches_of
from fitformer.data.readers import open_image, write_tiled_tiff
from fitformer.errors import InputError, MissingDependencyError
from fitformer.inference.features.encoder import Normalization, PatchEncoder
from fitformer.inference.features.encoders import open_encoder
from fitformer.inference.features.extract import Extraction
from fitformer.inference.find import Slide
from fitformer.interop.export import to_pt2
from fitformer.patching.any_size import to_signal

# Else it writes under the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Torch's own, while it compiles.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"),
]

CPU = torch.device("cpu")
ROWS, COLUMNS = 150, 230
HALF = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]


def picture(seed=0, rows=ROWS, columns=COLUMNS, kind="uint8"):
    """Tissue of two textures on white."""
    random = np.random.default_rng(seed)
    whole = 257 if kind == "uint16" else 1
    pixels = np.full((rows, columns, 3), 255 * whole, kind)
    pixels[32:96, 32:100] = whole * random.integers(40, 120, (64, 68, 3))
    pixels[32:128, 120:200] = whole * np.where(np.arange(80) // 4 % 2, 180, 60)[None, :, None]
    return pixels


def slide(path, pixels=None, **options):
    """A tiled TIFF; `options` are tifffile's."""
    pixels = picture() if pixels is None else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    photometric = "rgb" if pixels.shape[2] == 3 else "minisblack"
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric=photometric, metadata=None, **options)
    return path


def in_microns(size):
    return {"resolution": (1e4 / size, 1e4 / size), "resolutionunit": "CENTIMETER"}


class Means(nn.Module):
    """Features that tell patches apart: the means of channels, and those weighted from left to right."""

    def forward(self, x):
        weights = 2 * torch.arange(x.shape[3]) / (x.shape[3] - 1)
        return torch.cat([x.mean(dim=(2, 3)), (x * weights).mean(dim=(2, 3))], dim=1)


def means(pixels):
    """What `Means` gives of patches (b, H, W, channels) uint8, normalised to -1 .. 1."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1
    return Means()(x.permute(0, 3, 1, 2)).numpy()


def encoder(**options):
    """An encoder in memory."""
    return PatchEncoder(
        **{
            "name": "means", "digest": "0", "run": Means(), "channels": 3, "size": None, "device": CPU,
            "normalization": Normalization((0.5,) * 3, (0.5,) * 3), "channels_first": True, **options,
        }
    )  # fmt: skip


def extract(output, *paths, cut=None, **options):
    work = Extraction(options.pop("encoder", None) or encoder(), output, cut or PatchCut(32), **options)
    work.run([Slide(path, path.name) for path in paths])
    return work


def read(path):
    with h5py.File(path) as file:
        return file["features"][...], file["coords"][...], dict(file["coords"].attrs)


def at(pixels, corner, side):
    """The patch at x and y of a picture, with the last row and column where it lacks some."""
    x, y = corner
    found = pixels[y : y + side, x : x + side]
    return np.pad(found, ((0, side - found.shape[0]), (0, side - found.shape[1]), (0, 0)), mode="edge")


@pytest.mark.parametrize(("side", "overlap", "batch_size"), [(32, 0, 64), (32, 8, 7), (50, 0, 1)])
def test_each_patch_has_its_features_in_its_place(side, overlap, batch_size, tmp_path):
    pixels, path = picture(), slide(tmp_path / "a.tif")
    extract(tmp_path / "out", path, cut=PatchCut(side, overlap, background=None), batch_size=batch_size)
    features, coords, attributes = read(tmp_path / "out" / "a.h5")
    step = side - overlap
    grid = [(x, y) for y in range(0, ROWS - overlap, step) for x in range(0, COLUMNS - overlap, step)]
    assert coords.tolist() == [list(place) for place in grid]
    assert (features.dtype, coords.dtype) == (np.float32, np.int64)
    expected = means(np.stack([at(pixels, corner, side) for corner in grid]))
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert attributes.items() >= {
        "patch_size": side, "patch_size_level0": side, "overlap": overlap, "name": "a", "level0_width": COLUMNS,
        "level0_height": ROWS,
    }.items()  # fmt: skip
    with open_image(tmp_path / "out" / "a.h5") as image:
        shape = (len({y for _, y in grid}), len({x for x, _ in grid}), 6)
        assert image.shape == shape
        np.testing.assert_array_equal(image.window(0, 0, *shape[:2]).reshape(-1, 6), features)
        assert image.placement.step == step


def test_patches_without_tissue_are_left_out(tmp_path):
    pixels, path = picture(), slide(tmp_path / "a.tif")
    extract(tmp_path / "out", path)
    held = {(x, y) for y in range(0, ROWS, 32) for x in range(0, COLUMNS, 32)
            if (at(pixels, (x, y), 32) < 250).any()}  # fmt: skip
    _, coords, _ = read(tmp_path / "out" / "a.h5")
    assert {tuple(each) for each in coords.tolist()} == held
    extract(tmp_path / "half", path, cut=PatchCut(32, min_foreground=0.6))
    fuller = {corner for corner in held if (at(pixels, corner, 32) < 250).any(-1).mean() > 0.6}
    assert {tuple(each) for each in read(tmp_path / "half" / "a.h5")[1].tolist()} == fuller != held


@given(seed=st.integers(0, 2**31), side=st.integers(1, 20), step=st.integers(1, 20), share=st.sampled_from([0.0, 0.3]))
@settings(max_examples=30, deadline=None)
def test_windows_that_overlap_count_their_own_pixels(seed, side, step, share, tmp_path_factory):
    random = np.random.default_rng(seed)
    pixels = (random.random((23, 31, 1)) < random.choice([0.01, 0.3])).astype(np.uint8) * 255
    path = tmp_path_factory.mktemp("images") / "a.npy"
    np.save(path, pixels)
    tops, lefts = (np.arange(0, length, step) for length in pixels.shape[:2])
    with open_image(path) as image:
        found = foreground_windows(image, tops, lefts, side, background="black", min_foreground=share)
    shares = [[(pixels[y : y + side, x : x + side] > 0).mean() for x in lefts] for y in tops]
    np.testing.assert_array_equal(found, np.array(shares) > share)


def test_a_slide_without_tissue_gives_an_empty_file(tmp_path):
    path = slide(tmp_path / "a.tif", np.full((90, 70, 3), 255, np.uint8))
    work = extract(tmp_path / "out", path)
    assert (work.made, work.empty, work.patches) == (1, 1, 0)
    features, coords, _ = read(tmp_path / "out" / "a.h5")
    assert (features.shape, coords.shape, features.dtype) == ((0, 6), (0, 2), np.float32)


SCALES = {
    "magnification": ({"magnification": 20}, 2, (40, 20)),
    "microns": ({"microns_per_pixel": 0.5}, 2, (40, 20)),
    "said": ({"magnification": 10, "slide_microns_per_pixel": 0.5}, 2, (20, 10)),
    "between levels": ({"magnification": 40 / 3}, 3, (40, 40 / 3)),
    "finer": ({"magnification": 80}, 0.5, (40, 80)),
    "level 0": ({}, 1, (40, 40)),
}


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_patches_are_cut_at_the_scale_that_is_asked_for(scale, pyramid, tmp_path):
    asked, reduction, magnifications = SCALES[scale]
    # Slopes and stripes of 16 pixels, which every scale shows.
    down, across = np.mgrid[:192, :256]
    pixels = np.stack([down, across // 16 % 2 * 100 + 50, across * 255 // 256], axis=-1).astype(np.uint8)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        options = {"tile": (32, 32), "photometric": "rgb", "metadata": None, **in_microns(0.25)}
        file.write(pixels, **options)
        if pyramid:
            small = pixels.reshape(96, 2, 128, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
            file.write(small, subfiletype=1, **{**options, **in_microns(0.5)})
    extract(tmp_path / "out", path, cut=PatchCut(32, background=None, **asked))
    features, coords, attributes = read(tmp_path / "out" / "a.h5")
    side = round(32 * reduction)
    assert attributes["patch_size_level0"] == side
    assert (attributes["level0_magnification"], attributes["target_magnification"]) == pytest.approx(magnifications)
    expected = means(np.stack([at(pixels, corner, side) for corner in coords.tolist()]))
    np.testing.assert_allclose(features, expected, atol=0.03)
    with open_image(path) as image:
        patches = patches_of(image, PatchCut(32, background=None, **asked))
        assert patches.pixels == (side // 2 if pyramid and reduction >= 2 else side)


def test_a_scale_that_the_slide_does_not_say_is_an_error_with_the_way_out(tmp_path):
    with open_image(slide(tmp_path / "a.tif")) as image:
        assert image.microns_per_pixel is None
        for asked in ({"magnification": 20}, {"microns_per_pixel": 0.5}):
            with pytest.raises(
                InputError, match=r"a\.tif does not say how large its pixels are.*slide_microns_per_pix"
            ):
                patches_of(image, PatchCut(32, **asked))
            assert patches_of(image, PatchCut(32, slide_microns_per_pixel=0.25, **asked)).side == 64
        with pytest.raises(InputError, match=r"pixels of 7 microns.*magnification 20"):
            patches_of(image, PatchCut(32, magnification=20, slide_microns_per_pixel=7))
    extract(tmp_path / "out", tmp_path / "a.tif")
    assert "magnification" not in " ".join(read(tmp_path / "out" / "a.h5")[2])


OME = '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels \
ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="230" SizeY="150" SizeC="3" SizeZ="1" SizeT="1" \
PhysicalSizeX="{}" PhysicalSizeXUnit="{}"><Channel ID="C:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
SAID = {
    "a.tif": (in_microns(0.25), 0.25),
    "inch.tif": ({"resolution": (50800, 50800), "resolutionunit": "INCH"}, 0.5),
    "print.tif": ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
    "none.tif": ({"resolution": (40000, 40000), "resolutionunit": "NONE"}, None),
    "aperio.tif": (
        {"description": "Aperio Image Library v12\r\n1x1 [0,0 1x1]|AppMag = 20|MPP = 0.5040|Left = 1"},
        0.504,
    ),
    "a.ome.tif": ({"description": OME.format("0.3", "µm").encode()}, 0.3),
    "nm.ome.tif": ({"description": OME.format("300", "nm").encode()}, 0.3),
    "pixel.ome.tif": ({"description": OME.format("1", "pixel").encode()}, None),
    "a.svs": (in_microns(0.25), 0.25),
}


@pytest.mark.parametrize("name", SAID)
def test_slides_say_how_large_their_pixels_are(name, tmp_path):
    options, expected = SAID[name]
    with open_image(slide(tmp_path / name, **options)) as image:
        assert image.microns_per_pixel == (None if expected is None else pytest.approx(expected))


def test_an_ome_zarr_says_how_large_its_pixels_are(tmp_path):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("0", shape=(3, 20, 30), dtype="uint8", chunks=(3, 10, 10))
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    scale = [{"type": "scale", "scale": [1, 0.5, 0.5]}]
    said = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    said["multiscales"][0]["datasets"][0]["coordinateTransformations"] = scale
    group.attrs["ome"] = said
    with open_image(tmp_path / "a.zarr") as image:
        assert image.microns_per_pixel == 0.5


@pytest.mark.parametrize("name", ["a.tif", "a.npy", "a.zarr", "a.png", "deep.tif", "a.svs"])
def test_every_reader_gives_the_same_features(name, tmp_path):
    pixels, path = picture(), tmp_path / name
    if name == "a.npy":
        np.save(path, pixels)
    elif name == "a.zarr":
        zarr.create_array(str(path), data=pixels, chunks=(50, 60, 3))
    elif name == "deep.tif":
        deep = picture(kind="uint16")
        write_tiled_tiff(path, deep.shape, "uint16", lambda y, x, high, wide: deep[y : y + high, x : x + wide])
    elif name == "a.png":
        from PIL import Image

        Image.fromarray(pixels).save(path)
    else:
        slide(path)
    extract(tmp_path / "out", path)
    features, coords, _ = read(tmp_path / "out" / "a.h5" if name != "deep.tif" else tmp_path / "out" / "deep.h5")
    np.testing.assert_allclose(features, means(np.stack([at(pixels, c, 32) for c in coords.tolist()])), atol=1e-5)


def test_grey_and_alpha_become_the_channels_of_the_encoder(tmp_path):
    extract(tmp_path / "out", slide(tmp_path / "a.tif", picture()[..., :1]), cut=PatchCut(32, background=None))
    features, _, _ = read(tmp_path / "out" / "a.h5")
    np.testing.assert_array_equal(features[:, 0], features[:, 1])
    work = Extraction(encoder(), tmp_path / "out", PatchCut(32))
    with pytest.raises(InputError, match="5 channels and 3 are asked for"):
        work.run([Slide(slide(tmp_path / "five.tif", np.zeros((40, 40, 5), np.uint8), planarconfig="contig"), "b.tif")])


def test_floats_need_a_range(tmp_path):
    pixels = (picture() / np.float32(255)).astype(np.float32)
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(InputError, match=r"a\.npy has float32 pixels"):
        extract(tmp_path / "out", tmp_path / "a.npy")
    extract(tmp_path / "out", tmp_path / "a.npy", encoder=encoder(pixel_range=(0.0, 1.0)))
    features, coords, _ = read(tmp_path / "out" / "a.h5")
    np.testing.assert_allclose(features, means(np.stack([at(picture(), c, 32) for c in coords.tolist()])), atol=1e-4)


def test_a_mask_says_what_is_tissue(programs, tmp_path, capsys, monkeypatch):
    slide(tmp_path / "slides" / "a.tif")
    mask = np.zeros((ROWS, COLUMNS, 1), np.uint8)
    mask[64:96, 128:160] = 1
    slide(tmp_path / "masks" / "a.tif", mask)
    monkeypatch.chdir(tmp_path)
    command = ["features", "slides", "--encoder", str(programs / "any.pt2"), "-o", "out", "--patch-size", "32", *HALF]
    assert main([*command, "--background", "none", "--masks", "masks"]) == 0
    assert read(tmp_path / "out" / "a.h5")[1].tolist() == [[128, 64]]
    assert "1 of 1 slides done now, 1 patches of 6 features" in capsys.readouterr().out


def test_no_more_is_read_than_two_batches(tmp_path, monkeypatch):
    real, given, ahead, count = Patches.read, [], [], [0]

    def noted(patches, which):
        found = real(patches, which)
        count[0] += len(found)
        return found

    def behind(x):
        # What was read and not encoded yet: this batch, and the next.
        ahead.append(count[0] - sum(given))
        given.append(len(x))
        return Means()(x)

    monkeypatch.setattr(Patches, "read", noted)
    path = slide(tmp_path / "a.tif")
    work = extract(tmp_path / "out", path, cut=PatchCut(16), batch_size=5, encoder=encoder(run=behind))
    # The first is of trying the encoder.
    assert sum(given[1:]) == work.patches > 50
    assert max(given) == 5
    assert max(ahead) <= 10


# Resuming, and what may go wrong.


def test_a_second_call_does_what_is_missing(tmp_path):
    paths = [slide(tmp_path / f"{name}.tif") for name in "ab"]
    assert extract(tmp_path / "out", paths[0]).made == 1
    before = (tmp_path / "out" / "a.h5").stat().st_mtime_ns
    work = extract(tmp_path / "out", *paths)
    assert (work.made, work.broken) == (1, {})
    assert (tmp_path / "out" / "a.h5").stat().st_mtime_ns == before
    # A slide that was changed is made anew.
    slide(paths[0], picture(seed=1, rows=ROWS + 1))
    assert extract(tmp_path / "out", *paths).made == 1
    assert read(tmp_path / "out" / "a.h5")[2]["level0_height"] == ROWS + 1


def test_a_slide_that_is_broken_off_leaves_no_file(tmp_path):
    path = slide(tmp_path / "a.tif")
    calls = []

    def stopped(x):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return Means()(x)

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "out", path, batch_size=2, encoder=encoder(run=stopped))
    assert list((tmp_path / "out").iterdir()) == []
    assert extract(tmp_path / "out", path).made == 1


def test_a_broken_slide_is_told_and_the_others_are_made(tmp_path):
    good, broken = slide(tmp_path / "a.tif"), slide(tmp_path / "b.tif")
    broken.write_bytes(broken.read_bytes()[:9000])
    told = []
    work = extract(tmp_path / "out", broken, good, on_broken=lambda *said: told.append(said))
    assert (work.made, list(work.broken)) == (1, [str(broken)])
    assert told[0][0] == str(broken)
    assert "truncated" in json.loads((tmp_path / "out" / "b.failed").read_text())["reason"]
    assert not (tmp_path / "out" / "b.h5").exists()
    slide(broken)
    assert extract(tmp_path / "out", broken, good).made == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.h5", "b.h5"]
    with pytest.raises(InputError, match="none of the 1 slides"):
        extract(tmp_path / "other", tmp_path / "none.tif")


def test_features_that_are_no_numbers_break_their_slide(tmp_path):
    path = slide(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: the features of the patch at x 32, y 32 are NaN or infinite"):
        extract(tmp_path / "out", path, encoder=encoder(run=lambda x: torch.full((len(x), 2), torch.nan)))


def test_what_was_made_otherwise_is_not_written_over(tmp_path):
    path = slide(tmp_path / "a.tif", **in_microns(0.25))
    extract(tmp_path / "out", path)
    before = (tmp_path / "out" / "a.h5").read_bytes()
    others = {
        "the encoder was means and is other": {"encoder": encoder(name="other", digest="1")},
        "overlap was 0 and is 4": {"cut": PatchCut(32, 4)},
        "precision was 32 and is bf16": {"encoder": encoder(bf16=True)},
        "slide_microns_per_pixel was None and is 0.5": {"cut": PatchCut(32, slide_microns_per_pixel=0.5)},
    }
    for message, options in others.items():
        with pytest.raises(InputError, match=f"{message}.*another output folder"):
            extract(tmp_path / "out", path, **options)
    with pytest.raises(InputError, match=r"was made of .*/a\.tif, and .*/other/a\.tif"):
        extract(tmp_path / "out", slide(tmp_path / "other" / "a.tif"))
    assert (tmp_path / "out" / "a.h5").read_bytes() == before
    (tmp_path / "foreign").mkdir()
    with h5py.File(tmp_path / "foreign" / "a.h5", "w") as file:
        file["features"] = np.zeros((2, 2))
    with pytest.raises(InputError, match="not written by `fitformer features`"):
        extract(tmp_path / "foreign", path)
    with pytest.raises(InputError, match=r"a\.tif and .*a\.svs would both be written"):
        extract(tmp_path / "again", path, slide(tmp_path / "a.svs"))


def test_the_scale_of_one_slide_is_said_once(tmp_path):
    said, unsaid = slide(tmp_path / "a.tif", **in_microns(0.25)), slide(tmp_path / "b.tif")
    assert list(extract(tmp_path / "out", said, unsaid, cut=PatchCut(32, magnification=20)).broken) == [str(unsaid)]
    extract(tmp_path / "out", unsaid, cut=PatchCut(32, magnification=20, slide_microns_per_pixel=0.25))
    work = extract(tmp_path / "out", said, unsaid, cut=PatchCut(32, magnification=20))
    assert (work.made, work.broken) == (0, {})


def test_features_are_no_slide(tmp_path):
    extract(tmp_path / "out", slide(tmp_path / "a.tif"))
    with pytest.raises(InputError, match=r"a\.h5 holds features of patches"):
        extract(tmp_path / "again", tmp_path / "out" / "a.h5", encoder=encoder(channels=6, normalization=None))


# Encoders.


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Programs of torch.export: `any.pt2` of images of any size, `one.pt2` of two of 16 x 16 pixels."""
    folder, dim = tmp_path_factory.mktemp("programs"), torch.export.Dim
    free = {0: dim("b"), 2: dim("h", min=2), 3: dim("w", min=2)}
    for name, sides, dynamic in (("any", (20, 24), free), ("one", (16, 16), {})):
        made = torch.export.export(Means(), (torch.zeros(2, 3, *sides),), dynamic_shapes=(dynamic,))
        torch.export.save(made, folder / f"{name}.pt2")
    return folder


def test_a_program_gives_the_features_of_its_module(programs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    found = open_encoder(str(programs / "any.pt2"), CPU, normalization=half)
    assert (found.channels, found.size) == (3, None)
    np.testing.assert_allclose(found.features(pixels, 32), means(pixels), atol=1e-6)
    # Of one size and a batch of one size: patches are scaled, batches filled up.
    found = open_encoder(str(programs / "one.pt2"), CPU, normalization=half)
    assert found.size == (16, 16)
    np.testing.assert_allclose(found.features(pixels, 32), means(pixels), atol=0.05)
    # What the channels' own means and deviations make of it.
    shutil.copy(programs / "any.pt2", tmp_path / "any.pt2")
    (tmp_path / "any.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}))
    beside = open_encoder(str(tmp_path / "any.pt2"), CPU).features(pixels, 32)
    unit = (means(pixels) + 1) / 2
    np.testing.assert_allclose(beside, (unit - [0.1, 0.2, 0.3] * 2) / ([0.4, 0.5, 0.6] * 2), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_onnx_gives_the_features_of_its_module(programs, tmp_path):
    pytest.importorskip("onnxruntime")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    exported = torch.export.load(programs / "any.pt2")
    torch.onnx.export(exported, dynamo=True, verbose=False).save(str(tmp_path / "any.onnx"))
    found = open_encoder(str(tmp_path / "any.onnx"), CPU, normalization=Normalization((0.5,) * 3, (0.5,) * 3))
    assert (found.channels, found.size) == (3, None)
    np.testing.assert_allclose(found.features(pixels, 32), means(pixels), atol=1e-6)


def onnx_of_means(path, kind="FLOAT", batch="b", last=False, about=None):
    """A graph of ONNX that gives the means of channels, written node by node."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import helper

    of = getattr(onnx.TensorProto, kind)
    shape = [batch, "h", "w", 3] if last else [batch, 3, "h", "w"]
    axes = helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [1, 2] if last else [2, 3])
    node = helper.make_node("ReduceMean", ["pixels", "axes"], ["features"], keepdims=0)
    graph = helper.make_graph(
        [node], "means", [helper.make_tensor_value_info("pixels", of, shape)],
        [helper.make_tensor_value_info("features", of, [batch, 3])], [axes],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if about is not None:
        helper.set_model_props(model, {"fitformer": json.dumps(about)})
    onnx.save(model, path)


@pytest.mark.parametrize("form", [{}, {"batch": 2}, {"last": True}, {"kind": "FLOAT16"}], ids=str)
def test_onnx_of_any_layout_gives_features(form, tmp_path):
    onnx_of_means(tmp_path / "a.onnx", **form)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    found = open_encoder(str(tmp_path / "a.onnx"), CPU, normalization=Normalization((0.5,) * 3, (0.5,) * 3))
    np.testing.assert_allclose(found.features(pixels, 32), means(pixels)[:, :3], atol=2e-3)


def test_the_description_of_a_file_says_what_it_gives(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    onnx_of_means(tmp_path / "a.onnx", last=True, about={"role": "FITImageEncoder", "outputs": {"features": {}}})
    found = open_encoder(str(tmp_path / "a.onnx"), CPU).features(pixels, 32)
    np.testing.assert_allclose(found, means(pixels)[:, :3], atol=1e-5)
    with pytest.raises(InputError, match="knows its pixels"):
        open_encoder(str(tmp_path / "a.onnx"), CPU, normalization=Normalization((0.5,) * 3, (0.5,) * 3))
    onnx_of_means(tmp_path / "b.onnx", last=True, about={"role": "FITImageEncoder", "outputs": {"logits": {}}})
    with pytest.raises(InputError, match=r"gives logits, not features.*the run or the saved folder"):
        open_encoder(str(tmp_path / "b.onnx"), CPU)
    with pytest.raises(InputError, match="precision is bf16"):
        open_encoder(str(tmp_path / "a.onnx"), CPU, bf16=True)


def image_encoder(**options):
    torch.manual_seed(0)
    geometry = {"image_size": 32, "group_size": 16, "patch_size": 8, "num_classes": 3, **options}
    return FITImageEncoder.from_preset("tiny", **geometry).eval()


@pytest.mark.parametrize("any_size", [False, True])
def test_an_image_encoder_gives_what_its_head_takes(any_size, tmp_path):
    options = {"image_size": None, "latent_position": "row_column", "glimpses": 1} if any_size else {}
    model = image_encoder(**options)
    model.save_pretrained(tmp_path / "model")
    found = open_encoder(str(tmp_path / "model"), CPU)
    assert found.size == (None if any_size else (32, 32))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    features = found.features(pixels, 32)
    with torch.inference_mode():
        logits = model(to_signal(torch.from_numpy(pixels)))
        np.testing.assert_allclose(model.head(torch.from_numpy(features)), logits, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_fitformer_exported_knows_its_pixels(tmp_path):
    model = image_encoder(num_classes=0)
    to_pt2(model, tmp_path / "a.pt2")
    found = open_encoder(str(tmp_path / "a.pt2"), CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with torch.inference_mode():
        np.testing.assert_allclose(found.features(pixels, 32), model(to_signal(torch.from_numpy(pixels))), atol=1e-5)


class Resnet(nn.Module):
    """As a model of timm: a body, and a head that `num_classes=0` leaves out."""

    def __init__(self, num_classes=0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, num_classes) if num_classes else nn.Identity()
        self.pretrained_cfg = {"classifier": "fc", "fixed_input_size": False}

    def forward(self, x):
        return self.fc(self.conv(x).mean(dim=(2, 3)))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm, which needs torchvision: its calls, and errors of its kinds."""
    module = types.ModuleType("timm")

    def create_model(name, pretrained=False, num_classes=None):
        if pretrained:
            raise RuntimeError(f"No pretrained weights exist for {name}.")
        return Resnet(1000 if num_classes is None else num_classes)

    config = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    module.create_model = create_model
    module.list_models = lambda: ["resnet10t", "resnet50"]
    module.is_model = lambda name: name in module.list_models()
    module.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


@pytest.mark.parametrize("head", [0, 7])
def test_a_model_of_timm_gives_its_pooled_features(head, timm, tmp_path):
    torch.manual_seed(0)
    whole = Resnet(head)
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    found = open_encoder("timm:resnet10t", CPU, weights=str(tmp_path / "weights.safetensors"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        np.testing.assert_allclose(found.features(pixels, 32), whole.conv(x).mean(dim=(2, 3)), atol=1e-5)


def test_what_timm_cannot_do_is_one_clear_error(timm, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no model 'resnet10'; did you mean 'resnet10t'"):
        open_encoder("timm:resnet10", CPU)
    with pytest.raises(InputError, match=r"No pretrained weights exist.*\(weights\)"):
        open_encoder("timm:resnet50", CPU)
    save_file({"conv.weight": torch.zeros(4, 3, 3, 3), "extra": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"1 missing: conv\.bias; 1 unknown: extra"):
        open_encoder("timm:resnet50", CPU, weights=str(tmp_path / "a.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name in ("torn", "none"):
        with pytest.raises(InputError, match=f"{name}.safetensors is not a whole safetensors file"):
            open_encoder("timm:resnet50", CPU, weights=str(tmp_path / f"{name}.safetensors"))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"fitformer\[timm\]"):
        open_encoder("timm:resnet50", CPU)


def test_faults_of_encoders_are_one_clear_error(programs, tmp_path):
    shutil.copy(programs / "any.pt2", tmp_path / "a.pt2")
    image_encoder().save_pretrained(tmp_path / "model")
    (tmp_path / "torn.pt2").write_bytes((tmp_path / "a.pt2").read_bytes()[:500])
    (tmp_path / "odd.pt2").write_bytes((tmp_path / "a.pt2").read_bytes())
    (tmp_path / "odd.json").write_text('{"mean": 1}')
    grey, half = Normalization((0.5,), (1.0,)), Normalization((0.5,) * 3, (0.5,) * 3)
    faults = {
        r"a\.pt2 does not say how its pixels are normalised.*a\.json": ("a.pt2", {}),
        r"odd\.json does not hold a mean and a std": ("odd.pt2", {}),
        r"torn\.pt2 cannot be read": ("torn.pt2", {"normalization": half}),
        r"there is no file .*none\.onnx": ("none.onnx", {}),
        "there is no encoder": ("none", {}),
        "takes 3 channels, and mean and std are given for 1": ("a.pt2", {"normalization": grey}),
        "weights are for timm:NAME": ("a.pt2", {"weights": "x"}),
        "checkpoint is for a run": ("a.pt2", {"checkpoint": "best"}),
        "mean and std are for exported programs": ("model", {"normalization": half}),
    }
    for message, (name, options) in faults.items():
        with pytest.raises(InputError, match=message):
            open_encoder(str(tmp_path / name), CPU, **options)
    with pytest.raises(InputError, match=r"mean is 0\.5 and std 0"):
        Normalization((0.5,), (0.0,))
    maps = encoder(run=lambda x: x)
    with pytest.raises(InputError, match=r"gives \(1, 3, 32, 32\) for 1 patches.*pooling"):
        maps.width(32)
    strict = encoder(run=nn.Conv2d(3, 2, 64))
    with pytest.raises(InputError, match=r"does not take patches of 32 x 32 pixels.*another patch size"):
        extract(tmp_path / "out", slide(tmp_path / "a.tif"), encoder=strict)


@pytest.mark.parametrize(
    "options",
    [{"patch_size": 0}, {"overlap": 32}, {"magnification": -1}, {"microns_per_pixel": 0.0},
     {"magnification": 20, "microns_per_pixel": 0.5}, {"slide_microns_per_pixel": float("nan")}],
    ids=str,
)  # fmt: skip
def test_cuts_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        PatchCut(**{"patch_size": 32, **options})


def test_bfloat16_is_near(tmp_path):
    image_encoder().save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    exact, near = (open_encoder(str(tmp_path / "model"), CPU, bf16=b).features(pixels, 32) for b in (False, True))
    assert near.dtype == np.float32
    assert 0 < np.abs(exact - near).max() < 0.1 * np.abs(exact).max()


# The whole chain, through the command line.


def test_from_slides_to_a_step_of_training(programs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 2), ("test", 1)):
        for label in ("plain", "mixed"):
            for k in range(count):
                pixels = picture(seed=k)
                if label == "plain":
                    pixels[:, 110:] = 255
                slide(tmp_path / "slides" / part / label / f"{label}{k}.tif", pixels, **in_microns(0.25))
    shutil.copy(programs / "any.pt2", "encoder.pt2")
    command = ["features", "slides", "--encoder", "encoder.pt2", "--output", "features", "--patch-size", "8", *HALF]
    command += ["--magnification", "20"]
    assert main([*command, "--shard", "1/2"]) == 0
    assert main([*command, "--shard", "2/2"]) == 0
    assert main(command) == 0
    assert "0 of 6 slides done now, 6 were there already" in capsys.readouterr().out
    with open_image("features/train/mixed/mixed0.h5") as image:
        assert image.placement.step == 16
        assert image.shape[2] == 6
    recipe = {
        "task": "classify",
        "model": {"layers": "(1)1", "dim": 8, "latent_dim": 8, "heads": 2, "latent_heads": 2, "latents_per_group": 2,
                  "group_size": 4, "patch_size": 1, "latent_position": "row_column"},
        "data": {"source": "folder", "path": "features", "image_size": None, "validation": 0.0},
        "trainer": {"steps": 1, "batch_size": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml", "--run-dir", "run"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


WRONG = {
    "--mean is given without --std": ["--mean", "0.5"],
    "is a file; features need a folder": ["-o", "encoder.pt2"],
    "no part of a whole": ["--shard", "3/2"],
    "no background": ["--background", "pink"],
    "not allowed with": ["--magnification", "20", "--microns-per-pixel", "0.5"],
    "holds no images": [],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_one_line_and_status_2(message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    (tmp_path / "encoder.pt2").write_bytes(b"")
    assert main(["features", "slides", "--encoder", "encoder.pt2", "-o", "out", *WRONG[message]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
