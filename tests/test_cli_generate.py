"""`fitformer generate` on text: what the user reads, in the file and on the screen, and each refusal in one line."""

import io
import os
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fitformer.tasks.bytes as task
from fitformer.cli import main
from fitformer.errors import InputError
from fitformer.generation import TextStreamer
from fitformer.patching import bytes_to_tokens
from fitformer.tasks.bytes import generate_bytes
from fitformer.training.run_dir import Run
from helpers import patch_task, untrained_run

TINY = ["model.dim=16", "model.latent_dim=16", "model.heads=2", "model.latent_heads=2", "model.latents_per_group=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of bytes that holds 4 groups of 8, with random weights large enough that all bytes are drawn."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_bytes(bytes(range(256)) * 4)
    sizes = ["model.layers=(1)1(1)", "data.length=32", "model.tokens_per_group=8"]
    files = ["data.source=files", f"data.path={folder / 'text.txt'}"]
    path = untrained_run(folder / "run", "python-bytes-demo", *TINY, *sizes, *files)
    network = Run.open(path).model()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.15 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    network.save_pretrained(Run.open(path).model_folder)
    return path


def use(capsys, *words):
    assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refusal(capsys, *words):
    """What is said of a command that is refused before anything is printed."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("fitformer: error: ")
    return line


def shown(data):
    return data.decode("utf-8", errors="replace") + "\n"


# ---- text as it comes ----


class Page(list):
    """A file that remembers each write."""

    def write(self, text):
        self.append(text)
        return len(text)

    def flush(self):
        pass


@given(st.binary(max_size=30) | st.text(max_size=12).map(str.encode), st.integers(0, 12))
@settings(deadline=None, max_examples=200)
def test_a_streamed_text_is_the_text_and_no_character_is_torn(data, prompt):
    page = Page()
    streamer = TextStreamer(page)
    for _ in range(2):
        page.clear()
        streamer.put(bytes_to_tokens(data[:prompt])[None])
        for byte in data[prompt:]:
            streamer.put(torch.tensor([byte]))
        waiting = "".join(page)
        streamer.end()
        assert "".join(page) == data.decode("utf-8", errors="replace")
        if data.decode("utf-8", errors="ignore").encode() == data:
            assert "\ufffd" not in waiting or "\ufffd".encode() in data
            assert waiting == data.decode()


def test_characters_wait_for_their_last_byte():
    page = Page()
    streamer = TextStreamer(page, skip_prompt=True)
    streamer.put(bytes_to_tokens(b"left out")[None])
    written = []
    for byte in "a\u20ac".encode() + b"\xf0\x9f":
        page.clear()
        streamer.put(torch.tensor([byte]))
        written.append("".join(page))
    assert written == ["a", "", "", "\u20ac", "", ""]
    page.clear()
    streamer.end()
    assert "".join(page) == "\ufffd"
    with pytest.raises(InputError, match="one sequence, not for 2"):
        streamer.put(torch.zeros(2, 3, dtype=torch.int64))


# ---- prompts ----


@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize("prompt", ["AB\u00e9", "\u6771", "A\udcff\udce6\udc9d"])
def test_a_text_is_printed_whole_and_written_to_the_byte(run, capsys, tmp_path, prompt, stream):
    file = tmp_path / "text"
    words = ["generate", run, "--prompt", prompt, "--length", 60, "--seed", 4, "--output", file, *stream]
    out = use(capsys, *words)
    whole = file.read_bytes()
    given = os.fsencode(prompt)
    assert whole.startswith(given)
    assert len(whole) == len(given) + 60
    assert len(set(whole[len(given) :])) > 20, "the model draws bytes of all kinds"
    assert out == shown(whole)
    (tmp_path / "prompt").write_bytes(given)
    words[2:4] = ["--prompt-file", tmp_path / "prompt"]
    assert use(capsys, *words) == out
    assert file.read_bytes() == whole
    network = Run.open(run).model()
    assert generate_bytes(network, [given], 60, seed=4) == [whole]


def test_characters_of_a_stream_come_one_by_one(run, monkeypatch):
    writes = {}
    for name, words in (("stream", ["--stream"]), ("whole", [])):
        page = Page()
        monkeypatch.setattr(sys, "stdout", page)
        assert main(["generate", run, "--prompt", "AB", "--length", "40", *words]) == 0
        writes[name] = page
    monkeypatch.undo()
    assert "".join(writes["stream"]) == "".join(writes["whole"])
    assert len([text for text in writes["stream"] if text]) > 15
    assert len([text for text in writes["whole"] if text]) < 6


def test_prompts_of_several_lengths_go_on_as_each_alone(run, capsys, tmp_path):
    prompts = ["A", "Bcdefgh ijk", "\u6771\u4eac"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    words = ["generate", run, "--length", 20, "--temperature", 0, "--count", 2, "--output", tmp_path / "t.txt"]
    out = use(capsys, *words, *asked)
    files = [(tmp_path / f"t-0000{k}.txt").read_bytes() for k in range(6)]
    assert out == "\n".join(f"----- {k} -----\n{shown(file)}" for k, file in enumerate(files))
    for k, file in enumerate(files):
        alone = tmp_path / "alone.txt"
        use(capsys, "generate", run, "--length", 20, "--temperature", 0, "--prompt", prompts[k // 2], "--output", alone)
        assert alone.read_bytes() == file
    assert use(capsys, *words, *asked, "--stream") == out
    # Drawn, each has its own luck, whether they are drawn together or one by one.
    words[words.index("--temperature") + 1] = 1
    assert use(capsys, *words, *asked, "--stream") == use(capsys, *words, *asked)
    drawn = [(tmp_path / f"t-0000{k}.txt").read_bytes() for k in range(6)]
    assert len(set(drawn)) == 6


def test_texts_without_a_prompt_do_not_show_the_newline_they_begin_with(run, capsys, tmp_path):
    out = use(capsys, "generate", run, "--length", 9, "--output", tmp_path / "t")
    assert out == shown((tmp_path / "t").read_bytes())
    assert len((tmp_path / "t").read_bytes()) == 9


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_terminal_without_the_letters_shows_their_codes(run, stream, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", run, "--prompt", "\u00e9\u6771", "--length", "5", *stream]) == 0
    assert terminal.buffer.getvalue().startswith(b"\\xe9\\u6771")


# ---- length and window ----


def test_a_long_file_is_read_from_where_the_window_begins(run, capsys, tmp_path, monkeypatch):
    content = bytes((k * k) % 251 for k in range(3_000_000))
    (tmp_path / "long").write_bytes(content)
    read, network = [], Run.open(run).model()

    def spy(model, prompts, *rest, **options):
        read.extend(map(len, prompts))
        return generate_bytes(model, prompts, *rest, **options)

    patch_task(monkeypatch, task, generate_bytes=spy)
    words = ["generate", run, "--prompt-file", tmp_path / "long", "--length", 30, "--temperature", 0]
    out = use(capsys, *words, "--window", 3, "--output", tmp_path / "out")
    assert read == [len(content) % 8 + 2 * 8]
    whole = (tmp_path / "out").read_bytes()
    # As if all of it had been read.
    assert [whole] == generate_bytes(network, [content], 30, temperature=0, window=3)
    assert out == shown(whole)
    said = refusal(capsys, *words)
    assert "3000000" in said
    assert "holds 32 (4 groups of 8)" in said
    assert read == [len(content) % 8 + 2 * 8], "a prompt that is too long is not read"


def test_text_goes_past_the_trained_length_with_the_last_groups(run, capsys, tmp_path):
    words = ["generate", run, "--prompt", "x" * 32, "--length", 50, "--temperature", 0]
    out = use(capsys, *words)
    assert use(capsys, *words, "--window", 4) == out
    assert use(capsys, *words, "--window", 1) != out
    assert "prompt has 33" in refusal(capsys, "generate", run, "--prompt", "x" * 33)


# ---- ends ----


def test_a_stop_string_ends_the_text_and_its_absence_is_told_after_it(run, capsys, tmp_path):
    file = tmp_path / "t"
    words = ["generate", run, "--prompt", "AB", "--length", 40, "--seed", 1, "--output", file]
    use(capsys, *words)
    whole = file.read_bytes()
    stop = whole[20:23]
    first = whole.index(stop, 2) + 3
    for stream in ([], ["--stream"]):
        out = use(capsys, *words, "--stop", os.fsdecode(stop), *stream)
        assert file.read_bytes() == whole[:first]
        assert out == shown(whole[:first])
    out = use(capsys, *words, "--stop", "never", "--stop", os.fsdecode(stop))
    assert out == shown(whole[:first])
    for stream in ([], ["--stream"]):
        file.unlink()
        assert main([str(word) for word in [*words, "--stop", "never", *stream]]) == 2
        out, err = capsys.readouterr()
        assert out == shown(whole)
        assert file.read_bytes() == whole
        assert err.startswith("fitformer: error: the stop string 'never' did not come in 40 bytes")
        assert len(err.splitlines()) == 1


def test_of_several_texts_those_without_the_stop_string_are_named(run, capsys, tmp_path):
    words = ["generate", run, "--length", 40, "--count", 3, "--output", tmp_path / "t"]
    use(capsys, *words)
    stop = os.fsdecode((tmp_path / "t-00001").read_bytes()[30:34])
    assert main([str(word) for word in [*words, "--stop", stop]]) == 2
    out, err = capsys.readouterr()
    assert "of the texts 0, 2;" in err
    assert [len((tmp_path / f"t-0000{k}").read_bytes()) for k in range(3)] == [40, 34, 40]
    assert out.count("-----") == 6


# ---- strengths ----


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["--top-k", 1], True),
        (["--top-p", 1e-6], True),
        (["--min-p", 1], True),
        (["--temperature", 0, "--repetition-penalty", 1e6], False),
        (["--temperature", 1], False),
    ],
)
def test_options_of_sampling_arrive(run, capsys, words, same):
    greedy = use(capsys, "generate", run, "--prompt", "AB", "--length", 30, "--temperature", 0)
    assert (use(capsys, "generate", run, "--prompt", "AB", "--length", 30, *words) == greedy) == same


def test_a_penalty_keeps_bytes_from_coming_back(run, capsys, tmp_path):
    words = ["--temperature", 0, "--repetition-penalty", 1e9, "--output", tmp_path / "t"]
    use(capsys, "generate", run, "--prompt", "AB", "--length", 30, *words)
    greedy = generate_bytes(Run.open(run).model(), [b"AB"], 30, temperature=0)[0]
    assert len(set((tmp_path / "t").read_bytes())) > len(set(greedy))


# ---- bad input ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt-file", "EMPTY"], "the prompt is empty"),
        (["--prompt-file", "nowhere"], "there is no prompt file nowhere"),
        (["--top-p", 0], "top_p is 0"),
        (["--top-p", 0, "--stream", "--count", 2], "top_p is 0"),
        (["--top-p", 1.5], "top_p is 1.5"),
        (["--min-p", -0.1], "min_p is -0.1"),
        (["--min-p", 1.5], "min_p is 1.5"),
        (["--min-p", "nan"], "min_p is nan"),
        (["--top-k", 0], "top_k is 0"),
        (["--temperature", -1], "temperature is -1"),
        (["--repetition-penalty", 0], "repetition_penalty is 0"),
        (["--repetition-penalty", "inf"], "repetition_penalty is inf"),
        (["--stop", ""], "stop string b'' has 0 bytes"),
        (["--stop", "abc", "--length", 2], "stop string b'abc' has 3 bytes"),
        (["--length", 0], "0 is too small"),
        (["--window", 0], "0 is too small"),
        (["--image", "a.png"], "--image does not apply"),
        (["--keep-rows", 3], "--keep-rows does not apply"),
        (["--class", "1"], "--class does not apply"),
        (["--batch-size", 3], "--batch-size does not apply"),
        (["--seconds", 3], "--seconds does not apply"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(run, capsys, tmp_path, words, message):
    (tmp_path / "empty").write_bytes(b"")
    words = [tmp_path / "empty" if word == "EMPTY" else word for word in words]
    assert message in refusal(capsys, "generate", run, *words)


def test_a_task_that_generates_nothing_is_named(tmp_path, capsys):
    pixels = untrained_run(tmp_path / "run", "digits-classify", "model.layers=(1)1")
    assert "fitformer predict" in refusal(capsys, "generate", pixels)
    assert replace(task.TASK).generate_audio is None
