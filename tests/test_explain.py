import csv
import errno
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fitformer import FITImageEncoder
from fitformer.cli import main
from fitformer.data.pixels import fit
from fitformer.errors import InputError
from fitformer.execution import Streamed, checkpointed, plain, token_store
from fitformer.inference.explain import (
    HeatMap,
    attribute,
    explain,
    leave_out,
    write_geojson,
    write_overlay,
    write_tiff,
)  # fmt: skip
from fitformer.inference.explain.agreement import rank_correlation
from fitformer.inference.explain.attribution import CONTRAST
from fitformer.inference.explain.batch import Slides
from fitformer.inference.explain.explanation import MAPS
from fitformer.inference.explain.overlay import blend, grey, thumbnail_size
from fitformer.inference.find import Slide, find
from fitformer.patching.any_size import GroupedImage, PixelArray
from fitformer.tasks.answers import ClassAnswers
from helpers import untrained_run

SIZE = {"dim": 8, "latent_dim": 12, "heads": 2, "latent_heads": 2, "latents_per_group": 3}
WAYS = [plain, checkpointed, Streamed(slice_groups=1), Streamed(slice_groups=3), Streamed(slice_groups=2, keep="disk")]


def classifier(layers="(1)1(1)1", seed=0, **more):
    torch.manual_seed(seed)
    any_size = {"channels": 1, "num_classes": 3, "latent_position": "row_column"}
    model = FITImageEncoder.from_config(
        layers=layers, image_size=None, group_size=(8, 4), patch_size=(2, 1), **SIZE, **any_size | more
    ).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def image_of(rows, columns, seed=0):
    return PixelArray(np.random.default_rng(seed).integers(0, 256, (rows, columns, 1), dtype=np.uint8))


def heatmap(cells, image_size, group_size=(8, 4), patch_size=(2, 1)):
    return HeatMap(np.asarray(cells, dtype=np.float32), image_size, group_size, patch_size)


# Where the latents looked, what moved the decision


