"""One training step of a FIT decoder on a very long sequence of bytes: seconds and peak memory, streamed.

    python benchmarks/long_step.py --length 1000000 --threads 2 > benchmarks/results/...

The loss is summed slice by slice, so the logits are never whole; global layers attend in chunks. At `--check` bytes,
where plain execution fits too, both take the same step and their losses and gradients are compared. Every measurement
runs in a process of its own, so that its peak is its own. A step is forward, backward and AdamW."""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from fitformer import FITDecoder
from fitformer._support.system_memory import peak_bytes
from fitformer.execution import Streamed
from fitformer.models.config import TrunkConfig
from fitformer.profiling.flops import count_parameters, flops
from fitformer.tasks._autoregression import bits

BYTE_VALUES = 256
SIZES = ("layers", "dim", "latent_dim", "heads", "latent_heads", "latents_per_group")


def step(arguments: argparse.Namespace, length: int, way: str) -> dict[str, Any]:
    """A step in this process: what it took, and its gradient's first numbers and norm."""
    torch.manual_seed(0)
    trunk = TrunkConfig(**{name: getattr(arguments, name) for name in SIZES}, latent_position="index")
    network = FITDecoder(trunk, None, arguments.tokens_per_group, BYTE_VALUES)
    network.set_execution(Streamed(keep=arguments.keep) if way == "streamed" else way)
    groups = -(-length // arguments.tokens_per_group)
    tokens = torch.randint(BYTE_VALUES, (1, groups, arguments.tokens_per_group), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    start, busy = time.perf_counter(), time.process_time()
    loss = bits(network, tokens.long())
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])
    optimizer.step()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    if arguments.gradient is not None:
        torch.save(gradient, arguments.gradient)
    return {
        "bytes": groups * arguments.tokens_per_group,
        "groups": groups,
        "execution": way,
        "parameters": count_parameters(network),
        "tflop": 3 * flops(network, num_groups=groups).total / 1e12,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak_bytes(torch.device("cpu")),
        "loss": float(loss.detach()),
    }


def in_process(length: int, way: str, gradient: str | None = None) -> dict[str, Any]:
    """A step in a process of its own, with the options of this one."""
    words = [*sys.argv[1:], "--one", str(length), way, *([] if gradient is None else ["--gradient", gradient])]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(length: int) -> tuple[list[dict[str, Any]], float]:
    """A plain and a streamed step, and the largest difference of their gradients over the largest gradient."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        files = {way: str(Path(folder) / way) for way in ("plain", "streamed")}
        found = [in_process(length, way, file) for way, file in files.items()]
        plain, streamed = (torch.load(file, weights_only=True) for file in files.values())
    return found, float((plain - streamed).abs().max() / plain.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1_000_000, help="bytes of context")
    parser.add_argument("--check", type=int, default=32_000, help="bytes at which plain and streamed are compared")
    parser.add_argument("--keep", choices=("memory", "disk"), default="memory", help="where data tokens are kept")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens-per-group", type=int, default=500)
    sizes = {"layers": "(2)2(2)2(2)", "dim": 128, "latent_dim": 256, "heads": 4, "latent_heads": 4}
    for name, value in {**sizes, "latents_per_group": 8}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.one:
        length, way = arguments.one
        print(json.dumps(step(arguments, int(length), way)))
        return
    print("| bytes | groups | parameters | execution | seconds | TFLOP | peak, GB | bits per byte |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    pair, difference = compare(arguments.check)
    for each in [*pair, in_process(arguments.length, "streamed")]:
        print(f"| {each['bytes']:,} | {each['groups']:,} | {each['parameters']:,} | {each['execution']} ", end="")
        print(f"| {each['seconds']:.1f} | {each['tflop']:.3g} | {each['peak_bytes'] / 1e9:.2f} ", end="")
        print(f"| {each['loss']:.6f} |", flush=True)
    print(
        f"\nLargest difference of the gradients at {arguments.check:,} bytes: {difference:.1e} of the largest number."
    )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, data tokens kept {arguments.keep}")


if __name__ == "__main__":
    main()
