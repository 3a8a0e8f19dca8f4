import warnings

import numpy as np
import pytest
from PIL import Image

from fitformer.data.datasets.folders import Columns
from fitformer.data.datasets.hub import read_huggingface
from fitformer.errors import InputError

random = np.random.default_rng(0)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def hub_part(datasets, count=4, label=None):
    pixels = [random.integers(0, 256, (5, 4, 3), dtype=np.uint8) for _ in range(count)]
    label = label or datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"picture": datasets.Image(), "kind": label, "note": datasets.Value("string")})
    rows = {
        "picture": [Image.fromarray(image) for image in pixels],
        "kind": [index % 2 for index in range(count)],
        "note": ["x"] * count,
    }
    return datasets.Dataset.from_dict(rows, features=features), pixels


@pytest.mark.parametrize("form", ["saved", "parquet file", "parquet folder"])
def test_hub_columns_are_found_by_type(datasets, tmp_path, form):
    part, pixels = hub_part(datasets)
    if form == "saved":
        part.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        part.to_parquet(tmp_path / "set" / "train.parquet")
    path = tmp_path / "set" / "train.parquet" if form == "parquet file" else tmp_path / "set"
    source = read_huggingface(str(path), None, Columns(), (), None)["train"]
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert all(np.array_equal(source[index][0], pixels[index]) for index in range(4))
    reorder = read_huggingface(str(path), None, Columns(), ("dog", "cat"), 1)["train"]
    assert reorder.labels.tolist() == [1, 0, 1, 0]
    assert reorder[0][0].shape == (5, 4, 1)


def test_hub_image_folders_and_parts(datasets, tmp_path):
    for where in ("train/cat", "train/dog", "test/dog"):
        (tmp_path / "set" / where).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / where / "0.png")
    parts = read_huggingface(str(tmp_path / "set"), None, Columns(), (), None)
    assert sorted(parts) == ["test", "train"]
    assert parts["test"].labels.tolist() == [1]


def test_hub_columns_are_named_or_refused(datasets, tmp_path):
    part, _ = hub_part(datasets, label=datasets.Value("int64"))
    part.save_to_disk(tmp_path / "set")
    path = str(tmp_path / "set")
    assert read_huggingface(path, None, Columns(), (), None)["train"].classes == ()
    assert read_huggingface(path, None, Columns(label="kind"), (), None)["train"].classes == ("0", "1")
    with pytest.raises(InputError, match="no column 'pictures'; did you mean 'picture'"):
        read_huggingface(path, None, Columns(image="pictures"), (), None)
    part.remove_columns("picture").save_to_disk(tmp_path / "bare")
    with pytest.raises(InputError, match=r"no image column; set data.image_column to one of kind, note"):
        read_huggingface(str(tmp_path / "bare"), None, Columns(), (), None)
    with pytest.raises(InputError, match=r"needs data.path"):
        read_huggingface(None, None, Columns(), (), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded by `datasets`"):
        read_huggingface(str(tmp_path / "empty"), None, Columns(), (), None)
