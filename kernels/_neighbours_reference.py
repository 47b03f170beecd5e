"""Exhaustive search: the plain back end that the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

# Distances held at once: 2^21 float64 numbers are 16 MiB, about one processor's last-level cache.
_BLOCK = 2**21


def kth_nearest(
    states: Tensor, actions: Tensor, key_states: Tensor, key_actions: Tensor, beta: float, k: int
) -> tuple[Tensor, Tensor]:
    """Return row index [B] int64 and D^2 [B] float64 of the k-th nearest row, comparing every key with every row.

    Sums in the order of `_neighbours_metric`, so the distances have the same bits. Rows tie by exact equality of D^2
    and the lowest index comes first.
    """
    n_rows = states.shape[0]
    step = max(1, _BLOCK // n_rows)
    found = [
        _kth_of_block(
            beta**2 * _sum_of_squares(states, key_states[b : b + step])
            + _sum_of_squares(actions, key_actions[b : b + step]),
            k,
        )
        for b in range(0, key_actions.shape[0], step)
    ]
    row = torch.cat([row for row, _ in found])
    return row, torch.cat([squared for _, squared in found])


def _sum_of_squares(rows: Tensor, keys: Tensor) -> Tensor:
    total = torch.zeros(keys.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    for column in range(rows.shape[1]):
        difference = keys[:, column, None].double() - rows[None, :, column].double()
        total += difference * difference
    return total


def _kth_of_block(squared: Tensor, k: int) -> tuple[Tensor, Tensor]:
    value = squared.kthvalue(k, dim=1).values
    n_closer = (squared < value[:, None]).sum(dim=1)
    # Of the rows at exactly this distance, the (k - n_closer)-th in row order.
    place = (squared == value[:, None]).cumsum(dim=1)
    return (place == (k - n_closer)[:, None]).int().argmax(dim=1), value
