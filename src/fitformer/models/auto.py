"""Any saved model by the role that its folder names."""

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
from fitformer.models.pretrained import HUB_OPTIONS, read_config

ROLES: dict[str, type[FITModel]] = {
    role.__name__: role for role in (FITEncoder, FITImageEncoder, FITDenoiser, FITImageDenoiser, FITDecoder)
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
