"""Models as folders: config.json, model.safetensors and a model card; loaded strictly, from disk or from the Hub."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fitformer._support.atomic_files import write_atomically
from fitformer._support.json_text import parse_json
from fitformer.errors import InputError
from fitformer.models.adapt import LoadingReport, adapt, placed
from fitformer.models.config import SIZES, TrunkConfig, preset

HUB_OPTIONS = ("revision", "cache_dir", "force_download", "token", "local_files_only")

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
    """Saving and loading for the models: their constructors' plain arguments are the configuration.

    A configuration is flat: the options of the dataclasses in `nested` stand beside the other arguments.
    Built on the Hub's own mixin; loading is strict here, and files are written beside and renamed.
    """

    ends_local = True
    # Options in which a model may differ from the one whose weights it takes; `adapt` makes the weights fit.
    free: ClassVar[frozenset[str]] = frozenset(
        {"drop_path", "drop_units", "drop_att", "num_groups", "tokens_per_group", "global_window"}
    )
    # Other roles whose saved models this one takes as a part of itself: the part's attribute, by role.
    parts: ClassVar[Mapping[str, str]] = {}
    loading_report = LoadingReport()
    nested: ClassVar[dict[str, type]] = {"trunk": TrunkConfig}

    @classmethod
    def from_preset(cls, name: str, **arguments: Any) -> Self:
        """Build the model in a named size (`models.config.PRESETS`); `arguments` give the geometry, or other options.

        Raises:
            InputError: no such preset, an unknown argument, or whatever the constructor refuses.
        """
        return cls.from_config({**asdict(preset(name, ends_local=cls.ends_local)), **arguments})

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, /, **arguments: Any) -> Self:
        """Build the model from a flat configuration, as `config` gives it, and from further plain arguments.

        Raises:
            InputError: arguments that are unknown or missing, or whatever the constructor refuses.
        """
        values = {**(config or {}), **arguments}
        _check_arguments(cls, values)
        built = {name: kind(**_take(values, kind)) for name, kind in cls.nested.items()}
        return cls(**built, **values)

    @classmethod
    def around(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the configuration of a model of `parts` gives this role."""
        return config

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, flat, as they are saved in config.json.

        Raises:
            InputError: an argument was given that is no plain number, text or list, and cannot be written down.
        """
        config = dict(self._hub_mixin_config)  # type: ignore[arg-type]
        # The mixin drops what JSON cannot hold (a numpy integer, say) without a word.
        if dropped := sorted(set(self._hub_mixin_init_parameters) - {"self"} - set(config)):
            raise InputError(
                f"arguments that JSON cannot hold: {', '.join(dropped)}; give plain numbers, text or lists"
            )
        nested = {name: value for options in self.nested for name, value in config.pop(options).items()}
        return {**nested, **config}

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Write model.safetensors, config.json and, unless there is one, README.md into a folder.

        Args:
            save_directory: the folder, made if it is not there.
            push_to_hub: push it as well, as `repo_id` (by default the folder's name) and with the mixin's `options`.
            model_card_kwargs: more fields for the template of the model card.

        Returns:
            the address of the commit if it was pushed.

        Raises:
            InputError: an argument of the constructor was no plain number, text or list, and cannot be written down.
        """
        folder = Path(save_directory)
        config = json.dumps({"role": type(self).__name__, **self.config}, indent=2)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}  # type: ignore[attr-defined]
        with write_atomically(folder / constants.SAFETENSORS_SINGLE_FILE, durable=True) as path:
            save_file(state, path, metadata={"format": "pt"})
        with write_atomically(folder / constants.CONFIG_NAME, durable=True) as path:
            path.write_text(config + "\n")
        if not (folder / "README.md").exists():
            with write_atomically(folder / "README.md") as path:
                self.generate_model_card(**model_card_kwargs or {}).save(path)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model and its card to the Hub as `repo_id`; `options` are those of the Hub's mixin."""
        options["model_card_kwargs"] = {"repo_id": repo_id, **(options.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *args: Any, **fields: Any) -> Any:
        """Fill the card's template with what this model is."""
        parameters = sum(parameter.numel() for parameter in self.parameters())  # type: ignore[attr-defined]
        return super().generate_model_card(*args, role=type(self).__name__, parameters=f"{parameters:,}", **fields)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, map_location: str = "cpu", **options: Any) -> Self:  # type: ignore[override]
        """Load a saved model, in eval mode; offline if it is a folder.

        Args:
            source: a folder, or the model's name on the Hub.
            map_location: the device it is put on.
            options: how it is fetched from the Hub (`revision`, `cache_dir`, `force_download`, `token`,
                `local_files_only`); anything else overrides an argument of the constructor. `num_classes`, `channels`,
                sizes of images and groups, and numbers of groups may differ from the saved model's: positions are
                resized, a head for other classes is new, and `loading_report` says so.

        Raises:
            InputError: a config or weights of another role or architecture, or files that are not whole.
            FileNotFoundError: a folder or a repository without these files.
        """
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        config = read_config(source, **hub)
        role = config["role"]
        if role != cls.__name__ and role not in cls.parts:
            raise InputError(f"{source} holds a {role}, not a {cls.__name__}: load it with fitformer.{role}")
        own = without_role(config) if role == cls.__name__ else cls.around(without_role(config))
        model = _built(cls, {**own, **options}, str(source))
        model.load_weights(source, **hub)
        return model.eval().to(map_location)

    def load_weights(self, source: str | Path, **hub: Any) -> LoadingReport:
        """Take the weights of a saved model, adapted where this one has other classes, channels, sizes or groups.

        The model may be of a role in `parts`: what this one has beside it is new, and so are local layers at the end
        of its trunk, if the saved one ends in global layers.

        Args:
            source: a folder, a run directory, or a name on the Hub; `hub` as in `from_pretrained`.

        Returns:
            what was resized and what is new, which `loading_report` keeps.

        Raises:
            InputError: a saved model of another role, or of options that weights cannot be adapted to (names both
                values); files that are not whole.
            FileNotFoundError: as `from_pretrained`.
        """
        config = read_config(source, **hub)
        role, part, prefix = config["role"], self, ""
        if role in self.parts:
            part, prefix = getattr(self, self.parts[role]), f"{self.parts[role]}."
        elif role != type(self).__name__:
            raise InputError(f"the weights of {source} are of a {role}, not of a {type(self).__name__}")
        with torch.device("meta"):
            old = _built(type(part), without_role(config), str(source))
        if differing := _differing(old, part, closing=bool(prefix)):
            raise InputError(f"the weights of {source} do not fit: {differing}")
        path = file_of(source, constants.SAFETENSORS_SINGLE_FILE, **hub)
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); save or fetch it again") from error
        state, report = adapt(part, old, state)
        if prefix:
            state, report = placed(self, prefix, state, report)
        load_strictly(self, state, str(path))  # type: ignore[arg-type]
        self.loading_report = report
        logging.getLogger("fitformer").info("%s: %s", source, self.loading_report)
        return self.loading_report


