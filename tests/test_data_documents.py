"""Bytes by documents: what ends one, what is held out, how they are packed, and a run that trains on them."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitformer.config import load as config
from fitformer.data import build_dataset
from fitformer.data.datasets import documents
from fitformer.data.datasets.documents import DocumentsDataset, document_ends, end_at_separator
from fitformer.data.datasets.text import ByteBuffer, Piece, file_pieces, split_pieces
from fitformer.data.settings import ByteData
from fitformer.errors import InputError
from fitformer.tasks import build_model, group_examples, task_of
from test_data_text import buffer_of

texts = st.lists(st.text("ab,;", max_size=30).map(str.encode), min_size=1, max_size=5).filter(any)


def parts_of(datas, separator):
    """Documents by splitting: a run of separators ends one, and so does the end of a file."""
    found = []
    for data in filter(None, datas):
        begin = place = 0
        while (place := data.find(separator, place)) >= 0:
            while data.startswith(separator, place):
                place += len(separator)
            found.append(data[begin:place])
            begin = place
        found.append(data[begin:])
    return [part for part in found if part]


@settings(deadline=None, max_examples=150)
@given(datas=texts, separator=st.sampled_from([b",", b",;", b"aa", b"aba"]), at_once=st.integers(1, 40))
def test_documents_end_at_separators_and_at_the_ends_of_files(datas, separator, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_SEARCHED_AT_ONCE", at_once)
        ends = document_ends(buffer_of(*datas), separator).tolist()
    joined = b"".join(datas)
    assert [joined[a:b] for a, b in zip([0, *ends], ends)] == parts_of(datas, separator)
    assert document_ends(buffer_of(*datas), None).tolist() == np.cumsum([len(data) for data in datas if data]).tolist()


@settings(deadline=None, max_examples=80)
@given(datas=texts, length=st.integers(1, 20), n=st.integers(1, 5))
def test_every_byte_comes_once_and_documents_begin_groups(datas, length, n):
    buffer = buffer_of(*datas)
    dataset = DocumentsDataset(buffer, document_ends(buffer, b","), length)
    dataset.group_for(n)
    row, found = -(-length // n) * n, []
    for item in dataset:
        assert item["tokens"].shape == item["mask"].shape == (row,)
        assert item["documents"].shape == (row // n,)
        groups = item["documents"].tolist()
        for number in range(max(groups) + 1):
            held = torch.tensor(groups).repeat_interleave(n) == number
            found.append(bytes(item["tokens"][held & item["mask"]].tolist()))
        assert not item["mask"][torch.tensor(groups).repeat_interleave(n) < 0].any()
    cut = [part[k : k + row] for part in parts_of(datas, b",") for k in range(0, len(part), row)]
    assert sorted(found) == sorted(cut)
    assert f"{len(parts_of(datas, b',')):,} documents in {len(dataset):,} rows of {row}" in dataset.describe()
    again = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(again, dataset))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_single_file_is_split_where_a_document_ends(tmp_path, share):
    lines = [f"line {k}: {'x' * (k % 7)}\n".encode() for k in range(50)]
    (tmp_path / "lines.txt").write_bytes(b"".join(lines))
    kept, held = end_at_separator(*split_pieces(file_pieces(str(tmp_path / "lines.txt")), share, 0), b"\n")
    buffers = ByteBuffer(kept), ByteBuffer(held)
    first, second = (buffer.window(0, len(buffer)).tobytes() for buffer in buffers)
    assert first + second == b"".join(lines)
    assert first.endswith(b"\n")
    assert second.startswith(b"line ")
    assert len(second) == pytest.approx(share * len(first + second), abs=20)


def test_a_cut_inside_a_separator_and_one_that_no_separator_follows():
    def split(data, middle, separator):
        kept, held = end_at_separator([Piece("p", 0, middle, data)], [Piece("p", middle, len(data), data)], separator)
        return [data[piece.start : piece.stop] for piece in (*kept, *held)]

    assert split(b"ab--cd--ef", 3, b"--") == [b"ab--", b"cd--ef"]
    assert split(b"ab--cd--ef", 4, b"--") == [b"ab--", b"cd--ef"]
    assert split(b"ab--cd--ef", 5, b"--") == [b"ab--cd--", b"ef"]
    assert split(b"abcdef--", 3, b"--") == [b"abc", b"def--"]
    assert split(b"abcdef", 3, b"--") == [b"abc", b"def"]
    other = [Piece("a", 0, 2, b"ab")], [Piece("b", 0, 2, b"cd")]
    assert end_at_separator(*other, b"--") == other


def test_settings_say_what_a_document_is(tmp_path):
    for name, lines in (("a", 30), ("b", 40), ("c", 50)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{k}\n" for k in range(lines)))
    whole = ByteData(source="files", path=str(tmp_path), length=64, documents=True, holdout=0.4, validation=0.0)
    train, test = (build_dataset(whole, part) for part in ("train", "test"))
    assert len(train.ends) + len(test.ends) == 3
    by_line = ByteData(
        source="files", path=str(tmp_path), length=64, documents=True, separator="\n", holdout=0.4, validation=0.0
    )
    train, test = (build_dataset(by_line, part) for part in ("train", "test"))
    assert len(train.ends) + len(test.ends) == 120
    topics = build_dataset(ByteData(source="python-docs", documents=True, length=256), "test")
    assert topics.is_test
    assert len(topics.ends) > 5
    for options, message in (
        ({"separator": "\n"}, "documents: true"),
        ({"separator": "", "documents": True}, "separator is ''"),
        ({"length": 0}, "length is 0"),
    ):
        with pytest.raises(InputError, match=message):
            ByteData(**options)


def test_the_loss_of_packed_documents_is_that_of_each_alone(tmp_path):
    words = ["a fox", "jumps over\nthe", "lazy dog, and sleeps until the next day begins", "x"]
    for k, word in enumerate(words):
        (tmp_path / f"{k}.txt").write_text(word)
    recipe = config.load(
        "python-bytes-demo",
        [
            *("--model.layers=(1)1(1)", "--model.tokens_per_group=8", "--model.latent_position=index"),
            *("--data.source=files", f"--data.path={tmp_path}", "--data.documents=true", "--data.length=60"),
            *("--data.holdout=0.05", "--data.validation=0"),
        ],
    )
    dataset = build_dataset(recipe.data, "train")
    torch.manual_seed(0)
    network, task = build_model(recipe, dataset).eval(), task_of(recipe)
    group_examples(network, dataset, recipe)
    items = [dataset[0, k] for k in range(len(dataset))]
    batch = {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
    with torch.no_grad():
        metrics, count = task.measure(network, batch, recipe)
        alone = []
        for number, k in ((number, k) for k, item in enumerate(items) for number in range(item["documents"].max() + 1)):
            held = (batch["documents"][k] == number).repeat_interleave(8) & batch["mask"][k]
            document = batch["tokens"][k][held]
            logits = network.logits(document[None])[0]
            alone.append(torch.nn.functional.cross_entropy(logits, document, reduction="sum"))
    assert count == len(dataset.buffer)
    torch.testing.assert_close(metrics["loss"], sum(alone) / count, rtol=1e-5, atol=1e-5)