@pytest.mark.parametrize("layers", ["(1)1(1)1", "(1)1(1)"])
def test_what_was_seen_is_the_same_in_every_way_to_run(layers):
    model = classifier(layers, glimpses=1)
    image = image_of(19, 14)
    wanted = attribute(model, image)
    for way in WAYS:
        model.set_execution(way)
        found = attribute(model, image)
        for part in ("logits", "attention", "relevance"):
            torch.testing.assert_close(getattr(found, part), getattr(wanted, part), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(wanted.logits, model([image])[0])


def test_the_look_at_a_group_averages_one_over_the_patches_that_hold_pixels():
    seen = attribute(classifier(), image_of(19, 14))
    mask = seen.image.mask(slice(None))[0]
    assert not mask.all()
    assert (seen.attention[~mask] == 0).all()
    torch.testing.assert_close(seen.attention.sum(1) / mask.sum(1), torch.ones(len(mask)))
    assert seen.attention[mask].std() > 0


def odds_of(model, image, label):
    """Log-odds of a label, from its probability."""
    with torch.no_grad():
        return float(model([image])[0].double().softmax(-1)[label].logit())


@pytest.mark.parametrize("way", [plain, Streamed(slice_groups=2)])
def test_what_moved_is_the_change_of_the_faded_image_s_log_odds_as_a_patch_fades_to_the_average(way):
    model = classifier(glimpses=1).double()
    model.set_execution(way)
    image = GroupedImage(PixelArray(np.random.default_rng(1).normal(size=(15, 7, 1))), model.patch_grid, glimpses=1)
    seen, embed, step = attribute(model, image), model.encoder.embed, 1e-5
    label = int(seen.logits.argmax())
    with torch.no_grad():
        tokens, mask = image.read(slice(None))
        patches, held = embed(tokens) - model.trunk.position(), mask.clone()
        held[:, 0] = False  # a glimpse shows all of the image again
        differ = patches - patches[held].mean(0)
    for group, patch in ((0, 3), (1, 0), (2, 7), (4, 10)):
        ends = []
        for share in (-step, step):

            def faded(x, share=share, group=group, patch=patch):
                part = slice(faded.upto, faded.upto + x.shape[1])
                faded.upto = part.stop
                tokens = embed(x) - (1 - CONTRAST) * differ[:, part]
                if part.start <= group < part.stop:
                    tokens[0, group - part.start, patch] += share * differ[0, group, patch]
                return tokens

            faded.upto = 0
            model.encoder.embed = faded
            ends.append(odds_of(model, image, label))
        assert seen.relevance[group, patch] == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-3, abs=1e-7)
    assert seen.relevance.abs().max() > 1e-4


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_what_moved_depends_on_the_probabilities_alone(classes):
    model = classifier(num_classes=classes)
    before = attribute(model, image_of(19, 14))
    with torch.no_grad():
        model.head.weight += 3 * torch.randn(1, 12)
        model.head.bias += 5
    after = attribute(model, image_of(19, 14))
    assert (after.logits - before.logits).abs().min() > 0.1
    torch.testing.assert_close(after.logits.softmax(-1), before.logits.softmax(-1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after.relevance, before.relevance, rtol=1e-3, atol=1e-5)
    assert before.relevance.abs().max() > 1e-3


def test_what_moved_does_not_fade_where_the_classifier_is_sure():
    model = classifier()
    before = attribute(model, image_of(19, 14))
    best = int(before.logits.argmax())
    with torch.no_grad():
        model.head.bias[best] += 60
    sure = attribute(model, image_of(19, 14))
    assert sure.logits.softmax(-1)[best] == 1
    torch.testing.assert_close(sure.relevance, before.relevance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_only_group_that_differs_has_the_sign_of_what_it_does(seed):
    torch.manual_seed(seed)
    model = classifier(seed=seed).double()
    pixels = np.full((24, 12, 1), 0.5)
    pixels[::2] = -0.2
    # So little that the change is linear: what the others are less than the average is what it is more.
    odd, step = pixels.copy(), 1e-4 * np.random.default_rng(seed).normal(size=(8, 4, 1))
    odd[8:16, 4:8] += step
    seen = attribute(model, PixelArray(odd))
    label = int(seen.logits.argmax())
    alike, other = (odds_of(model, PixelArray(each), label) for each in (pixels, odd))
    groups = seen.relevance.sum(1)
    assert groups.abs().argmax() == 4
    assert np.sign(float(groups[4])) == np.sign(other - alike)


def test_an_image_of_one_patch_over_and_over_has_nothing_that_moves():
    seen = attribute(classifier(glimpses=1), PixelArray(np.full((19, 14, 1), 77, dtype=np.uint8)))
    assert seen.relevance.abs().max() < 1e-5
    alone = classifier(num_classes=1)
    assert (attribute(alone, image_of(19, 14)).relevance == 0).all()


def test_a_padded_patch_moves_nothing():
    seen = attribute(classifier(), image_of(19, 14))
    assert (seen.relevance[~seen.image.mask(slice(None))[0]] == 0).all()


def test_the_patch_that_stands_out_is_where_the_map_has_it():
    model = classifier("(0)1")
    read = model.trunk.blocks[0].read
    pixels = np.zeros((24, 12, 1), dtype=np.uint8)
    pixels[10:12, 5] = 255
    with torch.no_grad():
        model.trunk.position.weight.zero_()
        # Keys alone decide: every query is the same, along which the odd patch's key is longest.
        read.attention.query.weight.zero_()
        odd = model.encoder.embed(torch.ones(1, 1, 16, 2))[0, 0, :1]
        read.attention.query.bias.copy_(10 * read.attention.key(read.context_norm(odd))[0])
    seen = attribute(model, PixelArray(pixels))
    cells = HeatMap.of(seen.attention, seen.image).cells
    assert np.unravel_index(cells.argmax(), cells.shape) == (5, 5)


def test_looking_leaves_the_model_as_it_was():
    model = classifier()
    model.head.bias.requires_grad_(False)
    told = []
    attribute(model, image_of(16, 8), told.append)
    assert told == sorted(told)
    assert [parameter for parameter in model.parameters() if parameter.grad is not None] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["head.bias"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(InputError, match="read nothing"):
        attribute(classifier("(2)"), image_of(8, 8))
    model = classifier()
    with pytest.raises(InputError, match="2 channels"):
        attribute(model, PixelArray(np.zeros((8, 8, 2), dtype=np.uint8)))
    model.head = None
    with pytest.raises(InputError, match="no head"):
        attribute(model, image_of(8, 8))


# What each group adds, by leaving it out


def without_group(model, image, group, glimpses=0):
    """Logits of a plain run on an image that never had a group."""
    whole = GroupedImage(image, model.patch_grid, glimpses=glimpses)
    occupied = np.ones(whole.grid, dtype=bool)
    occupied[tuple(whole.coords[group].tolist())] = False
    with torch.no_grad():
        return model([GroupedImage(image, model.patch_grid, occupied, glimpses)])[0]


def log_odds_of(logits, label):
    return float(logits.double().softmax(-1)[label].logit())


@pytest.mark.parametrize("layers", ["(1)1(1)1", "(1)1(1)", "(1)2", "(2)", "(1)1(0)1(1)1"])
@pytest.mark.parametrize("more", [{}, {"glimpses": 1}, {"mask": "causal"}])
def test_leaving_out_a_group_is_a_plain_run_without_it_in_every_way_to_run(layers, more):
    model = classifier(layers, **more)
    image, glimpses = image_of(19, 14), more.get("glimpses", 0)
    with torch.no_grad():
        full = model([image])[0]
    label = int(full.argmax())
    groups = range(glimpses, model.grouped(image).num_groups)
    wanted = [
        log_odds_of(full, label) - log_odds_of(without_group(model, image, group, glimpses), label) for group in groups
    ]
    for way in [*WAYS, Streamed(slice_groups=100, keep="host")]:
        model.set_execution(way)
        found = leave_out(model, image)
        torch.testing.assert_close(found.logits, full, rtol=1e-4, atol=1e-5)
        assert found.added[:glimpses].isnan().all()
        torch.testing.assert_close(found.added[glimpses:], torch.tensor(wanted), rtol=1e-3, atol=2e-5)
    assert np.abs(wanted).max() > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keep", ["memory", "host", "disk"])
def test_leaving_out_is_the_same_on_a_gpu_in_slices_across_those_that_were_kept(keep):
    model, image = classifier("(1)1(1)1"), image_of(40, 16)
    wanted = leave_out(model, image)
    model.cuda().set_execution(Streamed(slice_groups=3, keep=keep))
    found = leave_out(model, image)
    torch.testing.assert_close(found.added, wanted.added, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layers", ["(1)1(1)1", "(1)1(1)", "(1)2"])
@pytest.mark.parametrize(
    ("position", "more"),
    [("learned", {}), ("sin_cos", {}), ("index", {"rotary": True}), ("shared", {"rotary": True, "mask": "causal"})],
)
def test_a_group_is_left_out_of_a_model_of_one_size_with_its_tokens_and_its_latents(layers, position, more):
    torch.manual_seed(0)
    model = FITImageEncoder.from_config(
        layers=layers, image_size=(24, 12), group_size=(8, 4), patch_size=(2, 1), channels=1, num_classes=3,
        latent_position=position, **SIZE, **more,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    image = image_of(24, 12)
    found, encoder = leave_out(model, image), model.encoder
    signal = torch.from_numpy(image.pixels.copy()).float()[None] / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(signal)[0], rtol=1e-4, atol=1e-5)
        label, x = int(found.logits.argmax()), encoder.embed(model.patch_grid.group(signal))
        for group in range(9):
            kept = [k for k in range(9) if k != group]
            places = torch.tensor([kept]) if more else None
            tokens, latents = model.trunk(x[:, kept], model.trunk.initial_latents(1, 9)[:, kept], places=places)
            last = encoder.latent_norm(latents) if model.ends_in_latents else encoder.norm(tokens)
            without = model.head(last.mean(dim=(1, 2)))[0]
            wanted = log_odds_of(found.logits, label) - log_odds_of(without, label)
            assert float(found.added[group]) == pytest.approx(wanted, rel=1e-3, abs=2e-5)


def test_skipped_groups_are_no_part_of_leaving_out():
    model, image = classifier(), image_of(19, 14)
    occupied = np.arange(12).reshape(3, 4) % 3 > 0
    some = GroupedImage(image, model.patch_grid, occupied)
    found = leave_out(model, some)
    assert found.added.shape == (8,)
    occupied[tuple(some.coords[2].tolist())] = False
    with torch.no_grad():
        other = model([GroupedImage(image, model.patch_grid, occupied)])[0]
    label = int(found.logits.argmax())
    wanted = log_odds_of(found.logits, label) - log_odds_of(other, label)
    assert float(found.added[2]) == pytest.approx(wanted, rel=1e-3, abs=2e-5)
    cells = HeatMap.of(found.values, found.image).cells
    assert np.isnan(cells[:4, :4]).all()


class Counting:
    """Counts the rows that layers are run on."""

    def __init__(self, model):
        self.rows = {}
        for name, layer in model.trunk.named_modules():
            if type(layer).__name__ in ("TransformerLayer", "CrossLayer"):
                layer.register_forward_pre_hook(lambda layer, given, name=name: self.note(name, given[0]))
        model.encoder.stem.register_forward_pre_hook(lambda layer, given: self.note("stem", given[0].flatten(0, 1)))

    def note(self, name, x):
        self.rows[name] = self.rows.get(name, 0) + len(x)


@pytest.mark.parametrize("way", [plain, Streamed(slice_groups=2)])
def test_what_does_not_depend_on_the_group_left_out_runs_once(way):
    model, groups = classifier("(1)1(1)1"), 12
    model.set_execution(way)
    counted = Counting(model)
    leave_out(model, image_of(24, 16))
    once = ("stem", "blocks.0.local_layers.0", "blocks.0.read")
    assert [counted.rows[name] for name in once] == [groups] * 3
    later = groups + groups * (groups - 1)
    for name in ("blocks.1.write", "blocks.1.local_layers.0", "blocks.1.read"):
        assert counted.rows[name] == later
    assert counted.rows["blocks.1.global_layers.0"] == 1 + groups
    single = classifier("(2)")
    counted = Counting(single)
    leave_out(single, image_of(24, 16))
    assert set(counted.rows.values()) == {groups}


def test_the_share_of_the_work_grows_to_all_of_it():
    for method in MAPS:
        told = []
        explain(classifier(), image_of(19, 14), method, told.append)
        assert told == sorted(told)
        assert told[-1] == 1


@pytest.mark.parametrize("method", MAPS)
def test_the_only_group_of_an_image_has_no_value_and_still_a_label(method):
    model = classifier()
    found = explain(model, image_of(8, 4), method)
    assert found.logits.isfinite().all()
    if method == "leave-out":
        assert found.maps["leave-out"].isnan().all()
    else:
        assert found.agreement.groups == []
        assert found.agreement.rank_correlation is None
        assert found.agreement.same_sign is None
    with pytest.raises(InputError, match="method is 'shap'; known are leave-out, gradient, attention"):
        explain(model, image_of(8, 4), "shap")
    model.head = None
    with pytest.raises(InputError, match="no head"):
        leave_out(model, image_of(8, 8))


def test_the_agreement_is_that_of_the_largest_groups_with_leaving_them_out():
    model, image = classifier(), image_of(40, 16)
    truth = leave_out(model, image)
    for method in ("gradient", "attention"):
        found = explain(model, image, method)
        values = found.maps["relevance"].sum(1) if method == "gradient" else found.maps["attention"].amax(1)
        agreement = found.agreement
        assert sorted(agreement.groups) == sorted(values.abs().argsort(descending=True)[:8].tolist())
        torch.testing.assert_close(agreement.claimed, values[agreement.groups])
        torch.testing.assert_close(agreement.added, truth.added[agreement.groups], rtol=1e-3, atol=2e-5)
        compared = agreement.added if method == "gradient" else agreement.added.abs()
        wanted = np.corrcoef(agreement.claimed.argsort().argsort(), compared.argsort().argsort())[0, 1]
        assert agreement.rank_correlation == pytest.approx(wanted)
        same = (agreement.claimed.sign() == agreement.added.sign()).float().mean()
        assert agreement.same_sign == (pytest.approx(float(same)) if method == "gradient" else None)


def test_equal_values_share_their_rank():
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 7, 9])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([9.0, 7, 5])) == pytest.approx(-1)
    assert rank_correlation(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2, 3])) == pytest.approx(0.75**0.5)
    for flat in (torch.ones(3), torch.ones(1)):
        assert rank_correlation(flat, torch.arange(float(len(flat)))) is None


