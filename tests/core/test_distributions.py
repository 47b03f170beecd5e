"""The diagonal Gaussian: a worked vector, PyTorch's distributions, and the direction of the divergence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from corollary.core.distributions import DiagonalGaussian, kl


def gaussian(mean: list[float], std: list[float]) -> DiagonalGaussian:
    return DiagonalGaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64).log())


P = gaussian([0, 1], [1, 0.5])
Q = gaussian([0.5, 0.5], [0.8, 1])


def test_the_worked_vector() -> None:
    """Reference card online.md 1.3; KL(p||q) = ln .8 + 1.25/1.28 - 1/2 + ln 2 + .5/2 - 1/2."""
    assert kl(P, Q).item() == pytest.approx(0.6965661292, abs=1e-10)
    assert kl(Q, P).item() == pytest.approx(1.4749963708, abs=1e-10)
    assert P.entropy().item() == pytest.approx(2.1447298859, abs=1e-10)


def test_swapping_or_averaging_is_caught_by_the_worked_vector() -> None:
    assert abs(kl(P, Q) - kl(Q, P)) > 0.7
    assert abs(kl(P, Q) / 2 - 0.6965661292) > 0.3  # averaged over the two dimensions


def test_log_probability_by_hand() -> None:
    """At its mean with unit deviation a density is (2 pi)^(-d/2); one deviation off costs exp(-1/2)."""
    standard = gaussian([0, 0, 0], [1, 1, 1])
    density = standard.log_prob(torch.tensor([[0.0, 0, 0], [1, 0, -1]]).double()).exp()
    assert density.tolist() == pytest.approx([(2 * torch.pi) ** -1.5, (2 * torch.pi) ** -1.5 / torch.e])


@given(st.integers(0, 2**32 - 1), st.sampled_from([(3,), (2, 3), (2, 4, 3)]), st.booleans())
def test_agreement_with_torch_distributions(seed, shape, shared_deviation) -> None:
    draw = torch.Generator().manual_seed(seed)

    def random() -> DiagonalGaussian:
        log_std = torch.randn(shape[-1:] if shared_deviation else shape, generator=draw, dtype=torch.float64)
        return DiagonalGaussian(torch.randn(shape, generator=draw, dtype=torch.float64), log_std)

    def theirs(p: DiagonalGaussian) -> Independent:
        return Independent(Normal(p.mean, p.log_std.exp().expand_as(p.mean)), 1)

    p, q = random(), random()
    action = torch.randn(shape, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(action), theirs(p).log_prob(action))
    torch.testing.assert_close(p.entropy(), theirs(p).entropy())
    torch.testing.assert_close(kl(p, q), kl_divergence(theirs(p), theirs(q)))
    assert p.log_prob(action).shape == kl(p, q).shape == p.entropy().shape == shape[:-1]
    assert (kl(p, p) == 0).all()


def test_samples_are_the_noise_scaled_and_shifted() -> None:
    mean = torch.tensor([[1.0, -2.0]], requires_grad=True)
    log_std = torch.tensor([0.0, 1.0], requires_grad=True)
    noise = torch.tensor([[0.5, -1.0], [0.0, 2.0]])
    sample = DiagonalGaussian(mean, log_std).sample(noise)
    torch.testing.assert_close(sample, torch.tensor([[1.5, -2 - torch.e], [1.0, -2 + 2 * torch.e]]))
    sample.sum().backward()
    assert mean.grad.tolist() == [[2, 2]]
    torch.testing.assert_close(log_std.grad, torch.tensor([0.5, torch.e]))  # sum of sigma * noise


def test_the_divergence_is_the_mean_log_ratio_of_samples() -> None:
    noise = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = P.sample(noise)
    ratio = P.log_prob(sample) - Q.log_prob(sample)
    standard_error = ratio.std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - kl(P, Q)) < 4 * standard_error
    assert abs(ratio.mean() - kl(Q, P)) > 100 * standard_error  # control: the other direction
