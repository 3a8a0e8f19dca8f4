"""Generation measured at several positions: FIT with its caches, FIT without, and a dense transformer with its cache.

All of equal parameters, in the same process, in turns. A position is reached without generating up to it: FIT reads
random bytes in whole groups, and the dense transformer's cache is filled with random keys and values. FIT's cost is
that of one whole group, so the global phase at its end is included.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitformer._support.atomic_files import write_atomically
from fitformer._support.checks import check_fields, whole
from fitformer._support.system_memory import available_memory
from fitformer.errors import InputError, require
from fitformer.execution import Streamed
from fitformer.generation import CachedDecoder
from fitformer.models.config import TrunkConfig
from fitformer.models.decoder import FITDecoder
from fitformer.profiling.dense_decoder import CachedDense, DenseDecoder, dense_like
from fitformer.profiling.flops import count_parameters
from fitformer.profiling.product_times import record_products, replay

VOCABULARY = 256
POSITIONS = (1_000, 4_096, 16_384, 65_536, 262_144)
# Tokens of one measurement of the dense transformer, whose cost is the same for all of them.
DENSE_TOKENS = 8
# Seconds that a token may take without caches: positions that would take longer are left out.
UNCACHED_SECONDS = 20.0
# The share of the free memory that the dense transformer's cache may fill.
DENSE_SHARE = 0.7
WAYS = {
    "fit_cached": "FIT, cached",
    "fit_uncached": "FIT, uncached",
    "dense_cached": "dense, KV cache",
}


@dataclass(frozen=True)
class GenerationBench:
    """What is measured.

    Attributes:
        trunk: of the FIT decoder; by default one for long sequences, of 13 million parameters.
        tokens_per_group: n.
        positions: tokens of context at which a token's time is measured.
        batch: rows generated at once. repeats: turns that medians are taken of. device: `cpu` or `cuda`.
        compile: FIT with its caches runs compiled, see `CachedDecoder`; the others do not.

    Raises:
        InputError: no positions, or numbers below 1.
    """

    trunk: TrunkConfig = field(
        default_factory=lambda: TrunkConfig(
            "(2)2(2)2(2)", 256, 384, heads=4, latent_heads=6, latents_per_group=8, latent_position="index"
        )
    )
    tokens_per_group: int = 512
    positions: Sequence[int] = POSITIONS
    batch: int = 1
    repeats: int = 3
    device: str = "cpu"
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.positions:
            raise InputError("there are no positions to measure at; give some, such as 1000,65536")
        for position in self.positions:
            whole("a position", position, 1, 2**40)
        whole("tokens_per_group", self.tokens_per_group), whole("batch", self.batch), whole("repeats", self.repeats)
        object.__setattr__(self, "positions", tuple(sorted(self.positions)))

    def decoder(self) -> FITDecoder:
        """The FIT decoder, of random weights; a table of positions reaches one group beyond the last position."""
        torch.manual_seed(0)
        is_table = self.trunk.latent_position in ("learned", "sin_cos")
        groups = self.positions[-1] // self.tokens_per_group + 2 if is_table else None
        return FITDecoder(self.trunk, groups, self.tokens_per_group, VOCABULARY).to(self.device).eval()


class FITCached:
    """FIT with its caches; a measurement is one whole group, the one that holds the position."""

    def __init__(self, bench: GenerationBench, decoder: FITDecoder) -> None:
        self.bench, self.tokens = bench, bench.tokens_per_group
        self.cached = CachedDecoder(decoder, compile=bench.compile)
        self.state = self.cached.start(bench.batch)

    def stand_at(self, position: int) -> bool:
        """Read random bytes up to the group; positions never fall."""
        missing = position // self.tokens * self.tokens - self.state.position[0]
        if missing > 0:
            self.cached.feed(self.state, random_tokens(self.bench, missing), last=True)
        return True

    def loop(self) -> Callable[[], Tensor]:
        """The work of a measurement."""
        state = self.state.clone()
        return lambda: greedy(self.bench, self.cached, state, self.tokens)

    def cache_bytes(self) -> int:
        """Of the state at the position."""
        return int(self.state.nbytes)


class FITUncached:
    """FIT run on everything for each token, streamed so that long sequences fit the memory."""

    tokens = 1

    def __init__(self, bench: GenerationBench, decoder: FITDecoder) -> None:
        self.bench, self.decoder = bench, decoder
        self.position, self.took = 0, 0.0

    def stand_at(self, position: int) -> bool:
        """False where a token would take longer than UNCACHED_SECONDS, if its time grows as the tokens."""
        if self.took * position > UNCACHED_SECONDS * self.position:
            return False
        n = self.bench.tokens_per_group
        self.groups = random_tokens(self.bench, (position // n + 1) * n).unflatten(1, (-1, n))
        self.position = position
        return True

    def loop(self) -> Callable[[], Tensor]:
        """The work of a measurement."""
        return self._token

    @torch.no_grad()
    def _token(self) -> Tensor:
        start, was = time.perf_counter(), self.decoder.execution
        self.decoder.set_execution(Streamed())
        token = self.decoder(self.groups)[:, -1, -1].argmax(-1)
        self.decoder.set_execution(was)
        self.took = time.perf_counter() - start
        return token

    def cache_bytes(self) -> int:
        """Nothing is kept."""
        return 0


class DenseCached:
    """The dense transformer with its cache, filled at random."""

    tokens = DENSE_TOKENS

    def __init__(self, bench: GenerationBench, decoder: DenseDecoder) -> None:
        self.bench, room = bench, DENSE_SHARE * available_memory(bench.device)
        a_token = 2 * len(decoder.layers) * decoder.dim * bench.batch * decoder.embedding.weight.element_size()
        self.reached = [p for p in bench.positions if (p + DENSE_TOKENS) * a_token <= room]
        self.cached = CachedDense(decoder, max(self.reached, default=1) + DENSE_TOKENS)
        self.state = self.cached.start(bench.batch)

    def stand_at(self, position: int) -> bool:
        """False where the cache would not fit the memory."""
        if position not in self.reached:
            return False
        self.state.fill(position)
        self.position = position
        return True

    def loop(self) -> Callable[[], Tensor]:
        """The work of a measurement; each begins at the position."""
        self.state.fill(self.position)
        return lambda: greedy(self.bench, self.cached, self.state, DENSE_TOKENS)

    def cache_bytes(self) -> int:
        """Of the tokens up to the position."""
        self.state.fill(self.position)
        return self.state.nbytes


Way = FITCached | FITUncached | DenseCached


def greedy(bench: GenerationBench, cached: Any, state: Any, count: int) -> Tensor:
    """The likeliest token after the last, so many times: the whole loop of a generation."""
    tokens = torch.zeros(bench.batch, 1, dtype=torch.int64, device=bench.device)
    for _ in range(count):
        tokens = cached.feed(state, tokens, last=True)[:, -1].argmax(-1, keepdim=True)
    return tokens


def random_tokens(bench: GenerationBench, count: int) -> Tensor:
    """Tokens `(b, count)`."""
    return torch.randint(VOCABULARY, (bench.batch, count), device=bench.device)


def seconds_of(work: Callable[[], Tensor]) -> float:
    """Seconds of some work, of the device's too."""
    start = time.perf_counter()
    work().cpu()
    return time.perf_counter() - start


