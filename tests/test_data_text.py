import gzip
import lzma
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fitformer.data.datasets import text
from fitformer.data.datasets.text import (
    ByteBuffer,
    BytesDataset,
    Piece,
    compressed_bits_per_byte,
    file_pieces,
    python_docs,
    python_sources,
    split_pieces,
)
from fitformer.data.order import StepBatches
from fitformer.data.workers import message_of
from fitformer.errors import InputError

contents = st.lists(st.binary(max_size=40), min_size=1, max_size=6).filter(any)


def buffer_of(*datas):
    return ByteBuffer([Piece(f"piece {n}", 0, len(data), data) for n, data in enumerate(datas)])


@settings(deadline=None, max_examples=80)
@given(datas=contents, start=st.integers(0, 200), length=st.integers(0, 60))
def test_a_window_is_a_slice_of_all_pieces_joined(datas, start, length):
    whole = b"".join(datas)
    assert buffer_of(*datas).window(start, start + length).tobytes() == whole[start : start + length]


@settings(deadline=None, max_examples=80)
@given(datas=contents, length=st.integers(1, 50))
def test_windows_side_by_side_cover_every_byte_once(datas, length):
    dataset = BytesDataset(buffer_of(*datas), length, train=False)
    items = list(dataset)
    assert {item["tokens"].shape for item in items} == {(length,)}
    joined = torch.cat([item["tokens"][item["mask"]] for item in items])
    assert bytes(joined.tolist()) == b"".join(datas) == dataset.contents()
    assert all(item["mask"].all() for item in items[:-1])
    assert not items[-1]["tokens"][~items[-1]["mask"]].any()


def test_training_windows_are_drawn_by_seed_epoch_and_index():
    whole = bytes(np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8))
    first, again, other = (BytesDataset(buffer_of(whole), 100, train=True, seed=seed) for seed in (1, 1, 2))
    assert len(first) == 20
    windows = {(e, i): bytes(first[e, i]["tokens"].tolist()) for e in range(20) for i in range(20)}
    assert all(window in whole for window in windows.values())
    assert len(set(windows.values())) > 300
    starts = np.array([whole.index(window) for window in windows.values()])
    assert starts.min() < 50
    assert starts.max() > 1850
    assert bytes(again[7, 3]["tokens"].tolist()) == windows[7, 3]
    assert bytes(other[7, 3]["tokens"].tolist()) != windows[7, 3]
    assert first[0]["mask"].all()
    assert bytes(BytesDataset(buffer_of(whole), 2000, train=True)[0]["tokens"].tolist()) == whole


@settings(deadline=None, max_examples=80)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), share=st.floats(0.1, 0.9), seed=st.integers(0, 50))
def test_a_split_is_a_partition_near_its_share(sizes, share, seed):
    pieces = [Piece(str(n), 0, size) for n, size in enumerate(sizes)]
    total = sum(sizes)
    if not 0 < round(share * total) < total:
        with pytest.raises(InputError, match=f"of {total} bytes"):
            split_pieces(pieces, share, seed)
        return
    kept, held = split_pieces(pieces, share, seed)
    assert 0 < sum(map(len, held)) <= round(share * total)
    cut = sorted((int(p.name), p.start, p.stop) for p in kept + held)
    joined = [(n, byte) for n, start, stop in cut for byte in range(start, stop)]
    assert joined == [(n, byte) for n, size in enumerate(sizes) for byte in range(size)]
    assert (kept, held) == split_pieces(pieces, share, seed)
    # What is missing to the share is less than the smallest piece that was left.
    left = [len(p) for p in kept]
    assert sum(map(len, held)) == round(share * total) or min(left) > round(share * total) - sum(map(len, held))


