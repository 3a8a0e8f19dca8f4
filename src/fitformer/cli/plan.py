"""How much a training step on a huge image or a long sequence costs, and how to run it in a given memory.

fitformer plan --image-size 40000x30000 --preset base --memory 16GB
fitformer plan --role segmenter --num-classes 5 --image-size 65536 --group-size 512 --preset tiny --memory 8GB
fitformer plan --role decoder --length 1000000 --preset small --memory 4GB
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from fitformer.cli.options import add_trunk, natural, positive, size, trunk_of
from fitformer.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from fitformer.profiling import Geometry, Plan, PlanRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fitformer plan`."""
    add_geometry(parser)
    add_run_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_geometry(parser: argparse.ArgumentParser) -> None:
    """Options of the model and of its input."""
    geometry = parser.add_argument_group("model and image")
    geometry.add_argument(
        "--role", choices=("encoder", "segmenter", "denoiser", "decoder"), default="encoder", help="default: encoder"
    )
    geometry.add_argument("--preset", help="tiny, slide, small, base or large (default: small)")
    geometry.add_argument("--image-size", type=size, metavar="PIXELS", help="side, or ROWSxCOLUMNS")
    geometry.add_argument("--patch-size", type=size, metavar="PIXELS", help="default: 16; 1 for a decoder")
    geometry.add_argument("--group-size", type=size, metavar="PIXELS", help="default: that of the fewest operations")
    geometry.add_argument("--channels", type=positive, help="of the image (default: 3)")
    geometry.add_argument("--num-classes", type=positive, help="of the head of an encoder or segmenter (default: 10)")
    words = "of a segmenter: numbers of a pixel that convolutions work on, 0 for none (default: 16)"
    geometry.add_argument("--refinement", type=natural, metavar="NUMBERS", help=words)
    geometry.add_argument(
        "--length", type=positive, metavar="BYTES", help="of a decoder's sequence, in place of an image"
    )
    words = "of a sequence, n (default: that of the fewest operations)"
    geometry.add_argument("--tokens-per-group", type=positive, metavar="BYTES", help=words)
    add_trunk(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of the execution."""
    running = parser.add_argument_group("how to run")
    running.add_argument("--memory", metavar="AMOUNT", help="budget, such as 16GB (10^9 bytes each) or 7.5GiB")
    running.add_argument(
        "--execution", choices=("auto", "plain", "checkpointed", "streamed"), default="auto", help="default: what fits"
    )
    running.add_argument("--keep", choices=("memory", "host", "disk"), help="of streamed: where data tokens are kept")
    running.add_argument("--kept-precision", choices=("bf16",), help="of streamed: keep data tokens in half the memory")
    running.add_argument("--slice", type=positive, metavar="GROUPS", help="of streamed: groups computed at a time")
    running.add_argument(
        "--recompute",
        choices=("full", "local", "selective", "light"),
        help="of streamed: what the backward pass computes again (default: the least that fits the budget)",
    )
    running.add_argument("--batch-size", type=positive, default=1, help="examples at once (default: 1)")
    running.add_argument("--precision", choices=("32", "bf16"), default="32", help="default: 32")
    running.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose memory counts (default: cpu)")


def geometry_of(arguments: argparse.Namespace, image_size: int | None = None) -> "Geometry":
    """The geometry asked for; `image_size` stands where none was given.

    Raises:
        InputError: no image size, no such preset, sizes that do not fit.
    """
    from fitformer.profiling import Geometry

    wanted = image_size if arguments.image_size is None else arguments.image_size
    cut = {"patch_size": arguments.patch_size, "group_size": arguments.group_size, "channels": arguments.channels or 3}
    if arguments.length is not None or arguments.tokens_per_group is not None:
        wanted, cut = _sequence(arguments)
    if wanted is None:
        raise InputError(
            "no image size is given: add --image-size 6400, or --image-size 40000x30000 (rows x columns), or for a "
            "decoder --length 1000000"
        )
    preset = arguments.preset or "small"
    found = Geometry.of_preset(arguments.role, preset, wanted, **cut, **_head(arguments), **trunk_of(arguments))
    return found if found.group_size is None else found.checked()


def _head(arguments: argparse.Namespace) -> dict[str, int]:
    """The options of a head that were given.

    Raises:
        InputError: the role has no such head.
    """
    roles = {"num_classes": ("encoder", "segmenter"), "refinement": ("segmenter",)}
    given = {name: value for name in roles if (value := getattr(arguments, name)) is not None}
    for name in given:
        if arguments.role not in roles[name]:
            raise InputError(
                f"--{name.replace('_', '-')} is of the role {' or '.join(roles[name])}, and the role is "
                f"{arguments.role}: leave it out, or add --role {roles[name][-1]}"
            )
    return given


def _sequence(arguments: argparse.Namespace) -> tuple[tuple[int, int], dict[str, Any]]:
    """A sequence of bytes as an image of one row and one channel: its size, and how it is cut.

    Raises:
        InputError: a role that reads no sequences, no length, or options of an image beside it.
    """
    if arguments.role != "decoder":
        raise InputError(f"--length is of a decoder's sequence, and the role is {arguments.role}: add --role decoder")
    if arguments.length is None:
        raise InputError("--tokens-per-group is of a sequence, which has no length: add --length 1000000")
    for name in ("image_size", "patch_size", "group_size", "channels"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--length is of a sequence and --{name.replace('_', '-')} of an image: leave one out")
    n = arguments.tokens_per_group
    return (1, arguments.length), {"channels": 1, "group_size": None if n is None else (1, n)}


def request_of(arguments: argparse.Namespace) -> "PlanRequest":
    """The execution that was asked for.

    Raises:
        InputError: an amount of memory that cannot be read, or options of streamed execution with another one.
    """
    from fitformer._support.bytesize import parse_bytes
    from fitformer.profiling import PlanRequest

    streamed = {"--keep": arguments.keep, "--slice": arguments.slice, "--kept-precision": arguments.kept_precision}
    streamed["--recompute"] = arguments.recompute
    for name, value in streamed.items():
        if value is not None and arguments.execution in ("plain", "checkpointed"):
            raise InputError(f"{name} is for streamed execution; leave it out, or take --execution streamed")
    return PlanRequest(
        budget=None if arguments.memory is None else parse_bytes(arguments.memory),
        execution=arguments.execution,
        keep=arguments.keep,
        slice_groups=arguments.slice,
        kept_precision=arguments.kept_precision,
        recompute=arguments.recompute,
        batch=arguments.batch_size,
        precision="bf16" if arguments.precision == "bf16" else 32,
        device=arguments.device,
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; the exit status is 1 if nothing fits."""
    from fitformer.profiling import choose

    plan = choose(geometry_of(arguments), request_of(arguments))
    if arguments.json:
        print(json.dumps(as_plain(plan), indent=2))
    else:
        from rich.console import Console

        console = Console()
        console.print(table(plan))
        console.print(plan.verdict, highlight=False, soft_wrap=True)
    return 0 if plan.fits else 1


def as_plain(plan: "Plan") -> dict[str, Any]:
    """What the table says, as plain data."""
    from dataclasses import asdict

    geometry = plan.geometry
    return {
        "role": geometry.role,
        "image_size": geometry.image_size,
        "group_size": geometry.patch_grid.group_size,
        "patch_size": geometry.patch_grid.patch_size,
        "groups": geometry.num_groups,
        "tokens": geometry.length,
        "tokens_per_group": geometry.tokens_per_group,
        "latents": plan.latents,
        "parameters": plan.parameters,
        "flops": asdict(plan.flops),
        "setup": asdict(plan.setup),
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "fits": plan.fits,
        "verdict": plan.verdict,
    }


def table(plan: "Plan") -> "Table":
    """Sizes, operations and memory of a plan."""
    from rich import box
    from rich.table import Table

    from fitformer._support.bytesize import format_bytes
    from fitformer.cli.info import short
    from fitformer.patching.sizes import format_size

    geometry, memory = plan.geometry, plan.memory
    found = Table(show_header=False, box=box.SIMPLE, padding=(0, 1, 0, 0))
    found.add_column(no_wrap=True)
    found.add_column(justify="right", no_wrap=True)
    found.add_column()
    grid = geometry.patch_grid
    high, wide = grid.cover(*geometry.image_size)  # type: ignore[misc]
    cut = f"{high} x {wide} of {format_size(grid.group_size)} pixels, {geometry.tokens_per_group} tokens"  # type: ignore[arg-type]
    found.add_row("groups", f"{geometry.num_groups:,}", cut)
    beyond = plan.tokens - geometry.length
    found.add_row(
        "tokens", f"{geometry.length:,}", f"and {beyond:,} that fill up groups at the edges" if beyond else ""
    )
    found.add_row("latents", f"{plan.latents:,}", f"{geometry.sizes['latents_per_group']} a group")
    found.add_row("parameters", short(plan.parameters), f"layers {geometry.sizes['layers']}")
    operations = f"of a training step, attention {short(plan.flops.attention)}"
    found.add_row("FLOPs", short(plan.flops.total), operations, end_section=True)
    streamed = plan.setup.execution == "streamed"
    remembered = ", remembered results" if streamed and plan.setup.recompute != "full" else ""
    for name, count, what in (
        ("weights", memory.weights, "parameters and gradients"),
        ("optimizer", memory.optimizer, "two averages of AdamW"),
        ("kept tokens", memory.kept, f"data tokens between blocks, latents{remembered}"),
        ("working set", memory.working, "of one slice or layer" if streamed else "activations"),
        ("process", memory.process, "Python, torch, decoded tiles"),
        ("allocator", memory.slack, "freed memory that is not returned"),
    ):
        found.add_row(name, format_bytes(count), what)
    found.add_row("peak memory", format_bytes(memory.total), end_section=True)
    for name, count in (("scratch on disk", memory.scratch), ("on the host", memory.host)):
        if count:
            found.add_row(name, format_bytes(count), "data tokens between blocks")
    return found
