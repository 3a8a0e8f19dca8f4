"""Generating tokens with an autoregressive decoder (spec section 7: the reference never samples).

One loop asks a step (`steps.py`) for the logits of the next token, processes them and draws. The draw for token p of
sample k is a pure function of (seed, k, p): batch size, prompt and way of running do not enter.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fitformer._support.checks import checked
from fitformer._support.rng import seeded_uniforms
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.generation.config import GenerationConfig, as_bytes
from fitformer.generation.logits import draw, filter_logits, likeliest, penalize_repetition
from fitformer.generation.steps import Cached, Decoder, Step, Uncached

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""`processor(tokens (b, p), logits (b, vocab)) -> logits`, as in transformers; shorter rows begin with padding."""

StoppingCriterion = Callable[[Tensor, Tensor], "Tensor | bool"]
"""`criterion(tokens (b, p), logits (b, vocab)) -> ended`, a boolean or one for each row `(b,)`, as in transformers."""

Prompt = Tensor | Sequence[Any] | None


@runtime_checkable
class Streamer(Protocol):
    """What is told of tokens as they come, as in transformers."""

    def put(self, tokens: Tensor) -> None:
        """Take the prompt `(b, L)`, then each column of tokens `(b,)`, on the CPU."""

    def end(self) -> None:
        """Know that no more tokens come."""


@checked
def generate(
    decoder: Decoder,
    prompt: Prompt = None,
    config: GenerationConfig | None = None,
    *,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
    streamer: Streamer | None = None,
    generator: torch.Generator | None = None,
    step: Step | None = None,
    labels: Tensor | None = None,
    **options: Any,
) -> Any:
    """Prompts with what a decoder generates after them. The decoder should be in eval mode.

    Args:
        decoder: a `FITDecoder`; any `Decoder` with `use_cache=False`.
        prompt: integer tokens `(b, L)`; a list of sequences of several lengths, bytes and text among them; or None for
            one sequence from nothing.
        config, options: the options of `GenerationConfig`, as one or by their names; names override the config.
        logits_processor: applied to the logits one after the other, before temperature, top-k, top-p and min-p.
        stopping_criteria: end sequences, besides the options' own ends.
        streamer: told of the prompt and of each column of tokens.
        generator: the seed is drawn from it, in place of the option `seed`.
        step: what gives the logits, see `steps.py`; by default a cache, or none where `use_cache` is false.
        labels: the class of each prompt `(b,)`, for a class-conditional decoder.

    Returns:
        int64 `(b * num_return_sequences, L + k)`, the sequences of a prompt together, padded after their ends; for a
        list of prompts a list of tensors `(length,)`, without padding.

    Raises:
        InputError: a prompt of another shape or kind, or outside the vocabulary; a length that the decoder cannot reach
            without `window`; options out of range; labels that do not go with the decoder.
    """
    run = _Run(decoder, prompt, GenerationConfig.of(config, options), generator, step, labels)
    if streamer is not None:
        streamer.put(run.so_far().cpu())
    for column in run.columns(logits_processor, stopping_criteria):
        if streamer is not None:
            streamer.put(column.cpu())
    if streamer is not None:
        streamer.end()
    return run.result()


@checked
def stream(
    decoder: Decoder,
    prompt: Prompt = None,
    config: GenerationConfig | None = None,
    *,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
    generator: torch.Generator | None = None,
    step: Step | None = None,
    labels: Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """The tokens that `generate` would return, a column `(b,)` int64 as soon as it is drawn; arguments as there."""
    run = _Run(decoder, prompt, GenerationConfig.of(config, options), generator, step, labels)
    return run.columns(logits_processor, stopping_criteria)


class _Run:
    """Sequences that grow by a token at a time; rows end at the same column, shorter ones begin later."""

    def __init__(
        self,
        decoder: Decoder,
        prompt: Prompt,
        config: GenerationConfig,
        generator: torch.Generator | None,
        step: Step | None,
        labels: Tensor | None,
    ) -> None:
        self.config = config
        self.several = prompt is not None and not isinstance(prompt, Tensor)
        prompts = _rows(prompt, decoder.vocab_size)
        rows = [row for row in prompts for _ in range(config.num_return_sequences)]
        self.length = self.begun = max(map(len, rows), default=0)
        _check_length(decoder, self.length, config)
        _check_ends(decoder.vocab_size, config)
        width = self.length + config.max_new_tokens
        # Tokens are int64: as much as two numbers each.
        check_room(f"tokens of {len(rows)} sequences of length {width}", 2 * len(rows) * width)
        self.starts = [self.length - len(row) for row in rows]
        self.ends: list[int | None] = [None] * len(rows)
        self.tokens = torch.full((len(rows), width), config.padding, dtype=torch.int64, device=_device(decoder))
        for own, row, start in zip(self.tokens, rows, self.starts, strict=True):
            own[start : self.length] = row
        self.seed = config.seed if generator is None else _seed_from(generator)
        labels = _repeated(labels, len(prompts), config.num_return_sequences, step)
        self.step = step or _step(decoder, config, labels)
        self.seen = self._seen(decoder.vocab_size) if config.repetition_penalty != 1 else None

    def so_far(self) -> Tensor:
        """The tokens of all rows `(b, p)`."""
        return self.tokens[:, : self.length]

    def columns(self, processors: Sequence[LogitsProcessor], criteria: Sequence[StoppingCriterion]) -> Iterator[Tensor]:
        """Add token after token, until all rows have ended."""
        while len(self.tokens) and self.length < self.tokens.shape[1] and None in self.ends:
            with torch.no_grad():
                logits = self.step(self.so_far(), self.starts)
                for process in processors:
                    logits = process(self.so_far(), logits)
                self._add(self._choose(logits))
                self._note_ends(logits, criteria)
            yield self.tokens[:, self.length - 1].clone()

    def result(self) -> Any:
        """What `generate` returns."""
        if not self.several:
            return self.so_far().clone()
        spans = zip(self.tokens, self.starts, self.ends, strict=True)
        return [row[start : self.length if end is None else end].clone() for row, start, end in spans]

    def _choose(self, logits: Tensor) -> Tensor:
        """The next token of each row `(b,)`."""
        config = self.config
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen, config.repetition_penalty)
        if not config.do_sample:
            return likeliest(logits)
        logits = filter_logits(logits, config.temperature, config.top_k, config.top_p, config.min_p)
        samples = range(config.first, config.first + len(logits))
        positions = [self.length - start for start in self.starts]
        return draw(logits, seeded_uniforms(self.seed, samples, positions))

    def _add(self, column: Tensor) -> None:
        self.tokens[:, self.length] = column
        for row, end in enumerate(self.ends):
            if end is not None:
                self.tokens[row, self.length] = self.config.padding
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, self.length, None], True)
        self.length += 1

    def _note_ends(self, logits: Tensor, criteria: Sequence[StoppingCriterion]) -> None:
        """Note which rows the last token ended."""
        ended = torch.zeros(len(self.tokens), dtype=torch.bool)
        last = self.tokens[:, self.length - 1]
        for token in self.config.end_tokens:
            ended |= (last == token).cpu()
        for stop in self.config.stop_bytes:
            # Of the generated tokens alone.
            if self.length - len(stop) >= self.begun:
                tail = self.tokens[:, self.length - len(stop) : self.length]
                ended |= (tail == torch.tensor(list(stop), device=tail.device)).all(1).cpu()
        for criterion in criteria:
            ended |= torch.as_tensor(criterion(self.so_far(), logits)).cpu()
        for row in ended.nonzero().flatten().tolist():
            if self.ends[row] is None:
                self.ends[row] = self.length

    def _seen(self, vocab_size: int) -> Tensor:
        """Which tokens the prompts have, booleans `(b, vocab)`."""
        seen = torch.zeros(len(self.tokens), vocab_size, dtype=torch.bool, device=self.tokens.device)
        for own, row, start in zip(seen, self.tokens, self.starts, strict=True):
            own[row[start : self.length]] = True
        return seen


