"""The autoregressive decoder as a model of Hugging Face `transformers`: `generate`, `Auto` classes, saving, training.

transformers' logits at place p predict token p + 1; FIT's decoder takes tokens shifted right by one, the first input 0,
so its outputs at place p predict token p. The wrapper therefore feeds `[0, token 0, token 1, ...]` and leaves out the
first output. Importing this module registers the classes with transformers.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fitformer._support.checks import shown
from fitformer.errors import InputError, require
from fitformer.interop.byte_tokenizer import ByteTokenizer
from fitformer.interop.padding import Columns
from fitformer.interop.transformers_cache import FITCache
from fitformer.models.config import TrunkConfig
from fitformer.models.decoder import FITDecoder
from fitformer.models.trunk import parse_layers
from fitformer.patching import groups_to_sequence, pad_to_groups, sequence_to_groups

transformers: Any = require("transformers", extra="transformers")
CausalLMOutputWithPast = transformers.modeling_outputs.CausalLMOutputWithPast

GEOMETRY = ("num_groups", "tokens_per_group", "vocab_size", "shared_embedding", "output_bias", "num_classes")
# Positions that are a table for one number of groups, see `TrunkConfig`.
TABLES = ("learned", "sin_cos")


class FITConfig(transformers.PreTrainedConfig):
    """The arguments of a `FITDecoder`, flat, as a configuration of transformers.

    Attributes:
        num_groups, tokens_per_group, vocab_size, shared_embedding, output_bias, num_classes: as those of `FITDecoder`.
        use_cache: return a cache where none is asked for or ruled out.
        bos_token_id, eos_token_id, pad_token_id: for `generate`.

    The options of `TrunkConfig` are attributes too; their defaults are the preset `tiny` of decoders.
    `hidden_size`, `num_attention_heads` and `tie_word_embeddings` are other names of `dim`, `heads` and
    `shared_embedding`.
    """

    model_type = "fitformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "heads",
        "tie_word_embeddings": "shared_embedding",
    }

    num_groups: int | None = 16
    tokens_per_group: int = 64
    vocab_size: int = 256
    shared_embedding: bool = True
    output_bias: bool = True
    num_classes: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, default in asdict(TrunkConfig().closed()).items():
            setattr(self, name, kwargs.pop(name, default))
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of local and global layers, as the layer string has them."""
        return len(parse_layers(self.layers))

    @property
    def max_position_embeddings(self) -> int | None:
        """Tokens that can be given at most, one less than the decoder has positions for; None for any number.

        The first position is that of the input 0. As many tokens and one more can be generated in all.
        """
        if self.latent_position not in TABLES or self.num_groups is None:
            return None
        return self.num_groups * self.tokens_per_group - 1

    def build(self) -> FITDecoder:
        """A new decoder of this configuration.

        Raises:
            InputError: options that do not fit together.
        """
        return FITDecoder.from_config({name: getattr(self, name) for name in (*TrunkConfig.names(), *GEOMETRY)})


class FITForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A `FITDecoder`, which it holds as `decoder`, as a causal language model of transformers.

    Gradient checkpointing runs the decoder `checkpointed`; any other way to run is chosen by
    `model.decoder.set_execution`.

    Args:
        config: of the decoder.

    Raises:
        InputError: options that do not fit together.
    """

    config: FITConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    # A cache cannot be rewound, which assisted generation needs.
    _is_stateful = True
    _no_split_modules: ClassVar[list[str]] = ["FITDecoder"]

    def __init__(self, config: FITConfig) -> None:
        super().__init__(config)
        # Fixed position codes are float32 whatever the default, under which transformers loads other precisions.
        self.decoder = config.build().to(torch.get_default_dtype())
        self.gradient_checkpointing = False
        for tensor in self._tensors().values():
            # The constructor drew it, save on a device without memory.
            tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
        self.post_init()

    @classmethod
    def from_fit(cls, source: FITDecoder | str | Path) -> Self:
        """Wrap a decoder, or one that fitformer saved: a folder, a run directory, or a name on the Hub.

        The way back is `model.decoder`, and `model.decoder.save_pretrained(FOLDER)`.

        Raises:
            InputError: what is there is no decoder.
            FileNotFoundError: a folder or a repository without a model.
        """
        decoder = source if isinstance(source, FITDecoder) else FITDecoder.from_pretrained(source)
        with torch.device("meta"):
            model = cls(FITConfig(**decoder.config))
        model.decoder = decoder
        return model.train(decoder.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: FITCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        class_labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the token after each one, and the loss.

        Args:
            input_ids: tokens `(b, L)`; with a cache those that come next.
            attention_mask: `(b, L)`, or with a cache all columns so far: 0 for padding, on any side. A row is read as
                if it had no padding; logits at padding are those after the row's last token before it.
            labels: tokens `(b, L)` for the loss, shifted by one here; -100 is left out.
            past_key_values: what was read before, as it was returned; it moves on.
            use_cache: return a cache. None is as the configuration says, but only where neither gradients nor hidden
                states are asked for: a cache gives none.
            output_hidden_states: data tokens `(b, L, c)`: embedded, after each block, the last normalised.
            logits_to_keep: the last so many columns alone, or those of these indices; 0 is all.
            class_labels: classes `(b,)` of a class-conditional decoder, with the first tokens.
            return_dict: false for a tuple.
            kwargs: of the loss, such as `num_items_in_batch`.

        Raises:
            InputError: tokens outside the vocabulary or beyond the decoder's positions; a mask of another shape; hidden
                states with a cache, attentions; a cache of another kind, or of another batch.
        """
        if kwargs.pop("output_attentions", None):
            raise InputError("attentions are not given out; see fitformer.viz for maps of them")
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        columns = Columns.of(input_ids, attention_mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = cache = None
        if self._with_cache(past_key_values, use_cache, hidden):
            cache = FITCache() if past_key_values is None else past_key_values
            logits = cache.read(self.decoder, columns, keep, class_labels)
        else:
            logits, states = self._read(columns, keep, hidden, class_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        outputs = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if as_dict else outputs.to_tuple()

    def _with_cache(self, cache: Any, use_cache: bool | None, hidden: bool) -> bool:
        if cache is not None and not isinstance(cache, FITCache):
            raise InputError(f"past_key_values is {shown(cache)}; it must be a FITCache, as the model returned it")
        if cache is None and use_cache is None:
            return self.config.use_cache and not (hidden or self.training or torch.is_grad_enabled())
        if hidden and (cache is not None or use_cache):
            raise InputError("output_hidden_states is given with a cache, which keeps none; give use_cache=False")
        return cache is not None or bool(use_cache)

    def _read(
        self, columns: Columns, keep: slice | Tensor, hidden: bool, class_labels: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Logits of some columns, and hidden states of all of them."""
        n = self.decoder.tokens_per_group
        groups = sequence_to_groups(pad_to_groups(columns.inputs(), n), n)
        found = self.decoder.hidden(groups, class_labels, None if hidden else self.decoder.last_block())
        last = columns.after(groups_to_sequence(found[-1]))
        logits = self.decoder.head(last[:, keep])
        if not hidden:
            return logits, None
        before = [self.decoder.embed(groups, labels=class_labels), *found[:-1]]
        states = (columns.after(groups_to_sequence(x)) for x in before)
        return logits, (*states, self.decoder.norm(last))

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.decoder.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Exchange the embedding of tokens."""
        self.decoder.embedding = value

    def get_output_embeddings(self) -> None:
        """None: `decoder.head` is no module of its own, and shares its weights by itself where it does."""
        return None

    def _resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers has it; both embeddings and the bias follow, new tokens' bias is 0."""
        decoder = self.decoder
        embedding = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embedding.num_embeddings
        if decoder.output_embedding is not None:
            decoder.output_embedding = self._get_resized_embeddings(
                decoder.output_embedding, size, mean_resizing=mean_resizing
            )
        if decoder.output_bias is not None:
            more = max(size - len(decoder.output_bias), 0)
            decoder.output_bias = nn.Parameter(nn.functional.pad(decoder.output_bias.detach(), (0, more))[:size])
        decoder.vocab_size = decoder._hub_mixin_config["vocab_size"] = size  # type: ignore[index]
        return embedding

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        self.gradient_checkpointing = enable
        self.decoder.set_execution("checkpointed" if enable else "plain")

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.decoder.named_parameters()), **dict(self.decoder.named_buffers())}

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what neither the constructor nor a file has filled, as the decoder's own constructor does."""
        missing = {
            name: tensor for name, tensor in self._tensors().items() if not getattr(tensor, "_is_hf_initialized", False)
        }
        drawn = self._drawn() if missing else {}
        for name, tensor in missing.items():
            tensor.copy_(drawn[name])
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]

    def _drawn(self) -> dict[str, Tensor]:
        decoder = self.config.build()
        return {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `FITCache` is the cache, which `forward` makes."""
        return False


transformers.AutoConfig.register(FITConfig.model_type, FITConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(FITConfig, FITForCausalLM, exist_ok=True)
transformers.AutoTokenizer.register(FITConfig, slow_tokenizer_class=ByteTokenizer, exist_ok=True)