def test_one_file_gives_its_tail(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    kept, held = split_pieces(file_pieces(str(tmp_path / "a.txt")), 0.2, 0)
    assert ByteBuffer(kept).window(0, 100).tobytes() == bytes(range(80))
    assert ByteBuffer(held).window(0, 100).tobytes() == bytes(range(80, 100))


def test_folders_are_read_in_order_and_hidden_files_are_not(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/1.bin", ".git/config", "c/.x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert ByteBuffer(file_pieces(str(tmp_path))).window(0, 99).tobytes() == b"a/1.bina/1.txtb/2.txt"
    assert ByteBuffer(file_pieces(str(tmp_path), "**/*.txt")).window(0, 99).tobytes() == b"a/1.txtb/2.txt"


def test_large_files_are_read_by_windows_and_travel_as_names(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_LARGE_FROM", 1000)
    whole = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    (tmp_path / "large").write_bytes(whole.tobytes())
    _, held = split_pieces(file_pieces(str(tmp_path / "large")), 0.51, 0)
    buffer = ByteBuffer(held)
    assert isinstance(buffer._arrays[0], text.LargeFile)
    dataset = BytesDataset(buffer, 64, train=True)
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content)[3, 5]["tokens"], dataset[3, 5]["tokens"])
    assert np.array_equal(buffer.window(0, 51_000), whole[-51_000:])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_file_that_is_cut_short_meanwhile_is_one_clear_error(tmp_path, workers):
    size = 16 * 2**20
    (tmp_path / "large").write_bytes(bytes(size))
    dataset = BytesDataset(ByteBuffer(file_pieces(str(tmp_path / "large"))), 2**20, train=False)
    batches = iter(DataLoader(dataset, num_workers=workers, prefetch_factor=1 if workers else None))
    assert next(batches)["tokens"].shape == (1, 2**20)
    os.truncate(tmp_path / "large", 8 * 2**20)
    with pytest.raises(InputError) as raised:
        list(batches)
    assert message_of(raised.value) == (
        f"{tmp_path / 'large'} is truncated: it had {size} bytes when it was listed and has {size // 2} now; "
        "put the file back as it was"
    )


def test_workers_hand_out_what_the_main_process_does():
    dataset = BytesDataset(ByteBuffer(python_docs()), 64, train=True)
    batches = StepBatches(len(dataset), 8, seed=0, total_steps=3)
    for a, b in zip(DataLoader(dataset, batch_sampler=batches), DataLoader(dataset, None, batch_sampler=None)):
        assert a["tokens"].shape == (8, 64)
        assert b["tokens"].shape == (64,)
    alone = [batch["tokens"] for batch in DataLoader(dataset, batch_sampler=batches)]
    helped = [batch["tokens"] for batch in DataLoader(dataset, batch_sampler=batches, num_workers=2)]
    assert all(map(torch.equal, alone, helped))


def test_python_brings_text_of_its_own():
    sources = python_sources()
    names = [piece.name for piece in sources]
    assert sum(map(len, sources)) > 5_000_000
    assert any(name.endswith("asyncio/events.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert names == [piece.name for piece in python_sources()]
    docs = ByteBuffer(python_docs())
    assert len(docs) > 200_000
    assert "statement" in docs.window(0, len(docs)).tobytes().decode()


def test_compressed_sizes_are_those_of_the_tools():
    data = bytes(range(256)) * 20 + b"some text, more text" * 50
    assert compressed_bits_per_byte(data, "gzip") == 8 * len(gzip.compress(data, 9)) / len(data)
    assert compressed_bits_per_byte(data, "xz") == 8 * len(lzma.compress(data, preset=9)) / len(data)
    with pytest.raises(InputError, match="choose gzip or xz"):
        compressed_bits_per_byte(data, "zip")
    with pytest.raises(InputError, match="0 bytes"):
        compressed_bits_per_byte(b"", "gzip")


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"no file below .* matches"):
        file_pieces(str(tmp_path))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"no bytes: .*empty\.txt empty"):
        file_pieces(str(tmp_path))
    with pytest.raises(InputError, match=r"did you mean 'empty\.txt'"):
        file_pieces(str(tmp_path / "emty.txt"))
    with pytest.raises(InputError, match=r"needs a path"):
        file_pieces(None)
    (tmp_path / "short.txt").write_text("x" * 100)
    pieces = file_pieces(str(tmp_path / "short.txt"))
    with pytest.raises(InputError, match=r"too short: it has 100 bytes and one window takes 101; .* at most 100"):
        BytesDataset(ByteBuffer(pieces), 101, train=True)
    (tmp_path / "short.txt").write_text("x" * 60)
    with pytest.raises(InputError, match=r"truncated: it had 100 bytes .* has 60 now"):
        ByteBuffer(pieces)
    with pytest.raises(InputError, match="length is 0"):
        BytesDataset(buffer_of(b"abc"), 0, train=True)
    with pytest.raises(IndexError):
        BytesDataset(buffer_of(b"abc"), 3, train=True)[1]


def test_short_windows_come_from_anywhere_and_stand_beside_each_long_one():
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    buffer = ByteBuffer([Piece("x", 0, 5000, content)])
    whole = BytesDataset(buffer, 64, train=True, seed=3)
    dataset = BytesDataset(buffer, 64, train=True, seed=3, short_length=16)
    starts = set()
    for where in [(0, 1), (0, 2), (5, 1)]:
        item = dataset[where]
        assert torch.equal(item["tokens"], whole[where]["tokens"])
        assert item["short"].shape == (4, 16)
        starts |= {content.index(bytes(row.tolist())) for row in item["short"]}
        assert torch.equal(item["short"], dataset[where]["short"])
    assert len(starts) == 12
    assert "short" not in BytesDataset(buffer, 64, train=False, short_length=16)[0]
