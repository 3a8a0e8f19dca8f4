"""FIT as an autoregressive decoder: shifted tokens in, logits of the next ones out (spec section 5)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fitformer import generation
from fitformer._support.checks import checked, whole
from fitformer._support.system_memory import check_room
from fitformer.errors import InputError
from fitformer.execution import Inputs
from fitformer.execution.base import Read, Score
from fitformer.generation import GenerationConfig
from fitformer.generation.decode import Prompt
from fitformer.models.base import FITModel, check_classes
from fitformer.models.config import TrunkConfig
from fitformer.models.encoder import check_grouped
from fitformer.models.layers import MOST_SIZE, check_sizes, layer_norm
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
        num_classes: classes that condition the model: the class of an example stands in place of its first input
            token, which is 0 otherwise; 0 for an unconditional model.

    Raises:
        InputError: arguments that do not fit together, see `Trunk`.
    """

    free = FITModel.free | {"num_classes"}
    class_weights = ("class_embedding.",)

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
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, dim=trunk.dim)
        whole("num_classes", num_classes, 0, MOST_SIZE)  # 0 is unconditional
        check_room(
            f"an embedding of {vocab_size} tokens and {num_classes} classes", (vocab_size + num_classes) * trunk.dim
        )
        self.num_groups, self.tokens_per_group, self.vocab_size = num_groups, tokens_per_group, vocab_size
        self.num_classes = num_classes
        self.embedding = nn.Embedding(vocab_size, trunk.dim)
        self.output_embedding = None if shared_embedding else nn.Embedding(vocab_size, trunk.dim)
        for embedding in filter(None, (self.embedding, self.output_embedding)):
            nn.init.trunc_normal_(embedding.weight, std=0.02, a=-0.04, b=0.04)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        self.trunk = Trunk(trunk, num_groups, tokens_per_group, causal="all")
        self.norm = layer_norm(trunk.dim)
        # Last, so that the other weights of a seed are those of the unconditional model.
        self.class_embedding = nn.Embedding(num_classes, trunk.dim) if num_classes else None
        if self.class_embedding is not None:
            nn.init.trunc_normal_(self.class_embedding.weight, std=0.02, a=-0.04, b=0.04)

    def forward(
        self,
        tokens: Tensor,
        score: Score | None = None,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits of the targets, given integer tokens shifted right by one.

        Args:
            tokens: `(b, t, n)`; fewer groups than the model was built for are the first ones.
            score: function of a slice of groups, its logits and None, whose sum over slices is returned in place of
                the logits: a loss that never holds them whole.
            labels: classes `(b,)` of a class-conditional model, -1 for none.
            documents: a number for each group, int64 `(b, t)`, as `patching.pack_documents` gives them: each document
                is read as if it were alone. None for one document a row.

        Returns:
            logits `(b, t, n, vocab_size)`, or the score.

        Raises:
            InputError: groups of another length, tokens that are no whole numbers, or one outside the vocabulary;
                labels that are missing, or no classes of the model; documents of other groups, or with labels.
        """
        check_grouped(tokens, self.tokens_per_group, "b t n")
        check_vocabulary(tokens, self.vocab_size)
        return self.read(tokens, tokens.shape[0], tokens.shape[1], score, labels, documents)

    def logits(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `(b, L, vocab_size)` of each token of sequences `(b, L)` of any length, given those before it.

        Raises:
            InputError: as `forward`.
        """
        check_axes(tokens, "tokens (b, L)", 2)
        n = self.tokens_per_group
        shifted = shift_right(sequence_to_groups(pad_to_groups(tokens, n), n))
        return groups_to_sequence(self(shifted, labels=labels), tokens.shape[1])

    def read(
        self,
        tokens: Tensor | Read,
        batch: int,
        groups: int,
        score: Score | None = None,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, for `groups` groups of `batch` examples, in memory or by a function that reads a slice."""
        inputs = self._inputs(tokens, batch, groups, labels, documents)
        if score is None:
            return self.head(self.execute(replace(inputs, blocks=self.last_block())).tokens[0])
        scored = self.execute(replace(inputs, score=lambda which, x, mask: score(which, self.head(x), mask))).score
        assert scored is not None
        return scored

    def hidden(
        self, tokens: Tensor, labels: Tensor | None = None, blocks: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        """What the trunk makes of whole groups, block by block.

        Args:
            tokens: shifted right by one `(b, t, n)`. labels: as `forward`.
            blocks: numbers of those that are wanted; None for all.

        Returns:
            data tokens `(b, t, n, c)` as they leave each of the blocks; `head` turns the last ones into logits.

        Raises:
            InputError: as `forward`.
        """
        check_grouped(tokens, self.tokens_per_group, "b t n")
        check_vocabulary(tokens, self.vocab_size)
        inputs = self._inputs(tokens, tokens.shape[0], tokens.shape[1], labels, None)
        blocks = range(len(self.trunk.blocks)) if blocks is None else blocks
        return self.execute(replace(inputs, blocks=blocks)).tokens

    def _inputs(
        self, tokens: Tensor | Read, batch: int, groups: int, labels: Tensor | None, documents: Tensor | None
    ) -> Inputs:
        """A pass through the trunk, without what is wanted of it."""
        self.check_labels(labels, batch)
        if documents is not None and documents.shape != (batch, groups):
            raise InputError(f"documents {tuple(documents.shape)} of an input of ({batch}, {groups}) groups (b, t)")
        if documents is not None and labels is not None:
            raise InputError("labels are the class of a row, which has several documents: leave out one of them")
        places = None if documents is None else places_in_documents(documents)
        return Inputs(
            tokens=tokens,
            latents=self.trunk.initial_latents(batch, groups, places=places),
            embed=lambda which, raw: self.embed(raw, labels=None if which.start else labels),
            parameters=self.all_parameters(),
            places=places,
        )

    def embed(self, tokens: Tensor, place: int | Tensor = 0, labels: Tensor | None = None) -> Tensor:
        """Integer tokens `(b, ..., k)` as data tokens `(b, ..., k, c)`.

        Args:
            tokens: whole groups `(b, t, n)`, or part of a group `(b, k)`.
            place: that of the first token in its group, or the place of every token.
            labels: classes `(b,)` that stand in place of the rows' first tokens, -1 where the token stays: given with
                the beginning of a sequence.
        """
        table = self.trunk.position
        at = table.at(place, tokens.shape[-1]) if isinstance(place, int) else table.at()[place]
        x = self.embedding(tokens.long())
        return (x if labels is None else self._with_classes(x, labels)) + at

    def _with_classes(self, x: Tensor, labels: Tensor) -> Tensor:
        """Embedded tokens `(b, ..., k, c)` with classes `(b,)` in place of the first ones, but for -1."""
        assert self.class_embedding is not None
        tokens, classes = x.flatten(1, -2), self.class_embedding(labels.long().clamp_min(0))
        first = torch.where((labels < 0)[:, None], tokens[:, 0], classes)
        return torch.cat([first[:, None], tokens[:, 1:]], dim=1).view_as(x)

    def check_labels(self, labels: Tensor | None, batch: int) -> None:
        """Refuse classes of examples that do not go with the model.

        Raises:
            InputError: labels that are no whole numbers `(b,)`, of another number of examples, or, on a CPU, one that
                is no class; labels for an unconditional model, or none for a conditional one.
        """
        if (labels is None) != (self.class_embedding is None):
            way = f"(b,), 0 to {self.num_classes - 1}, -1 for none" if labels is None else "to a model with num_classes"
            raise InputError(
                f"labels are {'missing' if labels is None else 'given'}, and the decoder was built with "
                f"num_classes={self.num_classes}; give them {way}"
            )
        if labels is not None:
            check_classes(labels, self.num_classes)
            if labels.shape[0] != batch:
                raise InputError(f"labels {tuple(labels.shape)} need one class for each of the {batch} examples")

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
