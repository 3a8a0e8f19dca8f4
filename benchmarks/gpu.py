"""Everything that only a GPU can show, in one call of at most 8 minutes, from a bare checkout:

    python benchmarks/gpu.py --output benchmarks/results/gpu-MACHINE-DATE.md

Each part runs in a process of its own, under a time limit of its own: a failure loses its rows and nothing else.
Needed are torch and the core packages (numpy, einops, safetensors, huggingface_hub, pillow, pyyaml); nothing is
downloaded or installed.
`--tiny --device cpu` runs every part at sizes that a CPU can do, to test the script itself.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

# Parts in their order, with their limits in seconds; together less than 8 minutes.
LIMITS = {
    "equality": 70,
    "bf16": 30,
    "compile": 55,
    "step": 85,
    "huge": 115,
    "overlap": 40,
    "generation": 30,
    "tests": 40,
}
TITLES = {
    "equality": "Every way to run against plain in float64 on the CPU (largest relative error)",
    "bf16": "Mixed precision against float32, and whether it learns",
    "compile": "Compiled layers",
    "step": "A training step of 160,000 tokens, preset base, bf16 (goal: 50% of the peak)",
    "huge": "A training step on 64,000 x 64,000 pixels, preset small, bf16, tokens on the host (16 GB on the device)",
    "overlap": "Copies to the host beside computation",
    "generation": "Generation of bytes, preset small",
    "tests": "Tests that need CUDA",
}

Row = dict[str, Any]


def run_part(name: str, options: list[str], limit: float) -> list[Row]:
    """The rows of a part, run in a process of its own; one row with the reason if it fails."""
    command = [sys.executable, __file__, "--part", name, *options]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env={**os.environ})
    except subprocess.TimeoutExpired:
        return [{"failed": f"not done after {limit:.0f} s"}]
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no word"]
        return [{"failed": f"status {done.returncode}: {said[-1]}"}]
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return [*rows, {"whole part, s": round(time.perf_counter() - start, 1)}]


def page(results: dict[str, list[Row]], command: str, machine: Row) -> str:
    """All results as one Markdown page."""
    lines = ["# What a GPU shows", "", f"Command: `{command}`.", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    for name, rows in results.items():
        lines += ["", f"## {TITLES[name]}", ""]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def machine_of(device: str) -> Row:
    """What this runs on; of the device as far as torch can tell."""
    about: Row = {"python": platform.python_version(), "system": platform.platform(), "processors": os.cpu_count()}
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    about["commit"] = git.stdout.strip() or "unknown"
    code = (
        "import torch, json; c = torch.cuda.is_available(); "
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
        "'device': torch.cuda.get_device_name() if c else 'cpu', "
        "'device memory, GB': round(torch.cuda.mem_get_info()[1] / 1e9, 1) if c else 0}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return about | (json.loads(done.stdout) if done.returncode == 0 else {"torch": "cannot be imported"})


def main() -> int:
    """Run all parts, or one; print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the page here")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to test the script")
    parser.add_argument("--parts", help=f"names with commas (default: all): {','.join(LIMITS)}")
    parser.add_argument("--seconds", type=float, default=470, help="limit of the whole call (default: 470)")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    if arguments.part:
        import gpu_parts

        print(json.dumps(gpu_parts.PARTS[arguments.part](arguments.device, arguments.tiny)))
        return 0
    names = arguments.parts.split(",") if arguments.parts else list(LIMITS)
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(LIMITS)}")
    end = time.monotonic() + arguments.seconds
    results = {}
    for name in names:
        left = end - time.monotonic()
        results[name] = run_part(name, options, min(LIMITS[name], left)) if left > 1 else [{"failed": "no time left"}]
        print(f"{name}: {results[name][0]}", file=sys.stderr, flush=True)
    text = page(results, " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), machine_of(arguments.device))
    print(text, end="")
    if arguments.output:
        scratch = arguments.output.with_name(f".{arguments.output.name}.tmp")
        scratch.write_text(text)
        scratch.replace(arguments.output)
    if failed := [name for name, rows in results.items() if any("failed" in row for row in rows)]:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
