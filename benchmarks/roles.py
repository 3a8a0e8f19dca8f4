"""Forward and training step of the three roles, as a fraction of this machine's own float32 matrix-multiply rate.

    python benchmarks/roles.py [--repeats 5] [--threads 2] > benchmarks/results/roles-<machine>-<date>.md

The rate is measured in the same run, before, between and after, on the shape of the model's own largest product.
A step is forward, backward and a fused AdamW update.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fitformer import FITDecoder, FITDenoiser, FITEncoder

BATCH = 4
SHAPE = {"num_groups": 16, "tokens_per_group": 64, "latents_per_group": 16}
SIZE = {"layers": "(2)4(2)4", "dim": 256, "latent_dim": 512, "heads": 4, "latent_heads": 8}
TOKENS = (BATCH, 16, 64)


def roles() -> dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    """Each role with a function that runs it and returns a scalar loss."""
    x, time_, cond = torch.randn(*TOKENS, 48), torch.rand(BATCH), torch.randn(BATCH, 10)
    tokens = torch.randint(256, TOKENS)
    return {
        "encoder": (FITEncoder.from_config(in_channels=48, **SHAPE, **SIZE), lambda model: model(x)[1].square().mean()),
        "denoiser": (
            FITDenoiser.from_config(out_dim=48, cond_dim=10, **SHAPE, **SIZE),
            lambda model: model(x, time_, cond)[0].square().mean(),
        ),
        "decoder": (
            FITDecoder.from_config(vocab_size=256, **SHAPE, **SIZE),
            lambda model: nn.functional.cross_entropy(model(tokens).flatten(0, 2), tokens.flatten()),
        ),
    }


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work`, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(repeats: int) -> float:
    """Float32 FLOP per second of a product of the size of the global feed-forward's, (b*t*m, d) by (d, 4d)."""
    a, b = torch.randn(BATCH * 16 * 16, 512), torch.randn(512, 2048)
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / seconds(lambda: [a @ b for _ in range(10)], repeats) * 10


def flops(work: Callable[[], object]) -> int:
    """Multiply-adds, twice, of the matrix products and attention in `work`."""
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def where_time_goes(work: Callable[[], object], most: int = 8) -> list[tuple[str, float]]:
    """Share of the operators' own CPU time in `work`, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(own.values())
    return [(key, own[key] / total) for key in sorted(own, key=lambda key: -own[key])[:most]]


def main() -> None:
    """Measure and print a Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    rates, rows, shares = [matmul_rate(arguments.repeats)], [], {}
    for name, (model, loss) in roles().items():
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def forward(model: nn.Module = model, loss: Callable[[nn.Module], Tensor] = loss) -> None:
            with torch.no_grad():
                loss(model)

        def backward(model: nn.Module = model, loss: Callable[[nn.Module], Tensor] = loss) -> None:
            model.zero_grad(set_to_none=True)
            loss(model).backward()

        def step(backward: Callable[[], None] = backward, optimizer: torch.optim.Optimizer = optimizer) -> None:
            backward()
            optimizer.step()

        work = {
            "forward": (forward, flops(lambda model=model, loss=loss: loss(model))),
            "training step": (step, flops(backward)),
        }
        times = {what: seconds(run, arguments.repeats) for what, (run, _) in work.items()}
        rates.append(matmul_rate(arguments.repeats))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows += [(name, parameters, what, times[what], work[what][1]) for what in work]
        shares[name] = where_time_goes(step)

    rate = statistics.median(rates)
    print(f"# Roles: forward and training step, {date.today()}\n")
    print(f"    python benchmarks/roles.py --repeats {arguments.repeats} --threads {arguments.threads}\n")
    print(
        f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, float32, batch {BATCH}; ",
        end="",
    )
    print(f"layers {SIZE['layers']}, t=16, n=64, m=16, c=256, d=512.")
    print(f"Matrix multiplication in the same run: {rate / 1e9:.0f} GFLOP/s", end="")
    print(f" (median of {len(rates)}, from {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}).\n")
    print("| role | parameters | what | ms | GFLOP | GFLOP/s | of the matmul rate |\n|---|---|---|---|---|---|---|")
    for name, parameters, what, took, count in rows:
        achieved = count / took
        print(f"| {name} | {parameters / 1e6:.1f}M | {what} | {took * 1e3:.0f} | {count / 1e9:.0f} |", end="")
        print(f" {achieved / 1e9:.0f} | {achieved / rate:.2f} |")
    print("\nWhere a training step's time goes (operators' own time):\n")
    for name, share in shares.items():
        print(f"- {name}: " + ", ".join(f"{key.removeprefix('aten::')} {part:.0%}" for key, part in share))


if __name__ == "__main__":
    main()
