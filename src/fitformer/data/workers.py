"""What became of the processes that read ahead."""

import re

# In torch's words, raised wherever the reading process's parent is when it is told.
_DEAD = re.compile(r"DataLoader worker \((pid\S* [\d, ]+)\) (.*?)(?:\.|$)")


def dead_worker(error: RuntimeError) -> str | None:
    """What to say of an error, if it is that such a process died; None if it is anything else."""
    found = _DEAD.search(str(error))
    if found is None:
        return None
    return f"a process that reads ahead (data.num_workers, {found[1]}) {found[2]}, perhaps for want of memory"
