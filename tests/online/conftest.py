"""What the tests of several online algorithms share: options that make any of them small."""

import dataclasses
from typing import Any

SMALL_OPTIONS: dict[str, Any] = {
    "n_envs": 2,
    "n_steps": 16,
    "batch_size": 8,
    "critic_batch_size": 8,
    "n_epochs": 2,
    "hidden": (8, 8),
    "critic_hidden": (),
    "learning_rate_decay": "none",
    "step_size_decay": "none",
    "behaviour_steps": 8,
    "learning_starts": 8,
    "buffer_size": 64,
}


def small(kind: Any, **more: Any) -> dict[str, Any]:
    """Return the small options that a class has, and more."""
    names = {f.name for f in dataclasses.fields(kind.config_type)}
    return {name: value for name, value in SMALL_OPTIONS.items() if name in names} | more
