"""Generation measured at several positions, at toy sizes: what is compared, counted and printed."""

import json
import time

import pytest
import torch

from fitformer.cli import main
from fitformer.errors import InputError
from fitformer.models.config import TrunkConfig
from fitformer.profiling import generation_benchmark
from fitformer.profiling.generation_benchmark import (
    WAYS,
    DenseCached,
    FITCached,
    GenerationBench,
    greedy,
    measure_generation,
    measure_products,
    ratios,
    share_lost,
)
from fitformer.profiling.product_times import record_products, replay

pytestmark = pytest.mark.usefixtures("one_thread")

TRUNK = {"layers": "(1)1(1)", "dim": 16, "latent_dim": 16, "heads": 2, "latent_heads": 2, "latents_per_group": 2}
WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in TRUNK.items()]
WORDS += ["--tokens-per-group", "8", "--repeats", "1"]


def bench(**options):
    return GenerationBench(
        TrunkConfig(**TRUNK), **{"tokens_per_group": 8, "positions": (40, 20), "repeats": 2, **options}
    )


def test_every_way_is_measured_at_every_position_and_they_have_equal_parameters():
    told = []
    found = measure_generation(bench(batch=2), told.append)
    assert told == found["rows"]
    assert [row["position"] for row in found["rows"]] == [20, 40]
    for row in found["rows"]:
        for name in WAYS:
            assert row[name]["tokens_per_second"] == pytest.approx(2 / row[name]["seconds"])
            assert min(row[name]["all_seconds"]) <= row[name]["seconds"] <= max(row[name]["all_seconds"])
    # Keys and values of every token, of 2 rows; FIT's grows by its latents alone.
    dense = found["dense"]
    assert found["rows"][0]["dense_cached"]["cache_bytes"] == 2 * 2 * dense["depth"] * dense["dim"] * 20 * 4
    assert ratios(found)[1]["cache"] > ratios(found)[0]["cache"]
    assert found["rows"][0]["fit_uncached"]["cache_bytes"] == 0
    assert -10 < found["slowdown"] < 1


def test_the_share_of_speed_that_is_lost_has_the_right_sign():
    class Sleeper:
        def __init__(self, seconds):
            self.seconds, self.at = seconds, None

        def stand_at(self, position):
            self.at = position

        def loop(self):
            return lambda: (time.sleep(self.seconds), torch.zeros(1))[1]

    quick, slow = Sleeper(0.01), Sleeper(0.05)
    assert 0.5 < share_lost(bench(), quick, slow) < 0.9
    assert share_lost(bench(), slow, quick) < 0
    assert (quick.at, slow.at) == (20, 20)


def test_fit_stands_in_the_group_of_a_position_and_each_measurement_begins_there():
    asked = bench()
    way = FITCached(asked, asked.decoder())
    for position, start in ((20, 16), (40, 40)):
        way.stand_at(position)
        for _ in range(2):
            way.loop()()
            assert way.state.position == [start]


def test_dense_measurements_begin_at_the_position_too():
    asked = bench()
    way = DenseCached(asked, generation_benchmark.dense_like(asked.decoder()))
    assert way.stand_at(20)
    for _ in range(2):
        way.loop()()
        assert way.state.position == [20 + way.tokens]
    size = way.cache_bytes()
    way.stand_at(40)
    assert way.cache_bytes() == 2 * size


def test_what_takes_too_much_is_left_out(monkeypatch):
    monkeypatch.setattr(generation_benchmark, "UNCACHED_SECONDS", 0)
    monkeypatch.setattr(generation_benchmark, "available_memory", lambda device: 0)
    found = measure_generation(bench())
    assert [row["fit_uncached"] is None for row in found["rows"]] == [False, True]
    assert [row["dense_cached"] for row in found["rows"]] == [None, None]
    assert ratios(found) == []


def test_products_are_those_of_the_layers_and_run_again_with_the_same_result():
    asked = bench(positions=(20,))
    found = measure_products(asked)
    assert found["fit"]["ratio"] > 0
    # Of a token: in two local layers queries, keys and values at once, attention, output and two of the feed-forward;
    # in write queries, attention and output; logits. Of a group of 8: read, a global layer, keys and values of write.
    assert found["fit"]["products"] == pytest.approx(2 * 5 + 3 + 1 + (5 + 7 + 2) / 8)
    way = FITCached(asked, asked.decoder())
    way.stand_at(20)
    calls = record_products(way.loop())
    assert len(calls) == 8 * found["fit"]["products"]
    assert replay(calls).shape == (1, 1, 256)
    with pytest.raises(InputError, match="no matrix product"):
        record_products(lambda: torch.ones(2) + 1)


def test_the_command_prints_writes_and_draws(capsys, tmp_path):
    plot = tmp_path / "generation.png"
    assert main(["bench", "generate", *WORDS, "--positions", "20,40", "--output", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "40: FIT, cached" in said
    assert "from position 20 to 40 FIT's speed falls by" in said
    assert [row["position"] for row in json.loads(plot.with_suffix(".json").read_text())["rows"]] == [20, 40]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "generate", *WORDS, "--positions", "20", "--products", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["product_seconds"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step", "--image-size", "64", "--positions", "20"], "--positions is for"),
        (["generate", "--image-size", "64"], "--image-size is for training"),
        (["generate", "--positions", "0"], "position is 0"),
        (["generate", "--preset", "huge"], "no preset 'huge'"),
    ],
)
def test_options_that_do_not_apply_are_refused(words, said, capsys):
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_loop_feeds_each_row_its_own_likeliest_token():
    fed = []

    class Echo:
        def feed(self, state, tokens, last):
            fed.append(tokens.clone())
            logits = torch.zeros(2, 1, 256)
            logits[0, 0, 5] = logits[1, 0, 7] = 1
            return logits

    assert greedy(bench(batch=2), Echo(), None, 2).tolist() == [[5], [7]]
    assert [tokens.flatten().tolist() for tokens in fed] == [[0, 0], [5, 7]]
