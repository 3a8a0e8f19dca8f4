"""FIT as an autoregressive decoder: shifted tokens in, logits of the next ones out (spec section 5)."""

import torch
from torch import Tensor, nn

from fitformer.errors import InputError
from fitformer.execution import Execution, plain
from fitformer.models.encoder import check_grouped
from fitformer.models.layers import check_sizes, layer_norm
from fitformer.models.pretrained import Pretrained
from fitformer.models.trunk import Trunk


class FITDecoder(Pretrained, nn.Module):
    """FIT autoregressive decoder (spec section 5).

    The logits at place k of group g depend on input tokens of groups before g, on those up to k of group g, and on
    nothing else. Global layers at the end of the layer string cannot reach them: end it in `)`.

    Args:
        layers: layer string.
        num_groups: t. tokens_per_group: n. latents_per_group: m.
        vocab_size: number of different tokens.
        dim: c. latent_dim: d. heads, latent_heads: of local and of global attention.
        shared_embedding: one embedding for input and output. output_bias: a bias of the logits.
        position, latent_position, mlp_ratio, drop_path, drop_units, drop_att: as in `FITEncoder`.

    Raises:
        InputError: arguments that do not fit together, see `Trunk`.
    """

    def __init__(
        self,
        layers: str,
        num_groups: int,
        tokens_per_group: int,
        latents_per_group: int,
        vocab_size: int,
        dim: int,
        latent_dim: int,
        heads: int,
        latent_heads: int,
        *,
        shared_embedding: bool = True,
        output_bias: bool = True,
        position: str = "learned",
        latent_position: str = "learned",
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        drop_units: float = 0.0,
        drop_att: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, dim=dim)
        self.num_groups, self.tokens_per_group, self.vocab_size = num_groups, tokens_per_group, vocab_size
        self.embedding = nn.Embedding(vocab_size, dim)
        self.output_embedding = None if shared_embedding else nn.Embedding(vocab_size, dim)
        for embedding in filter(None, (self.embedding, self.output_embedding)):
            nn.init.trunc_normal_(embedding.weight, std=0.02, a=-0.04, b=0.04)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        self.trunk = Trunk(
            layers,
            num_groups,
            tokens_per_group,
            latents_per_group,
            dim,
            latent_dim,
            heads,
            latent_heads,
            position=position,
            latent_position=latent_position,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            drop_units=drop_units,
            drop_att=drop_att,
            causal="all",
        )
        self.norm = layer_norm(dim)
        self.run: Execution = plain

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(b, t, n, vocab_size)` of the targets, given integer `tokens (b, t, n)` shifted right by one.

        Fewer groups than the model was built for are the first ones.

        Raises:
            InputError: groups of another length, tokens that are no whole numbers, or one outside the vocabulary.
        """
        x = self.embed(tokens)
        x, _ = self.run(self.trunk, x, self.trunk.initial_latents(*x.shape[:2]))
        return self.finish(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Integer tokens `(b, t, n)` as data tokens `(b, t, n, c)`.

        Raises:
            InputError: as `forward`.
        """
        check_grouped(tokens, self.tokens_per_group, "b t n")
        check_vocabulary(tokens, self.vocab_size)
        return self.embedding(tokens.long()) + self.trunk.position()

    def finish(self, x: Tensor) -> Tensor:
        """Data tokens `(b, t, n, c)` as they leave the trunk to logits `(b, t, n, vocab_size)`."""
        return nn.functional.linear(self.norm(x), (self.output_embedding or self.embedding).weight, self.output_bias)


def check_vocabulary(tokens: Tensor, vocab_size: int) -> None:
    """Refuse tokens outside 0 to vocab_size - 1.

    Only where looking costs nothing: on an accelerator it would make the host wait for the device, and a graph that is
    being traced has no values to look at.

    Raises:
        InputError: a token outside, or tokens that are no whole numbers.
    """
    if tokens.is_floating_point() or tokens.is_complex():
        raise InputError(f"tokens are {tokens.dtype}; they are whole numbers below {vocab_size}")
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or tokens.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise InputError(f"token {outside} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})")
