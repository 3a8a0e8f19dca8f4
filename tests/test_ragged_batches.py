"""Images with different numbers of groups in one pass: outputs and gradients are those of one image at a time."""

import numpy as np
import pytest
import torch

import fitformer
from fitformer.execution import Streamed, checkpointed, plain
from fitformer.execution.examples import Examples
from fitformer.patching.any_size import GroupedImage, PixelArray, in_a_row, together

WAYS = [plain, checkpointed, Streamed(2), Streamed(3, keep="disk"), Streamed(recompute="light")]
OPTIONS = {
    "latents": {"layers": "(1)2(2)1"},
    "tokens": {"layers": "(1)2(1)"},
    "causal": {"layers": "(1)1(1)1", "mask": "causal"},
    "causal, one latent": {"layers": "(1)1(1)1", "mask": "causal", "latents_per_group": 1},
    "glimpses": {"layers": "(1)1(1)1", "glimpses": 2},
}


def model_of(layers="(1)2(2)1", **options):
    torch.manual_seed(0)
    sizes = {"latents_per_group": 2, "dim": 8, "latent_dim": 12, "heads": 2, "latent_heads": 3}
    return fitformer.FITImageEncoder.from_config(
        layers=layers,
        image_size=None,
        group_size=(8, 12),
        patch_size=4,
        channels=2,
        num_classes=3,
        **({"latent_position": "row_column"} | sizes | options),
    ).double()


def picture(random):
    """An image of any size, some groups of which are skipped."""
    rows, columns = random.integers(1, 60, 2)
    pixels = random.integers(0, 256, (rows, columns, 2), np.uint8)
    occupied = random.random((-(-rows // 8), -(-columns // 12))) < 0.6
    occupied.flat[0] = True
    return PixelArray(pixels), occupied


def batch_of(model, seed, size=5):
    random = np.random.default_rng(seed)
    drawn = [picture(random) for _ in range(size)]
    return [GroupedImage(pixels, model.patch_grid, kept, model.glimpses) for pixels, kept in drawn]


def outcome(model, batches, way=plain):
    """Logits, and gradients of a function of them that tells images apart."""
    model.set_execution(way)
    model.zero_grad()
    logits = torch.cat([model(batch) for batch in batches])
    (logits.square() * torch.arange(1, len(logits) + 1)[:, None]).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def check_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_a_ragged_batch_equals_its_images_one_by_one_in_every_way(kind, seed):
    model = model_of(**OPTIONS[kind])
    images = batch_of(model, seed)
    assert len({image.num_groups for image in images}) > 1
    alone = outcome(model, [[image] for image in images])
    for way in WAYS:
        check_same(outcome(model, [images], way), alone)


def test_images_of_a_ragged_batch_may_stand_in_any_order():
    model = model_of()
    images = batch_of(model, 7)
    order = np.random.default_rng(0).permutation(len(images))
    torch.testing.assert_close(model([images[k] for k in order]), model(images)[order], rtol=1e-10, atol=1e-10)


def test_ragged_images_with_pixels_of_several_kinds_are_scaled_each_by_its_own():
    model, random = model_of(), np.random.default_rng(0)
    images = [
        PixelArray(random.integers(0, 256, (8, 12, 2), np.uint8)),
        PixelArray(random.integers(0, 65536, (16, 12, 2), np.uint16)),
        PixelArray(random.normal(size=(8, 36, 2))),
    ]
    alone = torch.cat([model([image]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-10, atol=1e-10)
    # Nor does it matter that all have as many groups.
    same = [PixelArray(np.ascontiguousarray(image.window(0, 0, 8, 12))) for image in images]
    alone = torch.cat([model([image]) for image in same])
    torch.testing.assert_close(model(same), alone, rtol=1e-10, atol=1e-10)


def test_any_slice_of_a_row_is_read_from_the_images_that_it_touches():
    images = batch_of(model_of(glimpses=1), 3)
    tokens, mask = in_a_row(images, slice(None))
    assert mask is not None
    total = sum(image.num_groups for image in images)
    assert tokens.shape[:2] == (1, total)
    for first in range(0, total, 3):
        found, seen = in_a_row(images, slice(first, first + 4))
        assert torch.equal(found, tokens[:, first : first + 4])
        wanted = mask[:, first : first + 4]
        assert bool(wanted.all()) if seen is None else torch.equal(seen, wanted)


def test_a_row_of_examples_is_laid_apart_and_joined_again():
    examples, row = Examples((2, 1, 4)), torch.randn(1, 7, 3)
    apart = examples.apart(row)
    assert apart.shape == (3, 4, 3)
    assert not apart[~examples.mask].any()
    assert torch.equal(apart[examples.mask], row[0])
    assert torch.equal(examples.joined(apart), row)
    torch.testing.assert_close(examples.sums(row), apart.sum(1))
    parts = [examples.sums(row[:, k : k + 2], slice(k, k + 2)) for k in range(0, 7, 2)]
    torch.testing.assert_close(torch.stack(parts).sum(0), apart.sum(1))


def test_images_run_together_unless_one_would_be_filled_up_to_many_times_its_groups():
    class Counted:
        def __init__(self, num_groups):
            self.num_groups = num_groups

    assert together([Counted(k) for k in (3, 64, 1)]) == [[2, 0, 1]]
    assert together([Counted(k) for k in (300, 60, 65, 150, 120)]) == [[1, 2, 4], [3, 0]]
    assert together([]) == []
