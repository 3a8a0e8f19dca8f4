"""The comparisons of benchmarks/, at toy sizes: what is counted, what is measured, that they resume, that each runs."""

import gzip
import importlib
import json
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parents[1] / "benchmarks"
TRUNK = {"layers": "(1)1(1)", "dim": 16, "latent_dim": 16, "heads": 2, "latent_heads": 2, "latents_per_group": 2}
WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in TRUNK.items()] + ["--points", "2", "--threads", "1"]
VOCABULARY, N = 7, 4
DATA = torch.randint(VOCABULARY, (400,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def script(monkeypatch):
    """Runs a script of benchmarks/ with words, and gives what it printed."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        importlib.import_module(name).main()

    return run


@pytest.fixture
def next_token(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("next_token")


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("budgeted_training")


def entry(next_token, name="FIT", length=16, **settings):
    def fit():
        return next_token.fit_decoder(VOCABULARY, N, **TRUNK)

    make = fit if name == "FIT" else lambda: next_token.dense_decoder(fit)
    settings = next_token.TokenSettings(1e-2, 2, length=length, **settings)
    return importlib.import_module("race").Entry(name, make, settings, partial(next_token.TokenRun, tokens_per_group=N))


@pytest.mark.parametrize("name", ["FIT", "dense"])
def test_a_step_costs_three_passes_and_half_of_causal_attention(next_token, name):
    run = entry(next_token, name).run()
    tokens, c = 2 * 16, 16
    if name == "dense":
        layer = run.network.layers[0]
        dim, depth = run.network.dim, len(run.network.layers)
        # Every token attends to (16 + 1) / 2 others on average.
        a_token = depth * (4 * dim**2 + 3 * dim * layer.outer.in_features + 17 * dim) + dim * VOCABULARY
    else:
        # Two local layers, write and read, a global layer; two latents for four tokens. Read and write project
        # queries and results of their own tokens, keys and values of the others'.
        local = 2 * (12 * c**2 + 5 * c)
        a_latent = 12 * c**2 + 2 * 8 * c
        cross = 2 * c**2 + 0.5 * 2 * c**2 + 2 * 2 * c
        back = 0.5 * (2 * c**2 + 2 * 4 * c) + 2 * c**2
        a_token = local + 0.5 * a_latent + cross + back + c * VOCABULARY
    assert run.step_flops(16, 2) == pytest.approx(3 * 2 * tokens * a_token)


def test_held_out_counts_every_token_once_with_the_context_of_its_window(next_token):
    run = entry(next_token).run()
    network, data = run.network.eval(), DATA[:50]
    each = run.held_out(data, overlap=0.5, batch=2)
    # Windows of 16 from 0, 8, 16, 24 and 32 on; 50 tokens are 12 groups.
    assert len(each) == 48

    def window(start):
        with torch.no_grad():
            return next_token.nats(network, data[None, start : start + 16].long(), N)[0].double()

    torch.testing.assert_close(each[:16], window(0))
    torch.testing.assert_close(each[16:24], window(8)[8:])
    torch.testing.assert_close(each[40:], window(32)[8:])
    table = data[:48].view(3, 16)
    torch.testing.assert_close(run.held_out(table), torch.cat([window(0), window(16), window(32)]))
    torch.testing.assert_close(run.held_out(data[:43])[-8:], window(24)[-8:])


def test_places_of_a_group_are_averaged_in_spans_that_double(next_token):
    found = next_token.by_place(torch.arange(24).double() % 8, 8)
    assert found == {"0": 0, "1": 1, "2 to 3": 2.5, "4 to 7": 5.5}


@pytest.mark.parametrize("name", ["FIT", "dense"])
def test_a_training_that_resumes_equals_one_that_was_never_interrupted(next_token, training, name, tmp_path):
    def trained(stops):
        for stop in stops:
            run = entry(next_token, name, short=8, short_share=0.45).run()
            budget = training.Budget(flops=5 * run.step_flops(8, 4) + 5 * run.step_flops(16, 2))

            def batch(settings, step):
                return next_token.windows(DATA, settings, step)

            def evaluate(run, stop=stop):
                if run.steps >= stop:
                    raise KeyboardInterrupt
                return 0.0

            try:
                training.train(run, batch, budget, evaluate, points=5, checkpoint=file, save_every=0)
            except KeyboardInterrupt:
                continue
        return run

    file = tmp_path / "whole.pt"
    whole = trained([99])
    file = tmp_path / "parts.pt"
    parts = trained([3, 7, 99])
    assert whole.steps == parts.steps == 10
    for ours, wanted in zip(parts.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_the_first_part_of_a_training_reads_more_and_shorter_examples(next_token, training):
    run, seen = entry(next_token, short=8, short_share=0.5).run(), []

    def batch(settings, step):
        seen.append((settings.batch, settings.length))
        return next_token.windows(DATA, settings, step)

    half = 6 * run.step_flops(8, 4)
    training.train(run, batch, training.Budget(flops=2 * half), lambda run: 0.0)
    assert seen[:6] == [(4, 8)] * 6
    assert set(seen[6:]) == {(2, 16)}
    assert run.flops == pytest.approx(half + (len(seen) - 6) * run.step_flops(16, 2))


def test_the_learning_rate_rises_and_falls_on_lines(training):
    settings = training.Settings(1.0, 8, warmup=0.2, end=0.1)
    rates = [training.rate(share, settings) for share in (0, 0.1, 0.2, 0.6, 1)]
    assert rates == pytest.approx([0.01, 0.5, 1, 0.55, 0.1])


def test_budgets_are_read(training):
    read = training.Budget.of
    assert [read("90s"), read("2m"), read("1e14")] == [
        training.Budget(seconds=90),
        training.Budget(seconds=120),
        training.Budget(flops=1e14),
    ]


def results(folder):
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def test_bytes_are_compared_at_equal_compute_and_what_is_done_is_not_done_again(script, tmp_path, capsys):
    words = [*WORDS, "--budget", "2e8", "--length", 64, "--contexts", "16,32", "--tokens-per-group", 16]
    words += ["--tokens-per-step", 128, "--most-held-out", 600, "--output", tmp_path]
    script("bytes_against_dense", *words)
    said, found = capsys.readouterr().out, results(tmp_path)
    assert "of its bits per byte" in said
    assert sorted(each["settings"]["seed"] for each in found) == [0, 0, 0, 1, 1]
    for each in found:
        assert 2e8 <= each["flops"] < 2.3e8
        assert 4 < each["value"] < 9
        assert len(each["curve"]) == 2
    script("bytes_against_dense", *words)
    assert "%" not in capsys.readouterr().out
    assert results(tmp_path) == found


def test_processes_share_the_trainings_of_a_comparison(script, tmp_path, capsys):
    words = [*WORDS, "--budget", "1e8", "--length", 64, "--contexts", "16,32", "--tokens-per-group", 16, "--seeds", 1]
    words += ["--tokens-per-step", 128, "--most-held-out", 300, "--output", tmp_path]
    for part, names in (("1/2", ["FIT, context 64", "dense, context 32"]), ("2/2", ["dense, context 16"])):
        script("bytes_against_dense", *words, "--part", part)
        said = capsys.readouterr().out
        assert [line.split(", rate")[0] for line in said.splitlines() if "rate" in line] == names
    script("bytes_against_dense", *words)
    said = capsys.readouterr().out
    assert "%" not in said
    assert said.count("| FIT") + said.count("| dense") == len(results(tmp_path)) == 3
    for words in (["--budget", "9s", "--part", "1/2"], ["--budget", "1e8", "--part", "3/2"]):
        with pytest.raises(SystemExit):
            script("bytes_against_dense", *words)


def test_shakespeare_trains_fit_and_the_dense_one_to_the_flops_that_fit_spent(script, tmp_path, capsys):
    text = tmp_path / "input.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 40)
    words = ["--data", text, "--budget", "1s", "--dense", "--seeds", 1, "--length", 32, "--tokens-per-group", 8]
    script("shakespeare", *words, *WORDS, "--output", tmp_path / "out")
    fit, dense = sorted(results(tmp_path / "out"), key=lambda each: each["entry"] != "FIT")
    assert fit["seconds"] >= 1
    # Up to a step, whose size hangs on the machine.
    assert 0 <= dense["flops"] - fit["flops"] < dense["flops"] / dense["steps"]
    assert fit["characters"] == 172 // 8 * 8
    assert fit["value"] > 0
    assert list(fit["by_place"]) == ["0", "1", "2 to 3", "4 to 7"]
    assert "| FIT, seed 0 |" in capsys.readouterr().out


def test_fashion_pixels_are_compared(script, tmp_path, capsys):
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("t10k", 3)):
        for kind, array in (
            ("images-idx3", random.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", np.arange(count, dtype=np.uint8)),
        ):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    words = ["--data", tmp_path, "--budget", "1e9", "--seeds", 1, "--batch", 1]
    script("fashion_pixels", *words, *WORDS, "--output", tmp_path / "out")
    fit, dense = sorted(results(tmp_path / "out"), key=lambda each: each["entry"] != "FIT")
    assert (fit["images"], dense["images"]) == (3, 3)
    assert 7 < fit["value"] < 9
    assert "bits per dimension" in capsys.readouterr().out


@pytest.fixture
def cifar10(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("cifar10")


def test_shifted_and_flipped_images_are_windows_of_padded_ones(cifar10, training):
    images = torch.randint(1, 256, (5, 32, 32, 3), dtype=torch.uint8)
    settings = training.Settings(1.0, 8)
    seen, labels = cifar10.batch_of((images, torch.arange(5)), settings, 3)
    padded = torch.nn.functional.pad(images, (0, 0, 4, 4, 4, 4))
    for image, label in zip(seen, labels.tolist(), strict=True):
        windows = [padded[label, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
        assert any(torch.equal(image, each) or torch.equal(image, each.flip(1)) for each in windows)
    again, _ = cifar10.batch_of((images, torch.arange(5)), settings, 3)
    assert torch.equal(seen, again)


def test_fit_and_vit_are_compared_at_equal_flops_on_images(script, tmp_path, capsys):
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in map(str, range(10)):
            (folder := tmp_path / part / name).mkdir(parents=True)
            for k in range(10):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{part}{k}.png")
    words = ["--data", tmp_path, "--budget", "5e8", "--seeds", 1, "--batch", 4, "--vit-dim", 16, "--vit-heads", 2]
    script("cifar10", *words, *WORDS, "--output", tmp_path / "out")
    fit, vit = results(tmp_path / "out")
    assert fit["name"].startswith("FIT")
    # As near as whole layers allow.
    assert vit["image_flops"] == pytest.approx(fit["image_flops"], rel=0.3)
    assert 0 <= fit["test_error"] <= 100
    assert fit["test_images"] == 100
    assert "percent of the test part" in capsys.readouterr().out


@pytest.mark.slow
def test_a_long_step_equals_the_plain_one_where_both_fit(script, capsys):
    words = [word for word in WORDS if not word.startswith("--p") and word != "2"]
    script("long_step", *words, "--length", 4000, "--check", 900, "--tokens-per-group", 50)
    lines = capsys.readouterr().out.splitlines()
    plain, streamed, long = (line.strip("| ").split(" | ") for line in lines[2:5])
    assert [plain[0], streamed[0], long[0]] == ["900", "900", "4,000"]
    assert plain[7] == streamed[7]
    assert float(lines[6].split(": ")[1].split()[0]) < 1e-5
