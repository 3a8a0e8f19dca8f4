"""What tells one model, and one state of a file, from another: outputs that were made of something else are stale."""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn


def identity(network: nn.Module) -> str:
    """A digest of a model, its numbers and its weights."""
    digest = hashlib.sha256(json.dumps(getattr(network, "config", None), sort_keys=True, default=str).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_state(path: Path) -> dict[str, int]:
    """Size and time of the last change, which tell one state of a file from another; nothing of an absent one."""
    if not path.exists():
        return {}
    about = path.stat()
    return {"bytes": about.st_size, "modified_ns": about.st_mtime_ns}
