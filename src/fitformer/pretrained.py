"""Models as folders: config.json, model.safetensors and a model card; loaded strictly, from disk or from the Hub."""

import json
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fitformer.errors import InputError
from fitformer.files import write_atomically
from fitformer.presets import preset

MODEL_CARD = """---
{{ card_data }}
---

# {{ model_name | default("A FIT model", true) }}

A Far-reaching Interleaved Transformer (Chen and Li, [arXiv 2305.12689](https://arxiv.org/abs/2305.12689)), saved by
`fitformer`.

```python
import fitformer

model = fitformer.{{ role }}.from_pretrained("{{ repo_id | default("this folder", true) }}")
```

`config.json` holds the arguments of `fitformer.{{ role }}`, `model.safetensors` its {{ parameters }} parameters.
"""


class Pretrained(
    PyTorchModelHubMixin,
    library_name="fitformer",
    license="apache-2.0",
    tags=["fit", "far-reaching-interleaved-transformer", "arxiv:2305.12689"],
    model_card_template=MODEL_CARD,
):
    """Saving and loading for the roles: their constructor's plain arguments are the configuration.

    Built on the Hub's own mixin; loading is strict here, and files are written beside and renamed.
    """

    ends_local = True

    @classmethod
    def from_preset(cls, name: str, **arguments: Any) -> Self:
        """Build the role in a named size (`presets.SIZES`); `arguments` give the geometry and override the size.

        Raises:
            InputError: no such preset, or whatever the constructor refuses.
        """
        return cls(**{**preset(name, end_local=cls.ends_local), **arguments})

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as they are saved in config.json."""
        return dict(self._hub_mixin_config)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write config.json, model.safetensors and README.md into a folder (and push it with `push_to_hub=True`)."""
        return super().save_pretrained(save_directory, config={"role": type(self).__name__, **self.config}, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model and its card to the Hub as `repo_id`; `options` are those of the Hub's mixin."""
        return super().push_to_hub(repo_id, config={"role": type(self).__name__, **self.config}, **options)

    def generate_model_card(self, *args: Any, **fields: Any) -> Any:
        """Fill the card's template with what this model is."""
        parameters = sum(parameter.numel() for parameter in self.parameters())  # type: ignore[attr-defined]
        return super().generate_model_card(*args, role=type(self).__name__, parameters=f"{parameters:,}", **fields)

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}  # type: ignore[attr-defined]
        with write_atomically(save_directory / constants.SAFETENSORS_SINGLE_FILE) as path:
            save_file(state, path, metadata={"format": "pt"})

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **options: Any
    ) -> Self:
        if not strict:
            raise InputError("loading is strict; build the model and call load_state_dict(..., strict=False) yourself")
        hub = {
            key: options.pop(key) for key in ("revision", "cache_dir", "force_download", "token", "local_files_only")
        }
        config = json.loads(_file(model_id, constants.CONFIG_NAME, hub).read_text())
        role = config.pop("role", cls.__name__)
        if role != cls.__name__:
            raise InputError(f"{model_id} holds a {role}, not a {cls.__name__}: load it with fitformer.{role}")
        unknown = set(config) - set(cls._hub_mixin_init_parameters)
        if unknown:
            raise InputError(
                f"{model_id}/config.json has arguments that {cls.__name__} lacks: {', '.join(sorted(unknown))}"
            )
        model = cls(**{**config, **options})
        path = _file(model_id, constants.SAFETENSORS_SINGLE_FILE, hub)
        try:
            state = load_file(path, device=map_location)
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); save or fetch it again") from error
        load_strictly(model, state, str(path))  # type: ignore[arg-type]
        return model.eval()  # type: ignore[attr-defined]


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state into a model, in place, if every name and shape agrees.

    Raises:
        InputError: names what is missing, unknown or misshapen in `source`; the model is left as it was.
    """
    own = model.state_dict()
    faults = difference(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: tuple(tensor.shape) for name, tensor in own.items()},
    )
    if faults:
        raise InputError(f"{source} does not fit this {type(model).__name__}: {faults}")
    model.load_state_dict(state)


def difference(given: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], most: int = 8) -> str:
    """Say how named shapes differ from those wanted, `most` names of a kind; an empty string where they agree."""

    def few(names: list[str]) -> str:
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

    kinds = {
        "missing": sorted(set(wanted) - set(given)),
        "unknown": sorted(set(given) - set(wanted)),
        "misshapen": [
            f"{name} {given[name]} instead of {wanted[name]}"
            for name in sorted(set(given) & set(wanted))
            if given[name] != wanted[name]
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {few(names)}" for kind, names in kinds.items() if names)


def _file(model_id: str, name: str, hub: dict[str, Any]) -> Path:
    """Find a file of a saved model, in a folder or on the Hub."""
    if Path(model_id).is_dir():
        path = Path(model_id) / name
        if not path.is_file():
            raise FileNotFoundError(f"{model_id} is not a saved model: it has no {name}")
        return path
    try:
        return Path(hf_hub_download(repo_id=model_id, filename=name, **hub))
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{model_id} on the Hub is not a saved model: it has no {name}") from error
