"""Parts of `gpu.py` that compare numbers: every execution of every role, in float32 and in bf16."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_shared import Row, Scale, guarded, mixed, stepper
from torch import Tensor

from fitformer import FITDecoder, FITDenoiser, FITEncoder
from fitformer.execution import Streamed
from fitformer.models.base import FITModel

DROPS = {"drop_path": 0.3, "drop_units": 0.2, "drop_att": 0.25}
TINY = {"latents_per_group": 2, "dim": 16, "latent_dim": 32, "heads": 2, "latent_heads": 4}
LARGER = {"latents_per_group": 8, "dim": 128, "latent_dim": 256, "heads": 2, "latent_heads": 4}


def role(name: str, scale: Scale, dropout: bool = False) -> FITModel:
    """A model on the CPU, the same each time."""
    torch.manual_seed(0)
    shape = {"num_groups": 5, "tokens_per_group": 6} if scale.tiny else {"num_groups": 64, "tokens_per_group": 64}
    size = TINY if scale.tiny else LARGER
    layers = "(1)2(2)1" if name == "encoder" else "(1)2(2)1(1)"
    options: dict[str, Any] = {"layers": layers, **shape, **size, **(DROPS if dropout else {})}
    if name == "encoder":
        return FITEncoder.from_config(in_channels=12, **options)
    if name == "denoiser":
        return FITDenoiser.from_config(out_dim=12, cond_dim=8, **options)
    return FITDecoder.from_config(vocab_size=64, **options)


def example(model: FITModel) -> tuple[Tensor, ...]:
    """Float64 inputs of a role, on the CPU."""
    made = torch.Generator().manual_seed(1)
    groups, tokens = model.num_groups, model.tokens_per_group
    if isinstance(model, FITDecoder):
        return (torch.randint(64, (2, groups, tokens), generator=made),)
    x = torch.randn(2, groups, tokens, 12, generator=made, dtype=torch.float64)
    if isinstance(model, FITDenoiser):
        cond = torch.randn(2, 8, generator=made, dtype=torch.float64)
        return x, torch.tensor([0.2, 0.9], dtype=torch.float64), cond
    return (x,)


def outcome(model: FITModel, way: Any, inputs: tuple[Tensor, ...], bf16: bool = False) -> tuple[list[Tensor], ...]:
    """Outputs and gradients of parameters and inputs, as float64 on the CPU."""
    weight = next(model.parameters())
    model.set_execution(way)
    model.zero_grad()
    given = [each.to(weight.device, weight.dtype if each.is_floating_point() else None, copy=True) for each in inputs]
    if given[0].is_floating_point():
        given[0].requires_grad_()
    torch.manual_seed(3)
    with mixed(weight.device.type, bf16):
        found = model(*given)
    outputs = list(found) if isinstance(found, tuple) else [found]
    sum((out.double() * weights_of(out)).sum() for out in outputs).backward()
    gradients = [each.grad for each in (*model.parameters(), given[0]) if each.grad is not None]
    return [each.detach().cpu().double() for each in outputs], [each.cpu().double() for each in gradients]


def weights_of(out: Tensor) -> Tensor:
    """A fixed direction that the outputs are summed along."""
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.device).view(out.shape)


def error(ours: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest difference over the largest value of all tensors together."""
    pairs = list(zip(ours, wanted, strict=True))
    # `torch.stack(...).max()` keeps a NaN, Python's `max` may not.
    apart = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    return float(apart / torch.stack([b.abs().max() for _, b in pairs]).max())


def checked(
    model: FITModel, way: Any, inputs: tuple[Tensor, ...], wanted: Any, bound: float, bf16: bool = False
) -> Row:
    """Errors of outputs and gradients; a failure above the bound."""
    found = outcome(model, way, inputs, bf16)
    errors = [error(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)]
    row = {"outputs": f"{errors[0]:.1e}", "gradients": f"{errors[1]:.1e}"}
    # Not `any(e > bound)`: a NaN compares false.
    return row if all(each <= bound for each in errors) else {**row, "failed": f"above {bound:.0e}"}


def equality(scale: Scale) -> Iterator[Row]:
    """Every way against float64; with dropout, every way against the plain one."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("encoder", "denoiser", "decoder"):
        exact, inputs = role(name, scale).double(), example(role(name, scale))
        reference = outcome(exact, "plain", inputs)
        model, dropping = role(name, scale).to(scale.device), role(name, scale, dropout=True).to(scale.device)
        dropped = outcome(dropping, "plain", inputs)
        for way, execution in scale.ways().items():
            yield guarded(f"{name}, {way}", partial(checked, model, execution, inputs, reference, 1e-3))
            against = partial(checked, dropping, execution, inputs, dropped, 1e-4)
            yield guarded(f"{name}, {way}, dropout, against plain", against)


def bf16(scale: Scale) -> Iterator[Row]:
    """Every way under autocast against float32, and a short training."""
    for name in ("encoder", "denoiser", "decoder"):
        model = role(name, scale).to(scale.device)
        inputs = example(model)
        wanted = outcome(model, "plain", inputs)
        for way, execution in scale.ways().items():
            yield guarded(f"{name}, {way}", partial(checked, model, execution, inputs, wanted, 0.2, bf16=True))
    yield guarded("decoder, 20 steps, streamed, host", lambda: trained(scale))


def trained(scale: Scale) -> Row:
    """The loss before and after 20 steps on one batch."""
    model = role("decoder", scale).to(scale.device)
    model.set_execution(Streamed(2 if scale.tiny else 16, keep="host"))
    tokens = example(model)[0].to(scale.device)
    step, losses = stepper(model, lambda: F.cross_entropy(model(tokens).flatten(0, 2), tokens.flatten())), []
    for _ in range(20):
        losses.append(step())
    row = {"first loss": f"{float(losses[0]):.3f}", "last loss": f"{float(losses[-1]):.3f}"}
    return row if losses[-1] < losses[0] else {**row, "failed": "the loss did not decrease"}
