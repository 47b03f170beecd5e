"""Nearest rows: hand numbers, limits in beta, agreement of back ends (ties included), certificates, disk cache, bad input."""

import pytest
import torch
from torch import Tensor

from corollary.kernels.neighbours import NeighbourIndex

BACKENDS = ("reference", "kdtree", "blocks", "candidates", "auto")


def walk(n: int, d_s: int, d_a: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random walk through states: neighbouring rows have near states, as in trajectories."""
    generator = torch.Generator().manual_seed(seed)
    states = (0.2 * torch.randn(n, d_s, generator=generator)).cumsum(0)
    return (states - states.mean(0)) / states.std(0), torch.rand(n, d_a, generator=generator) * 2 - 1


def lattice(n: int, d_s: int, d_a: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small integers: duplicated rows and exactly tied distances abound, and float arithmetic on them is exact."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(0, 3, (n, d_s), generator=generator).float()
    return states, torch.randint(-1, 2, (n, d_a), generator=generator).float()


def by_hand(states: Tensor, actions: Tensor, state: Tensor, action: Tensor, beta: float, k: int) -> tuple[int, float]:
    """Sort every row by (distance, index) in Python's own arithmetic."""
    ranked = sorted(
        (
            beta**2 * sum((float(x) - float(y)) ** 2 for x, y in zip(state, s, strict=True))
            + sum((float(x) - float(y)) ** 2 for x, y in zip(action, a, strict=True)),
            index,
        )
        for index, (s, a) in enumerate(zip(states, actions, strict=True))
    )
    return ranked[k - 1][1], ranked[k - 1][0] ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_numbers(backend: str) -> None:
    states = torch.tensor([[0.0], [1.0], [1.0]])
    actions = torch.tensor([[0.0], [3.0], [-3.0]])
    index = NeighbourIndex(states, actions, beta=2.0, backend=backend)
    # Key (0, 3): squared distances 9, 4 + 0, 4 + 36.
    row, distance = index.query(torch.tensor([[3.0]]), row=torch.tensor([0]))
    assert row.tolist() == [1]
    assert distance.tolist() == [2.0]
    row, distance = index.query(torch.tensor([[3.0]]), row=torch.tensor([0]), k=3)
    assert row.tolist() == [2]
    assert distance.tolist() == [40**0.5] or distance.item() == pytest.approx(40**0.5)
    # Key (1, 0): rows 1 and 2 tie at 9 behind row 0 at 4; the lower index has rank 2.
    for k, expected in ((1, 0), (2, 1), (3, 2)):
        assert index.query(torch.zeros(1, 1), row=torch.tensor([1]), k=k).row.tolist() == [expected]
