"""Steps on sequences from the command line: a decoder's `--length`."""

import json

import pytest

from fitformer.cli import main

TINY = ["--role", "decoder", "--preset", "tiny"]


def test_a_sequence_is_planned_in_groups_that_are_given_or_chosen(capsys):
    assert main(["plan", *TINY, "--length", "1000000", "--tokens-per-group", "500", "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert (given["tokens"], given["groups"], given["tokens_per_group"], given["latents"]) == (10**6, 2000, 500, 8000)
    assert main(["plan", *TINY, "--length", "1000000", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["tokens"] == 10**6
    assert sum(chosen["flops"].values()) < sum(given["flops"].values())


def test_a_million_bytes_fit_a_budget_that_is_far_below_all_logits(capsys):
    words = ["--length", "1000000", "--tokens-per-group", "500", "--memory", "1.2GB", "--execution", "streamed"]
    assert main(["plan", *TINY, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    # In float32 the logits alone are 1.02 GB, their gradient as much again.
    assert found["memory"]["working"] + found["memory"]["kept"] < 1.02e9


def test_a_step_on_a_sequence_is_measured(capsys):
    words = ["--length", "90", "--tokens-per-group", "20", "--execution", "streamed", "--slice", "2"]
    assert main(["bench", "step", *TINY, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["groups"], found["group_size"]) == (90, 5, "1 x 20")
    assert 0 < found["loss"] < 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--length", "90"], "add --role decoder"),
        (["plan", *TINY, "--tokens-per-group", "20"], "add --length"),
        (["plan", *TINY, "--length", "90", "--image-size", "20"], "--image-size of an image"),
        (["bench", "step", *TINY, "--length", "90", "--image", "a.tif"], "a.tif has its own size"),
        (["bench", "generate", "--length", "90"], "--length is for training steps"),
        (["plan", *TINY], "--length 1000000"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err
