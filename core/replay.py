"""Replay: the latest transitions of every seed in a ring on the device, and uniform batches of them.

Axes: ``S`` seeds, ``n`` rows in the order they were experienced, ``B`` batch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels.streams import RandomStream
from .errors import CheckpointError
from .transitions import Batch


class Replay:
    """Up to `capacity` transitions of each seed, as the environment gave them; the oldest makes room for the newest.

    A row is ``(s, a, r, s', d)``: s' is the true successor, and d is 1 only where the task terminated, so a row cut by
    a time limit goes on bootstrapping. What was no transition is left out, so seeds may hold different numbers of rows.

    Args:
        seeds: the runs; each samples from a random stream of its own.
        capacity: most rows of a seed, >= 1. The memory of all of them is reserved at once; on the processor it is
            taken as rows come in.
        observation_dim, action_dim: d_s and d_a.
        device, dtype: of the rows.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        capacity: int,
        observation_dim: int,
        action_dim: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = capacity
        self._widths = [observation_dim, action_dim, 1, observation_dim, 1]
        # Side by side, so that a batch costs one selection.
        shape = len(seeds) * capacity, sum(self._widths)
        if device.type == "cpu":  # NumPy's zeros take memory as it is written to, PyTorch's at once
            self._rows = torch.from_numpy(np.zeros(shape, np.float64 if dtype == torch.float64 else np.float32))
        else:
            self._rows = torch.zeros(shape, dtype=dtype, device=device)
        self._added = torch.zeros(len(seeds), 1, dtype=torch.int64, device=device)
        self._first = capacity * torch.arange(len(seeds), device=device).unsqueeze(1)
        # Uniform numbers and not integers: those depend on their upper bound, which grows from step to step, so none
        # could be drawn ahead. With 53 bits a row's probability is within size * 2^-53 of equal, relatively.
        self._stream = RandomStream(seeds, "replay", device=device, dtype=torch.float64)

    @property
    def sizes(self) -> Tensor:
        """Rows held by each seed, int64 ``[S]``."""
        return self._added.squeeze(1).clamp(max=self.capacity)

    def add(
        self,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        next_obs: Tensor,
        terminated: Tensor,
        valid: Tensor | None = None,
    ) -> None:
        """Append rows ``[S, n, d_s]``, ``[S, n, d_a]``, ``[S, n]``, ``[S, n, d_s]``, ``[S, n]``.

        Where `valid` ``[S, n]`` is False there was no transition.
        """
        rows = torch.cat([obs, action, reward.unsqueeze(-1), next_obs, terminated.unsqueeze(-1)], -1)
        if valid is None:
            valid = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        number = self._added + valid.cumsum(1) - 1  # of all rows ever added
        self._added += valid.sum(1, keepdim=True)
        kept = valid & (number >= self._added - self.capacity)  # of more rows than fit, the last
        self._rows[(self._first + number % self.capacity)[kept]] = rows[kept].to(self._rows.dtype)

    def sample(self, step: int, batch_size: int) -> Batch:
        """Draw rows uniformly with replacement: row ``floor(size u)`` for uniform u, a function of (seed, step).

        Every seed must hold a row. `step` counts the gradient steps.
        """
        sizes = self._added.clamp(max=self.capacity)
        return self.gather((self._stream.uniform(step, (batch_size,)) * sizes).long())

    def gather(self, index: Tensor) -> Batch:
        """Return the rows at places `index` ``[S, B]`` of the seeds' rings, as the agent's update takes them.

        The action that followed is not kept: `next_action` repeats the row's own and is marked as not valid.
        """
        rows = self._rows.index_select(0, (self._first + index).flatten()).view(*index.shape, self._rows.shape[1])
        obs, action, reward, next_obs, terminated = rows.split(self._widths, -1)
        return Batch(
            obs=obs,
            action=action,
            reward=reward.squeeze(-1),
            next_obs=next_obs,
            terminated=terminated.squeeze(-1),
            next_action=action,
            next_action_valid=torch.zeros_like(reward.squeeze(-1)),
            index=index,
        )

    def state(self) -> dict[str, Tensor]:
        """Return the part that is filled, ``[S, largest size, k]``, and how many rows each seed ever added."""
        filled = int(self.sizes.max())
        return {"rows": self._by_seed[:, :filled], "added": self._added.squeeze(1)}

    def empty_state(self) -> dict[str, Tensor]:
        """Return what :meth:`state` does before the first row."""
        return {"rows": self._by_seed[:, :0], "added": torch.zeros_like(self._added.squeeze(1))}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            CheckpointError: if a tensor is missing or does not fit.
        """
        rows, added = tensors.get("rows"), tensors.get("added")
        ours = self._by_seed
        if rows is None or added is None or rows.shape[::2] != ours.shape[::2] or rows.shape[1] > self.capacity:
            found = "is missing" if rows is None or added is None else f"has rows {list(rows.shape)}"
            raise CheckpointError(
                f"The stored replay {found}; it must have {ours.shape[0]} seeds, at most {self.capacity} rows, and "
                f"{ours.shape[2]} numbers in each."
            )
        ours[:, : rows.shape[1]] = rows.to(ours)
        self._added.copy_(added.unsqueeze(1))

    @property
    def _by_seed(self) -> Tensor:
        return self._rows.view(-1, self.capacity, self._rows.shape[1])
