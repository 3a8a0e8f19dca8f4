"""FIT as models of timm: `timm.create_model("fit_small", ...)`, for classifiers and as a pyramid of feature maps.

Importing this module registers the presets with timm. The maps have reductions 4, 8, 16 and 32 by default, as those of
hierarchical models, so what takes such a model by its name in timm takes FIT.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitformer._support.checks import checked, whole
from fitformer.errors import InputError, require
from fitformer.interop._pyramid import Pyramid, reductions_of
from fitformer.models.adapt import change_channels, resize_table
from fitformer.models.config import TrunkConfig, preset
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.models.layers import MOST_SIZE
from fitformer.patching.sizes import Size, axis_lengths

timm: Any = require("timm", extra="timm")

__all__ = ["FITBackbone", "fit_base", "fit_large", "fit_small", "fit_tiny", "from_fit"]

GROUP_SIZE, PATCH_SIZE = 32, 4
FORMATS = ("NCHW", "NHWC")
# Positions that take a group at any row and column: without them a model is of one size.
ANY_SIZE = "row_column"


class FITBackbone(nn.Module):
    """A FIT encoder of images as timm's models are: channels first, features, a head, levels of maps.

    Args:
        trunk: options of the trunk.
        img_size: of the images, of whole groups. A model of positions other than `latent_position="row_column"` is of
            this one size; with those it is of any.
        group_size, patch_size: sides of groups and patches, in pixels.
        in_chans: channels of the images.
        num_classes: classes of the head; 0 for none.
        global_pool: how the head pools: `"avg"`, `"max"`, `"avgmax"`, `"catavgmax"`, or `""` for maps.
        drop_rate: dropout before the classifier.
        drop_path_rate: `TrunkConfig.drop_path`, under timm's name.
        device, dtype: of the parameters.

    Raises:
        InputError: sizes that do not divide (names the nearest that do), or options that exclude each other.
    """

    # Of Python alone: `torch.jit.script` would compile them.
    __jit_unused_properties__ = ("feature_info", "head_hidden_size", "num_features")

    def __init__(
        self,
        trunk: TrunkConfig,
        img_size: Size | None = None,
        group_size: int = GROUP_SIZE,
        patch_size: int = PATCH_SIZE,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, whole("num_classes", num_classes, 0, MOST_SIZE)
        if drop_path_rate:
            trunk = replace(trunk, drop_path=drop_path_rate)
        if img_size is not None:
            axis_lengths(img_size, group_size, patch_size, "hw")
        elif trunk.latent_position != ANY_SIZE:
            raise InputError(
                f"latent_position is {trunk.latent_position!r}, which needs img_size, the one size of the images; "
                f"{ANY_SIZE!r} takes any"
            )
        image_size = None if trunk.latent_position == ANY_SIZE else img_size
        with nullcontext() if device is None else torch.device(device):
            self.body = Pyramid(trunk, image_size, group_size, patch_size, in_chans).to(dtype=dtype)
        self.head = timm.layers.ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype
        )
        # The stem is a linear map, whose channels timm's adaption of convolutions does not fit: `filter_weights` does.
        self._traits = {"first_conv": None, "fixed_input_size": image_size is not None}

    @property
    def num_features(self) -> int:
        """Channels of the last level."""
        return self.body.levels[-1].width

    @property
    def head_hidden_size(self) -> int:
        """Numbers that the classifier takes."""
        return self.head.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, reduction and module of each level."""
        return [
            {"num_chs": level.width, "reduction": level.reduction, "module": f"body.encoder.trunk.blocks.{level.block}"}
            for level in self.body.levels
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(b, num_classes)` of images `(b, in_chans, H, W)`; what is pooled, without classes."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level `(b, num_features, H / r, W / r)`, normalised, of images `(b, in_chans, H, W)`.

        Raises:
            InputError: images of another number of channels, or of a size that groups do not divide.
        """
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` gives, or what the classifier takes."""
        return self.head(x, pre_logits=pre_logits)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Levels of images `(b, in_chans, H, W)`, finest first.

        Args:
            x: images.
            indices: numbers of levels, or how many of the last; all by default.
            norm: normalise the last level.
            stop_early: run no blocks beyond those that these levels need.
            output_fmt: `"NCHW"` or `"NHWC"`, of the levels.
            intermediates_only: give nothing else.

        Returns:
            `forward_features(x)` and the levels, or the levels alone.

        Raises:
            InputError: an unknown format, a level that is not there, or images as in `forward_features`.
        """
        if output_fmt not in FORMATS:
            raise InputError(f"output_fmt is {output_fmt!r}; it must be one of {', '.join(FORMATS)}")
        levels = self._levels(indices)
        last, maps = self.body.maps(x, levels, norm=norm, stop=stop_early or intermediates_only)
        if output_fmt == "NHWC":
            maps = [each.permute(0, 2, 3, 1) for each in maps]
        return maps if intermediates_only else (last, maps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that these levels do not need, and the head; returns the numbers of the levels."""
        levels = self._levels(indices)
        shorter = max(levels) < len(self.body.levels) - 1
        self.body.cut_to(max(levels), keep_norm=not prune_norm)
        if shorter or prune_head:
            self.reset_classifier(0, "")
        return levels

    def _levels(self, indices: int | Sequence[int] | None) -> list[int]:
        """Numbers of levels, as timm gives them: how many of the last, from the end, or all."""
        count = len(self.body.levels)
        wanted = range(count) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if not len(wanted) or any(not -count <= k < count for k in wanted):
            raise InputError(f"indices are {indices!r}; there are {count} levels, counted from 0")
        return [k % count for k in wanted]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear map."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier for `num_classes` classes in the place of the old; 0 for none.

        Raises:
            InputError: a negative number of classes.
        """
        self.num_classes = whole("num_classes", num_classes, 0, MOST_SIZE)
        like = self.body.encoder.stem.projection.weight
        self.head.reset(num_classes, global_pool, in_features=self.num_features, device=like.device, dtype=like.dtype)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the phases of blocks again in the backward pass, or keep their activations."""
        self.body.encoder.set_execution("checkpointed" if enable else "plain")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the positions."""
        return {name for name, _ in self.named_parameters() if re.search(r"\.(?:latent_)?position\.", name)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How names of parameters fall into groups, by depth: stem and positions, then layers, or coarse blocks.

        timm's layer-wise rates of learning read it.
        """
        trunk = r"^body\.encoder\.trunk\."
        layers: list[tuple[str, tuple[int, ...] | None]] = [(rf"{trunk}blocks\.(\d+)", None)]
        if not coarse:
            parts = [f"{i}.{name}" for i, block in enumerate(self.body.encoder.trunk.blocks) for name in _parts(block)]
            layers = [(rf"{trunk}blocks\.{re.escape(name)}\.", (k,)) for k, name in enumerate(parts)]
        # timm's own number for what belongs to the layer before it.
        layers.append((r"^body\.encoder\.(?:latent_)?norm\.", (99999,)))
        return {"stem": rf"^body\.encoder\.stem|{trunk}(?:latent_)?position", "blocks": layers}

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` takes in its place: a copy, of which it replaces parts."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        return twin


# Tracers of torch.fx take it as one operation.
timm.layers.register_notrace_module(Pyramid)


def filter_weights(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a `FITBackbone` or of a `FITImageEncoder`, made to fit a backbone: names, channels, and positions.

    A table of the positions of groups is resized if the groups that it was made for stand in a square.
    """
    model, found = cast(FITBackbone, model), dict(state)
    if not any(name.startswith("body.") for name in found):
        heads = {f"head.{kind}": f"head.fc.{kind}" for kind in ("weight", "bias")}
        found = {heads.get(name, f"body.{name}"): tensor for name, tensor in found.items()}
        # A FITImageEncoder has the norm of what it does not answer in, too.
        norms = {name: getattr(model.body.encoder, name) for name in ("norm", "latent_norm")}
        unused = tuple(f"body.encoder.{name}." for name, norm in norms.items() if isinstance(norm, nn.Identity))
        found = {name: tensor for name, tensor in found.items() if not name.startswith(unused)}
    grid, trunk = model.body.grid, model.body.encoder.trunk
    stem, table = "body.encoder.stem.projection.weight", "body.encoder.trunk.latent_position.weight"
    pixels = math.prod(grid.patch_size)  # type: ignore[arg-type]
    if stem in found and found[stem].shape[1] != grid.token_dim and found[stem].shape[1] % pixels == 0:
        found[stem] = change_channels(found[stem], found[stem].shape[1] // pixels, grid.channels)
    if table in found and grid.shape is not None:
        groups = len(found[table]) // trunk.latents_per_group
        if groups != grid.num_groups and math.isqrt(groups) ** 2 == groups:
            found[table] = resize_table(found[table], (math.isqrt(groups),) * 2, grid.shape)
    return found


@checked
def from_fit(source: FITImageEncoder | str | Path, **options: Any) -> nn.Module:
    """A `FITImageEncoder`, or the folder of one, as a model of timm with its weights.

    `timm.models.save_for_hf` writes it into a folder, which `create_model("local-dir:FOLDER", pretrained=True)` reads.

    Args:
        source: the encoder, of square groups and patches, without glimpses and without a mask.
        options: of `timm.create_model`, such as `features_only=True`, or `num_classes=5` for a new head.

    Raises:
        InputError: another encoder, or what `FITBackbone` refuses.
    """
    encoder = source if isinstance(source, FITImageEncoder) else FITImageEncoder.from_pretrained(source)
    trunk = encoder.trunk.config
    # Every option of the trunk is given, so that the preset has no say.
    named = {**asdict(trunk), **_geometry(encoder), "num_classes": encoder.num_classes, **options}
    weights = {"state_dict": encoder.state_dict(), "num_classes": encoder.num_classes}
    model = timm.create_model("fit_tiny", pretrained=True, pretrained_cfg_overlay=weights, **named)
    del model.pretrained_cfg["state_dict"]
    return model


def _geometry(encoder: FITImageEncoder) -> dict[str, Any]:
    """Sizes and channels of an encoder, by timm's names."""
    grid = encoder.patch_grid
    (group, *groups), (patch, *patches) = ({*size} for size in (grid.group_size, grid.patch_size))  # type: ignore[misc]
    causal = any(block.causal_global for block in encoder.trunk.blocks)
    if groups or patches or encoder.glimpses or causal:
        raise InputError(
            f"an encoder of groups {grid.group_size} in patches {grid.patch_size}, with {encoder.glimpses} glimpses, "
            f"mask {'causal' if causal else 'none'}; timm's models have square ones, no glimpses and no mask"
        )
    sizes = {} if grid.image_size is None else {"img_size": grid.image_size}
    return {"group_size": group, "patch_size": patch, "in_chans": encoder.channels, **sizes}


def _parts(block: nn.Module) -> Iterator[str]:
    """Names of the layers of a block, in the order in which they are run."""
    for name, part in block.named_children():
        yield from (f"{name}.{k}" for k in range(len(part))) if isinstance(part, nn.ModuleList) else (name,)


def _cfg() -> dict[str, Any]:
    side, half = 224, (0.5, 0.5, 0.5)
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // GROUP_SIZE, side // GROUP_SIZE),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        # Pixels from -1 to 1, as all of fitformer takes them.
        "mean": half,
        "std": half,
        "first_conv": "body.encoder.stem.projection",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2305.12689",
        "paper_name": "FIT: Far-reaching Interleaved Transformers",
    }


default_cfgs = timm.models.generate_default_cfgs({f"fit_{name}": _cfg() for name in ("tiny", "small", "base", "large")})


def _create(size: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """A model of a preset, whose options are taken out of `options`; the others are timm's."""
    changed = {name: options.pop(name) for name in TrunkConfig.names() if name in options}
    trunk = replace(preset(size), **{"latent_position": ANY_SIZE, **changed})
    levels = reductions_of(options.get("group_size", GROUP_SIZE), options.get("patch_size", PATCH_SIZE))
    return timm.models.build_model_with_cfg(
        FITBackbone,
        f"fit_{size}",
        pretrained,
        trunk=trunk,
        feature_cfg={"out_indices": tuple(range(len(levels))), "feature_cls": "getter"},
        pretrained_filter_fn=filter_weights,
        **options,
    )


@timm.models.register_model
def fit_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """The preset `tiny`: 0.3M parameters, for tests. Options are those of `FITBackbone`, `TrunkConfig` and timm."""
    return _create("tiny", pretrained, options)


@timm.models.register_model
def fit_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """The preset `small`: 30M parameters; options as of `fit_tiny`."""
    return _create("small", pretrained, options)


@timm.models.register_model
def fit_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """The preset `base`: 101M parameters; options as of `fit_tiny`."""
    return _create("base", pretrained, options)


@timm.models.register_model
def fit_large(pretrained: bool = False, **options: Any) -> nn.Module:
    """The preset `large`: 340M parameters; options as of `fit_tiny`."""
    return _create("large", pretrained, options)
