"""Parameters, operations and group plan of a preset, a run or a saved model, before anything runs.

fitformer info small --image-size 512 --patch-size 16 --group-size 128
fitformer info base --role decoder --length 8192 --tokens-per-group 64
fitformer info runs/digits-classify
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitformer._support.checks import whole
from fitformer._support.json_text import parse_json
from fitformer.cli.options import add_trunk, natural, positive, size, trunk_of
from fitformer.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from fitformer.profiling import Model

ROLES = {
    "encoder": "FITImageEncoder",
    "segmenter": "FITImageSegmenter",
    "denoiser": "FITImageDenoiser",
    "decoder": "FITDecoder",
}
CONFIG = "config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer info`."""
    parser.add_argument("what", help="a preset (tiny, slide, small, base, large), a run, or a saved model's folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    of_preset = parser.add_argument_group("of a preset")
    of_preset.add_argument("--role", choices=ROLES, help="encoder by default")
    of_preset.add_argument(
        "--image-size",
        type=size,
        metavar="PIXELS",
        help="side, or ROWSxCOLUMNS; 256 by default; also of a saved model of any size",
    )
    of_preset.add_argument("--group-size", type=size, metavar="PIXELS", help="of encoder and denoiser; 64 by default")
    of_preset.add_argument("--patch-size", type=size, metavar="PIXELS", help="8 by default")
    of_preset.add_argument("--channels", type=positive, help="of an image; 3 by default")
    words = "of the head of an encoder or segmenter, or of a denoiser's condition; none, 10 for a segmenter"
    of_preset.add_argument("--num-classes", type=int, help=words)
    of_preset.add_argument("--refinement", type=natural, help="of a segmenter, see its documentation; 16 by default")
    of_preset.add_argument(
        "--length",
        type=positive,
        help="tokens of a decoder's sequence, instead of an image; also of a saved one of any length",
    )
    of_preset.add_argument("--tokens-per-group", type=positive, help="with --length; 64 by default")
    of_preset.add_argument("--vocab-size", type=positive, help="of a decoder; 256 by default")
    add_trunk(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what the model holds and costs."""
    from fitformer.models.config import PRESETS

    model = of_preset(arguments) if arguments.what in PRESETS else of_folder(arguments)
    if arguments.json:
        print(json.dumps(as_plain(model), indent=2))
        return 0
    from rich.console import Console

    console = Console()
    for table in tables(model, arguments.what):
        console.print(table)
    return 0


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a preset that were set."""
    apart = {"what", "json", "overrides"}
    return {name: value for name, value in vars(arguments).items() if name not in apart and value is not None}


def of_preset(arguments: argparse.Namespace) -> "Model":
    """The model of a preset and the geometry asked for, without weights.

    Raises:
        InputError: options that do not apply to the role, or sizes that do not fit.
    """
    from fitformer.profiling import on_meta

    trunk = trunk_of(arguments)
    asked = {name: value for name, value in given(arguments).items() if name not in trunk}
    role = asked.pop("role", "encoder")
    if role == "decoder":
        numbers = _sequence(asked)
    else:
        cut = DEFAULT_CUT | ({"num_classes": 10, "refinement": 16} if role == "segmenter" else {})
        numbers = {name: asked.pop(name, value) for name, value in cut.items()}
    if asked:
        raise InputError(f"--{next(iter(asked)).replace('_', '-')} does not apply to this {role}; leave it out")
    return on_meta(ROLES[role], {**numbers, **trunk}, preset=arguments.what)


DEFAULT_CUT: dict[str, Any] = {"image_size": 256, "group_size": 64, "patch_size": 8, "channels": 3, "num_classes": 0}


def _sequence(asked: dict[str, Any]) -> dict[str, Any]:
    """Geometry of a decoder: of `length` tokens, or of the pixels of an image, a patch a group (spec section 6)."""
    from fitformer.patching.sizes import check_divisible, to_sides

    vocabulary = {"vocab_size": asked.pop("vocab_size", 256)}
    if "length" in asked:
        length, n = asked.pop("length"), asked.pop("tokens_per_group", 64)
        return {"num_groups": -(-length // n), "tokens_per_group": n, **vocabulary}
    rows, columns = to_sides(asked.pop("image_size", DEFAULT_CUT["image_size"]), "hw")
    high, wide = to_sides(asked.pop("patch_size", DEFAULT_CUT["patch_size"]), "hw")
    check_divisible(rows, high, ("an image", "patches", "rows"))
    check_divisible(columns, wide, ("an image", "patches", "columns"))
    groups = (rows // high) * (columns // wide)
    return {"num_groups": groups, "tokens_per_group": high * wide * asked.pop("channels", 3), **vocabulary}


def of_folder(arguments: argparse.Namespace) -> "Model":
    """The model of a run or of a saved model, from its config.json, without weights.

    Raises:
        InputError: neither a preset nor such a folder, or options of a preset given with a folder.
    """
    from fitformer.models.config import PRESETS
    from fitformer.profiling import on_meta

    folder = Path(arguments.what)
    path = next((file for file in (folder / CONFIG, folder / "model" / CONFIG) if file.is_file()), None)
    if path is None:
        raise InputError(
            f"{arguments.what!r} is no preset ({', '.join(PRESETS)}), and no run or saved model "
            f"({'it has no config.json' if folder.is_dir() else 'there is no such folder'})"
        )
    try:
        config = dict(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not the configuration of a model ({error}); save the model again") from error
    asked = given(arguments)
    if config.get("latent_position") in ("index", "shared"):
        config |= _any_length(config, asked.pop("length", None))
    if config.get("latent_position") == "row_column" and config.get("image_size", 0) is None:
        if "image_size" not in asked:
            raise InputError("the model takes images of any size; add --image-size, in pixels")
        config["image_size"] = asked.pop("image_size")
    if asked:
        raise InputError(
            f"--{next(iter(asked)).replace('_', '-')} is for presets; leave it out with {arguments.what}, a saved model"
        )
    return on_meta(config.pop("role", "nothing"), config)


def _any_length(config: dict[str, Any], length: int | None) -> dict[str, int]:
    """How many groups the sequence of so many tokens has, of a model of any number of groups."""
    if length is None and config.get("num_groups", 0) is None:
        raise InputError("the model takes sequences of any length; add --length, in tokens")
    return {} if length is None else {"num_groups": -(-length // whole(CONFIG, config.get("tokens_per_group")))}


def as_plain(model: "Model") -> dict[str, Any]:
    """What the tables say, as plain data."""
    from dataclasses import asdict

    from fitformer.profiling import count_parameters, flops, group_plan, parts

    return {
        "role": type(model).__name__,
        "parameters": count_parameters(model),
        "flops": asdict(flops(model)),
        "groups": asdict(group_plan(model)),
        "parts": [asdict(part) for part in parts(model)],
    }


def tables(model: "Model", title: str) -> "list[Table]":
    """The group plan, and the parts with their sum, as tables."""
    from rich import box
    from rich.table import Table

    from fitformer.profiling import count_parameters, group_plan, parts, sum_flops

    plan, look = group_plan(model), {"title_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    headings = ("groups t", "tokens n", "latents m", "width c", "width d", "layers")
    groups = Table(*headings, title=title, **look)  # type: ignore[arg-type]
    sizes = (plan.num_groups, plan.tokens_per_group, plan.latents_per_group, plan.dim, plan.latent_dim)
    groups.add_row(*map(str, sizes), plan.layers)
    title = f"{type(model).__name__}, one example forward"
    costs = Table(title=title, show_footer=True, **look)  # type: ignore[arg-type]
    costs.add_column("part", no_wrap=True, footer="all")
    costs.add_column("tokens", no_wrap=True)
    rows = parts(model)
    whole = sum_flops([part.flops for part in rows])
    columns = ("parameters", count_parameters(model)), ("attention", whole.attention)
    for name, value in (*columns, ("FLOPs", whole.total)):
        costs.add_column(name, footer=short(value), justify="right")
    costs.add_column("share", justify="right")
    for part in rows:
        counts = (part.parameters, part.flops.attention, part.flops.total)
        share = f"{part.flops.total / whole.total:.1%}"
        costs.add_row(part.name, part.tokens, *(short(count) if count else "" for count in counts), share)
    return [groups, costs]


def short(count: float) -> str:
    """A large number for people: 1234567 is `1.23M`."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}P"
