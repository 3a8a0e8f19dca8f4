"""Errors of the worker processes of a loader, in the words that a user needs."""

import re

# In torch's words, raised wherever the reading process's parent is when it is told.
_DEAD = re.compile(r"DataLoader worker \((pid\S* [\d, ]+)\) (.*?)(?:\.|$)")


def message_of(error: BaseException) -> str:
    """The message of an error, of which torch makes a traceback if it was raised in a worker process."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def dead_worker(error: RuntimeError) -> str | None:
    """What to say of an error, if it is that such a process died; None if it is anything else."""
    found = _DEAD.search(str(error))
    if found is None:
        return None
    return f"a process that reads ahead (data.num_workers, {found[1]}) {found[2]}, perhaps for want of memory"