Result = dict[str, Any]


def measure_generation(bench: GenerationBench, tell: Callable[[Result], None] = lambda row: None) -> Result:
    """Measure every way at every position.

    Args:
        bench: what is measured.
        tell: called with the row of each position as it is measured.

    Returns:
        plain data: sizes, and `rows` with the position and for each way of `WAYS` its tokens per second (all rows of
        the batch together), its cache in bytes and its seconds a token, or None where it was not measured; `slowdown`,
        the share of FIT's speed at the first position that is lost at the last, measured in turns with nothing else.
    """
    decoder = bench.decoder()
    dense = dense_like(decoder).to(bench.device).eval()
    ways: dict[str, Way] = {
        "fit_cached": FITCached(bench, decoder),
        "fit_uncached": FITUncached(bench, decoder),
        "dense_cached": DenseCached(bench, dense),
    }
    rows = []
    for position in bench.positions:
        rows.append({"position": position, **_at(bench, ways, position)})
        tell(rows[-1])
    slowdown = share_lost(bench, FITCached(bench, decoder), ways["fit_cached"])
    return {**_sizes(bench, decoder, dense), "rows": rows, "slowdown": slowdown}


def share_lost(bench: GenerationBench, first: Any, last: Any) -> float:
    """The share of the speed at the first position that is lost at the last, where one way stands already."""
    first.stand_at(bench.positions[0])
    times = [(seconds_of(first.loop()), seconds_of(last.loop())) for _ in range(bench.repeats + 1)][1:]
    begun, ended = (statistics.median(each) for each in zip(*times, strict=True))
    return 1 - begun / ended


