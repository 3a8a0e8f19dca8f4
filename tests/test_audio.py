"""Sound: the mu-law, WAV files of every kind, and the task that predicts samples, on files that are made here."""

import json
import wave

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from fitformer import data
from fitformer.cli import main
from fitformer.config import load as config
from fitformer.data import mu_law
from fitformer.data.settings import AudioData
from fitformer.data.wav import read_sound, write_sound
from fitformer.errors import InputError
from fitformer.tasks import build_model
from fitformer.tasks._given_the_last import given_the_last_bits
from fitformer.tasks.audio import generate_audio
from fitformer.tasks.preview import Preview, save
from fitformer.training.run_dir import Run
from helpers import untrained_run

RATE = 8000
CODES = np.arange(256, dtype=np.uint8)


def tone(seconds=0.5, rate=RATE, hertz=440.0):
    """A tone with a second one over it, between -1 and 1."""
    time = np.arange(round(seconds * rate)) / rate
    return 0.6 * np.sin(2 * np.pi * hertz * time) + 0.3 * np.sin(2 * np.pi * 2.7 * hertz * time)


def write_24_bits(path, signal, rate=RATE):
    frames = np.rint(signal * (2**23 - 1)).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(3)
        file.setframerate(rate)
        file.writeframes(frames.tobytes())


KINDS = {
    "8 bits": lambda signal: np.rint(signal * 127 + 128).astype(np.uint8),
    "16 bits": lambda signal: np.rint(signal * 32767).astype(np.int16),
    "32 bits": lambda signal: np.rint(signal * (2**31 - 1)).astype(np.int32),
    "float": lambda signal: signal.astype(np.float32),
    "double": lambda signal: signal.astype(np.float64),
}


# ---- the mu-law ----


def test_every_code_comes_back_and_so_it_does_through_a_file(tmp_path):
    assert np.array_equal(mu_law.encode(mu_law.decode(CODES)), CODES)
    assert (np.diff(mu_law.decode(CODES)) > 0).all()
    assert (mu_law.decode(CODES)[0], mu_law.decode(CODES)[-1]) == (-1, 1)
    write_sound(tmp_path / "all.wav", CODES, RATE)
    assert np.array_equal(read_sound(tmp_path / "all.wav", RATE).codes, CODES)


@given(st.floats(-1, 1))
@settings(deadline=None)
def test_a_sample_is_rounded_to_the_nearest_step_of_the_curve(x):
    # The curve of G.711 in its continuous form, written down once more.
    companded = np.copysign(np.log1p(255 * abs(x)) / np.log(256), x)
    code = int(mu_law.encode(np.array([x]))[0])
    assert abs((companded + 1) / 2 * 255 - code) <= 0.5 + 1e-9
    error = abs(float(mu_law.decode(np.array([code], np.uint8))[0]) - x)
    assert error <= (0.00031 if abs(x) < 0.01 else 0.022)


def test_what_lies_beyond_is_the_end():
    assert mu_law.encode(np.array([-7.0, 1.5, np.inf])).tolist() == [0, 255, 255]


# ---- files ----


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_hold_the_same_sound(kind, tmp_path):
    wavfile.write(tmp_path / "a.wav", RATE, KINDS[kind](tone()))
    sound = read_sound(tmp_path / "a.wav", RATE)
    near = 1 / 127 if kind == "8 bits" else 1e-4
    wanted = mu_law.decode(mu_law.encode(tone()))
    heard = mu_law.decode(sound.codes)
    assert sound.channels == 1
    # Where rounding falls on the other side, the next code is as near.
    assert np.abs(heard - tone()).max() <= np.abs(wanted - tone()).max() + near


def test_a_file_of_24_bits(tmp_path):
    write_24_bits(tmp_path / "a.wav", tone())
    wavfile.write(tmp_path / "b.wav", RATE, KINDS["32 bits"](tone()))
    assert np.array_equal(read_sound(tmp_path / "a.wav", RATE).codes, read_sound(tmp_path / "b.wav", RATE).codes)