def read_config(source: str | Path, **hub: Any) -> dict[str, Any]:
    """The config.json of a saved model: its role and its constructor's arguments, flat.

    Raises:
        InputError: a file that is no such configuration.
        FileNotFoundError: a folder or a repository without it.
    """
    path = file_of(source, constants.CONFIG_NAME, **hub)
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not a whole JSON file ({error}); save or fetch it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not the configuration of a model: it holds a {type(config).__name__}")
    if not isinstance(config.get("role"), str):
        raise InputError(f"{path} is not the configuration of a model: it names no role")
    return config


def without_role(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments in a configuration."""
    return {name: value for name, value in config.items() if name != "role"}


def _differing(old: Pretrained, new: Pretrained, closing: bool) -> str:
    """The options on which two models of a role differ and weights cannot be adapted, each with both values.

    With `closing`, the new one may have local layers at the end that the old one lacks.
    """
    pairs = {name: (value, new.config[name]) for name, value in old.config.items() if name not in new.free}
    there, here = pairs["layers"]
    if closing and here.startswith(there) and re.fullmatch(r"\(\d+\)", here.removeprefix(there)):
        del pairs["layers"]
    return "; ".join(
        f"{name} is {there!r} there and {here!r} here"
        for name, (there, here) in pairs.items()
        if _plain(there) != _plain(here)
    )


def _plain(value: Any) -> Any:
    """As JSON gives it back; a size of one number as both its sides."""
    return list(value) if isinstance(value, tuple) else [value, value] if isinstance(value, int) else value


def _built(role: type[Pretrained], config: dict[str, Any], source: str) -> Any:
    """Build a model from its configuration; errors name where it came from."""
    try:
        return role.from_config(config)
    except InputError as error:
        raise InputError(f"the configuration of {source}: {error}") from None


def _check_arguments(role: type[Pretrained], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are unknown or missing.

    Raises:
        InputError: names them.
    """
    own = {name: value for name, value in role._hub_mixin_init_parameters.items() if name not in ("self", *role.nested)}
    known = {*own, *(field.name for kind in role.nested.values() for field in fields(kind))}
    if unknown := sorted(set(arguments) - known):
        raise InputError(f"{role.__name__} has no arguments {', '.join(unknown)}")
    required = {name for name, parameter in own.items() if parameter.default is parameter.empty} | set(SIZES)
    if missing := sorted(required - set(arguments)):
        raise InputError(f"{role.__name__} needs {', '.join(missing)}")


def _take(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """Take the options of a dataclass out of a flat configuration."""
    return {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}


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


def file_of(source: str | Path, name: str, **hub: Any) -> Path:
    """Find a file of a saved model, in a folder, in the exported model of a run directory, or on the Hub.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    model_id = str(source)
    if Path(model_id).is_dir():
        # A run directory keeps its exported model in a folder of its own.
        for path in (Path(model_id) / name, Path(model_id) / "model" / name):
            if path.is_file():
                return path
        raise FileNotFoundError(f"{model_id} is not a saved model: it has no {name}")
    try:
        return Path(hf_hub_download(repo_id=model_id, filename=name, **hub))
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no folder {model_id}, and it cannot be a name on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {model_id}, and no copy of that name from the Hub, which cannot be reached now"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{model_id} on the Hub is not a saved model: it has no {name}") from error
