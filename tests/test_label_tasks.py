"""Regression, several labels and survival: losses and metrics against obvious ones, and runs by the command line."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score, f1_score, r2_score, roc_auc_score

from fitformer import FITImageEncoder
from fitformer.cli import main
from fitformer.cli.evaluate import tables
from fitformer.config import load as config
from fitformer.errors import InputError
from fitformer.inference.predictor import Predictor
from fitformer.models.heads import risk, survival
from fitformer.tasks import build_model, multilabel, regress
from fitformer.tasks import survival as survival_task
from fitformer.tasks.answers import LabelAnswers, NumberAnswers, RiskAnswers
from fitformer.tasks.concordance import concordance_index, cox_loss
from fitformer.tasks.survival import hazard_loss
from helpers import slide_of_features, write_features

pytestmark = pytest.mark.usefixtures("one_thread")


def observations(seed, count=40, times=12):
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 9, (count,), generator=random).double(),
        torch.randint(0, times, (count,), generator=random).double(),
        (torch.rand(count, generator=random) < 0.6).double(),
    )


@pytest.mark.parametrize("seed", range(3))
def test_concordance_is_the_share_of_pairs_in_order(seed):
    risks, times, events = observations(seed)
    right, pairs = 0.0, 0
    for i in range(len(risks)):
        for j in range(len(risks)):
            before = times[i] < times[j] or (times[i] == times[j] and not events[j])
            if i != j and events[i] and before:
                pairs += 1
                right += 1.0 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0.0
    assert concordance_index(risks, times, events) == pytest.approx(right / pairs, abs=1e-12)
    assert concordance_index(-times, times, torch.ones(40)) == 1
    assert concordance_index(times, times, torch.ones(40)) == 0
    assert math.isnan(concordance_index(risks, times, torch.zeros(40)))


@pytest.mark.parametrize("seed", range(3))
def test_cox_is_the_chance_of_each_event_among_those_at_risk(seed):
    risks, times, events = observations(seed)
    risks = (risks / 4).requires_grad_()
    each = [risks[times >= times[i]].exp().sum().log() - risks[i] for i in range(len(risks)) if events[i]]
    wanted = torch.stack(each).mean()
    torch.testing.assert_close(cox_loss(risks, times, events), wanted)
    (gradient,), (other,) = (
        torch.autograd.grad(value, risks, retain_graph=True) for value in (cox_loss(risks, times, events), wanted)
    )
    torch.testing.assert_close(gradient, other)
    # Nobody has an event: nothing to learn, no NaN.
    (none,) = torch.autograd.grad(cox_loss(risks, times, events * 0), risks)
    assert (none == 0).all()


def test_hazards_are_the_likelihood_of_the_intervals_that_were_seen():
    cuts, logits = torch.tensor([2.0, 5.0]), torch.tensor([[0.3, -0.7, 0.2]]).double()
    h1, h2, h3 = logits.sigmoid()[0]
    for time, event, likelihood in (
        (1.0, 1, h1), (2.0, 1, h1), (3.0, 1, (1 - h1) * h2), (9.0, 1, (1 - h1) * (1 - h2) * h3),
        (1.0, 0, torch.ones(())), (2.0, 0, 1 - h1), (3.0, 0, 1 - h1), (9.0, 0, (1 - h1) * (1 - h2)),
    ):  # fmt: skip
        found = hazard_loss(logits, cuts, torch.tensor([time]), torch.tensor([event]))
        torch.testing.assert_close(found, -likelihood.double().log())
    torch.testing.assert_close(survival(logits)[0], torch.stack([1 - h1, (1 - h1) * (1 - h2)]))
    # The area above the survival curve, from 1 at time 0.
    area = 2 * (1 + (1 - h1)) / 2 + 3 * ((1 - h1) + (1 - h1) * (1 - h2)) / 2
    torch.testing.assert_close(risk(logits, cuts.double())[0], 1 - area / 5)


class Columns:
    """A recipe whose data have these columns."""

    def __init__(self, names, loss="mse"):
        self.data = self.objective = self.number_columns = self
        self.names, self.loss = names, loss


def test_scores_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    truth, shares = (random.random((30, 2)) < 0.4).astype("float32"), random.random((30, 2)).astype("float32")
    found = dict(multilabel.scores(None, torch.from_numpy(shares).logit(), torch.from_numpy(truth), Columns("ab")))
    for name, measure in (("auc", roc_auc_score), ("average_precision", average_precision_score)):
        wanted = [measure(truth[:, k], shares[:, k]) for k in range(2)]
        assert list(found[f"{name}_by_label"].values()) == pytest.approx(wanted, abs=1e-6)
        assert found[name] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert found["f1"] == pytest.approx(np.mean([f1_score(truth[:, k], shares[:, k] > 0.5) for k in range(2)]))
    # A label that nobody has is not measured.
    truth[:, 1] = 0
    found = dict(multilabel.scores(None, torch.from_numpy(shares).logit(), torch.from_numpy(truth), Columns("ab")))
    assert math.isnan(found["auc_by_label"]["b"])
    assert found["auc"] == found["auc_by_label"]["a"]
    head = FITImageEncoder.from_preset(
        "tiny", image_size=8, group_size=4, patch_size=2, channels=1, num_classes=2, outputs="numbers"
    )
    numbers, wanted = random.normal(size=(30, 2)).astype("float32"), random.normal(size=(30, 2)).astype("float32")
    found = dict(regress.scores(head, torch.from_numpy(numbers), torch.from_numpy(wanted), Columns("ab")))
    assert found["r2"] == pytest.approx(r2_score(wanted, numbers), abs=1e-6)
    assert found["mae_by_target"]["b"] == pytest.approx(np.abs(wanted - numbers)[:, 1].mean(), abs=1e-6)


# From here on through the command line: slides whose share of a tissue says everything.
WIDTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    rows = []
    for k in range(30):
        patient, share = k // 2, ((k // 2) * 7 % 15 + 0.5) / 15
        _, features, coords = slide_of_features(5, 6, WIDTH, 0.7, seed=k)
        features *= 0.2
        features[random.random(len(features)) < share, 0] += 3
        write_features(folder / f"{k}.h5", features, coords)
        event = int(patient % 3 > 0)
        rows.append(f"{k}.h5,P{patient},{1000 + 50 * share:.3f},{share:.4f},{int(share > 0.5)},{int(share < 0.3)},"
                    f"{100 * (1 - share) * (1 if event else 0.8):.3f},{event},{'ab'[share > 0.5]}")  # fmt: skip
    (folder / "table.csv").write_text("path,patient,weight,share,many,few,days,dead,grade\n" + "\n".join(rows) + "\n")
    return folder


def trained(folder, task, data, *more, steps=30):
    recipe = {
        "task": task,
        "model": {"group_size": 4, "patch_size": 1, "latent_position": "row_column", "layers": "(1)1", "dim": 16,
                  "latent_dim": 16, "heads": 2, "latent_heads": 2, "latents_per_group": 2},
        "data": {"source": "manifest", "path": str(folder / "table.csv"), "image_size": None, "validation": 0, **data},
        "optimizer": {"warmup_steps": 5, "lr": 1e-2},
        "trainer": {"steps": steps, "batch_size": 6, "validate_every": steps, "checkpoint_every": steps // 2,
                    "accelerator": "cpu"},
    }  # fmt: skip
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run = folder / "-".join(["run", task, *(word.partition("=")[2] for word in more)])
    status = main(["train", str(path), *more, "--run-dir", str(run)])
    return run, status


def measured(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def predicted(run, folder, capsys, *words):
    assert main(["predict", str(run), str(folder), *words]) == 0
    return list(csv.DictReader(capsys.readouterr().out.splitlines()))


def truths(folder):
    with open(folder / "table.csv", newline="") as file:
        return {str(folder / row["path"]): row for row in csv.DictReader(file)}


def test_numbers_are_learned_and_told_in_their_own_units(folder, capsys):
    run, status = trained(folder, "regress", {"targets": ["weight", "share"]})
    assert status == 0
    assert "weight, share" in capsys.readouterr().out
    found = measured(run, capsys)
    assert found["examples"] == 6
    assert found["r2"] > 0.5
    # Weights lie between 1000 and 1050.
    assert 0 < found["mae_by_target"]["weight"] < 15
    rows, truth = predicted(run, folder, capsys), truths(folder)
    assert list(rows[0]) == ["file", "weight", "share"]
    errors = [abs(float(row["weight"]) - float(truth[row["file"]]["weight"])) for row in rows]
    assert len(rows) == 30
    assert np.mean(errors) < 10
    # The last validation is what evaluate says, and the model alone answers in these units.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val/r2"] == pytest.approx(found["r2"], abs=1e-4)
    model = FITImageEncoder.from_pretrained(run / "model")
    assert (model.outputs, model.num_classes) == ("numbers", 2)
    assert 1000 < float(model.head.mean[0]) < 1050
    # Going on keeps the units, also where the table has changed meanwhile.
    frame = Predictor(run)({"path": [rows[0]["file"], "gone.h5"]})
    assert frame["weight"][0] == pytest.approx(float(rows[0]["weight"]), rel=1e-5)
    assert math.isnan(frame["weight"][1])
    assert "gone.h5" in frame["error"][1]
    # Maps are of one of several numbers.
    where = ["--output", str(folder / "maps"), "--explain", "leave-out"]
    assert main(["predict", str(run), str(folder / "0.h5"), *where]) == 2
    assert "name one of them by --target" in capsys.readouterr().err
    assert main(["predict", str(run), str(folder / "0.h5"), *where, "--target", "wait"]) == 2
    assert "no 'wait' to explain; did you mean 'weight'?" in capsys.readouterr().err
    assert main(["predict", str(run), str(folder / "0.h5"), *where, "--target", "weight"]) == 0
    record = json.loads((folder / "maps" / "0.h5.json").read_text())
    assert record["explained"] == "weight"
    whole, *tiles = json.loads((folder / "maps" / "0.h5.geojson").read_text())["features"]
    assert whole["properties"]["measurements"] == record["values"]
    assert {each["properties"]["classification"]["name"] for each in tiles} <= {"raises weight", "lowers weight"}
    # Values are in the number's units: what the number is less the number without the group.
    assert 0.01 < max(abs(each["properties"]["measurements"]["leave-out"]) for each in tiles) < 100
    with open(folder / "maps" / "results.csv", newline="") as file:
        assert next(csv.DictReader(file))["weight"] == f"{record['values']['weight']:.7g}"


def test_labels_are_learned_each_by_itself(folder, capsys):
    run, status = trained(
        folder, "multilabel", {"targets": ["many", "few"]}, "--objective.positive_weights=balanced", "--trainer.ema=0.9"
    )
    assert status == 0
    found = measured(run, capsys)
    assert found["auc_by_label"]["many"] > 0.8
    rows, truth = predicted(run, folder, capsys), truths(folder)
    right = [
        (float(row[name]) > 0.5) == bool(int(truth[row["file"]][name])) for row in rows for name in ("many", "few")
    ]
    assert np.mean(right) > 0.85
    where = ["--output", str(folder / "labelled"), "--explain", "attention", "--target", "few"]
    assert main(["predict", str(run), str(folder / "0.h5"), *where]) == 0
    whole = json.loads((folder / "labelled" / "0.h5.geojson").read_text())["features"][0]["properties"]
    assert whole["name"].startswith("few 0.") or whole["name"].startswith("few ")


@pytest.mark.parametrize("loss", ["hazard", pytest.param("cox", marks=pytest.mark.slow)])
def test_the_order_of_events_is_learned(folder, capsys, loss):
    words = [f"--objective.loss={loss}"]
    run, status = trained(folder, "survival", {"time": "days", "event": "dead", "patient": "patient"}, *words)
    assert status == 0
    assert "12 patients, 24 images" in capsys.readouterr().out
    found = measured(run, capsys)
    assert (found["examples"], found["events"]) == (3, 2)
    rows, truth = predicted(run, folder, capsys), truths(folder)
    values = torch.tensor(
        [[float(row["risk"]), *(float(truth[row["file"]][n]) for n in ("days", "dead"))] for row in rows]
    )
    assert concordance_index(*values.T) > 0.75
    alive = [name for name in rows[0] if name.startswith("survival at ")]
    assert len(alive) == (3 if loss == "hazard" else 0)
    for row in rows:
        chances = [float(row[name]) for name in alive]
        assert chances == sorted(chances, reverse=True)
    if loss == "hazard":
        patients_are_predicted_by_a_table(run, folder, capsys)


def patients_are_predicted_by_a_table(run, folder, capsys):
    from fitformer.data.readers import open_image

    table = str(folder / "table.csv")
    assert main(["predict", str(run), table]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["file"] for row in rows] == [f"P{k}" for k in range(15)]
    model = FITImageEncoder.from_pretrained(run / "model").eval()
    pair = tuple(open_image(folder / f"{k}.h5") for k in (2, 3))
    with torch.no_grad():
        wanted = float(risk(model([pair])[0], model.head.cuts))
    assert float(rows[1]["risk"]) == pytest.approx(wanted, abs=1e-5)
    # A patient with a broken slide is left out, and named.
    (folder / "some.csv").write_text("path,patient\n0.h5,A\n1.h5,A\ngone.h5,B\n2.h5,B\n")
    assert main(["predict", str(run), str(folder / "some.csv")]) == 0
    out, err = capsys.readouterr()
    assert [row["file"] for row in csv.DictReader(out.splitlines())] == ["A"]
    assert "patient B" in err
    assert "gone.h5" in err
    # Maps of a patient's risk lie over each of its slides.
    assert main(["predict", str(run), str(folder / "some.csv"), "--output", str(folder / "new")]) == 0
    for slide in ("0.h5", "1.h5"):
        whole = json.loads((folder / "new" / "A" / f"{slide}.geojson").read_text())["features"][0]["properties"]
        assert whole["measurements"]["risk"] == pytest.approx(float(rows[0]["risk"]), abs=1e-5)
    assert not (folder / "new" / "B").exists()
    assert main(["predict", str(run), str(folder / "0.h5")]) == 0
    assert "a patient of its own" in capsys.readouterr().err


def test_what_cannot_be_learned_is_refused_before_the_first_step(folder, capsys):
    for task, data, words, message in (
        ("survival", {"time": "days", "event": "dead"}, ["--objective.loss=cox", "--trainer.batch_size=1"],
         "trainer.batch_size is 1.*objective.loss=hazard"),
        ("survival", {"time": "day", "event": "dead"}, [], "no column 'day'; did you mean 'days'"),
        ("survival", {"time": "days", "event": "share"}, [], "'share' is .*must be 0 or 1"),
        ("regress", {"targets": "grade"}, [], "row 2: 'grade' is 'a', which is no number"),
        ("multilabel", {"targets": ["many"]}, ["--objective.positive_weights=[1,2]"], "2 numbers, and there are 1"),
    ):  # fmt: skip
        _, status = trained(folder, task, data, *words)
        assert status == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line)


def test_a_number_that_is_always_the_same_is_refused(folder):
    class Same:
        channels = WIDTH
        source = type("Source", (), {"labels": np.full((5, 1), 3, "float32")})

    text = (
        f"task: regress\nmodel: {{latent_position: row_column}}\ndata: {{path: {folder}/table.csv, targets: share}}\n"
    )
    with pytest.raises(InputError, match="'share' is 3 in all 5 examples"):
        build_model(config.parse(text), Same)


def test_events_that_are_all_at_one_time_make_two_intervals(folder):
    class Same:
        channels = WIDTH
        source = type("Source", (), {"labels": np.array([[4, 1], [4, 1], [9, 0]], "float32")})

    text = f"task: survival\nmodel: {{latent_position: row_column}}\ndata: {{path: {folder}/table.csv}}\n"
    network = build_model(config.parse(text), Same)
    assert network.head.cuts.tolist() == [4]
    assert network.num_classes == 2
    Same.source.labels[:, 1] = 0
    with pytest.raises(InputError, match="none of the 3 examples to train on has an event"):
        build_model(config.parse(text), Same)
    assert survival_task.answers(network, None, ()).columns == ("risk", "survival at 4")


def test_answers_say_what_they_explain():
    outputs = torch.tensor([1.0, -2.0])
    numbers, labels = NumberAnswers(("age", "bmi")), LabelAnswers(("hot", "cold"))
    assert numbers.answer("f", outputs).values == {"age": 1, "bmi": -2}
    assert float(numbers.decide("bmi")(torch.tensor([5.0, 7.0]), outputs)) == 7
    assert labels.said(outputs).name == "hot"
    assert labels.said(outputs, "cold").sides == ("for cold", "against cold")
    hazards = RiskAnswers(torch.tensor([2.0, 5.0]))
    assert hazards.columns == ("risk", "survival at 2", "survival at 5")
    with pytest.raises(InputError, match="3 names given to a model of 2 outputs"):
        hazards.check_outputs(2)


def test_weights_of_a_classifier_start_a_regression(tmp_path):
    size = {"image_size": 8, "group_size": 4, "patch_size": 2, "channels": 1}
    classifier = FITImageEncoder.from_preset("tiny", **size, num_classes=2)
    classifier.save_pretrained(tmp_path)
    number = FITImageEncoder.from_preset("tiny", **size, num_classes=2, outputs="numbers")
    number.head.mean.fill_(60)
    before = number.head.weight.clone()
    report = number.load_weights(tmp_path)
    assert torch.equal(number.encoder.norm.weight, classifier.encoder.norm.weight)
    assert torch.equal(number.head.weight, before)
    assert "head.weight" in str(report)
    assert number.head.mean.tolist() == [60, 60]
    # A folder says what its outputs mean.
    number.save_pretrained(tmp_path / "number")
    loaded, image = FITImageEncoder.from_pretrained(tmp_path / "number"), torch.rand(1, 8, 8, 1)
    assert torch.equal(loaded.eval()(image), number.eval()(image))


def test_measures_of_labels_stand_in_one_table_with_a_row_for_each(capsys):
    from rich.console import Console

    measures = [("auc", 0.9), ("auc_by_label", {"a": 0.8, "b": 1.0}), ("f1_by_label", {"a": 0.5})]
    for table in tables(measures, (), "seen"):
        Console(width=80).print(table)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ["label", "auc", "f1"] in lines
    assert ["a", "0.8000", "0.5000"] in lines
    assert ["b", "1.0000"] in lines