def _at(bench: GenerationBench, ways: dict[str, Way], position: int) -> Result:
    """What each way takes at a position, in turns, after one turn to warm up."""
    standing = {name: way for name, way in ways.items() if way.stand_at(position)}
    times: dict[str, list[float]] = {name: [] for name in standing}
    for turn in range(bench.repeats + 1):
        for name, way in standing.items():
            # A token without caches is slow, and warm by itself.
            if turn == 0 or not isinstance(way, FITUncached) or way.took < 1:
                times[name].append(seconds_of(way.loop()) / way.tokens)
    return {name: _row(bench, standing[name], times[name]) if name in standing else None for name in ways}


def _row(bench: GenerationBench, way: Way, times: list[float]) -> Result:
    times = times[1:] or times
    seconds = statistics.median(times)
    rate = bench.batch / seconds
    return {"tokens_per_second": rate, "cache_bytes": way.cache_bytes(), "seconds": seconds, "all_seconds": times}


def _sizes(bench: GenerationBench, decoder: FITDecoder, dense: DenseDecoder) -> Result:
    shape = {"dim": dense.dim, "depth": len(dense.layers), "heads": dense.heads}
    return {
        "trunk": asdict(bench.trunk),
        "tokens_per_group": bench.tokens_per_group,
        "dense": shape,
        "parameters": {"fit": count_parameters(decoder), "dense": count_parameters(dense)},
        "batch": bench.batch,
        "device": bench.device,
        "compile": bench.compile,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure_products(bench: GenerationBench) -> Result:
    """A token's time against the time of its matrix products alone, over one whole group at the first position.

    Returns:
        plain data: for `fit` and `dense` the seconds a token of the whole loop and of the products, and their ratio.
    """
    decoder = bench.decoder()
    dense = dense_like(decoder).to(bench.device).eval()
    fit = _against_products(bench, lambda asked: FITCached(asked, decoder))
    found = {"fit": fit, "dense": _against_products(bench, lambda asked: DenseCached(asked, dense))}
    return {**_sizes(bench, decoder, dense), "position": bench.positions[0], **found}


def _against_products(bench: GenerationBench, make: Callable[[GenerationBench], Way]) -> Result:
    """A way's loop against the products of the same loop, as it runs without compiling, in turns."""
    way, plain = make(bench), make(replace(bench, compile=False))
    for each in (way, plain):
        each.stand_at(bench.positions[0])
        seconds_of(each.loop())
    products, times = record_products(plain.loop()), []
    for _ in range(bench.repeats):
        times.append((seconds_of(way.loop()), seconds_of(lambda: replay(products))))
    loop, alone = (statistics.median(each) / way.tokens for each in zip(*times, strict=True))
    return {"seconds": loop, "product_seconds": alone, "ratio": loop / alone, "products": len(products) / way.tokens}


def ratios(found: Result) -> list[Result]:
    """FIT against the dense transformer at each position where both were measured: speed and size of the cache."""
    pairs = [(row["position"], row["fit_cached"], row["dense_cached"]) for row in found["rows"]]
    return [
        {
            "position": position,
            "speed": fit["tokens_per_second"] / dense["tokens_per_second"],
            "cache": dense["cache_bytes"] / max(fit["cache_bytes"], 1),
        }
        for position, fit, dense in pairs
        if fit and dense
    ]


def write_generation_plot(path: str | Path, found: Result) -> None:
    """Draw tokens per second and bytes of cache against the position, into a PNG or SVG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for place, (key, what) in enumerate((("tokens_per_second", "tokens per second"), ("cache_bytes", "cache, bytes"))):
        axes = figure.add_subplot(1, 2, place + 1, xlabel="tokens of context", ylabel=what, xscale="log", yscale="log")
        for name, label in WAYS.items():
            points = [(row["position"], row[name][key]) for row in found["rows"] if row[name] and row[name][key]]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=label)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    path = Path(path)
    with write_atomically(path) as scratch:
        figure.savefig(scratch, format=path.suffix.lstrip(".") or "png", dpi=120)
