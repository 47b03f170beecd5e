"""The optimiser step that all algorithms share, against PyTorch's own, and the schedule of learning rates."""

import math

import pytest
import torch
from torch import Tensor, nn

from corollary.core.agent import adam, cosine_decay, descend


def problem() -> tuple[list[nn.Parameter], Tensor]:
    """A weight whose gradient comes out transposed, and a bias; two seeds."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 4, 3, generator=draw))
    bias = nn.Parameter(torch.randn(2, 4, generator=draw))
    return [weight, bias], torch.randn(2, 5, 3, generator=draw)


def losses(parameters: list[nn.Parameter], x: Tensor) -> Tensor:
    weight, bias = parameters
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT).square().mean((1, 2))


def test_descend_is_one_step_of_plain_adam_whatever_the_layout_of_the_gradient() -> None:
    ours, x = problem()
    theirs, _ = problem()
    gradient, _ = torch.autograd.grad(losses(ours, x).sum(), ours)
    assert not gradient.is_contiguous()  # the layout that fused Adam on the CPU would misread
    optimizer = adam(ours, 0.1)
    plain = torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False)
    for _ in range(5):
        descend(optimizer, losses(ours, x))
        plain.zero_grad()
        losses(theirs, x).sum().backward()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_adam_by_hand() -> None:
    """It is the learning rate times the gradient's sign, up to eps: also in a transposed gradient."""
    parameters, x = problem()
    before = parameters[0].detach().clone()
    (gradient, _) = torch.autograd.grad(losses(parameters, x).sum(), parameters)
    descend(adam(parameters, 0.1), losses(parameters, x))
    torch.testing.assert_close(parameters[0], before - 0.1 * gradient.sign(), rtol=1e-4, atol=1e-5)


def test_descend_touches_only_its_own_parameters_and_accumulates_nothing() -> None:
    parameters, x = problem()
    weight, bias = parameters
    for _ in range(2):
        descend(adam([weight], 0.0), losses(parameters, x))
    (expected, _) = torch.autograd.grad(losses(parameters, x).sum(), parameters)
    torch.testing.assert_close(weight.grad, expected)
    assert bias.grad is None


def test_one_seeds_loss_moves_one_seed() -> None:
    parameters, x = problem()
    before = [parameter.detach().clone() for parameter in parameters]
    descend(adam(parameters, 0.1), losses(parameters, x) * torch.tensor([0.0, 1.0]))
    for parameter, start in zip(parameters, before, strict=True):
        assert torch.equal(parameter[0], start[0])
        assert (parameter[1] != start[1]).all()


@pytest.mark.parametrize(
    ("step", "total", "expected"),
    [(0, 100, 1.0), (50, 100, 0.5), (100, 100, 0.0), (500, 100, 0.0), (25, 100, 0.5 + math.sqrt(2) / 4), (9, None, 1)],
)
def test_cosine_decay_by_hand(step, total, expected) -> None:
    assert cosine_decay(step, total) == pytest.approx(expected, abs=1e-15)
