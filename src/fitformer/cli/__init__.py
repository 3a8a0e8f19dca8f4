"""The command line: `fitformer VERB ...`. Verbs parse, call and print; what they do stands elsewhere.

A verb is a module `fitformer.cli.<verb>` with `add_arguments(parser)` and `run(arguments) -> exit status`; it is
imported when it is called, so that help comes at once. A verb with `OVERRIDES = True` gets what its parser does not
know as `arguments.overrides`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from fitformer import __version__
from fitformer.errors import InputError, MissingDependencyError

VERBS = {
    "train": "train a model from a recipe, or continue its run",
    "evaluate": "measure a run on held-out data",
    "predict": "label image files with a classifier's run",
    "sample": "draw images from a diffusion run",
    "generate": "continue text, or draw images pixel by pixel, from an autoregressive run",
    "info": "parameters, FLOPs and group plan of a preset or a run",
    "plan": "how to train on a huge image in a given memory, and what it costs",
    "bench": "measure training steps on a huge image",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] not in VERBS:
            return _outer(words)
        return _verb(words[0], words[1:])
    except KeyboardInterrupt:
        print("fitformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (InputError, MissingDependencyError, OSError) as error:
        print(f"fitformer: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    """What an error says, on one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):
        # Raised in a worker process of a loader, torch gives its whole traceback as the message; the last line says it.
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are bad input like any other: one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def _outer(words: list[str]) -> int:
    listing = "\n".join(f"  {verb:10} {what}" for verb, what in VERBS.items())
    parser = _Parser(
        prog="fitformer",
        usage="fitformer VERB ...",
        description="FIT transformers: train them, and use what was trained.",
        epilog=f"verbs:\n{listing}\n\n`fitformer VERB --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fitformer {__version__}")
    _, rest = parser.parse_known_args(words)
    if not rest:
        parser.print_help()
        return 0
    near = get_close_matches(rest[0], VERBS, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VERBS)}"
    raise InputError(f"no verb {rest[0]!r}; {hint}")


def _verb(verb: str, words: list[str]) -> int:
    module = importlib.import_module(f"fitformer.cli.{verb}")
    parser = _Parser(
        prog=f"fitformer {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if getattr(module, "OVERRIDES", False):
        arguments, rest = parser.parse_known_args(words)
        arguments.overrides = rest
    else:
        arguments = parser.parse_args(words)
    return int(module.run(arguments))
