"""What several test files share."""

from dataclasses import replace


def patch_task(monkeypatch, module, **functions):
    """Put other functions in the place of a task's own, such as `loss` or `measure`."""
    monkeypatch.setattr(module, "TASK", replace(module.TASK, **functions))