# Maps


def test_a_map_lies_as_the_patches_do_and_is_empty_where_groups_were_skipped():
    occupied = np.array([[True, False], [False, True], [True, True]])
    image = GroupedImage(image_of(19, 7), classifier().patch_grid, occupied, glimpses=2)
    values = torch.arange(6 * 16.0).reshape(6, 16)
    found = HeatMap.of(values, image)
    assert found.cells.shape == (10, 7)
    for (row, column), own in zip(image.coords.tolist()[2:], values[2:], strict=True):
        there = found.cells[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert np.array_equal(there, own.reshape(4, 4).numpy()[: there.shape[0], : there.shape[1]])
    assert np.isnan(found.cells).sum() == 4 * 3 + 4 * 4
    with pytest.raises(InputError, match="a map of 3 x 3 values does not lie over an image of 10 x 7 patches"):
        heatmap(np.zeros((3, 3)), (19, 7))


@pytest.mark.parametrize("size", [(19, 7), (38, 21), (5, 3), (1, 1), (6, 7)])
def test_a_shrunk_map_is_the_mean_over_the_pixels_of_the_image(size):
    cells = np.random.default_rng(0).normal(size=(10, 7))
    cells[:3, :2] = np.nan
    full = np.repeat(cells, 2, axis=0)[:19]
    # On a raster so fine that every picture's pixel is whole blocks of it, a mean is a mean.
    fine = np.repeat(np.repeat(full, size[0], axis=0), size[1], axis=1)
    blocks = fine.reshape(size[0], 19, size[1], 7)
    counts = np.isfinite(blocks).sum((1, 3))
    wanted = np.where(counts, np.nansum(blocks, (1, 3)) / np.maximum(counts, 1), np.nan)
    np.testing.assert_allclose(heatmap(cells, (19, 7)).shrunk(*size), wanted, atol=1e-5)


# Pictures


def test_a_picture_keeps_the_aspect_and_never_grows():
    assert thumbnail_size(40_000, 10_000) == (1024, 256)
    assert thumbnail_size(30, 40) == (30, 40)
    assert thumbnail_size(100_000, 3) == (1024, 1)


def test_heat_is_brightest_where_the_map_is_highest_and_the_rest_is_grey():
    values = np.array([[0.0, 1.0], [3.0, np.nan]])
    picture = blend(np.full((2, 2, 3), 100, dtype=np.uint8), values).astype(int)
    assert picture[1, 1].tolist() == [100, 100, 100]
    bright = picture.sum(-1)
    assert bright[1, 0] > bright[0, 1] > bright[0, 0]


def test_signed_colours_are_red_for_blue_against_and_nothing_for_nothing():
    picture = blend(np.full((1, 4, 1), 100, dtype=np.uint8), np.array([[2.0, -1.0, 0.0, np.nan]]), "signed")
    red, blue = picture[0, :, 0].astype(int), picture[0, :, 2].astype(int)
    assert red[0] > blue[0]
    assert blue[1] > red[1]
    assert picture[0, 2:].tolist() == [[100] * 3] * 2
    nothing = blend(np.full((1, 2, 1), 7, dtype=np.uint8), np.zeros((1, 2)), "signed")
    assert (nothing == 7).all()


def test_pixels_of_any_type_become_grey():
    bytes_ = np.array([[[0], [200]]], dtype=np.uint8)
    assert grey(bytes_).tolist() == [[0, 200]]
    for kind in (np.uint16, np.float32):
        assert grey(bytes_.astype(kind) * 3).tolist() == [[0, 255]]
        assert np.isfinite(grey(np.full((2, 2, 5), 9, dtype=kind))).all()
    assert grey(np.array([[[1.0], [np.nan], [3.0]]], dtype=np.float32)).tolist() == [[0, 0, 255]]


def test_the_overlay_is_a_small_png(tmp_path):
    thumbnail = image_of(40, 2100).thumbnail(*thumbnail_size(40, 2100))
    cells = np.zeros((20, 2100))
    cells[:, 1050:] = 1
    write_overlay(tmp_path / "seen.png", thumbnail, heatmap(cells, (40, 2100)))
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.size == (1024, 20)
        colours = np.asarray(picture).astype(int)
    assert colours[:, 520:].mean() > colours[:, :500].mean() + 50


# GeoJSON


def written(path, attention, relevance, **more):
    write_geojson(
        path,
        {"attention": attention, "relevance": relevance},
        ClassAnswers(("cat", "dog")).said(torch.tensor([3.0, 1.0]).log()),
        **more,
    )
    found = json.loads(path.read_text())
    assert found["type"] == "FeatureCollection"
    by_kind = {"annotation": [], "tile": [], "detection": []}
    for feature in found["features"]:
        assert feature["type"] == "Feature"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5
        assert ring[0] == ring[-1]
        assert all(isinstance(value, float) for value in feature["properties"]["measurements"].values())
        by_kind[feature["properties"]["objectType"]].append((ring, feature["properties"]))
    return by_kind


def box(ring):
    xs, ys = zip(*ring)
    return min(ys), min(xs), max(ys), max(xs)


def test_rectangles_tile_the_image_at_full_scale(tmp_path):
    random = np.random.default_rng(0)
    attention, relevance = (heatmap(random.normal(size=(10, 7)), (19, 7)) for _ in range(2))
    found = written(tmp_path / "a.geojson", attention, relevance)
    ((ring, about),) = found["annotation"]
    assert box(ring) == (0, 0, 19, 7)
    assert (about["name"], about["classification"]["name"]) == ("cat 75.0%", "cat")
    assert about["measurements"] == {"probability of cat": 0.75, "probability of dog": 0.25}
    for kind, height, width in (("tile", 8, 4), ("detection", 2, 1)):
        covered = np.zeros((19, 7), dtype=int)
        for ring, about in found[kind]:
            top, left, bottom, right = box(ring)
            covered[top:bottom, left:right] += 1
            inside = relevance.cells[top // 2 : -(-bottom // 2), left:right]
            assert about["measurements"]["relevance"] == pytest.approx(float(inside.sum()), rel=1e-4)
            side = "for" if about["measurements"]["relevance"] >= 0 else "against"
            assert about["classification"]["name"] == f"{side} cat"
            assert (top % height, left % width) == (0, 0)
        assert (covered == 1).all()


def test_skipped_groups_have_no_rectangle_and_the_most_moving_patches_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("fitformer.inference.explain.geojson.MOST_PATCHES", 5)
    cells = np.random.default_rng(0).normal(size=(8, 8))
    cells[:4, 4:] = np.nan
    found = written(tmp_path / "a.geojson", heatmap(cells, (16, 8)), heatmap(cells, (16, 8)))
    assert [box(ring)[:2] for ring, _ in found["tile"]] == [(0, 0), (8, 0), (8, 4)]
    strongest = sorted(np.abs(cells[np.isfinite(cells)]))[-5:]
    assert sorted(abs(about["measurements"]["relevance"]) for _, about in found["detection"]) == pytest.approx(
        strongest, rel=1e-4
    )


def test_rows_may_count_upwards_for_gis_viewers(tmp_path):
    attention = heatmap(np.ones((4, 4)), (8, 4))
    down, up = (written(tmp_path / f"{y}.geojson", attention, attention, y=y) for y in ("down", "up"))
    for kind in down:
        for (ring, about), (turned, same) in zip(down[kind], up[kind], strict=True):
            assert turned == [[x, -y] for x, y in ring]
            assert about == same


# TIFF


def test_a_raster_has_a_value_a_patch_and_lies_over_the_image(tmp_path):
    cells = np.random.default_rng(0).normal(size=(300, 290)).astype(np.float32)
    cells[5:9, 7] = np.nan
    write_tiff(tmp_path / "map.tif", heatmap(cells, (600, 290)), "attention")
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        page = file.pages[0]
        assert page.is_tiled
        np.testing.assert_array_equal(page.asarray(), cells)
        assert page.tags["GDAL_NODATA"].value == "nan"
        assert page.tags["ImageDescription"].value.startswith("attention; a value for each patch of 2 x 1 pixels")
        assert page.resolution == (1.0, 0.5)
        geo = file.geotiff_metadata
    assert geo["ModelPixelScale"] == [1, 2, 0]
    assert geo["ModelTiepoint"] == [0] * 6


@pytest.mark.parametrize("raster_type", ["area", "point", "unsaid"])
def test_a_raster_takes_over_the_coordinates_of_a_geotiff(tmp_path, raster_type):
    said = {"area": (1025, 0, 1, 1), "point": (1025, 0, 1, 2), "unsaid": ()}[raster_type]
    keys = (1, 1, 0, 1 + len(said) // 4, 1024, 0, 1, 1, *said)
    common = [(34735, 3, len(keys), keys, True)]
    scale = [(33550, 12, 3, (0.5, 0.25, 0), True), (33922, 12, 6, (4, 8, 0, 1000, 2000, 0), True)]
    matrix = [(34264, 12, 16, (0, 3, 0, 10, 2, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 1), True)]
    for name, tags in (("scale", scale), ("matrix", matrix)):
        image = tmp_path / f"{name}.tif"
        tifffile.imwrite(image, np.zeros((32, 16), np.uint8), extratags=[*tags, *common])
        write_tiff(tmp_path / "map.tif", heatmap(np.zeros((16, 16)), (32, 16)), "relevance", image)
        place = [place_of(path) for path in (image, tmp_path / "map.tif")]
        for row, column in ((0, 0), (1, 0), (0, 1), (13, 7)):
            # A corner of a patch is that of its first pixel.
            assert place[1](row, column) == pytest.approx(place[0](row * 2, column))
        with tifffile.TiffFile(tmp_path / "map.tif") as file:
            written = file.pages[0].tags["GeoKeyDirectoryTag"].value
        assert written == ((*keys[:-1], 1) if raster_type == "point" else keys)


def place_of(path):
    """Model coordinates of the corner of pixel (row, column), as the GeoTIFF specification has them.

    Pixels are areas whose corners are whole numbers, or points (key 1025 is 2) that are: their corners lie half a
    pixel before them.
    """
    with tifffile.TiffFile(path) as file:
        tags = {tag.code: tag.value for tag in file.pages[0].tags}
    keys = np.reshape(tags[34735], (-1, 4)).tolist()
    before = 0.5 if [1025, 0, 1, 2] in keys else 0
    if 34264 in tags:
        matrix = np.array(tags[34264]).reshape(4, 4)
        return lambda row, column: (matrix @ (column - before, row - before, 0, 1))[:2].tolist()
    i, j, _, x, y, _ = tags[33922]
    across, down, _ = tags[33550]
    return lambda row, column: [x + (column - before - i) * across, y - (row - before - j) * down]


def test_an_image_that_is_no_tiff_has_no_coordinates(tmp_path):
    (tmp_path / "slide.npy").write_bytes(b"no tiff")
    for image in (tmp_path / "slide.npy", tmp_path / "absent.tif"):
        write_tiff(tmp_path / "map.tif", heatmap(np.zeros((4, 4)), (8, 4)), "attention", image)
        with tifffile.TiffFile(tmp_path / "map.tif") as file:
            assert file.pages[0].tags["ModelPixelScaleTag"].value == (1, 2, 0)


# Folders of images

CLASSES = ("cat", "dog", "eel")
ENDINGS = (".geojson", ".json", ".attention.png", ".attention.tif", ".relevance.png", ".relevance.tif")


@pytest.fixture
def folder(tmp_path):
    """Images of three formats in two folders, a broken one, and one with other channels."""
    for k, name in enumerate(["b.tif", "deep/a.npy", "deep/c.PNG"]):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = image_of(15 + k, 9, seed=k).pixels
        if name.endswith("npy"):
            np.save(tmp_path / "in" / name, pixels)
        elif name.endswith("tif"):
            tifffile.imwrite(tmp_path / "in" / name, pixels[..., 0], tile=(16, 16))
        else:
            Image.fromarray(pixels[..., 0]).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def work(output, model=None, made_with="a", **more):
    return Slides(model or classifier(), ClassAnswers(CLASSES), output, {"model": made_with}, **more)


def times(output):
    return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and path.suffix != ".csv"}


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_images_are_found_below_folders_but_not_among_the_outputs(folder):
    assert [slide.name for slide in find([folder])] == ["b.tif", "deep/a.npy", "deep/c.PNG"]
    (folder / "slide.zarr" / "0").mkdir(parents=True)
    (folder / "slide.zarr" / "0" / "x.png").touch()
    (folder / "out").mkdir()
    (folder / "out" / "b.tif.attention.png").touch()
    found = find([folder / "b.tif", folder], folder / "out")
    assert [slide.name for slide in found] == ["b.tif", "deep/a.npy", "deep/c.PNG", "slide.zarr"]
    (folder / "none").mkdir()
    with pytest.raises(InputError, match="none holds no images"):
        find([folder / "none"])
    (folder / "deep" / "b.tif").touch()
    with pytest.raises(InputError, match=r"in/b\.tif and .*deep/b\.tif would both be written as b\.tif"):
        find([folder, folder / "deep"])


def test_every_image_gets_its_files_and_a_line(folder, tmp_path):
    shown = []
    made = work(tmp_path / "out", show=lambda done, of: shown.append((done, of))).run(find([folder]))
    assert made == 3
    assert shown == sorted(shown)
    assert shown[-1] == (3, 3)
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("[!.]*.*")}
    assert names == {
        "results.csv",
        *(name + ending for name in ("b.tif", "deep/a.npy", "deep/c.PNG") for ending in ENDINGS),
    }
    rows = rows_of(tmp_path / "out" / "results.csv")
    assert [row["file"] for row in rows] == [str(slide.path) for slide in find([folder])]
    for row, record in zip(rows, map(read_record, sorted((tmp_path / "out").rglob("*.json"))), strict=True):
        assert row["label"] == record["label"] == max(record["probabilities"], key=record["probabilities"].get)
        assert sum(record["probabilities"].values()) == pytest.approx(1)
    record = read_record(tmp_path / "out" / "deep" / "a.npy.json")
    assert (record["rows"], record["columns"], record["groups"], record["groups_in_all"]) == (16, 9, 6, 6)


def read_record(path):
    return json.loads(path.read_text())


def test_what_is_written_is_what_was_seen(folder, tmp_path):
    model = classifier()
    work(tmp_path / "out", model).run(find([folder / "deep" / "a.npy"]))
    seen = attribute(model, PixelArray(np.load(folder / "deep" / "a.npy")))
    for what in ("attention", "relevance"):
        cells = HeatMap.of(getattr(seen, what), seen.image).cells
        np.testing.assert_allclose(tifffile.imread(tmp_path / "out" / f"a.npy.{what}.tif"), cells, rtol=1e-4, atol=1e-6)
    total = sum(
        feature["properties"]["measurements"]["relevance"]
        for feature in read_record(tmp_path / "out" / "a.npy.geojson")["features"]
        if feature["properties"]["objectType"] == "tile"
    )
    assert total == pytest.approx(float(seen.relevance.sum()), rel=1e-3)


def test_a_run_that_was_killed_goes_on_where_it_was(folder, tmp_path):
    output = tmp_path / "out"

    def kill(done, of):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(output, show=kill).run(find([folder]))
    before = times(output)
    assert len(rows_of(output / "results.csv")) == 2
    # As if killed in the middle of writing: files and scratch of an image without its record, and a torn record.
    (output / "deep" / ".c.PNG.relevance.tif.77.tmp").write_text("torn")
    (output / "deep" / "c.PNG.json").write_text('{"file": ')
    assert work(output).run(find([folder])) == 1
    assert {path: time for path, time in times(output).items() if path in before} == before | {
        path: time for path, time in times(output).items() if path in before and "c.PNG" in path.name
    }
    assert len(rows_of(output / "results.csv")) == 3
    assert not list(output.rglob("*.tmp"))
    after = times(output)
    assert work(output).run(find([folder])) == 0
    assert times(output) == after


@pytest.mark.parametrize("change", ["image", "model", "y", "output"])
def test_what_changed_is_made_anew(folder, tmp_path, change):
    output = tmp_path / "out"
    work(output).run(find([folder]))
    if change == "image":
        np.save(folder / "deep" / "a.npy", image_of(30, 9).pixels)
    if change == "output":
        (output / "deep" / "a.npy.relevance.tif").unlink()
    more = {"model": {"made_with": "b"}, "y": {"y": "up"}}.get(change, {})
    assert work(output, **more).run(find([folder])) == (1 if change in ("image", "output") else 3)
    assert len(rows_of(output / "results.csv")) == 3


def test_the_table_holds_what_earlier_commands_labelled(folder, tmp_path):
    work(tmp_path / "out").run(find([folder / "b.tif"]))
    work(tmp_path / "out").run(find([folder / "deep"]))
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 3


def test_the_same_images_called_otherwise_are_not_made_again(folder, tmp_path, monkeypatch):
    work(tmp_path / "out").run(find([folder]))
    monkeypatch.chdir(folder.parent)
    assert work(tmp_path / "out").run(find(["in"])) == 0
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 3


@pytest.mark.parametrize("way", [plain, Streamed(slice_groups=1)])
def test_an_image_that_is_damaged_in_the_middle_is_broken(folder, tmp_path, way):
    pixels = image_of(64, 64).pixels[..., 0]
    tifffile.imwrite(folder / "b.tif", pixels, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(folder / "b.tif") as file:
        start, count = file.pages[0].dataoffsets[9], file.pages[0].databytecounts[9]
    whole = bytearray((folder / "b.tif").read_bytes())
    whole[start : start + count] = bytes(count)
    (folder / "b.tif").write_bytes(whole)
    model = classifier()
    model.set_execution(way)
    made = work(tmp_path / "out", model)
    assert made.run(find([folder])) == 2
    assert made.broken[str(folder / "b.tif")].what == "unreadable"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [path.name for path in (tmp_path / "out").glob("b.tif*")] == ["b.tif.failed"]


def test_broken_images_are_listed_and_tried_again_once_mended(folder, tmp_path):
    whole = (folder / "b.tif").read_bytes()
    work(tmp_path / "out").run(find([folder]))
    (folder / "b.tif").write_bytes(whole[:100])
    tifffile.imwrite(folder / "colour.tif", np.zeros((16, 16, 3), np.uint8))
    told = []
    again = work(tmp_path / "out", on_broken=lambda file, reason: told.append(file))
    assert again.run([*find([folder]), Slide(folder / "gone.tif", "gone.tif")]) == 0
    names = ["b.tif", "colour.tif", "gone.tif"]
    rows = rows_of(tmp_path / "out" / "broken.csv")
    assert [row["file"] for row in rows] == told == [str(folder / name) for name in names]
    assert all(row["reason"] for row in rows)
    assert {row["what"] for row in rows} == {"unreadable"}
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 2
    (folder / "b.tif").write_bytes(whole)
    (folder / "colour.tif").unlink()
    assert work(tmp_path / "out").run(find([folder])) == 1
    assert not (tmp_path / "out" / "broken.csv").exists()
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 3


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0 no")
    with pytest.raises(InputError, match=r"none of the 1 images can be labelled: .*a\.tif"):
        work(tmp_path / "out").run(find([tmp_path / "a.tif"]))
    with pytest.raises(InputError, match="2 names given to a model of 3 outputs"):
        Slides(classifier(), ClassAnswers(CLASSES[:2]), tmp_path, {})


def test_an_image_of_what_is_no_number_is_broken(folder, tmp_path):
    pixels = np.ones((16, 9, 1), dtype=np.float32)
    pixels[3, 3] = np.nan
    np.save(folder / "b.npy", pixels)
    made = work(tmp_path / "out")
    assert made.run(find([folder])) == 3
    broken = made.broken[str(folder / "b.npy")]
    assert broken.what == "not finite"
    assert "NaN or infinite pixels" in broken.reason


def test_an_image_of_background_alone_is_blank(folder, tmp_path):
    def group(image):
        patch_grid = classifier().patch_grid
        return GroupedImage(
            image, patch_grid, np.full(patch_grid.cover(*image.shape[:2]), not image.path.endswith("a.npy"))
        )

    made = work(tmp_path / "out", group=group)
    assert made.run(find([folder])) == 2
    assert made.broken[str(folder / "deep" / "a.npy")].what == "blank"


SCRATCH = {
    "absent": "there is no folder .*absent",
    "small": "need .* of scratch, and .* has 9 B free",
    "full": "No space left on device",
    "not ours": "Permission denied",
}


@pytest.mark.parametrize("fault", SCRATCH)
def test_a_scratch_disk_that_fails_is_no_broken_image(folder, tmp_path, monkeypatch, fault):
    def fails(code):
        def raising(*given, **more):
            raise OSError(code, os.strerror(code))

        return raising

    if fault == "small":
        monkeypatch.setattr(token_store.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 9}))
    if fault == "full":
        monkeypatch.setattr(os, "posix_fallocate", fails(errno.ENOSPC))
    if fault == "not ours":
        monkeypatch.setattr(token_store.tempfile, "TemporaryFile", fails(errno.EACCES))
    model = classifier()
    model.set_execution(Streamed(keep="disk", folder=tmp_path / ("absent" if fault == "absent" else "")))
    made = work(tmp_path / "out", model)
    with pytest.raises(token_store.ScratchError, match=SCRATCH[fault]):
        made.run(find([folder]))
    assert made.broken == {}


