"""One check of arguments by kind and range, with one wording: what was given, what it must be.

`checked` reads the kinds off a function's annotations, `check_fields` off those of a dataclass; ranges are told by
`whole`, `number` and `rate`. Torch is not imported here: options of the trunk are checked before it is.
"""

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, wraps
from inspect import Parameter, signature
from math import inf
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fitformer.errors import InputError

# No size, count or seed is beyond what a tensor can be indexed by.
MOST_WHOLE = 2**63 - 1
MOST_SHOWN = 80
NUMBERS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "None"}

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = tuple[Callable[[Any], bool], str]


def whole(name: str, value: Any, lowest: int = 1, highest: int = MOST_WHOLE) -> int:
    """A whole number in a range; one of numpy becomes a plain one.

    Raises:
        InputError: another kind, or out of range.
    """
    if not _is_whole(value) or not lowest <= value <= highest:
        most = f", and at most {highest}" if highest < MOST_WHOLE else ""
        raise InputError(f"{name} is {shown(value)}; it must be a whole number of at least {lowest}{most}")
    return int(value)


def number(name: str, value: Any, above: float = 0, highest: float = inf) -> float:
    """A finite number above a bound; a whole one stays whole.

    Raises:
        InputError: another kind, NaN, or out of range.
    """
    if not _is_number(value) or not above < value <= highest or value == inf:
        most = f", and at most {highest:g}" if highest < inf else " and finite"
        raise InputError(f"{name} is {shown(value)}; it must be a number above {above:g}{most}")
    return int(value) if isinstance(value, Integral) else float(value)


def rate(name: str, value: Any) -> float:
    """A probability of leaving something out, at least 0 and below 1.

    Raises:
        InputError: another kind, or out of range.
    """
    if not _is_number(value) or not 0 <= value < 1:
        raise InputError(f"{name} is {shown(value)}; a rate is at least 0 and below 1")
    return int(value) if isinstance(value, Integral) else float(value)


def shown(value: Any) -> str:
    """A value as an error message shows it, in short: tensors and arrays by their shape."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def checked(function: Function) -> Function:
    """A function that refuses arguments of another kind than its annotations say.

    Raises (the function):
        InputError: names the argument, what was given and what it must be.
    """

    # Here, not in the call: a compiler that traces it meets constants.
    names, kinds = _kinds_of(function)

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        for name, value in (*zip(names, given), *named.items()):
            if name in kinds:
                _check(name, value, kinds[name])
        return function(*given, **named)

    return call  # type: ignore[return-value]


def check_fields(instance: Any) -> None:
    """Refuse fields of a dataclass whose values are of another kind than their annotations say.

    Raises:
        InputError: names the field, its value and what it must be.
    """
    cls: Any = type(instance)
    for name, kind in _fields_of(cls).items():
        _check(name, getattr(instance, name), kind)


def _check(name: str, value: Any, kind: Kind) -> None:
    accepts, description = kind
    if isinstance(value, Integral) and not -MOST_WHOLE <= int(value) <= MOST_WHOLE:
        raise InputError(f"{name} is {shown(value)}; whole numbers are below 2**63 here")
    if not accepts(value):
        raise InputError(f"{name} is {shown(value)}; it must be {description}")


def _kinds_of(function: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Kind]]:
    """Names of a function's parameters in their order, and the kinds of those that have one."""
    hints = get_type_hints(function)
    plain = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature(function).parameters.values()
    kinds = {each.name: kind for each in parameters if (kind := kind_of(hints.get(each.name, Any))) is not None}
    return tuple(each.name for each in parameters if each.kind in plain), kinds


@cache
def _fields_of(cls: Any) -> dict[str, Kind]:
    hints = get_type_hints(cls)
    return {each.name: kind for each in fields(cls) if (kind := kind_of(hints[each.name])) is not None}


def kind_of(hint: Any) -> Kind | None:
    """What values an annotation accepts, and in words which those are; None where it accepts any."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (bool, int, float):
        return {bool: _is_flag, int: _is_whole, float: _is_number}[hint], NUMBERS[hint]
    if hint is None or hint is type(None):
        return (lambda value: value is None), NUMBERS[type(None)]
    if origin is Literal:
        return (lambda value: _among(value, inner)), f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        kinds = [kind_of(each) for each in inner]
        if None in kinds:
            return None
        checks = [kind[0] for kind in kinds if kind]
        words = dict.fromkeys(kind[1] for kind in kinds if kind)
        return (lambda value: any(check(value) for check in checks)), " or ".join(words)
    if origin is tuple and inner and Ellipsis not in inner:
        return _together([kind_of(each) for each in inner])
    if isinstance(origin, type) and issubclass(origin, Sequence | Mapping):
        return _several(origin, kind_of(inner[0]) if inner and issubclass(origin, Sequence) else None)
    if origin is not None:
        return (callable, "a function") if origin is Callable else None
    if not isinstance(hint, type) or hint in (Any, object):
        return None
    # A protocol that cannot be asked is met by anything.
    if getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False):
        return None
    return (lambda value: isinstance(value, hint)), NUMBERS.get(hint, f"a {hint.__name__}")


def _several(origin: Any, inside: Kind | None) -> Kind:
    """A sequence or mapping; of a sequence, what is inside has a kind too. Text is no sequence of numbers."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, origin) or isinstance(value, str | bytes):
            return False
        return inside is None or all(inside[0](each) for each in value)

    words = "a mapping" if issubclass(origin, Mapping) else "a sequence"
    of = "" if inside is None else f" of {inside[1].removeprefix('a ')}s" if inside[1] != "text" else " of texts"
    return accepts, f"{words}{of}"


def _together(inside: list[Kind | None]) -> Kind:
    """A tuple or list of so many values, each of its kind."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) != len(inside):
            return False
        return all(kind is None or kind[0](each) for kind, each in zip(inside, value))

    return accepts, f"({', '.join(kind[1] if kind else 'anything' for kind in inside)})"


def _is_flag(value: Any) -> bool:
    # numpy's own, if it is there at all.
    numpy = sys.modules.get("numpy")
    return isinstance(value, bool) or (numpy is not None and isinstance(value, numpy.bool_))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # NaN is no number, and the only one that is not itself.
    return isinstance(value, Real) and not isinstance(value, bool) and bool(value == value)


def _among(value: Any, known: tuple[Any, ...]) -> bool:
    # Not `in`: arrays compare element by element, and unhashable values are compared all the same.
    return any(type(value) is type(each) and value == each for each in known)
