"""Run a command under a hard limit of memory, page cache included: in a memory control group of its own (needs root).

python benchmarks/limited.py 8GB fitformer bench step --preset small --image-size 25600 --execution streamed --keep disk

Prints what the command prints, then the group's own account: its limit, its highest use, how often it was at the limit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from fitformer._support.bytesize import parse_bytes

ROOT = Path("/sys/fs/cgroup")


def files() -> dict[str, Path]:
    """Where the kernel keeps limit, peak and count of failures, in its second or its first version of groups."""
    name = f"fitformer-{os.getpid()}"
    if (ROOT / "cgroup.controllers").is_file():
        group = ROOT / name
        names = {"limit": "memory.max", "peak": "memory.peak", "events": "memory.events"}
    else:
        group = ROOT / "memory" / name
        names = {"limit": "memory.limit_in_bytes", "peak": "memory.max_usage_in_bytes", "events": "memory.failcnt"}
    return {"group": group, "processes": group / "cgroup.procs", **{key: group / value for key, value in names.items()}}


def main() -> int:
    limit, command = parse_bytes(sys.argv[1]), sys.argv[2:]
    where = files()
    where["group"].mkdir()
    try:
        where["limit"].write_text(str(limit))
        entering = where["processes"]
        done = subprocess.run(command, preexec_fn=lambda: entering.write_text(str(os.getpid())))
        account = {key: where[key].read_text().split() for key in ("limit", "peak", "events")}
        print(json.dumps({"command": command, "status": done.returncode, **account}))
        return done.returncode
    finally:
        where["group"].rmdir()


if __name__ == "__main__":
    sys.exit(main())
