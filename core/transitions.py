"""Flat transitions: what agents that learn from a dataset sample their batches from."""

import dataclasses
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import DataError


class Batch(NamedTuple):
    """Transitions picked by `Transitions.gather`; all fields share the leading axes of `index`."""

    obs: Tensor  # [*batch, d_s]
    action: Tensor  # [*batch, d_a]
    reward: Tensor  # [*batch]
    next_obs: Tensor  # [*batch, d_s]
    terminated: Tensor  # [*batch] 0 or 1; 1 stops the bootstrap
    next_action: Tensor  # [*batch, d_a]
    next_action_valid: Tensor  # [*batch] 0 or 1
    index: Tensor  # type: ignore[assignment]  # [*batch] int64 rows; shadows tuple.index, which nobody needs
    weight: Tensor | None = None  # [*batch] each row's factor in every loss, mean 1 over the data; None for ones


@dataclass(frozen=True, eq=False)
class Transitions:
    """Flat transitions as tensors on one device, packed for sampling.

    The seven fields a batch needs are stored side by side in one contiguous ``[N, 2 d_s + 2 d_a + 3]`` matrix
    and the attributes are slices of it, so a batch costs one `torch.index_select` and the data is held once.
    Use `dataclasses.replace` to change a field, for example the rewards; the result is packed anew.

    Raises:
        DataError: fields whose shapes disagree.
    """

    obs: Tensor  # [N, d_s]
    action: Tensor  # [N, d_a]; a discrete action is its index, [N, 1]
    reward: Tensor  # [N]
    next_obs: Tensor  # [N, d_s]; meaningless where terminated
    terminated: Tensor  # [N] 0 or 1
    truncated: Tensor  # [N] 0 or 1
    next_action: Tensor  # [N, d_a] the action taken in next_obs; the row's own action where unknown
    next_action_valid: Tensor  # [N] 0 on an episode's last row, else 1
    episode: Tensor  # [N] int64, number of the episode in the dataset

    _rows: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the shapes and pack the rows."""
        if self.obs.ndim != 2 or self.action.ndim != 2:
            raise DataError(
                f"obs and action must be matrices; got {list(self.obs.shape)} and {list(self.action.shape)}"
            )
        n, d_s, d_a = len(self.obs), self.obs.shape[1], self.action.shape[1]
        shapes: dict[str, tuple[int, ...]] = {
            "action": (n, d_a),
            "next_obs": (n, d_s),
            "next_action": (n, d_a),
        }
        for key in ("reward", "terminated", "truncated", "next_action_valid", "episode"):
            shapes[key] = (n,)
        for key, shape in shapes.items():
            if getattr(self, key).shape != shape:
                raise DataError(f"{key} must have shape {list(shape)}; got {list(getattr(self, key).shape)}")
        columns = [
            self.obs,
            self.action,
            self.reward[:, None],
            self.next_obs,
            self.terminated[:, None],
            self.next_action,
            self.next_action_valid[:, None],
        ]
        object.__setattr__(self, "_rows", torch.cat(columns, dim=1))
        # Re-point the attributes at the packed matrix: the data is then in memory once.
        for key, value in self._split(self._rows).items():
            object.__setattr__(self, key, value)

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        """Name the slices of packed rows ``[*batch, k]``."""
        d_s, d_a = self.obs.shape[1], self.action.shape[1]
        after_reward = d_s + d_a + 1
        after_next = after_reward + d_s + 1
        return {
            "obs": rows[..., :d_s],
            "action": rows[..., d_s : d_s + d_a],
            "reward": rows[..., d_s + d_a],
            "next_obs": rows[..., after_reward : after_reward + d_s],
            "terminated": rows[..., after_reward + d_s],
            "next_action": rows[..., after_next : after_next + d_a],
            "next_action_valid": rows[..., after_next + d_a],
        }

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, index: Tensor, weight: Tensor | None = None) -> Batch:
        """Return the transitions at `index` (int64, any shape, on the same device) as one `Batch`.

        `weight`, of the shape of `index`, becomes the batch's. The cost is one `torch.index_select`; the other fields
        are views of its result.
        """
        rows = self._rows.index_select(0, index.reshape(-1)).view(*index.shape, self._rows.shape[1])
        return Batch(**self._split(rows), index=index, weight=weight)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Transitions":
        """Return them on `device`, floating-point fields as `dtype`; `self` if nothing changes."""
        if self._rows.to(device=device, dtype=dtype) is self._rows:
            return self
        return Transitions(
            **{
                f.name: getattr(self, f.name).to(device=device, dtype=None if f.name == "episode" else dtype)
                for f in dataclasses.fields(self)
                if f.init
            }
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of obs, action, reward, next_obs and terminated, whatever the device."""
        digest = hashlib.sha256()
        for key in ("obs", "action", "reward", "next_obs", "terminated"):
            value = getattr(self, key).detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {list(value.shape)};".encode())
            digest.update(value.numpy().data)
        return digest.hexdigest()
