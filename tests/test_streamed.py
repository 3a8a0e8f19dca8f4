"""Every way to run equals the plain one: outputs and all gradients, with dropout on, for any slice."""

import errno
import os
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fitformer
from fitformer.errors import InputError
from fitformer.execution import Inputs, Streamed, _streamed_pass, checkpointed, plain, token_store
from fitformer.patching.any_size import GroupedImage, PixelArray
from small_models import DROPS, ROLES, SIZES, N, T, check_equal, denoise, denoiser, encode, encoder, mask_of, outcome

WAYS = [
    checkpointed,
    Streamed(1),
    Streamed(3),
    Streamed(100),
    Streamed(2, keep="disk"),
    Streamed(2, keep="host"),
    Streamed(2, recompute="local"),
    Streamed(3, keep="disk", recompute="selective"),
    Streamed(2, recompute="light"),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_way_equals_plain_with_dropout_on(role, dtype, way):
    build, call = ROLES[role]
    model = build(**DROPS).to(dtype)
    check_equal(outcome(model, call, way), outcome(model, call, plain))


OPTIONS = [{"mask": "causal"}, {"y_channels": 3}, {"latent_position": "row_column"}, {"qk_norm": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_the_encoder_stream(options):
    model = encoder(**options)

    def call(model, x):
        return model(x, *([torch.ones(2, T, 2, 3)] if "y_channels" in options else []))

    check_equal(outcome(model, call, Streamed(2)), outcome(model, call, plain))


def test_dropout_does_drop_and_slices_do_not_change_it():
    model = encoder(**DROPS)
    first, other = (outcome(model, encode, Streamed(2), seed)[0][0] for seed in (3, 4))
    assert not torch.allclose(first, other)


def inputs_of(model, x, score=None, depends_on=(), **more):
    def read(groups):
        return x[:, groups], mask_of(x)[:, groups]

    scored = None if score is None else (lambda groups, x, mask: score(groups, model.head(x), mask))
    more = {"embed": lambda groups, raw: model.embed(raw), **more}
    latents = model.trunk.initial_latents(2, T)
    return Inputs(read, latents, score=scored, parameters=model.all_parameters(*depends_on), **more)


def total(model, inputs):
    outputs = model.execute(inputs)
    return outputs.score, outputs.latents


def noisy_score(groups, out, mask):
    # A caller's own randomness, drawn slice by slice.
    return (F.dropout(out, 0.5) * mask[..., None]).square().sum(dim=(1, 2)).mean(0)


@given(size=st.integers(1, T + 2), keep=st.sampled_from(["memory", "disk"]))
@settings(max_examples=12, deadline=None)
def test_scores_add_up_whatever_the_slice(size, keep):
    model, x = encoder(), torch.randn(2, T, N, 5, generator=torch.Generator().manual_seed(0))

    def score(groups, out, mask):
        return (out * mask[..., None]).square().sum(dim=(1, 2))

    results = []
    for way in (plain, Streamed(size, keep)):
        model.set_execution(way)
        model.zero_grad()
        added, latents = total(model, inputs_of(model, x, score))
        (added.sum().sqrt() + latents.square().sum()).backward()
        results.append(([added.detach(), latents.detach()], {name: p.grad for name, p in model.named_parameters()}))
    check_equal(results[1], results[0])


def test_the_random_state_of_scores_is_restored_in_the_backward_pass():
    """The gradient is that of the very numbers drawn in the forward pass, seen by finite differences."""
    model = encoder().double()
    x = torch.randn(2, T, N, 5, dtype=torch.float64)
    gate = torch.ones(2, T, 1, 1, dtype=torch.float64, requires_grad=True)
    model.set_execution(Streamed(2))

    def value():
        torch.manual_seed(7)
        inputs = inputs_of(
            model, x, noisy_score, embed=lambda groups, raw: model.embed(raw) * gate[:, groups], depends_on=[gate]
        )
        return total(model, inputs)[0].sum()

    value().backward()
    slope = gate.grad[1, 4].item()
    with torch.no_grad():
        gate[1, 4] += 1e-6
        above = value()
        gate[1, 4] -= 2e-6
        below = value()
    assert slope == pytest.approx((above - below).item() / 2e-6, rel=1e-5)


def test_accumulated_gradients_are_those_of_plain():
    model, results = encoder(**DROPS), []
    for way in (plain, Streamed(3)):
        model.set_execution(way)
        model.zero_grad()
        torch.manual_seed(0)
        for _ in range(3):
            x, latents = model(torch.randn(2, T, N, 5))
            (x.square().mean() + latents.square().mean()).backward()
        results.append(([torch.zeros(())], {name: p.grad for name, p in model.named_parameters()}))
    check_equal(results[1], results[0])


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    model = encoder()
    model.stem.requires_grad_(False)
    model.trunk.blocks[0].requires_grad_(False)

    def call(model, x):
        return model(x.detach())

    ours, plainly = (outcome(model, call, way) for way in (Streamed(2), plain))
    assert ours[1].pop("x") is plainly[1].pop("x") is None
    check_equal(ours, plainly)
    assert model.stem.projection.weight.grad is None


def test_what_was_freed_is_given_back_where_there_are_many_slices(monkeypatch):
    given = []
    monkeypatch.setattr(_streamed_pass, "trim_heap", lambda: given.append(1))
    model = encoder()
    model.set_execution(Streamed(1))
    # Of each of two blocks: after every second of seven slices and the whole block, and backward after each phase.
    for many, times in ((2, 2 * (3 + 1) + 2 * 2), (8, 0)):
        monkeypatch.setattr(_streamed_pass, "MANY_SLICES", many)
        given.clear()
        model(torch.randn(1, T, N, 5))[1].sum().backward()
        assert len(given) == times


def test_without_gradients_one_room_serves_all_blocks(monkeypatch):
    make_stores = []
    make = token_store.MemoryStore.__init__
    monkeypatch.setattr(
        token_store.MemoryStore, "__init__", lambda self, *a: (make_stores.append(a[0]), make(self, *a))[1]
    )
    model = denoiser().eval()
    x = torch.randn(2, T, N, 5)
    with torch.no_grad():
        expected = denoise(model, x)[0]
        model.set_execution(Streamed(2))
        torch.testing.assert_close(denoise(model, x)[0], expected)
    assert len(make_stores) == 1


def test_bf16_tokens_are_near_and_not_exact():
    model = denoiser()
    near, exact = (outcome(model, denoise, way)[0][0] for way in (Streamed(2, precision="bf16"), plain))
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(near, exact)


def test_mixed_precision_is_entered_again():
    model, results = encoder(), []
    for way in (plain, Streamed(3)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(outcome(model, encode, way))
    for name, wanted in results[0][1].items():
        if wanted is not None:
            torch.testing.assert_close(results[1][1][name], wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())


def test_a_second_backward_pass_is_refused():
    model = encoder()
    model.set_execution(Streamed(2))
    loss = model(torch.randn(1, T, N, 5))[1].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def open_scratch():
    here = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [os.readlink(fd) for fd in here if os.path.lexists(fd) and "(deleted)" in os.readlink(fd)]


def test_scratch_has_no_name_and_goes_with_the_pass(tmp_path):
    model = encoder()
    model.set_execution(Streamed(2, keep="disk", folder=tmp_path))
    before = len(open_scratch())
    loss = model(torch.randn(1, T, N, 5))[1].sum()
    assert not list(tmp_path.iterdir())
    assert len(open_scratch()) == before + 1
    loss.backward()
    assert len(open_scratch()) == before
    model(torch.randn(1, T, N, 5))  # and with a pass that is thrown away
    assert len(open_scratch()) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(token_store.shutil, "disk_usage", lambda folder: usage)
    model = encoder()
    model.set_execution(Streamed(2, keep="disk", folder=tmp_path))
    with pytest.raises(token_store.ScratchError, match=r"need .* of scratch, and .* has 1 KB free"):
        model(torch.randn(1, T, N, 5))
    model.set_execution(Streamed(2, keep="disk", folder=tmp_path / "absent"))
    with pytest.raises(token_store.ScratchError, match="there is no folder"):
        model(torch.randn(1, T, N, 5))


def test_a_disk_that_fails_in_mid_step_leaves_nothing_behind(tmp_path, monkeypatch):
    writes, real = [], os.pwrite

    def failing(*given):
        writes.append(given)
        if len(writes) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    monkeypatch.setattr(token_store.os, "pwrite", failing)
    model = encoder()
    model.set_execution(Streamed(1, keep="disk", folder=tmp_path))
    before = len(open_scratch())
    with pytest.raises(OSError, match=r"scratch for data tokens") as caught:
        model(torch.randn(1, T, N, 5))[1].sum().backward()
    assert caught.value.filename == str(tmp_path)
    del caught
    assert not list(tmp_path.iterdir())
    assert len(open_scratch()) == before


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("layers", ["(1)2(2)1", "(2)1"])
def test_layers_that_the_loss_does_not_use_get_no_gradient(layers, used):
    """Not even zeros, with which an optimizer would decay their weights."""
    torch.manual_seed(0)
    model = fitformer.FITEncoder.from_config(layers=layers, num_groups=T, tokens_per_group=N, in_channels=5, **SIZES)

    def call(model, x):
        return [model(x)[used]]

    check_equal(outcome(model, call, Streamed(2)), outcome(model, call, plain))


def test_what_is_named_twice_gets_its_gradient_once():
    model, results = encoder(), []
    x = torch.randn(2, T, N, 5, generator=torch.Generator().manual_seed(0))
    for way in (plain, Streamed(2)):
        model.set_execution(way)
        model.zero_grad()
        inputs = inputs_of(model, x, lambda groups, out, mask: out.pow(3).sum(), depends_on=list(model.parameters()))
        total(model, inputs)[0].backward()
        results.append(([torch.zeros(())], {name: p.grad for name, p in model.named_parameters()}))
    check_equal(results[1], results[0])


def test_mixed_precision_of_the_backward_pass_is_not_entered():
    model, seen = encoder(), []
    model.set_execution(Streamed(3))

    def score(groups, out, mask):
        seen.append(torch.is_autocast_enabled("cpu"))
        return out.sum()

    added, _ = total(model, inputs_of(model, torch.ones(2, T, N, 5), score))
    with torch.autocast("cpu", torch.bfloat16):
        added.backward()
    assert seen == [False] * 6


def test_nothing_of_a_pass_outlives_its_backward_pass():
    """Neither what it kept, though the loss is still there, nor a second copy of the gradients."""
    model = encoder()
    model.set_execution(Streamed(2))
    _, latents = model(torch.randn(1, T, N, 5))
    node = latents.grad_fn
    while type(node).__name__ != "_StreamBackward":
        node = node.next_functions[0][0]
    done, sums = weakref.ref(node.streamed), {}
    node.register_hook(lambda found, _: sums.update({g.data_ptr(): g.shape for g in found if g is not None}))
    latents.pow(3).sum().backward()
    assert done() is None
    blocks = [p.grad for p in model.trunk.blocks.parameters() if p.grad is not None]
    assert all(gradient.data_ptr() in sums for gradient in blocks)


@pytest.mark.parametrize("keep", ["memory", "host", "disk"])
def test_evaluation_streams(keep):
    model = encoder().eval()
    x = torch.randn(1, T, N, 5)
    with torch.inference_mode():
        wanted = model(x)[1]
        model.set_execution(Streamed(2, keep))
        torch.testing.assert_close(model(x)[1], wanted)


def test_an_error_in_the_middle_ends_the_reading_and_the_scratch(tmp_path):
    model = encoder()
    model.set_execution(Streamed(1, keep="disk", folder=tmp_path))
    before = len(open_scratch()), threading.active_count()
    for fails_backward in (False, True):

        def score(groups, out, mask, fails_backward=fails_backward):
            if groups.start == 3 and out.requires_grad == fails_backward:
                raise InputError("no such score")
            return out.sum()

        with pytest.raises(InputError, match="no such score") as caught:  # noqa: PT012
            added, _ = total(model, inputs_of(model, torch.ones(2, T, N, 5), score))
            added.backward()
        # The error is still there, and all that it came through.
        assert caught.tb is not None
        assert (len(open_scratch()), threading.active_count()) == before


def test_scratch_for_all_blocks_is_asked_for_at_once(tmp_path, monkeypatch):
    model = denoiser()
    size = T * N * SIZES["dim"] * 4
    monkeypatch.setattr(token_store.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2 * 2 * size - 1}))
    model.set_execution(Streamed(2, keep="disk", folder=tmp_path))
    with pytest.raises(token_store.ScratchError, match="of scratch"):
        denoise(model, torch.randn(2, T, N, 5))
    with torch.no_grad():  # needs one room only
        denoise(model, torch.randn(2, T, N, 5))


def test_an_error_of_the_reader_reaches_the_caller():
    model = encoder()
    model.set_execution(Streamed(2))

    def read(groups):
        if groups.start > 2:
            raise InputError("the file broke")
        return torch.zeros(1, groups.stop - groups.start, N, 5), None

    with pytest.raises(InputError, match="the file broke"):
        model.execute(Inputs(read, model.trunk.initial_latents(1, T), lambda groups, raw: model.embed(raw)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slice_groups": 0}, "slice_groups is 0"),
        ({"keep": "tape"}, "keep is 'tape'; it must be one of memory, host, disk"),
        ({"precision": "fp4"}, "precision is 'fp4'"),
    ],
)
def test_ways_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        Streamed(**options)


# ---------------------------------------------------------------------------------------------- images of any size


def image_encoder(layers="(1)2(2)1", **options):
    torch.manual_seed(0)
    return fitformer.FITImageEncoder.from_config(
        layers=layers,
        image_size=None,
        group_size=(8, 12),
        patch_size=4,
        channels=2,
        num_classes=3,
        latent_position="row_column",
        **SIZES,
        **options,
    )


def picture(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 2), dtype=np.uint8)


PICTURES = [(29, 50), (8, 12), (3, 70), (29, 50), (16, 24)]


@pytest.mark.parametrize("layers", ["(1)2(2)1", "(1)2(1)"])
@pytest.mark.parametrize("glimpses", [0, 2])
def test_a_batch_of_mixed_sizes_equals_the_images_one_by_one(layers, glimpses):
    model = image_encoder(layers, glimpses=glimpses)
    images = [PixelArray(picture(*size, seed)) for seed, size in enumerate(PICTURES)]
    together = model(images)
    alone = torch.cat([model([image]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert len(torch.unique(together, dim=0)) == len(PICTURES)


@pytest.mark.parametrize("layers", ["(1)2(2)1", "(1)2(1)"])
def test_images_stream_as_they_run_plainly(layers):
    model = image_encoder(layers, glimpses=1, **DROPS)
    images = [PixelArray(picture(*size, seed)) for seed, size in enumerate(PICTURES[:2])]
    results = []
    for way in (plain, Streamed(2, keep="disk")):
        model.set_execution(way)
        model.zero_grad()
        torch.manual_seed(0)
        logits = model(images)
        F.cross_entropy(logits, torch.tensor([0, 2])).backward()
        results.append(([logits], {name: p.grad for name, p in model.named_parameters()}))
    check_equal(results[1], results[0])


def test_pixels_of_a_slice_are_read_when_its_turn_comes():
    read = []

    class Noting(PixelArray):
        def window(self, *place):
            read.append(place)
            return super().window(*place)

    model = image_encoder()
    model.set_execution(Streamed(3))
    logits = model([Noting(picture(29, 50))])
    windows = len(read)
    assert windows == 4 * 5
    logits.sum().backward()
    assert len(read) == 2 * windows


@pytest.mark.parametrize("layers", ["(1)2(2)1", "(1)2(1)"])
def test_a_masked_token_changes_nothing(layers):
    """Neither in the outputs nor in the gradients, whatever it holds."""
    model, image = image_encoder(layers), GroupedImage(PixelArray(picture(29, 50)), image_encoder().patch_grid)
    read, mask, results = image.read, image.mask(slice(None)), []
    assert mask is not None
    assert 0 < int((~mask).sum()) < mask.numel()
    for fill in (None, 0, 201):

        def refilled(groups, fill=fill):
            tokens, mask = read(groups)
            return tokens if fill is None else tokens.masked_fill(~mask[..., None], fill), mask

        image.read = refilled
        model.zero_grad()
        logits = model([image])
        logits.square().sum().backward()
        results.append(([logits], {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0][0], results[1][0][0])
    check_equal(results[1], results[0])
    check_equal(results[2], results[0])


def test_empty_groups_are_skipped_and_cost_nothing():
    model, pixels = image_encoder(), picture(32, 48)
    occupied = np.ones((4, 4), dtype=bool)
    occupied[1, 2] = occupied[3] = False
    logits = model([GroupedImage(PixelArray(pixels), model.patch_grid, occupied)])
    changed = pixels.copy()
    changed[8:16, 24:36] = 0
    changed[24:] = 255
    image = GroupedImage(PixelArray(changed), model.patch_grid, occupied)
    assert image.num_groups == 11
    assert torch.equal(model([image]), logits)
    assert not torch.allclose(model([PixelArray(changed)]), model([PixelArray(pixels)]))


def test_where_a_group_stands_is_known_to_the_model():
    model, pixels = image_encoder(), picture(8, 12)
    corner, far = (np.zeros((4, 4), dtype=bool) for _ in range(2))
    corner[0, 0] = far[2, 3] = True
    tiled = PixelArray(np.tile(pixels, (4, 4, 1)))
    one, other = (model([GroupedImage(tiled, model.patch_grid, where)]) for where in (corner, far))
    assert not torch.allclose(one, other, atol=1e-4)


def test_a_glimpse_sees_what_was_skipped():
    model, pixels = image_encoder(glimpses=1), picture(32, 48)
    occupied = np.zeros((4, 4), dtype=bool)
    occupied[0, 0] = True
    changed = pixels.copy()
    changed[24:] = 255
    before, after = (
        model([GroupedImage(PixelArray(each), model.patch_grid, occupied, glimpses=1)]) for each in (pixels, changed)
    )
    assert not torch.allclose(before, after, atol=1e-4)


def test_whole_images_of_one_size_are_those_of_the_fixed_table():
    """Reading group by group with a table of positions is exactly what the tensor path does."""
    torch.manual_seed(0)
    model = fitformer.FITImageEncoder.from_config(
        layers="(1)2(1)1", image_size=(16, 24), group_size=(8, 12), patch_size=4, channels=2, num_classes=3, **SIZES
    )
    pixels = np.stack([picture(16, 24, seed) for seed in range(2)])
    signal = torch.from_numpy(pixels).float() / 127.5 - 1
    expected = model(signal)
    torch.testing.assert_close(model([PixelArray(each) for each in pixels]), expected)
    model.set_execution(Streamed(1))
    torch.testing.assert_close(model(signal), expected)
    torch.testing.assert_close(model([PixelArray(each) for each in pixels]), expected)


def test_feature_maps_of_any_size():
    model = image_encoder("(1)2(1)")
    occupied = np.ones((4, 5), dtype=bool)
    occupied[0, 0] = False
    image = GroupedImage(PixelArray(picture(29, 50)), model.patch_grid, occupied)
    (maps,) = model.forward_features([image])
    assert maps.shape == (8, 8, 13)
    assert torch.equal(maps[:, :2, :3], torch.zeros(8, 2, 3))
    assert bool((maps[:, 2:] != 0).any(0).all())


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_sixteen_bits_and_floats_are_the_same_pictures(dtype):
    model, pixels = image_encoder(), picture(16, 24)
    other = (pixels.astype(np.uint16) * 257) if dtype == np.uint16 else (pixels / 127.5 - 1).astype(np.float32)
    torch.testing.assert_close(model([PixelArray(other)]), model([PixelArray(pixels)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_run_in_the_precision_of_the_weights(dtype):
    model, pixels = image_encoder("(1)2(1)").to(dtype), picture(16, 24)
    signal = pixels / 127.5 - 1
    for image in (PixelArray(pixels), PixelArray(signal), torch.from_numpy(signal).to(dtype)):
        assert model([image]).dtype == dtype
        assert model.forward_features([image])[0].dtype == dtype


def test_images_that_cannot_be():
    model = image_encoder()
    with pytest.raises(InputError, match="coords of 3 groups given for an input of 7"):
        encoder(latent_position="row_column")(torch.ones(1, T, N, 5), coords=torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(InputError, match="has 3 channels, the model was built for 2"):
        model([PixelArray(np.zeros((8, 8, 3), np.uint8))])
    with pytest.raises(InputError, match=r"4 groups.* none"):
        GroupedImage(PixelArray(picture(16, 24)), model.patch_grid, np.zeros((2, 2), bool))
    with pytest.raises(InputError, match=r"2 x 2 .*3 x 2"):
        GroupedImage(PixelArray(picture(16, 24)), model.patch_grid, np.ones((3, 2), bool))
    with pytest.raises(InputError, match="is a table"):
        fitformer.FITImageEncoder.from_config(layers="(1)1", image_size=None, group_size=8, patch_size=4, **SIZES)
    fixed = fitformer.FITImageEncoder.from_config(
        layers="(1)1", image_size=(16, 24), group_size=(8, 12), patch_size=4, channels=2, **SIZES
    )
    with pytest.raises(InputError, match=r"8 x 24.*16 x 24"):
        fixed([PixelArray(picture(8, 24))])


# ------------------------------------------------------------------------------------------------------ processes


def _rank(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = []
    for way in (plain, Streamed(2), Streamed(2, recompute="light")):
        model = image_encoder(drop_path=0.2)
        model.set_execution(way)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        torch.manual_seed(rank)
        for step in range(2):  # the first one accumulates alone
            with wrapped.no_sync() if step == 0 else torch.enable_grad():
                wrapped([PixelArray(picture(29, 50, rank + step))]).square().sum().backward()
        results.append(([torch.zeros(())], {name: p.grad for name, p in model.named_parameters()}))
    for found in results[1:]:
        check_equal(found, results[0])
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_across_processes_are_those_of_plain(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("role", ROLES)
def test_every_way_equals_plain_on_a_gpu(role, way):
    build, call = ROLES[role]
    torch.set_default_device("cuda")
    try:
        model = build(**DROPS).double().cuda()
        check_equal(outcome(model, call, way), outcome(model, call, plain))
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("way", [checkpointed, Streamed(2), Streamed(3, keep="disk")], ids=str)
def test_tokens_of_every_block_and_the_score_at_once_have_their_gradients(way):
    model, results = encoder(**DROPS).double(), []
    for each in (plain, way):
        model.set_execution(each)
        model.zero_grad()
        torch.manual_seed(0)
        x = torch.randn(2, T, N, 5, dtype=torch.float64, requires_grad=True)
        inputs = model.inputs(x, mask=mask_of(x), blocks=(0, 1))
        inputs = replace(inputs, score=lambda groups, x, mask: (x * mask[..., None]).pow(3).sum())
        outputs = model.execute(inputs)
        first, second = outputs.tokens
        (outputs.score + first.sin().sum() + second.cos().sum() + outputs.latents.square().sum()).backward()
        results.append(
            ([first, second, outputs.score], {n: p.grad for n, p in model.named_parameters()} | {"x": x.grad})
        )
    check_equal(results[1], results[0])


@pytest.mark.parametrize("size", [None, (16, 24)])
def test_feature_maps_stream(size):
    options = {"latent_position": "row_column"} if size is None else {}
    model = fitformer.FITImageEncoder.from_config(
        layers="(1)2(2)1(1)", image_size=size, group_size=(8, 12), patch_size=4, channels=2, **SIZES, **options
    ).eval()
    images = torch.randn(2, 16, 24, 2) if size else [torch.randn(13, 30, 2), torch.randn(16, 24, 2)]
    plainly = [model.forward_features(images), *model.forward_intermediates(images, [0, -1])]
    model.set_execution(Streamed(1))
    streamed = [model.forward_features(images), *model.forward_intermediates(images, [0, -1])]
    torch.testing.assert_close(streamed, plainly)
    torch.testing.assert_close(streamed[0], streamed[2])


def test_set_execution_takes_names_and_reaches_the_encoder_of_images():
    model = fitformer.FITImageEncoder.from_preset("tiny", image_size=16, group_size=8, patch_size=4)
    model.set_execution("checkpointed")
    assert model.execution is model.encoder.execution is checkpointed
    with pytest.raises(InputError, match="plain, checkpointed, streamed"):
        model.set_execution("stremed")
