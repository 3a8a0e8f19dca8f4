import json

import pytest

from fitformer.cli import main


def plan(capsys, *words, status=0):
    assert main(["plan", *words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *words, verb="plan"):
    assert main([verb, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


TINY = ("--preset", "tiny", "--image-size", "512x640")


def test_a_plan_says_what_there_is_and_where_memory_goes(capsys):
    found = plan(capsys, *TINY, "--group-size", "128")
    assert (found["groups"], found["tokens"], found["tokens_per_group"]) == (20, 32 * 40, 64)
    assert found["latents"] == 20 * 4
    parts = ("weights", "optimizer", "kept", "working", "process", "slack")
    assert sum(found["memory"][part] for part in parts) == found["memory"]["total"]
    assert found["memory"]["weights"] == found["memory"]["optimizer"] == 8 * found["parameters"]
    assert found["fits"]


def test_a_budget_decides_how_to_run(capsys):
    words = ("--preset", "small", "--image-size", "6400", "--group-size", "400")
    assert plan(capsys, *words)["setup"]["execution"] == "plain"
    tight = plan(capsys, *words, "--memory", "2GB")
    assert tight["setup"]["execution"] == "streamed"
    assert tight["memory"]["total"] <= 2e9
    tightest = plan(capsys, *words, "--memory", "1.54GB")
    assert tightest["setup"]["slice_groups"] < tight["setup"]["slice_groups"]
    assert tightest["memory"]["total"] <= 1.54e9


def test_what_does_not_fit_says_what_would(capsys):
    words = ("--preset", "base", "--image-size", "1600", "--group-size", "400", "--memory", "2GB")
    found = plan(capsys, *words, "--execution", "plain", status=1)
    assert not found["fits"]
    assert "plain execution needs" in found["verdict"]
    assert "of 2 GB" in found["verdict"]
    assert "the preset small" in found["verdict"]
    slices = plan(capsys, *words[:-1], "3GB", "--execution", "plain", status=1)
    assert "but streamed execution in slices" in slices["verdict"]


def test_the_table_ends_in_one_line_with_the_verdict(capsys):
    assert main(["plan", *TINY, "--group-size", "128", "--memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("groups", "latents", "FLOPs", "kept tokens", "working set", "peak memory"))
    assert out.splitlines()[-1].startswith("fits: plain execution needs")


@pytest.mark.parametrize("role", ["segmenter", "denoiser", "decoder"])
def test_other_roles_are_planned_too(capsys, role):
    size = ("--image-size", "32", "--group-size", "8") if role == "decoder" else (*TINY[2:], "--group-size", "128")
    found = plan(capsys, "--preset", "tiny", "--role", role, *size)
    assert found["tokens_per_group"] == (8 * 8 * 3 if role == "decoder" else 64)


def test_a_segmenter_is_planned_with_its_pixels(capsys):
    words = (*TINY, "--group-size", "128", "--role", "segmenter", "--num-classes", "5")
    found = plan(capsys, *words)
    assert plan(capsys, *words, "--refinement", "0")["memory"]["working"] < found["memory"]["working"] / 2
    assert plan(capsys, *TINY, "--group-size", "128")["memory"]["working"] < found["memory"]["working"] / 2
    assert plan(capsys, *words[:-1], "50")["memory"]["working"] > 1.5 * found["memory"]["working"]
    tight = plan(capsys, *words, "--memory", "600MB")
    assert tight["setup"]["execution"] == "streamed"
    assert tight["memory"]["total"] < 600e6 < found["memory"]["total"]
    assert "the preset slide" in plan(capsys, *words, "--preset", "base", "--memory", "700MB", status=1)["verdict"]


def test_bad_input_is_one_line(capsys):
    assert "--refinement is of the role segmenter" in refusal(capsys, *TINY, "--refinement", "4")
    denoiser = ("--role", "denoiser", "--num-classes", "4")
    assert "of the role encoder or segmenter, and the role is denoiser" in refusal(capsys, *TINY, *denoiser)
    assert "--image-size" in refusal(capsys, "--preset", "tiny")
    assert "no preset 'smal'" in refusal(capsys, "--preset", "smal", "--image-size", "512")
    assert "'much'" in refusal(capsys, *TINY, "--memory", "much")
    assert "--slice is for streamed execution" in refusal(capsys, *TINY, "--execution", "plain", "--slice", "2")
    assert "does not divide" in refusal(capsys, *TINY, "--group-size", "100")
    assert "its patch size is 1" in refusal(capsys, *TINY, "--role", "decoder", "--patch-size", "4")
    assert "several --sizes" in refusal(capsys, "scaling", *TINY, verb="bench")
    assert "are for `fitformer bench scaling`" in refusal(capsys, "step", *TINY, "--output", "a.png", verb="bench")
    assert "does not fit" in refusal(capsys, "step", *TINY, "--group-size", "128", "--memory", "1MB", verb="bench")
