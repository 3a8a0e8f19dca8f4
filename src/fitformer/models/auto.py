"""Any saved model by the role that its folder names, and what a saved decoder generates."""

from pathlib import Path
from typing import Any

from fitformer._support.checks import checked
from fitformer.errors import InputError
from fitformer.models.base import FITModel
from fitformer.models.decoder import FITDecoder
from fitformer.models.denoiser import FITDenoiser
from fitformer.models.encoder import FITEncoder
from fitformer.models.image_denoiser import FITImageDenoiser
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.image_segmenter import FITImageSegmenter
from fitformer.models.pretrained import HUB_OPTIONS, read_config
from fitformer.patching import tokens_to_bytes

ROLES: dict[str, type[FITModel]] = {
    role.__name__: role
    for role in (FITEncoder, FITImageEncoder, FITImageSegmenter, FITDenoiser, FITImageDenoiser, FITDecoder)
}


@checked
def from_pretrained(source: str | Path, **options: Any) -> FITModel:
    """Load a saved model of any role, in eval mode: a folder, a run directory, or a name on the Hub.

    Args:
        source: where it is. options: as those of `FITModel.from_pretrained`.

    Raises:
        InputError: an unknown role, or what the role's `from_pretrained` refuses.
        FileNotFoundError: a folder or a repository without a model.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    role = read_config(source, **hub)["role"]
    if role not in ROLES:
        raise InputError(f"{source} holds a {role!r}; known roles are {', '.join(ROLES)}")
    return ROLES[role].from_pretrained(source, **options)


@checked
def generate(source: str | Path, prompt: Any = None, *, device: str = "cpu", **options: Any) -> Any:
    """Prompts with what a saved decoder generates after them.

    Args:
        source: a folder, a run directory, or a name on the Hub.
        prompt: text, bytes, a list of these, or what `FITDecoder.generate` takes.
        device: where the decoder runs.
        options: as those of `fitformer.generation.generate`.

    Returns:
        for text a text, in which bytes that are no UTF-8 are replaced; for bytes bytes; for a list of these a list, a
        prompt's sequences together; else tokens. A text whose `num_return_sequences` are several is a list, too.

    Raises:
        InputError: the source holds no decoder, or what `fitformer.generation.generate` refuses.
        FileNotFoundError: a folder or a repository without a model.
    """
    decoder = from_pretrained(source, map_location=device)
    if not isinstance(decoder, FITDecoder):
        raise InputError(f"{source} holds a {type(decoder).__name__}, which generates no tokens; give a FITDecoder")
    one = isinstance(prompt, str | bytes)
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(each, str | bytes) for each in prompts):
        return decoder.generate(prompt, **options)
    found = [tokens_to_bytes(row) for row in decoder.generate(prompts, **options)]
    each = len(found) // max(len(prompts), 1)
    kinds = [type(prompt) for prompt in prompts for _ in range(each)]
    texts = [text.decode(errors="replace") if kind is str else text for text, kind in zip(found, kinds, strict=True)]
    return texts[0] if one and each == 1 else texts
