"""One report on one large GPU: exactness, speed, memory and generation, each part in a process of its own.

    python benchmarks/gpu.py [--output FILE] [--parts equality,mfu] [--limit 480]
    python benchmarks/gpu.py --tiny --device cpu        # the same parts at toy sizes, within about a minute

Runs from a bare checkout. Needs torch, numpy, einops, safetensors, huggingface_hub and pillow; part `tests` needs
pytest and hypothesis as well. A part that fails, lacks a package or exceeds its time limit becomes a row with the
reason, and its traceback goes to standard error; rows it had finished are kept. Prints one Markdown page and exits with
0 once the page is complete.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, str]

# Title and time limit in seconds of each part, in the order of running: the total may cut the last ones.
PARTS = {
    "equality": ("Every execution against float64 on the CPU (float32, TF32 off)", 75),
    "mfu": ("Training step of a base encoder on 160K tokens (bf16, AdamW)", 60),
    "huge": ("One step on a 64,000 x 64,000 image in 16 GB of device memory (small, bf16, tokens on the host)", 150),
    "overlap": ("Tokens on the host against tokens in device memory", 60),
    "compile": ("torch.compile of the layers (bf16)", 90),
    "generation": ("Generation of bytes, small decoder", 60),
    "bf16": ("bf16 autocast against float32", 45),
    "tests": ("CUDA tests", 150),
}


def child(name: str, device: str, tiny: bool) -> int:
    """Run one part in this process; each row is one line of JSON as soon as it is known."""
    sys.path.insert(0, str(ROOT / "src"))
    try:
        from gpu_parts import PARTS as FUNCTIONS
        from gpu_shared import Scale

        for row in FUNCTIONS[name](Scale(device, tiny)):
            print(json.dumps(row), flush=True)
    except ModuleNotFoundError as error:
        print(json.dumps({"failed": f"package {error.name} is missing"}))
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"failed": one_line(f"{type(error).__name__}: {error}")}))
    return 0


def one_line(text: str, longest: int = 240) -> str:
    """The first non-empty line, short enough for a cell of a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no message"])[0][:longest].replace("|", "/")


def run_part(command: Sequence[str], limit: float) -> list[Row]:
    """Rows of a command that prints JSON lines; a failure, a crash or the end of its time is one more row."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=max(limit, 0.1))
            failure = f"exit status {process.returncode}: {last_line(err)}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            failure = f"stopped at its limit of {limit:.0f} s"
    print(err, end="", file=sys.stderr, flush=True)
    rows = parsed(out)
    if not failure and not rows:
        failure = "no rows"
    return [*rows, {"failed": failure}] if failure else rows


def parsed(out: str) -> list[Row]:
    """The rows among lines of output; a line that was cut off or is no row is passed over."""
    rows = []
    for line in out.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def last_line(text: str) -> str:
    return one_line("\n".join(reversed(text.splitlines())))


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; the column `failed` stands last and only where something failed."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "failed"))
    columns += ["failed"] if any("failed" in row for row in rows) else []
    lines = [columns, ["---"] * len(columns), *([str(row.get(key, "")) for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def output_of(*command: str) -> str:
    """First line that a command prints; empty where there is no such command."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return one_line(found.stdout) if found.returncode == 0 and found.stdout.strip() else ""


def machine() -> list[str]:
    """What the page says of the machine and the code."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    version = output_of(sys.executable, "-c", "import torch; print(torch.__version__)")
    return [
        f"- GPU, driver, memory: {output_of(*query) or 'none'}",
        f"- torch {version or 'missing'}, Python {platform.python_version()}, {os.cpu_count()} CPU cores",
        f"- commit: {output_of('git', 'rev-parse', 'HEAD') or 'unknown'}",
        f"- command: `python benchmarks/gpu.py {' '.join(sys.argv[1:])}`",
    ]


def measure(names: Sequence[str], device: str, tiny: bool, limit: float) -> dict[str, list[Row]]:
    """Rows of every part; together they take no longer than `limit` seconds."""
    end, found = time.monotonic() + limit, {}
    for name in names:
        left = end - time.monotonic()
        if left < 1:
            found[name] = [{"failed": f"not started: the total of {limit:.0f} s was used up"}]
            continue
        command = [sys.executable, __file__, "--part", name, "--json", "--device", device, *["--tiny"] * tiny]
        start = time.monotonic()
        found[name] = run_part(command, min(left, PARTS[name][1]))
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def page(found: dict[str, list[Row]], heading: Sequence[str]) -> str:
    """The whole report in Markdown."""
    failed = [name for name, rows in found.items() if any("failed" in row for row in rows)]
    parts = [f"## {name}: {PARTS[name][0]}\n\n{table(rows)}" for name, rows in found.items()]
    end = f"Failed parts: {', '.join(failed) or 'none'}."
    return "\n\n".join(["# fitformer on a GPU", "\n".join(heading), *parts, end]) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="file that the page is also written to")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--limit", type=float, default=480, help="seconds for all parts together")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to test the script")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := [name for name in given.parts.split(",") if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return given


def main() -> int:
    """Measure and print."""
    given = arguments()
    if given.part:
        return child(given.part, given.device, given.tiny)
    text = page(measure(given.parts.split(","), given.device, given.tiny, given.limit), machine())
    print(text)
    if given.output:
        write(given.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