def test_channels_are_averaged(tmp_path):
    left, right = tone(), tone(hertz=300)
    wavfile.write(tmp_path / "two.wav", RATE, np.stack([left, right], axis=1))
    wavfile.write(tmp_path / "one.wav", RATE, (left.astype(np.float32) + right.astype(np.float32)) / 2)
    two, one = read_sound(tmp_path / "two.wav", RATE), read_sound(tmp_path / "one.wav", RATE)
    assert (two.channels, one.channels) == (2, 1)
    assert np.array_equal(two.codes, one.codes)


@pytest.mark.parametrize("rate", [4000, 11025, 44100])
def test_another_rate_is_an_error_that_names_both_or_is_resampled(rate, tmp_path):
    wavfile.write(tmp_path / "a.wav", rate, KINDS["16 bits"](tone(rate=rate)))
    with pytest.raises(InputError, match=rf"a\.wav has {rate:,} .* is 8,000.*data\.resample"):
        read_sound(tmp_path / "a.wav", RATE)
    heard = mu_law.decode(read_sound(tmp_path / "a.wav", RATE, resample=True).codes)
    assert len(heard) == RATE // 2
    # But for the ends, where the filter meets silence, and for the codes' own rounding.
    assert np.abs(heard - tone())[200:-200].max() < 0.03


def damaged(content, case):
    random, content = np.random.default_rng(case), bytearray(content)
    if case % 2:
        return bytes(content[: random.integers(len(content))])
    for _ in range(random.integers(1, 3)):
        content[random.integers(44)] = random.integers(256)
    return bytes(content)


def test_a_damaged_file_is_a_sound_or_one_clear_error(tmp_path):
    write_sound(tmp_path / "whole.wav", CODES, RATE)
    whole, refused = (tmp_path / "whole.wav").read_bytes(), []
    for case in range(300):
        (tmp_path / "a.wav").write_bytes(damaged(whole, case))
        try:
            read_sound(tmp_path / "a.wav", RATE, resample=True)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 150
    assert all("a.wav" in said and "\n" not in said for said in refused)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no sound", "no whole WAV file"), (b"", "no whole WAV file"), (None, "there is no sound file")],
)
def test_what_is_no_sound_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_sound(tmp_path / "a.wav", RATE)


def test_numbers_that_are_none_are_refused(tmp_path):
    wavfile.write(tmp_path / "a.wav", RATE, np.array([0, np.nan, 0.5], np.float32))
    with pytest.raises(InputError, match=r"a\.wav has samples that are no finite numbers"):
        read_sound(tmp_path / "a.wav", RATE)


# ---- data ----


@pytest.fixture
def folder(tmp_path):
    """Ten files, one of two channels, one of them in a folder and one hidden."""
    root = tmp_path / "sounds"
    (root / "more").mkdir(parents=True)
    for k in range(10):
        signal = KINDS["16 bits"](tone(hertz=200 + 20 * k))
        name = "more/9.WAV" if k == 9 else f"{k}.wav"
        wavfile.write(root / name, RATE, np.stack([signal, signal], axis=1) if k == 3 else signal)
    (root / ".hidden.wav").write_bytes(b"no sound")
    (root / "notes.txt").write_text("no sound")
    return root


def audio(folder, **more):
    return AudioData(path=str(folder), sample_rate=RATE, length=256, **more)


def test_a_folder_is_split_by_files_and_says_what_it_is(folder):
    parts = {split: data.build_dataset(audio(folder), split) for split in ("train", "val", "test")}
    # A tenth of ten files of half a second, and a tenth of what is left: the end of one file.
    assert [len(part.buffer) for part in parts.values()] == [32400, 3600, 4000]
    assert len(parts["test"]) == 16
    item = parts["test"][15]
    assert item["tokens"].shape == (256,)
    assert int(item["mask"].sum()) == 4000 - 15 * 256
    line = parts["train"].describe()
    assert "32,400 samples" in line
    assert "(4.0 s at 8,000 a second)" in line or "(4.1 s at 8,000 a second)" in line
    assert "1 of 10 files mixed down to one channel" in line
    assert parts["test"].is_test
    assert not parts["val"].is_test


