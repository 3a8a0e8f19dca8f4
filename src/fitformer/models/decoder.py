"""FIT as an autoregressive decoder: shifted tokens in, logits of the next ones out (spec section 5)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fitformer import generation
from fitformer._support.checks import checked
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.execution import Inputs
from fitformer.execution.base import Read, Score
from fitformer.generation import GenerationConfig
from fitformer.generation.decode import Prompt
from fitformer.models.base import FITModel
from fitformer.models.config import TrunkConfig
from fitformer.models.encoder import check_grouped
from fitformer.models.layers import check_sizes, layer_norm
from fitformer.models.trunk import Trunk
from fitformer.patching import groups_to_sequence, pad_to_groups, places_in_documents, sequence_to_groups, shift_right
from fitformer.patching.sequence import check_vocabulary
from fitformer.patching.sizes import check_axes


class FITDecoder(FITModel):
    """FIT autoregressive decoder (spec section 5).

    The logits at place k of group g depend on input tokens of groups before g, on those up to k of group g, and on
    nothing else. Global layers at the end of the layer string cannot reach them: end it in `)`.

    Args:
        trunk: options of the trunk.
        num_groups: t; None for any number, see `Trunk`. tokens_per_group: n.
        vocab_size: number of different tokens.
        shared_embedding: one embedding for input and output. output_bias: a bias of the logits.

    Raises:
        InputError: arguments that do not fit together, see `Trunk`.
    """

    @checked
    def __init__(
        self,
        trunk: TrunkConfig,
        num_groups: int | None,
        tokens_per_group: int,
        vocab_size: int,
        *,
        shared_embedding: bool = True,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, dim=trunk.dim)
        check_room(f"an embedding of {vocab_size} tokens", vocab_size * trunk.dim)
        self.num_groups, self.tokens_per_group, self.vocab_size = num_groups, tokens_per_group, vocab_size
        self.embedding = nn.Embedding(vocab_size, trunk.dim)
        self.output_embedding = None if shared_embedding else nn.Embedding(vocab_size, trunk.dim)
        for embedding in filter(None, (self.embedding, self.output_embedding)):
            nn.init.trunc_normal_(embedding.weight, std=0.02, a=-0.04, b=0.04)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        self.trunk = Trunk(trunk, num_groups, tokens_per_group, causal="all")
        self.norm = layer_norm(trunk.dim)

    def forward(self, tokens: Tensor, score: Score | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits of the targets, given integer tokens shifted right by one.

        Args:
            tokens: `(b, t, n)`; fewer groups than the model was built for are the first ones.
            score: function of a slice of groups, its logits and None, whose sum over slices is returned in place of
                the logits: a loss that never holds them whole.
            documents: a number for each group, int64 `(b, t)`, as `patching.pack_documents` gives them: each document
                is read as if it were alone. None for one document a row.

        Returns:
            logits `(b, t, n, vocab_size)`, or the score.

        Raises:
            InputError: groups of another length, tokens that are no whole numbers, one outside the vocabulary, or
                documents of other groups.
        """
        check_grouped(tokens, self.tokens_per_group, "b t n")
        check_vocabulary(tokens, self.vocab_size)
        return self.read(tokens, tokens.shape[0], tokens.shape[1], score, documents)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits `(b, L, vocab_size)` of each token of sequences `(b, L)` of any length, given those before it.

        Raises:
            InputError: as `forward`.
        """
        check_axes(tokens, "tokens (b, L)", 2)
        n = self.tokens_per_group
        return groups_to_sequence(self(shift_right(sequence_to_groups(pad_to_groups(tokens, n), n))), tokens.shape[1])

    def read(
        self,
        tokens: Tensor | Read,
        batch: int,
        groups: int,
        score: Score | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, for `groups` groups of `batch` examples, in memory or by a function that reads a slice."""
        if documents is not None and documents.shape != (batch, groups):
            raise InputError(f"documents {tuple(documents.shape)} of an input of ({batch}, {groups}) groups (b, t)")
        places = None if documents is None else places_in_documents(documents)
        scored = None if score is None else (lambda which, x, mask: score(which, self.head(x), mask))
        inputs = Inputs(
            tokens=tokens,
            latents=self.trunk.initial_latents(batch, groups, places=places),
            embed=lambda which, raw: self.embed(raw),
            score=scored,
            blocks=() if score else self.last_block(),
            parameters=self.all_parameters(),
            places=places,
        )
        outputs = self.execute(inputs)
        return self.head(outputs.tokens[0]) if outputs.score is None else outputs.score

    def embed(self, tokens: Tensor, place: int | Tensor = 0) -> Tensor:
        """Integer tokens `(b, ..., k)` as data tokens `(b, ..., k, c)`.

        Args:
            tokens: whole groups `(b, t, n)`, or part of a group `(b, k)`.
            place: that of the first token in its group, or the place of every token.
        """
        table = self.trunk.position
        at = table.at(place, tokens.shape[-1]) if isinstance(place, int) else table.at()[place]
        return self.embedding(tokens.long()) + at

    @property
    def most_groups(self) -> int | None:
        """Groups that the decoder has positions for; None for any number."""
        return self.trunk.most_groups

    def head(self, x: Tensor) -> Tensor:
        """Data tokens `(b, t, n, c)` as they leave the trunk to logits `(b, t, n, vocab_size)`."""
        return nn.functional.linear(self.norm(x), (self.output_embedding or self.embedding).weight, self.output_bias)

    def generate(self, prompt: Prompt = None, config: GenerationConfig | None = None, **options: Any) -> Any:
        """Prompts with what the decoder generates after them: `fitformer.generation.generate` of this decoder."""
        return generation.generate(self, prompt, config, **options)

    def stream(self, prompt: Prompt = None, config: GenerationConfig | None = None, **options: Any) -> Iterator[Tensor]:
        """The same token by token, columns `(b,)`: `fitformer.generation.stream` of this decoder."""
        return generation.stream(self, prompt, config, **options)
