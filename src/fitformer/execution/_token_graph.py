"""One token's way through a cached trunk as a CUDA graph: a GPU runs it faster than Python can call its kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fitformer.execution._fused_layers import Places

Run = Callable[[dict[str, Tensor], Tensor, Places], Tensor]
# Tokens of one cache that run call by call before a graph of them is made, which takes as long as several.
TOKENS_BEFORE = 8


class TokenGraph:
    """The graph of the cache that was used last, once it has been used for some tokens.

    Args:
        n: places of a group.
    """

    def __init__(self, n: int) -> None:
        self.n, self.tokens = n, 0
        self.key: tuple[object, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Run, tensors: dict[str, Tensor], x: Tensor, starts: Sequence[int]) -> Tensor:
        """The next token of each row `(b, 1, c)`, in and out.

        Args:
            run: what takes the cache's tensors, which it writes to in place, tokens and their places.
            tensors: of the cache. x: tokens. starts: tokens that the current group of each row has already.
        """
        key = _key(tensors, x)
        if key != self.key:
            self.key, self.tokens, self.graph = key, 0, None
        self.tokens += 1
        if self.tokens <= TOKENS_BEFORE:
            return run(tensors, x, Places.of(starts, 1, x.device))
        places = torch.tensor(starts)[:, None]
        if self.graph is None:
            self.x, self.places = x.clone(), places.to(x.device)
            self._capture(run, tensors)
        else:
            self.x.copy_(x)
            self.places.copy_(places)
        assert self.graph is not None
        self.graph.replay()
        return self.out.clone()

    def _capture(self, run: Run, tensors: dict[str, Tensor]) -> None:
        # Casts that autocast remembers would lie outside of the graph.
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # To warm up. A token may be run again: it writes the same to the same place.
                run(tensors, self.x, Places.apart(self.places, self.n))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.out = run(tensors, self.x, Places.apart(self.places, self.n))
        self.graph = graph


def _key(tensors: dict[str, Tensor], x: Tensor) -> tuple[object, ...]:
    """What a graph holds for: the memory that it reads and writes, and the precision. Latents are outside of it."""
    kept = (tensor for name, tensor in tensors.items() if ".latents." not in name)
    own = tuple((tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) for tensor in kept)
    return (*own, x.dtype, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
