"""Text as bytes, in the manner of a tokenizer of `transformers`: a token is a byte, its id the byte's value."""

from typing import Any, ClassVar

from fitformer.errors import require

transformers: Any = require("transformers", extra="transformers")

BYTES = 256


class ByteTokenizer(transformers.PreTrainedTokenizer):
    """UTF-8 text to ids 0 to 255 and back; there is no special token, and no file.

    A token's name is the character of its code point. Bytes that are no UTF-8 are decoded as U+FFFD. Batches are padded
    on the left with byte 0, which the attention mask tells from a byte 0 of the text.

    Args:
        options: of transformers' tokenizers, such as `padding_side`.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"pad_token": chr(0), **options})

    @property
    def vocab_size(self) -> int:
        """256."""
        return BYTES

    def get_vocab(self) -> dict[str, int]:
        """The ids of all tokens by their names."""
        return {chr(byte): byte for byte in range(BYTES)}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of some tokens."""
        return bytes(map(ord, tokens)).decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """No files: bytes need no vocabulary."""
        return ()
