"""The command line: `fitformer VERB ...`. Verbs parse arguments, call the library and print.

A verb is a module `fitformer.cli.<verb>` with `add_arguments(parser)` and `run(arguments) -> exit status`; it is
imported only when it is called, so that `--help` is fast. A verb with `OVERRIDES = True` gets the arguments that its
parser does not know as `arguments.overrides`.
"""

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from fitformer import __version__
from fitformer._support.suggest import suggest
from fitformer.data.workers import message_of
from fitformer.errors import InputError, MissingDependencyError, ran_out_of_memory

VERBS = {
    "train": "train a model from a recipe, or continue its run",
    "evaluate": "measure a run on held-out data",
    "predict": "label image files with a classifier's run, or their pixels with a segmenter's",
    "features": "write features of the patches of slides, by a frozen encoder",
    "sample": "draw images from a diffusion run",
    "generate": "continue text, or draw images pixel by pixel, from an autoregressive run",
    "export": "write a model as ONNX, or as a program of torch.export",
    "compress": "compress a file without loss by the model of a bytes run",
    "decompress": "get a compressed file back, bit for bit",
    "info": "parameters, FLOPs and group plan of a preset or a run",
    "plan": "how to train on a huge image in a given memory, and what it costs",
    "bench": "measure training steps on a huge image, or generation",
}

_TOO_LARGE = (
    "the memory does not suffice; a smaller batch takes less, and so does training with trainer.execution=streamed: "
    "`fitformer plan` says what it takes"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for bad input, 130 if interrupted.

    An error is one line on standard error, and so is a warning that is not filtered out, each told once.
    """
    told = set[str]()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).split())
        # The parts of one data set often warn of the same.
        if line not in told:
            print(f"fitformer: warning: {line}", file=sys.stderr)
        told.add(line)

    with warnings.catch_warnings():
        # Python's own words name a line of code, which a user of commands did not write.
        warnings.showwarning = show
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a letter shows its code, and ends nothing.
            stream.reconfigure(errors="backslashreplace")
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
        print(f"fitformer: error: {message_of(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        print(f"fitformer: error: {_TOO_LARGE} ({message_of(error)})", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """A parser that raises `InputError` in place of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def _outer(words: list[str]) -> int:
    listing = "\n".join(f"  {verb:10} {what}" for verb, what in VERBS.items())
    parser = _Parser(
        prog="fitformer",
        usage="fitformer VERB ...",
        description="Train FIT transformers, and use the trained models.",
        epilog=f"verbs:\n{listing}\n\n`fitformer VERB --help` lists the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fitformer {__version__}")
    _, rest = parser.parse_known_args(words)
    if not rest:
        parser.print_help()
        return 0
    hint = suggest(rest[0], VERBS, f"; the verbs are {', '.join(VERBS)}")
    raise InputError(f"no verb {rest[0]!r}{hint}")


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
