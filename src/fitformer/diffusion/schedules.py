"""Noise schedules gamma(t) of continuous-time diffusion (Chen, arXiv 2301.10972, section 2.1), read from strings."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fitformer._support.checks import checked
from fitformer.errors import InputError

SCHEDULES = ("cosine", "cosine@start,end,tau", "sigmoid@start,end,tau", "simple_linear", "log@start,end,reverse")

Curve = Callable[[Tensor], Tensor]


@checked
def gamma(schedule: str, t: Tensor | float) -> Tensor:
    """The noise level at times `t` in [0, 1], of the shape of `t`, in float32 or wider (arXiv 2301.10972, section 2.1).

    Raises:
        InputError: `schedule` is none of `SCHEDULES`, or its numbers give no falling curve.
    """
    time = torch.as_tensor(t)
    if time.dtype not in (torch.float32, torch.float64):
        time = time.float()
    return _curve(schedule)(time)


@lru_cache(maxsize=64)
def _curve(schedule: str) -> Curve:
    name, _, text = schedule.partition("@")
    numbers = text.split(",") if text else []
    if schedule == "cosine":
        return lambda t: torch.cos((t + 0.0002) / 1.00025 * (math.pi / 2)) ** 2
    if schedule == "simple_linear":
        return lambda t: (1 - t).clamp(1e-9, 1)
    if name not in ("cosine", "sigmoid", "log") or len(numbers) != 3:
        raise _bad_schedule(schedule, "is not a schedule")
    start, end = _number(schedule, numbers[0]), _number(schedule, numbers[1])
    if name == "cosine":
        return _cosine(schedule, start, end, _tau(schedule, numbers[2]))
    if name == "sigmoid":
        tau = _tau(schedule, numbers[2])
        return _falling(schedule, lambda s: torch.sigmoid(s / tau), start, end, lowest=1e-9)
    if numbers[2].strip() not in ("t", "f"):
        raise _bad_schedule(schedule, f"has reverse {numbers[2]!r} where t or f is needed")
    if min(start, end) <= 0:
        raise _bad_schedule(schedule, f"takes the logarithm of {min(start, end):g}; start and end must be above 0")
    first, last = (end, start) if numbers[2].strip() == "t" else (start, end)
    return _falling(schedule, torch.log, first, last, lowest=0.0)


def _cosine(schedule: str, start: float, end: float, tau: float) -> Curve:
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise _bad_schedule(schedule, f"runs from {start:g} to {end:g}; both must lie in [0, 1]")
    # In float32 cos(pi/2) is slightly negative, and a fractional power of that is NaN.
    return _falling(schedule, lambda s: torch.cos(s * (math.pi / 2)).clamp_min(0) ** (2 * tau), start, end, lowest=1e-9)


def _falling(schedule: str, v: Callable[[Tensor], Tensor], start: float, end: float, lowest: float) -> Curve:
    """`(v(t (end - start) + start) - v(end)) / (v(start) - v(end))`: any monotone `v`, rescaled to fall from 1 to 0."""
    # On the CPU also where a model is built on another default device, such as `meta`.
    first, last = (v(torch.tensor(s, dtype=torch.float64, device="cpu")).item() for s in (start, end))
    if not math.isfinite(first - last) or first == last:
        raise _bad_schedule(schedule, f"does not fall: its curve is {first:g} at the start and {last:g} at the end")
    return lambda t: ((v(t * (end - start) + start) - last) / (first - last)).clamp(lowest, 1)


def _number(schedule: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _bad_schedule(schedule, f"has {text!r} where a number is needed")
    return value


def _tau(schedule: str, text: str) -> float:
    tau = _number(schedule, text)
    if tau <= 0:
        raise _bad_schedule(schedule, f"has tau {tau:g}; it must be above 0")
    return tau


def _bad_schedule(schedule: str, problem: str) -> InputError:
    return InputError(f"noise schedule {schedule!r} {problem}; write one of {', '.join(SCHEDULES)}")
