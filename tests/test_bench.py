import json
import math
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from fitformer._support.system_memory import peak_bytes, trim_heap
from fitformer.cli import main
from fitformer.data.readers import open_image
from fitformer.errors import InputError
from fitformer.execution import Streamed, checkpointed, plain
from fitformer.profiling import Geometry, PlanRequest
from fitformer.profiling.benchmark import Bench, measure
from fitformer.profiling.losses import loss_of
from fitformer.profiling.scaling import exponent, scaling
from fitformer.profiling.synthetic_image import write_image

SIZES = {"layers": "(1)1(1)1", "dim": 16, "latent_dim": 16, "heads": 2, "latent_heads": 2, "latents_per_group": 2}


def geometry(role, **cut):
    sizes = dict(SIZES, layers="(1)1(1)") if role != "encoder" else SIZES
    cut = {"image_size": 8, "patch_size": 1, "group_size": 4} if role == "decoder" else cut
    return Geometry(role, sizes, **{"image_size": 96, "patch_size": 8, "group_size": 32, **cut})


def test_a_generated_image_is_the_same_every_time_and_no_two_tiles_are_alike(tmp_path):
    for name in ("a.tif", "b.tif"):
        write_image(tmp_path / name, 700, 1100)
    first, second = (open_image(tmp_path / name) for name in ("a.tif", "b.tif"))
    assert first.shape == (700, 1100, 3)
    pixels = first.window(0, 0, 700, 1100)
    assert (pixels == second.window(0, 0, 700, 1100)).all()
    assert not (pixels[:188, :512] == pixels[512:, :512]).all()
    assert pixels.astype(np.float32).std() > 10


@pytest.mark.parametrize("role", ["encoder", "segmenter", "denoiser", "decoder"])
def test_every_way_to_run_measures_the_same_step(role, tmp_path):
    path = tmp_path / "image.tif"
    asked = geometry(role)
    write_image(path, *asked.image_size)
    import fitformer

    name, config = asked.config()
    torch.manual_seed(0)
    model = getattr(fitformer, name).from_config(config)
    losses, gradients = [], []
    for way in (plain, checkpointed, Streamed(2)):
        model.set_execution(way)
        model.zero_grad()
        loss = loss_of(model, asked, [open_image(path)], torch.device("cpu"))()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    if role == "denoiser":
        # Its noise is drawn slice by slice: another slice is other noise.
        assert losses[0] == losses[1]
        return
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_step_is_measured_and_its_file_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = measure(Bench(geometry("encoder"), PlanRequest(execution="streamed", slice_groups=2), steps=2, warmup=1))
    assert len(found.seconds) == len(found.cpu_seconds) == 2
    assert min(found.seconds) > 0
    assert found.peak > 50e6
    assert math.isfinite(found.loss)
    assert found.rate == pytest.approx(found.plan.flops.total / found.second)
    assert list(tmp_path.iterdir()) == []


def test_the_peak_grows_with_what_is_allocated():
    before = peak_bytes(torch.device("cpu"))
    torch.ones(30_000_000)
    assert peak_bytes(torch.device("cpu")) >= before
    torch.ones((before + 50_000_000) // 4)
    assert peak_bytes(torch.device("cpu")) > before + 40_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_in_the_middle_of_the_heap_is_given_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Small enough for the heap, and every other one stays: the holes between them are not its end.
    tensors = [torch.ones(2**13) for _ in range(12800)]
    del tensors[::2]
    before = resident()
    trim_heap()
    assert resident() < before - 100e6
    assert len(tensors) == 6400


def test_a_file_of_ones_own_is_measured_from_the_command_line(capsys, tmp_path):
    path = tmp_path / "own.tif"
    write_image(path, 70, 96)
    words = ["--preset", "tiny", "--group-size", "32", "--patch-size", "8", "--execution", "streamed", "--keep", "disk"]
    assert main(["bench", "step", "--image", str(path), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["image_size"], found["groups"], found["keep"]) == ("70 x 96", 9, "disk")
    assert main(["bench", "step", "--image", str(path), *words]) == 0
    assert "peak memory" in capsys.readouterr().out.splitlines()[-1]
    assert main(["bench", "step", "--image", str(path), "--image-size", "800", *words]) == 2
    assert "--image-size is of a generated image" in capsys.readouterr().err


def test_exponents_of_power_laws_are_found():
    lengths = [10, 20, 80]
    fit = exponent(lengths, [3 * length**1.5 for length in lengths])
    assert fit.exponent == pytest.approx(1.5)
    assert fit.at(7) == pytest.approx(3 * 7**1.5)
    with pytest.raises(InputError, match="two different lengths"):
        exponent([5, 5], [1, 2])


@pytest.mark.slow
def test_scaling_runs_each_size_in_its_own_process_and_draws_it(capsys, tmp_path):
    plot = tmp_path / "scaling.png"
    words = ["--preset", "tiny", "--group-size", "32", "--patch-size", "8", "--execution", "streamed"]
    assert main(["bench", "scaling", "--sizes", "64,96", *words, "--output", str(plot)]) == 0
    said = capsys.readouterr().out
    found = json.loads(plot.with_suffix(".json").read_text())
    assert [step["tokens"] for step in found["steps"]] == [64, 144]
    assert set(found["exponents"]) == {"time", "cpu_time", "memory", "attention", "operations"}
    assert "exponents against tokens" in said
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_size_that_fails_is_named():
    with pytest.raises(InputError, match=r"bench step --image-size 64.*does not fit"):
        scaling([64, 96], ["--preset", "tiny", "--group-size", "32", "--patch-size", "8", "--memory", "1MB"], print)