def test_data_that_are_not_there_or_too_few_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="needs a path"):
        data.build_dataset(AudioData())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no WAV files in .*empty"):
        data.build_dataset(audio(tmp_path / "empty"))
    wavfile.write(tmp_path / "none.wav", RATE, np.zeros(0, np.int16))
    with pytest.raises(InputError, match="has no samples"):
        data.build_dataset(audio(tmp_path / "none.wav"))
    with pytest.raises(InputError, match=r"has 8,000 .* is 16,000"):
        data.build_dataset(AudioData(path=str(folder)))
    with pytest.raises(InputError, match="sample_rate is 0"):
        AudioData(sample_rate=0)


# ---- the task ----

RECIPE = """
task: audio
model: {layers: (1)1(1), dim: 16, latent_dim: 16, heads: 2, latent_heads: 2, latents_per_group: 2, tokens_per_group: 16}
data: {sample_rate: 8000, length: 64}
"""


def test_a_chain_is_priced_at_its_entropy():
    random, switch = torch.Generator().manual_seed(0), 0.1
    turns = torch.rand(200, 500, generator=random) < switch
    chains = turns.cumsum(1) % 2
    everything = torch.ones_like(turns)
    entropy = -(switch * np.log2(switch) + (1 - switch) * np.log2(1 - switch))
    found = given_the_last_bits([(chains[:150], everything[:150])], [(chains[150:], everything[150:])], 4)
    assert found == pytest.approx(entropy, abs=0.02)
    # Values that were never seen cost much, but not without end; masked ones cost nothing.
    never = torch.full((1, 500), 3)
    assert 10 < given_the_last_bits([(chains, everything)], [(never, everything[:1])], 4) < 30
    half = everything[:1].clone()
    half[:, 250:] = False
    short = given_the_last_bits([(chains, everything)], [(never[:, :250], everything[:1, :250])], 4)
    assert given_the_last_bits([(chains, everything)], [(never, half)], 4) == pytest.approx(short)
    with pytest.raises(InputError, match="at least one"):
        given_the_last_bits([], [(never, half)], 4)


def test_a_run_learns_and_is_measured_beside_its_baseline(folder, tmp_path, capsys):
    (tmp_path / "audio.yaml").write_text(RECIPE)
    run = tmp_path / "run"
    words = [f"--data.path={folder}", "--trainer.steps=30", "--trainer.batch_size=8", "--trainer.accelerator=cpu"]
    words += ["--trainer.validate_every=30", "--trainer.validate_batches=2", "--optimizer.lr=0.01"]
    words += ["--objective.preview_length=32", "--trainer.previews=2", "--run-dir", str(run)]
    assert main(["train", str(tmp_path / "audio.yaml"), *words]) == 0
    assert "1 of 10 files mixed down to one channel" in capsys.readouterr().out
    assert len(read_sound(run / "samples" / "step-0000030.wav", RATE).codes) == 2 * 32 + RATE // 4
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 4000
    assert found["bits_per_sample"] == pytest.approx(found["loss"] / np.log(2))
    assert found["bits_per_sample"] < 7.5
    assert 0 < found["given_the_last_bits_per_sample"] < 8


def test_lengths_that_fill_no_group_are_padded():
    assert build_model(config.parse(RECIPE, ["--data.length=100"]), None).num_groups == 7
    with pytest.raises(InputError, match="tokens_per_group is 0"):
        build_model(config.parse(RECIPE, ["--model.tokens_per_group=0"]), None)


def test_a_preview_is_a_file_with_silence_between(tmp_path):
    sound = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8)
    path = save(Preview(sound=sound, sample_rate=8), tmp_path / "step-1")
    assert path.suffix == ".wav"
    assert read_sound(path, 8).codes.tolist() == [10, 20, 128, 128, 30, 40]


# ---- at the command line ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of sound that holds 4 groups of 16 samples, untrained."""
    folder = tmp_path_factory.mktemp("audio")
    wavfile.write(folder / "a.wav", RATE, KINDS["16 bits"](tone()))
    (folder / "audio.yaml").write_text(RECIPE)
    return untrained_run(folder / "run", str(folder / "audio.yaml"), f"data.path={folder / 'a.wav'}")


