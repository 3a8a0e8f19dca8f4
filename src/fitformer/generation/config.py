"""How tokens are generated: the options of `generate`, under the names that Hugging Face users know."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from fitformer._support.checks import check_fields, whole
from fitformer._support.suggest import suggest
from fitformer.errors import InputError
from fitformer.generation.logits import check_filters

# They choose among drawn tokens; without a draw they would be ignored in silence.
_OF_DRAWS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class GenerationConfig:
    """Options of generation.

    Attributes:
        max_new_tokens: tokens to generate for each sequence at most.
        do_sample: draw each token; otherwise take the likeliest one.
        temperature, top_k, top_p, min_p: which tokens are drawn, see `filter_logits`; only with `do_sample`.
        repetition_penalty: logits of tokens that the sequence has already are divided by it, negative ones multiplied
            (arXiv 1909.05858, section 4.1); 1 changes nothing.
        eos_token_id: a token, or several, that end a sequence.
        stop_strings: texts, or bytes, that end a sequence of bytes once it has generated one of them.
        pad_token_id: what follows the end of a sequence while others go on: by default `eos_token_id`, or 0.
        num_return_sequences: sequences for each prompt.
        seed, first: row k of the result is sample `first + k`. What it draws depends on (seed, first + k), on its own
            prompt and on nothing else.
        use_cache: decode with a cache; without one the decoder runs on the whole context for every token.
        compile: on a CPU, run compiled code for a token's way through local layers, see `CachedDecoder`; the first
            token takes up to half a minute more.
        window: groups of context at most, the current one included. It is needed to go past the number of groups that
            a decoder with a table of positions was built for, see `context_start`.

    Raises:
        InputError: an option of another kind or out of range, or one that would have no effect.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | bytes | Sequence[str | bytes] | None = None
    pad_token_id: int | None = None
    num_return_sequences: int = 1
    seed: int = 0
    first: int = 0
    use_cache: bool = True
    compile: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        whole("max_new_tokens", self.max_new_tokens, 0)
        whole("num_return_sequences", self.num_return_sequences)
        if self.window is not None:
            whole("window", self.window)
        check_filters(self.temperature, self.top_k, self.top_p, self.min_p)
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 changes nothing)")
        given = [name for name in _OF_DRAWS if getattr(self, name) is not None]
        given += ["temperature"] if self.temperature not in (0, 1) else []
        if given and not self.do_sample:
            raise InputError(
                f"{given[0]} is {getattr(self, given[0])}, but nothing is drawn without do_sample=True: give both"
            )
        if self.compile and not self.use_cache:
            raise InputError("compile is of generation with a cache, and use_cache is False: leave one of them out")
        for stop in self.stop_bytes:
            if not 0 < len(stop) <= self.max_new_tokens:
                raise InputError(
                    f"the stop string {stop!r} has {len(stop)} bytes; it must have at least 1 and at most "
                    f"max_new_tokens, which is {self.max_new_tokens}"
                )

    @classmethod
    def of(cls, config: "GenerationConfig | None", options: dict[str, Any]) -> Self:
        """A configuration with some options replaced, or one of these options alone.

        Raises:
            InputError: an option that there is not, or what the constructor refuses.
        """
        names = list(cls.__dataclass_fields__)
        unknown = [name for name in options if name not in names]
        if unknown:
            raise InputError(
                f"generation has no option {unknown[0]!r}{suggest(unknown[0], names)}; there are {', '.join(names)}"
            )
        if config is not None:
            return replace(config, **options)  # type: ignore[return-value]
        if "max_new_tokens" not in options:
            raise InputError("how many tokens? give max_new_tokens")
        return cls(**options)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def stop_bytes(self) -> tuple[bytes, ...]:
        """The stop strings as bytes."""
        given = self.stop_strings
        texts: Sequence[str | bytes] = () if given is None else (given,) if isinstance(given, str | bytes) else given
        return tuple(as_bytes("stop_strings", text) if isinstance(text, str) else text for text in texts)

    @property
    def padding(self) -> int:
        """The token after the end of a sequence."""
        return self.pad_token_id if self.pad_token_id is not None else (*self.end_tokens, 0)[0]


def as_bytes(name: str, text: str) -> bytes:
    """A text as UTF-8; `name` is that of the argument it came in.

    Raises:
        InputError: it has half a character.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} has {text!r}, no text in UTF-8 ({error.reason}); give bytes") from error