def test_outputs_of_another_image_are_not_written_over(folder, tmp_path):
    (folder / "other").mkdir()
    np.save(folder / "other" / "a.npy", image_of(16, 9, seed=9).pixels)
    one, two = (folder / name / "a.npy" for name in ("deep", "other"))
    # An archive unpacked: the same size, the same time.
    for path in (one, two):
        os.utime(path, (0, 0))
    output = tmp_path / "out"
    work(output).run(find([one]))
    before = times(output)
    with pytest.raises(
        InputError, match=r"out/a\.npy\.\* was made of .*deep/a\.npy, and .*other/a\.npy would be"
    ) as said:
        work(output, made_with="b").run(find([folder / "b.tif", two]))
    assert "another output folder" in str(said.value)
    one.unlink()
    os.utime(two, (1, 1))
    with pytest.raises(InputError, match="would be written over"):
        work(output).run(find([two]))
    assert times(output) == before


def test_an_image_that_was_moved_keeps_its_outputs_under_its_new_name(folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    work(output).run(find([folder]))
    before = {path: time for path, time in times(output).items() if path.suffix != ".json"}
    relevance = folder.rename(tmp_path / "elsewhere")
    made = work(output)
    assert made.run(find([relevance])) == 0
    assert {path: time for path, time in times(output).items() if path.suffix != ".json"} == before
    names = [str(slide.path) for slide in find([relevance])]
    assert [row["file"] for row in rows_of(output / "results.csv")] == names
    assert work(output).run(find([relevance])) == 0
    assert [row["file"] for row in rows_of(output / "results.csv")] == names
    # By a link it is the same file.
    (tmp_path / "link").symlink_to(relevance)
    assert work(output).run(find([tmp_path / "link"])) == 0
    monkeypatch.chdir(relevance)
    assert [slide.name for slide in find(["b.tif", relevance / "b.tif"])] == ["b.tif"]


def test_an_output_that_cannot_be_written_is_no_broken_image(folder, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="out"):
        work(tmp_path / "out").run(find([folder]))


def test_skipped_groups_are_empty_in_the_maps(folder, tmp_path):
    def group(image):
        return GroupedImage(image, classifier().patch_grid, np.arange(6).reshape(2, 3) % 2 == 0)

    work(tmp_path / "out", group=group).run(find([folder / "deep" / "a.npy"]))
    cells = tifffile.imread(tmp_path / "out" / "a.npy.attention.tif")
    assert np.isnan(cells).sum() == 4 * 4 + 4 * 4 + 4 * 1
    assert read_record(tmp_path / "out" / "a.npy.json")["groups"] == 3


# A sure classifier, from its training to what a user reads


def blobs(random, red, blue, side=48):
    """Noise, with red and blue blobs, each in a group of 16 x 16 pixels of its own.

    Returns the pixels, and which of them are red and which blue.
    """
    pixels = random.integers(90, 160, (side, side, 3), dtype=np.uint8)
    where = np.zeros((2, side, side), dtype=bool)
    for k, cell in enumerate(random.permutation((side // 16) ** 2)[: red + blue]):
        top, left = (16 * int(place) + 4 for place in divmod(cell, side // 16))
        pixels[top : top + 8, left : left + 8] = (210, 40, 40) if k < red else (40, 40, 210)
        where[int(k >= red), top : top + 8, left : left + 8] = True
    return pixels, *where


def sure_of(counts, layers, steps):
    """A classifier trained until it is sure, on images of `counts`: pairs of red and blue blobs, of either class."""
    random = np.random.default_rng(2)
    torch.manual_seed(2)
    model = FITImageEncoder.from_config(
        layers=layers, dim=16, latent_dim=16, heads=2, latent_heads=2, latents_per_group=2, image_size=None,
        group_size=16, patch_size=4, channels=3, num_classes=2, latent_position="row_column",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for k in range(steps):
        drawn = [(label, counts[label][(k + j) % len(counts[label])]) for j in range(4) for label in (0, 1)]
        images = [PixelArray(blobs(random, *pair)[0]) for _, pair in drawn]
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([label for label, _ in drawn]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def sure():
    """Class 1 has red blobs, class 0 none: one alone decides."""
    return sure_of([[(0, 6)], [(1, 5), (2, 4), (3, 3)]], "(1)1(1)1", steps=150)


@pytest.fixture(scope="module")
def majority():
    """Class 1 has more red blobs, class 0 more blue ones."""
    return sure_of([[(1, 6), (2, 5), (3, 4)], [(6, 1), (5, 2), (4, 3)]], "(1)1", steps=200)


@pytest.mark.slow
@pytest.mark.parametrize(("red_count", "blue_count"), [(6, 1), (5, 2), (4, 3), (1, 6), (2, 5), (3, 4)])
def test_every_blob_has_the_colour_that_it_has_for_the_decision(majority, tmp_path, red_count, blue_count):
    pixels, *where = blobs(np.random.default_rng(5), red_count, blue_count)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Slides(majority, ClassAnswers(("blue", "red")), tmp_path / "seen", {}, "leave-out").run(find([tmp_path / "a.png"]))
    record = read_record(tmp_path / "seen" / "a.png.json")
    assert record["label"] == ("red" if red_count > blue_count else "blue")
    assert record["log_odds"] > 4
    supporting, opposing = where if record["label"] == "red" else where[::-1]
    with Image.open(tmp_path / "seen" / "a.png.leave-out.png") as file:
        picture = np.asarray(file).astype(int)
    assert (picture[supporting][:, 0] > picture[supporting][:, 2]).all()
    assert (picture[opposing][:, 0] < picture[opposing][:, 2]).all()
    for feature in read_record(tmp_path / "seen" / "a.png.geojson")["features"][1:]:
        top, left, bottom, right = box(feature["geometry"]["coordinates"][0])
        for colour, word in ((supporting, "for"), (opposing, "against")):
            if colour[top:bottom, left:right].any():
                assert feature["properties"]["classification"]["name"] == f"{word} {record['label']}"
                assert (feature["properties"]["measurements"]["leave-out"] > 0) == (word == "for")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_where_a_classifier_is_sure_a_user_reads_the_right_sign_over_what_decides(sure, tmp_path, seed):
    pixels, red, _ = blobs(np.random.default_rng(seed), 1, 5)
    painted = np.where(red[..., None], (40, 40, 210), pixels).astype(np.uint8)
    with torch.no_grad():
        odds = [log_odds_of(sure([PixelArray(each)])[0], 1) for each in (pixels, painted)]
    assert odds[0] > 5
    assert odds[1] < -2
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Slides(sure, ClassAnswers(("plain", "red")), tmp_path / "seen", {}, "leave-out").run(find([tmp_path / "a.png"]))
    with Image.open(tmp_path / "seen" / "a.png.leave-out.png") as file:
        picture = np.asarray(file).astype(int)
    assert (picture[red][:, 0] > picture[red][:, 2] + 50).all()
    blue_most = (picture[..., 2] - picture[..., 0]).max()
    assert blue_most < (picture[red][:, 0] - picture[red][:, 2]).min()
    cells = tifffile.imread(tmp_path / "seen" / "a.png.leave-out.tif")
    over = np.kron(cells, np.ones((4, 4)))[red]
    assert (over > odds[0]).all()
    tiles = {
        (top, left): feature["properties"]
        for feature in read_record(tmp_path / "seen" / "a.png.geojson")["features"]
        if feature["properties"]["objectType"] == "tile"
        for top, left, _, _ in [box(feature["geometry"]["coordinates"][0])]
    }
    place = tuple(int(side) // 16 * 16 for side in np.argwhere(red)[0])
    assert tiles[place]["classification"]["name"] == "for red"
    assert tiles[place]["measurements"] == {"leave-out": pytest.approx(float(over[0]), rel=1e-5)}
    assert max(tiles, key=lambda place: abs(tiles[place]["measurements"]["leave-out"])) == place
    record = read_record(tmp_path / "seen" / "a.png.json")
    assert record["log_odds"] == pytest.approx(odds[0], rel=1e-4)
    assert "agreement" not in record


@pytest.mark.slow
def test_a_map_of_relevance_tells_that_it_is_wrong(sure, tmp_path):
    Image.fromarray(blobs(np.random.default_rng(0), 1, 5)[0]).save(tmp_path / "a.png")
    for method, name in (("gradient", "relevance"), ("attention", "attention")):
        work = Slides(sure, ClassAnswers(("plain", "red")), tmp_path / method, {}, method)
        work.run(find([tmp_path / "a.png"]))
        found = read_record(tmp_path / method / "a.png.json")["agreement"]
        assert (found["of"], found["with"]) == (name, "leave-out")
        assert -1 <= found["rank_correlation"] <= 1
        truth = leave_out(sure, PixelArray(np.asarray(Image.open(tmp_path / "a.png"))))
        assert len(found["groups"]) == 8
        for group in found["groups"]:
            number = truth.image.coords.tolist().index([group["row"] // 16, group["column"] // 16])
            assert group["leave-out"] == pytest.approx(float(truth.added[number]), rel=1e-3, abs=1e-4)
        same = np.mean([np.sign(group[name]) == np.sign(group["leave-out"]) for group in found["groups"]])
        assert found["same_sign"] == (pytest.approx(same) if method == "gradient" else None)
        images, means = work.agreement()
        assert (images, means["rank_correlation"]) == (1, found["rank_correlation"])


# The command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run, untrained, that takes images of any size and skips what is black."""
    tiny = ["dim=16", "latent_dim=16", "heads=2", "latent_heads=2", "latents_per_group=2", "group_size=4"]
    keys = [f"model.{key}" for key in (*tiny, "patch_size=2", "latent_position=row_column", "glimpses=1")]
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return untrained_run(folder, "digits-classify", *keys, "data.image_size=8", "data.background=black")


@pytest.fixture
def slides(tmp_path):
    """A folder of two images, of which the second is half black, and a broken one."""
    (tmp_path / "slides").mkdir()
    pixels = image_of(21, 18).pixels
    tifffile.imwrite(tmp_path / "slides" / "a.tif", pixels[..., 0], tile=(16, 16))
    pixels[:, 8:] = 0
    np.save(tmp_path / "slides" / "b.npy", pixels)
    (tmp_path / "slides" / "c.tif").write_bytes(b"no image")
    return tmp_path / "slides"


def test_the_command_writes_what_was_seen_and_goes_on(run_folder, slides, tmp_path, capsys):
    words = ["predict", run_folder, str(slides), "--output", str(tmp_path / "seen")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'seen'}: 2 of 3 images labelled now, 1 could not be read (broken.csv)\n"
    assert err.startswith(f"fitformer: skipped {slides / 'c.tif'} (")
    assert len(rows_of(tmp_path / "seen" / "results.csv")) == 2
    assert np.isnan(tifffile.imread(tmp_path / "seen" / "b.npy.attention.tif")[:, 4:]).all()
    (slides / "c.tif").unlink()
    assert main([*words, "--keep", "disk"]) == 0
    assert capsys.readouterr().out.endswith(": 0 of 2 images labelled now, 2 were there already\n")


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_nothing_half_done(run_folder, tmp_path, capsys):
    (tmp_path / "slides").mkdir()
    for k in range(40):
        np.save(tmp_path / "slides" / f"{k:02}.npy", image_of(100, 100, seed=k).pixels)
    words = ["predict", run_folder, str(tmp_path / "slides"), "--output", str(tmp_path / "seen")]
    process = subprocess.Popen([sys.executable, "-m", "fitformer", *words], stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "seen").glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    made = len(list((tmp_path / "seen").glob("*.json")))
    assert main(words) == 0
    assert f"{40 - made} of 40 images labelled now, {made} were there already" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "seen" / "results.csv")) == 40
    assert len(list((tmp_path / "seen").glob("[!.]*"))) == 40 * len(ENDINGS) + 1


def test_the_command_labels_alone_without_a_folder(run_folder, slides, tmp_path, capsys):
    main(["predict", run_folder, str(slides), "--output", str(tmp_path / "seen")])
    capsys.readouterr()
    assert main(["predict", run_folder, str(slides)]) == 0
    out, err = capsys.readouterr()
    assert "c.tif" in err
    for row, seen in zip(csv.DictReader(out.splitlines()), rows_of(tmp_path / "seen" / "results.csv"), strict=True):
        assert (row["file"], row["label"]) == (seen["file"], seen["label"])
        assert float(row["probability"]) == pytest.approx(float(seen["probability"]), abs=2e-6)
    assert main(["predict", run_folder, str(slides), "--output", str(tmp_path / "labels.json")]) == 0
    assert len(read_record(tmp_path / "labels.json")) == 2


def test_the_command_counts_apart_what_could_not_be_labelled(run_folder, slides, tmp_path, capsys):
    np.save(slides / "black.npy", np.zeros((9, 9, 1), dtype=np.uint8))
    np.save(slides / "nan.npy", np.where(np.eye(9)[..., None] > 0, np.nan, 1).astype(np.float32))
    # A run that did not write down what kind of pixels it was trained on takes floats, too.
    shutil.copytree(run_folder, tmp_path / "run")
    known = tmp_path / "run" / "data.json"
    known.write_text(json.dumps({k: v for k, v in json.loads(known.read_text()).items() if k != "pixels"}))
    assert main(["predict", str(tmp_path / "run"), str(slides), "--output", str(tmp_path / "seen")]) == 0
    assert capsys.readouterr().out.endswith(
        ": 2 of 5 images labelled now, 1 could not be read, 1 blank, 1 with NaN or infinite pixels (broken.csv)\n"
    )
    found = {row["file"]: row["what"] for row in rows_of(tmp_path / "seen" / "broken.csv")}
    assert found == {
        str(slides / "black.npy"): "blank",
        str(slides / "c.tif"): "unreadable",
        str(slides / "nan.npy"): "not finite",
    }


@pytest.mark.parametrize("output", ["seen", "labels.csv"])
def test_the_command_ends_where_there_is_no_scratch_and_says_the_way_out(run_folder, slides, tmp_path, capsys, output):
    words = ["predict", run_folder, str(slides), "--output", str(tmp_path / output)]
    assert main([*words, "--scratch", str(tmp_path / "absent")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"there is no folder {tmp_path / 'absent'}" in line
    assert line.endswith("; here: --scratch FOLDER, or --keep memory")
    assert main([*words, "--scratch", str(tmp_path / "absent"), "--keep", "memory"]) == 2
    error = capsys.readouterr().err
    assert "--scratch" in error
    assert "--keep is memory" in error
    assert main([*words, "--scratch", str(tmp_path)]) == 0


def test_the_command_ends_where_there_is_no_folder_of_masks(run_folder, slides, tmp_path, capsys):
    other = shutil.copytree(run_folder, tmp_path / "run")
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("masks: null", f"masks: {tmp_path / 'absent'}"))
    for output in ([], ["--output", str(tmp_path / "seen")]):
        assert main(["predict", str(other), str(slides), *output]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"there is no folder {tmp_path / 'absent'} of masks" in line


def test_the_command_says_in_a_line_what_is_wrong(run_folder, slides, tmp_path, capsys):
    def refusal(*words):
        assert main(["predict", run_folder, *map(str, words)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "none of the 1 images can be labelled" in refusal(slides / "c.tif", "--output", tmp_path / "seen")
    assert "none of the 1 files can be read" in refusal(slides / "c.tif")
    assert "--format is for labels alone" in refusal(slides, "--output", tmp_path / "seen", "--format", "csv")
    assert "a.tif is a file" in refusal(slides, "--output", slides / "a.tif")


MADE = {
    "leave-out": {".leave-out.png", ".leave-out.tif", ".geojson", ".json"},
    "gradient": set(ENDINGS),
    "attention": {".attention.png", ".attention.tif", ".geojson", ".json"},
}


@pytest.fixture(scope="module")
def one_size_run(tmp_path_factory):
    """A run, untrained, that takes images of 8 x 8."""
    tiny = ["dim=16", "latent_dim=16", "heads=2", "latent_heads=2", "latents_per_group=2", "group_size=4"]
    keys = [f"model.{key}" for key in (*tiny, "patch_size=2")]
    return untrained_run(tmp_path_factory.mktemp("runs") / "digits", "digits-classify", *keys, "data.image_size=8")


@pytest.fixture
def photos(tmp_path):
    """A folder of a photo of another size, one of 8 x 8, and a broken one."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    Image.fromarray(image_of(21, 18).pixels[..., 0]).save(tmp_path / "photos" / "a.png")
    Image.fromarray(image_of(8, 8).pixels[..., 0]).save(tmp_path / "photos" / "deep" / "b.png")
    (tmp_path / "photos" / "c.png").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.mark.parametrize("method", MADE)
@pytest.mark.parametrize("size", ["any", "one"])
def test_the_command_explains_in_three_ways_images_of_any_size_and_of_one(
    run_folder, one_size_run, slides, photos, tmp_path, capsys, method, size
):
    run, images, names = {
        "any": (run_folder, slides, ("a.tif", "b.npy")), "one": (one_size_run, photos, ("a.png", "deep/b.png"))
    }[size]  # fmt: skip
    output = tmp_path / "seen"
    words = ["predict", run, str(images), "--output", str(output), "--explain", method]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}: 2 of 3 images labelled now, 1 could not be read (broken.csv)\n"
    assert (f"fitformer: {method} against leave-out, largest groups of 2 images" in err) == (method != "leave-out")
    made = {path.relative_to(output).as_posix() for path in output.rglob("[!.]*.*")}
    (failed,) = (path.relative_to(output).as_posix() for path in output.rglob("*.failed"))
    outputs = {name + ending for name in names for ending in MADE[method]}
    assert made == {"results.csv", "broken.csv", failed} | outputs
    records = [read_record(output / f"{name}.json") for name in names]
    assert all(record["made_with"]["explain"] == method for record in records)
    assert all(("agreement" in record) == (method != "leave-out") for record in records)
    assert main(words) == 0
    assert "0 of 3 images labelled now, 2 were there already" in capsys.readouterr().out
    main(["predict", run, str(images)])
    for row, seen in zip(csv.DictReader(capsys.readouterr().out.splitlines()), records, strict=True):
        assert row["label"] == seen["label"]
        assert float(row["probability"]) == pytest.approx(seen["probability"], abs=2e-6)


def test_maps_of_images_of_one_size_are_of_what_the_model_sees(one_size_run, photos, tmp_path):
    words = ["predict", one_size_run, str(photos), "--output", str(tmp_path / "seen"), "--explain", "leave-out"]
    assert main([*words, "--y", "up"]) == 0
    model = FITImageEncoder.from_pretrained(f"{one_size_run}/model").eval()
    for name, file in (("a.png", photos / "a.png"), ("deep/b.png", photos / "deep" / "b.png")):
        pixels = fit(np.asarray(Image.open(file))[..., None], (8, 8))
        found = leave_out(model, PixelArray(pixels))
        cells = tifffile.imread(tmp_path / "seen" / f"{name}.leave-out.tif")
        np.testing.assert_allclose(cells, HeatMap.of(found.values, found.image).cells, rtol=1e-4, atol=1e-6)
        with Image.open(tmp_path / "seen" / f"{name}.leave-out.png") as picture:
            assert picture.size == (8, 8)
        record = read_record(tmp_path / "seen" / f"{name}.json")
        assert (record["rows"], record["columns"], record["groups"]) == (8, 8, 4)
        assert record["made_with"]["resize"] == "crop"
        boxes = [box(feature["geometry"]["coordinates"][0]) for feature in read_record(
            tmp_path / "seen" / f"{name}.geojson")["features"]]  # fmt: skip
        assert boxes == [(-8, 0, 0, 8), (-4, 0, 0, 4), (-4, 4, 0, 8), (-8, 0, -4, 4), (-8, 4, -4, 8)]


def test_a_folder_means_maps_and_a_file_labels_also_of_images_of_one_size(one_size_run, photos, tmp_path):
    words = ["predict", one_size_run, str(photos), "--output"]
    assert main([*words, str(tmp_path / "seen")]) == 0
    assert (tmp_path / "seen" / "a.png.relevance.png").is_file()
    for more in ([str(tmp_path / "labels.txt")], [str(tmp_path / "labels"), "--format", "json"]):
        assert main([*words, *more]) == 0
        assert (tmp_path / more[0]).is_file()


def test_the_command_says_in_a_line_what_cannot_be_explained(run_folder, one_size_run, photos, tmp_path, capsys):
    def refusal(run, *words):
        assert main(["predict", run, *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error.splitlines()[-1]

    for run in (run_folder, one_size_run):
        said = refusal(run, photos, "--explain", "leave-out")
        assert "--explain leave-out is for a folder, and there is no --output; give --output FOLDER" in said
        said = refusal(run, photos, "--explain", "attention", "--output", tmp_path / "labels.csv")
        assert "labels.csv; give --output FOLDER" in said
        assert "--y up is for a folder" in refusal(run, photos, "--y", "up")
    assert "for a run that takes images of any size" in refusal(one_size_run, photos, "--keep", "disk")
    assert main(["predict", one_size_run, str(photos), "--output", str(tmp_path / "seen")]) == 0
    before = times(tmp_path / "seen")
    said = refusal(one_size_run, photos, "--output", tmp_path / "seen", "--explain", "leave-out")
    assert "was made with --explain gradient, and leave-out would be written over it; give another" in said
    assert times(tmp_path / "seen") == before
    assert "invalid choice: 'shap'" in refusal(run_folder, photos, "--explain", "shap")
    other = shutil.copytree(one_size_run, tmp_path / "run")
    about = read_record(other / "model" / "config.json")
    one_group = FITImageEncoder.from_config(**SIZE, layers="(1)1", image_size=8, group_size=8, patch_size=2, channels=1,
                                            num_classes=10)  # fmt: skip
    one_group.save_pretrained(other / "model")
    assert about != read_record(other / "model" / "config.json")
    said = refusal(str(other), photos, "--output", tmp_path / "other", "--explain", "leave-out")
    assert "cuts every image into 1 group, and to leave one out takes at least 2" in said
    assert "--explain gradient" in said


@pytest.mark.parametrize("method", MADE)
def test_an_image_of_one_group_is_labelled_and_its_map_of_leaving_out_is_empty(run_folder, tmp_path, method):
    np.save(tmp_path / "a.npy", 1 + image_of(4, 3).pixels // 2)
    words = ["predict", run_folder, str(tmp_path / "a.npy"), "--output", str(tmp_path / "seen"), "--explain", method]
    assert main(words) == 0
    (row,) = rows_of(tmp_path / "seen" / "results.csv")
    assert 0 < float(row["probability"]) < 1
    kinds = [
        feature["properties"]["objectType"] for feature in read_record(tmp_path / "seen" / "a.npy.geojson")["features"]
    ]
    # A glimpse of the image stays when its group is left out.
    assert kinds.count("tile") == 1
    if method == "leave-out":
        assert kinds.count("detection") == 0
    else:
        assert read_record(tmp_path / "seen" / "a.npy.json")["agreement"]["rank_correlation"] is None


def test_the_only_group_without_a_glimpse_is_grey(tmp_path):
    np.save(tmp_path / "a.npy", image_of(8, 4).pixels)
    work(tmp_path / "out", method="leave-out").run(find([tmp_path / "a.npy"]))
    assert np.isnan(tifffile.imread(tmp_path / "out" / "a.npy.leave-out.tif")).all()
    with Image.open(tmp_path / "out" / "a.npy.leave-out.png") as picture:
        pixels = np.asarray(picture).astype(int)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert len(read_record(tmp_path / "out" / "a.npy.geojson")["features"]) == 1