def use(capsys, *words):
    assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refusal(capsys, *words):
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def heard(path):
    rate, frames = wavfile.read(path)
    assert (rate, frames.dtype, frames.ndim) == (RATE, np.int16, 1)
    return read_sound(path, RATE).codes


def test_sound_goes_on_from_a_file_as_a_file(run, capsys, tmp_path):
    wavfile.write(tmp_path / "in.wav", RATE, KINDS["float"](tone(0.004)))
    output = tmp_path / "out.wav"
    words = ["generate", run, "--prompt-file", tmp_path / "in.wav", "--length", 50, "--output", output, "--seed", 3]
    assert use(capsys, *words) == f"{output}\n"
    begun, whole = read_sound(tmp_path / "in.wav", RATE).codes, heard(output)
    assert len(whole) == len(begun) + 50 == 82
    assert np.array_equal(whole[: len(begun)], begun)
    network = Run.open(run).model()
    assert np.array_equal(generate_audio(network, [begun], 50, seed=3)[0], whole)
    assert not np.array_equal(generate_audio(network, [begun], 50, seed=4)[0], whole)


def test_sounds_from_nothing_by_seconds_several_times(run, capsys, tmp_path):
    printed = use(capsys, "generate", run, "--seconds", 0.01, "--count", 2, "--output", tmp_path / "a.wav")
    files = [tmp_path / "a-00000.wav", tmp_path / "a-00001.wav"]
    assert printed.splitlines() == [str(file) for file in files]
    sounds = [heard(file) for file in files]
    assert [len(sound) for sound in sounds] == [80, 80]
    assert not np.array_equal(*sounds)
    there = Run.open(run).samples / "seed-0.wav"
    assert use(capsys, "generate", run, "--length", 30) == f"{there}\n"
    assert len(heard(there)) == 30


def test_prompts_of_several_lengths_and_a_window_for_a_long_one(run, capsys, tmp_path):
    lengths = {"a": 3, "b": 40, "long": 100}
    for k, (name, length) in enumerate(lengths.items()):
        write_sound(tmp_path / f"{name}.wav", np.roll(CODES, k)[:length], RATE)
    words = ["generate", run, "--length", 9, "--output", tmp_path / "o.wav", "--temperature", 0]
    files = [word for name in ("a", "b") for word in ("--prompt-file", tmp_path / f"{name}.wav")]
    use(capsys, *words, *files)
    assert [len(heard(tmp_path / f"o-0000{k}.wav")) for k in range(2)] == [12, 49]
    said = refusal(capsys, *words, "--prompt-file", tmp_path / "long.wav")
    assert "prompt has 100" in said
    assert "holds 64 (4 groups of 16)" in said
    use(capsys, *words, "--prompt-file", tmp_path / "long.wav", "--window", 2)
    assert np.array_equal(heard(tmp_path / "o.wav")[:100], np.roll(CODES, 2)[:100])


def test_what_is_no_beginning_of_a_sound_is_refused_in_one_line(run, capsys, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    wavfile.write(tmp_path / "fast.wav", 44100, KINDS["16 bits"](tone(rate=44100)))
    for words, message in (
        (
            ["--prompt-file", tmp_path / "fast.wav"],
            "fast.wav has 44,100 samples a second, and data.sample_rate is 8,000",
        ),
        (["--prompt-file", tmp_path / "text.wav"], "no whole WAV file"),
        (["--prompt", "x"], "give a WAV --prompt-file"),
        (["--seconds", 0], "seconds is 0"),
        (["--seconds", "nan"], "seconds is nan"),
        (["--seconds", "inf"], "seconds is inf"),
        (["--seconds", 1, "--length", 3], "--length and --seconds"),
        (["--stop", "x"], "--stop does not apply"),
        (["--stream"], "--stream does not apply"),
        (["--class", "1"], "--class does not apply"),
        (["--top-p", 0], "top_p is 0"),
    ):
        assert message in refusal(capsys, "generate", run, *words)
