"""Compress a file by a decoder's probabilities and a range coder, and get it back, bit for bit.

The coder is constriction's (Bamler, arXiv 2201.01741): range coding with probabilities of 24 bits, none of them 0. All
segments share one stream of words. The last step of either side is the checksum of the original.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitformer._support.atomic_files import write_atomically
from fitformer._support.checks import checked, whole
from fitformer.data.datasets.text import VOCABULARY, ByteBuffer, whole_file
from fitformer.errors import InputError, require
from fitformer.generation import Decoder
from fitformer.inference.compression import container, numerics
from fitformer.inference.compression.prediction import Predictor, run
from fitformer.inference.compression.segments import Reader, Segments, Writer, default_segments

OnStep = Callable[[int, int], None]
Restore = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Report:
    """What came of a file.

    Attributes:
        tokens: of the original; of a file of bytes its size.
        compressed: bytes of the compressed file, header and checksums included.
        coded: bytes of the range coder alone. model_bits: what the model's probabilities say that it takes.
        segments: rows that were coded side by side.
    """

    tokens: int
    compressed: int
    coded: int
    model_bits: float
    segments: int

    @property
    def bits_per_token(self) -> float:
        """Of the compressed file; 0 for an empty one."""
        return 8 * self.compressed / self.tokens if self.tokens else 0.0


@checked
def compress(
    decoder: Decoder,
    source: str | Path | ByteBuffer,
    target: str | Path,
    *,
    segments: int | None = None,
    window: int | None = None,
    on_step: OnStep = lambda done, total: None,
) -> Report:
    """Compress a file.

    Args:
        decoder: a `FITDecoder` of bytes, in eval mode, or of other tokens below 256 for a source that holds these.
        source: the file, or tokens of a byte each, such as those of an image.
        target: the compressed file, which must not be there.
        segments: parts that are coded side by side, as a batch: faster, and each begins without a context. By default
            one for every 16,384 bytes, at most 64.
        window: most groups of context; None for as many as the decoder has.
        on_step: called after every step with the number of steps done and of all.

    Raises:
        InputError: a source that is not there, becomes shorter, or has a byte outside the decoder's vocabulary; a
            target that is there; a decoder of other tokens; numbers out of range; no memory for the cache.
        MissingDependencyError: constriction is not installed.
    """
    content, target, coder = source if isinstance(source, ByteBuffer) else whole_file(source), Path(target), _coder()
    _check_decoder(decoder)
    _check_target(target)
    reader = _reader(content, segments)
    cut, encoder, numbers = reader.segments, _Encoder(coder, reader), list[str]()
    predictor = Predictor(decoder, cut.rows, cut.steps, None if window is None else whole("window", window))
    run(predictor, cut, encoder, numbers.append, on_step)
    header = container.Header(
        length=cut.length,
        segments=cut.rows,
        window=window,
        threads=torch.get_num_threads(),
        content=reader.digest.value(),
        model=numerics.fingerprint(decoder),
        numbers="".join(numbers),
        environment=numerics.environment(predictor.device),
    )
    words = encoder.words()
    with write_atomically(target, durable=True) as scratch, open(scratch, "wb") as file:
        size = container.write(file, header, words)
    return Report(cut.length, size, words.nbytes, encoder.bits, cut.rows)


@checked
def decompress(
    decoder: Decoder,
    source: str | Path,
    target: str | Path,
    *,
    restore: Restore | None = None,
    on_step: OnStep = lambda done, total: None,
) -> int:
    """Get a compressed file back, with the decoder that compressed it; returns its tokens, of bytes its size.

    Args:
        decoder: a `FITDecoder` of the same weights, on the same kind of device.
        source: the compressed file. target: the original, which must not be there; it appears when it is whole.
        restore: `(tokens) -> content`, both bytes, for tokens that are not the bytes of the original.
        on_step: called after every step with the number of steps done and of all.

    Raises:
        InputError: a source that is not there, damaged, no compressed file, or compressed by another decoder, build or
            kind of machine; a target that is there; no memory for the cache.
        MissingDependencyError: constriction is not installed.
    """
    source, target, coder = Path(source), Path(target), _coder()
    _check_decoder(decoder)
    header, words = container.read(source)
    _check_target(target)
    if header.model != numerics.fingerprint(decoder):
        raise InputError(f"{source} was compressed by a model of other weights or options; give the one that did")
    numerics.check_environment(str(source), header.environment, numerics.environment(numerics.device_of(decoder)))
    cut = Segments(header.length, header.segments)
    with numerics.threads(header.threads), write_atomically(target, durable=True) as scratch:
        predictor, writer = Predictor(decoder, cut.rows, cut.steps, header.window), Writer(scratch, cut)
        run(predictor, cut, _Decoder(coder, words, writer, source), _same_numbers(source, header.numbers), on_step)
        writer.flush()
        if writer.digest.value() != header.content:
            raise _elsewhere(source, "the checksum of what came out is not that of the original")
        if restore is not None:
            scratch.write_bytes(restore(scratch.read_bytes()))
    return cut.length


def _reader(content: ByteBuffer, segments: int | None) -> Reader:
    """Bytes, cut into segments; no more of them than there are bytes."""
    default = default_segments(len(content))
    rows = default if segments is None else whole("segments", segments, 1, container.MOST_SEGMENTS)
    return Reader(content, Segments(len(content), max(min(rows, len(content)), 1)))


class _Encoder:
    """Codes the columns of a reader."""

    def __init__(self, coder: Any, reader: Reader) -> None:
        self.stream, self.family = coder.stream.queue.RangeEncoder(), coder.stream.model.Categorical(perfect=False)
        self.columns, self.bits = reader.columns(), 0.0

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        column = next(self.columns).astype(np.int32)
        if column.max() >= (size := probabilities.shape[1]):
            raise InputError(f"the source has byte {column.max()}, and the decoder a vocabulary of {size}")
        self.stream.encode(column, self.family, probabilities)
        chosen = probabilities[np.arange(len(column)), column].astype(np.float64)
        self.bits -= float(np.log2(np.maximum(chosen, np.finfo(np.float32).tiny)).sum())
        return column

    def words(self) -> np.ndarray:
        """What the coder wrote, uint32."""
        return self.stream.get_compressed()


class _Decoder:
    """Decodes columns and hands them to a writer."""

    def __init__(self, coder: Any, words: np.ndarray, writer: Writer, source: Path) -> None:
        self.stream, self.family = coder.stream.queue.RangeDecoder(words), coder.stream.model.Categorical(perfect=False)
        self.writer, self.source = writer, source

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        try:
            column = self.stream.decode(self.family, probabilities)
        except AssertionError as error:
            raise _elsewhere(self.source, "the coder met words that no symbol has") from error
        self.writer.add(column)
        return column


def _coder() -> Any:
    return require("constriction", "compress")


def _same_numbers(source: Path, expected: str) -> Callable[[str], None]:
    def check(numbers: str) -> None:
        if numbers != expected:
            raise _elsewhere(source, "the first probabilities differ")

    return check


def _elsewhere(source: Path, why: str) -> InputError:
    return InputError(
        f"{source} cannot be decompressed here: {why}; this machine, or this version of fitformer, computes other "
        "last bits than the one that compressed it"
    )


def _check_decoder(decoder: Any) -> None:
    if decoder.vocab_size > VOCABULARY:
        raise InputError(f"the decoder has a vocabulary of {decoder.vocab_size}; bytes need at most {VOCABULARY}")
    if decoder.num_classes:
        raise InputError("the decoder is class-conditional, and files have no class; give one without classes")


def _check_target(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} is there already; remove it, or give another place")