def _rows(prompt: Prompt, vocab_size: int) -> list[Tensor]:
    """Prompts as tokens `(L,)`, int64."""
    if prompt is None:
        return [torch.zeros(0, dtype=torch.int64)]
    if isinstance(prompt, Tensor) and prompt.ndim != 2:
        raise InputError(f"the prompt is {prompt.dtype} {tuple(prompt.shape)}; give integer tokens (b, length)")
    rows = []
    for row in prompt:
        row = _as_tensor(row)
        if row.ndim != 1 or row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise InputError(f"the prompt is {row.dtype} {tuple(row.shape)}; give integer tokens (b, length)")
        rows.append(row.long())
    for row in rows:
        outside = row[(row < 0) | (row >= vocab_size)]
        if len(outside):
            size = vocab_size
            raise InputError(f"the prompt has token {outside[0].item()}, the vocabulary has {size} (0 to {size - 1})")
    return rows


def _as_tensor(row: Any) -> Tensor:
    if isinstance(row, Tensor):
        return row
    if not isinstance(row, Sequence):
        raise InputError(f"a prompt is {row!r}; give integer tokens (length,), bytes or text")
    row = list(as_bytes("prompt", row) if isinstance(row, str) else row)
    return torch.tensor(row, dtype=None if row else torch.int64)


def _step(decoder: Decoder, config: GenerationConfig, labels: Tensor | None) -> Step:
    if config.use_cache:
        return Cached(decoder, config.window, labels, compile=config.compile)
    return Uncached(decoder, config.window, labels)


def _repeated(labels: Tensor | None, prompts: int, times: int, step: Step | None) -> Tensor | None:
    """The class of each sequence."""
    if labels is None:
        return None
    if step is not None:
        raise InputError("labels are given with a step, which knows its own; leave them out")
    if labels.shape != (prompts,):
        raise InputError(f"labels are {tuple(labels.shape)}; give one class for each of the {prompts} prompts")
    return labels.repeat_interleave(times)


def _device(decoder: Any) -> torch.device:
    if not isinstance(decoder, nn.Module):
        return torch.device("cpu")
    tensors = itertools.chain(decoder.parameters(), decoder.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _seed_from(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _check_length(decoder: Decoder, prompt_length: int, config: GenerationConfig) -> None:
    groups, n = decoder.most_groups, decoder.tokens_per_group
    length = prompt_length + config.max_new_tokens
    if groups is not None and config.window is None and length > groups * n:
        raise InputError(
            f"a prompt of {prompt_length} tokens and max_new_tokens={config.max_new_tokens} are a length of {length}, "
            f"beyond the decoder's {groups * n} ({groups} groups of {n} tokens); ask for less, or for window={groups}, "
            "which goes on with the last groups as context"
        )


def _check_ends(vocab_size: int, config: GenerationConfig) -> None:
    tokens = {
        "eos_token_id": config.end_tokens,
        "pad_token_id": () if config.pad_token_id is None else (config.pad_token_id,),
    }
    tokens["stop_strings"] = tuple(byte for stop in config.stop_bytes for byte in stop)
    for name, values in tokens.items():
        for value in values:
            if not 0 <= value < vocab_size:
                raise InputError(
                    f"{name} has token {value}, outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})"
                )
