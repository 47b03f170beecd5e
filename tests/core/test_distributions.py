"""Policy distributions: worked vectors, PyTorch's distributions, enumeration, Hessians, and the edges of rounding."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import hessian
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

from corollary.core.distributions import Categorical, DiagonalGaussian, Distribution, SquashedGaussian, kl

# ---------------------------------------------------------------------------------------------------------- Gaussian


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


def test_the_divergence_of_close_policies_keeps_its_digits_in_float32() -> None:
    p, q = DiagonalGaussian(torch.zeros(1), torch.zeros(1)), DiagonalGaussian(torch.zeros(1), torch.full((1,), 3e-4))
    exact = 3e-4**2 - 2 * 3e-4**3 / 3  # x + exp(-2 x) / 2 - 1/2, as a series
    assert kl(p, q).item() == pytest.approx(exact, rel=1e-3)
    as_written = (q.log_std - p.log_std + 0.5 * torch.exp(2 * (p.log_std - q.log_std)) - 0.5).item()
    assert abs(as_written - exact) > 0.1 * exact  # control: the formula as it is usually written loses them


# ---------------------------------------------------------------------------------------------- squashed by a tanh


def test_the_squashed_density_by_hand() -> None:
    """At u = 0 the tanh has slope 1; at u = ln 3 it is 0.8, its slope 0.36, and log N is (ln 3)^2 / 2 lower."""
    standard = SquashedGaussian(gaussian([0, 0], [1, 1]))
    latent = torch.tensor([0, math.log(3)], dtype=torch.float64)
    at_zero = -0.5 * math.log(2 * math.pi)
    expected = [at_zero, at_zero - 0.5 * math.log(3) ** 2 - math.log(0.36)]
    assert standard.log_densities(latent).tolist() == pytest.approx(expected, abs=1e-14)
    assert SquashedGaussian(gaussian([math.log(3)], [2])).mode().item() == pytest.approx(0.8)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1,), (2, 3)]))
def test_agreement_with_torchs_transformed_distribution(seed, shape) -> None:
    draw = torch.Generator().manual_seed(seed)
    mean, log_std, noise = (2 * torch.rand(3, *shape, generator=draw, dtype=torch.float64) - 1).requires_grad_()
    ours = SquashedGaussian(DiagonalGaussian(mean, log_std))
    theirs = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform()])
    latent, log_densities = ours.draw(noise)
    # Theirs recovers the latent from the action, which costs digits, but few while |u| < 4.
    torch.testing.assert_close(ours.log_densities(latent), theirs.log_prob(latent.tanh()), rtol=0, atol=1e-10)
    torch.testing.assert_close(log_densities, ours.log_densities(latent))
    torch.testing.assert_close(ours.sample(noise), latent.tanh())
    for a, b in zip(
        torch.autograd.grad(log_densities.sum(), (mean, log_std), retain_graph=True),
        torch.autograd.grad(ours.log_densities(latent).sum(), (mean, log_std)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_squashed_density_integrates_to_one_and_without_the_jacobian_does_not() -> None:
    policy = SquashedGaussian(gaussian([0.7], [0.9]))
    action = torch.linspace(-1, 1, 200_003).double()[1:-1].unsqueeze(-1)
    latent = torch.atanh(action)
    assert torch.trapezoid(policy.log_densities(latent).exp(), action, dim=0).item() == pytest.approx(1, abs=1e-6)
    assert abs(torch.trapezoid(policy.base.log_prob(latent).exp(), action.squeeze(), dim=0).item() - 1) > 0.1


def test_the_squashed_density_survives_saturation_in_float32() -> None:
    """Where tanh(u) rounds to 1, log(1 - tanh(u)^2) does not end at -inf, nor at a constant: it is 2 log 2 - 2 u."""
    mean = torch.tensor([20.0, -20.0], requires_grad=True)
    policy = SquashedGaussian(DiagonalGaussian(mean, torch.zeros(2)))
    latent, log_densities = policy.draw(torch.zeros(2))
    assert torch.tanh(latent).abs().tolist() == [1, 1]
    expected = -0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 40
    assert log_densities.tolist() == pytest.approx([expected, expected])
    assert torch.autograd.grad(log_densities.sum(), mean)[0].tolist() == [2, -2]
    assert torch.isinf(torch.log(1 - torch.tanh(latent) ** 2)).all()


def test_a_draw_keeps_its_density_where_the_noise_is_lost_in_the_mean() -> None:
    """At sigma = e^-20 the latent rounds to the mean, so the noise, and its density, cannot be recovered from it."""
    policy = SquashedGaussian(DiagonalGaussian(torch.tensor([1.0]), torch.tensor([-20.0])))
    latent, log_density = policy.draw(torch.tensor([2.0]))
    exact = -2 - 0.5 * math.log(2 * math.pi) + 20 - math.log(1 - math.tanh(1) ** 2)
    assert log_density.item() == pytest.approx(exact, rel=1e-6)
    assert abs(policy.log_densities(latent).item() - exact) > 1


# ------------------------------------------------------------------------------------------------------- categorical

SIZES = [(4,), (1,), (3, 3), (2, 3, 4), (1, 3)]


def categorical(*probabilities: list[float]) -> Categorical:
    logits = torch.tensor([p for component in probabilities for p in component], dtype=torch.float64).log()
    return Categorical(logits, tuple(len(component) for component in probabilities))


def random_logits(seed: int, sizes: tuple[int, ...], lead: tuple[int, ...] = ()) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*lead, sum(sizes), generator=draw, dtype=torch.float64)


def all_actions(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor(list(itertools.product(*map(range, sizes))))


def test_categorical_numbers_by_hand() -> None:
    """H = ln 2 / 2 + 2 ln 4 / 4; against the uniform, KL = ln 3 - H one way, (2 ln(4/3) + ln(2/3)) / 3 the other."""
    p, uniform = categorical([0.5, 0.25, 0.25]), categorical([1 / 3] * 3)
    ln2, ln3 = math.log(2), math.log(3)
    assert [p.log_prob(torch.tensor([k])).item() for k in range(3)] == pytest.approx([-ln2, -2 * ln2, -2 * ln2])
    assert p.entropy().item() == pytest.approx(1.5 * ln2)
    assert kl(p, uniform).item() == pytest.approx(ln3 - 1.5 * ln2)
    assert kl(uniform, p).item() == pytest.approx((5 * ln2 - 3 * ln3) / 3)
    both = categorical([0.5, 0.25, 0.25], [0.25, 0.75])
    assert both.log_prob(torch.tensor([2, 1])).item() == pytest.approx(math.log(0.25 * 0.75))
    assert both.mode().tolist() == [0, 1]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_agreement_with_torchs_categorical(sizes, lead) -> None:
    ours, theirs = (random_logits(0, sizes, lead).requires_grad_() for _ in range(2))
    other = random_logits(1, sizes, lead)
    action = torch.stack([torch.randint(n, lead, generator=torch.Generator().manual_seed(n)) for n in sizes], -1)
    p, q = Categorical(ours, sizes), Categorical(other, sizes)
    parts = [torch.distributions.Categorical(logits=part) for part in theirs.split(sizes, -1)]
    other_parts = [torch.distributions.Categorical(logits=part) for part in other.split(sizes, -1)]
    expected = [
        sum(part.log_prob(column) for part, column in zip(parts, action.unbind(-1), strict=True)),
        sum(part.entropy() for part in parts),
        sum(kl_divergence(part, target) for part, target in zip(parts, other_parts, strict=True)),
        sum(kl_divergence(target, part) for part, target in zip(parts, other_parts, strict=True)),
    ]
    got = [p.log_prob(action), p.entropy(), kl(p, q), kl(q, p)]
    for mine, reference in zip(got, expected, strict=True):
        assert mine.shape == lead
        torch.testing.assert_close(mine, reference)
        (grad,) = torch.autograd.grad(mine.sum(), ours, retain_graph=True)
        (reference_grad,) = torch.autograd.grad(reference.sum(), theirs, retain_graph=True)
        torch.testing.assert_close(grad, reference_grad)
    assert p.mode().tolist() == torch.stack([part.probs.argmax(-1) for part in parts], -1).tolist()


@pytest.mark.parametrize("sizes", SIZES)
def test_entropy_and_divergence_are_sums_over_all_actions(sizes) -> None:
    p, q = Categorical(random_logits(0, sizes), sizes), Categorical(random_logits(1, sizes), sizes)
    actions = all_actions(sizes)
    log_p, log_q = (Categorical(d.logits.expand(len(actions), -1), sizes).log_prob(actions) for d in (p, q))
    assert log_p.exp().sum().item() == pytest.approx(1)
    torch.testing.assert_close(p.entropy(), -(log_p.exp() * log_p).sum())
    torch.testing.assert_close(kl(p, q), (log_p.exp() * (log_p - log_q)).sum(), atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("sizes", SIZES)
def test_equal_logits_give_the_greatest_entropy(sizes) -> None:
    flat = Categorical(torch.full((sum(sizes),), 7.0), sizes)
    assert flat.entropy().item() == pytest.approx(sum(math.log(n) for n in sizes), abs=1e-6)


@pytest.mark.parametrize("sizes", [(2,), (2, 2), (2, 3)])
def test_certainty_leaves_every_number_finite(sizes) -> None:
    logits = torch.zeros(sum(sizes))
    logits[0] = 200.0
    logits.requires_grad_()
    p, q = Categorical(logits, sizes), Categorical(torch.zeros(sum(sizes)), sizes)
    rare = torch.tensor([1] + [0] * (len(sizes) - 1))
    elsewhere = sum(math.log(n) for n in sizes[1:])
    assert p.log_prob(rare).item() == pytest.approx(-200 - elsewhere)
    assert p.entropy().item() == pytest.approx(elsewhere)
    assert kl(p, q).item() == pytest.approx(math.log(2), rel=1e-6)
    assert kl(q, p).item() == pytest.approx(100 - math.log(2))
    (p.log_prob(rare) + p.entropy() + kl(p, q) + kl(q, p)).backward()
    assert logits.grad.isfinite().all()
    assert logits.detach()[:2].softmax(-1).log()[1] == -torch.inf  # control: what the log of a softmax says


def test_a_common_shift_of_the_logits_changes_nothing() -> None:
    logits = random_logits(0, (3, 2)).float()
    shift = torch.tensor([1e4, 1e4, 1e4, -1e4, -1e4])
    p, q = Categorical(logits, (3, 2)), Categorical(logits + shift, (3, 2))
    assert kl(p, q).item() == pytest.approx(0, abs=1e-5)
    assert kl(p, p).item() == 0


# ---------------------------------------------------------------------------------------------------------- sampling


def test_noise_falls_into_the_pieces_of_the_unit_interval() -> None:
    p = categorical([0.5, 0.25, 0.25])
    noise = torch.tensor([0, 0.49, 0.5, 0.74, 0.75, 0.99]).double().unsqueeze(-1)
    sample = Categorical(p.logits.expand(6, -1), p.sizes).sample(noise)
    assert sample.dtype == torch.int64
    assert sample.squeeze(-1).tolist() == [0, 0, 1, 1, 2, 2]
    two = Categorical(categorical([0.5, 0.5], [0.1, 0.2, 0.7]).logits, (2, 3))
    assert two.sample(torch.tensor([0.6, 0.2])).tolist() == [1, 1]


@pytest.mark.parametrize("sizes", SIZES)
def test_even_noise_gives_frequencies_equal_to_the_probabilities(sizes) -> None:
    n = 10_000
    p = Categorical(random_logits(0, sizes).expand(n, -1), sizes)
    grid = ((torch.arange(n).double() + 0.5) / n).unsqueeze(-1).expand(-1, len(sizes))
    for column, part in zip(p.sample(grid).unbind(-1), p.logits[0].split(sizes), strict=True):
        counts = torch.bincount(column, minlength=len(part))
        assert len(counts) == len(part)
        assert (counts - n * part.softmax(-1)).abs().max() <= 1


def test_components_are_drawn_independently() -> None:
    sizes, n = (2, 3), 200_000
    p = Categorical(random_logits(0, sizes).expand(n, -1), sizes)
    noise = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actions = all_actions(sizes)
    joint = p.log_prob(actions.repeat(n // 6 + 1, 1)[:n])[:6].exp()
    standard_error = (joint * (1 - joint) / n).sqrt()

    def frequencies(sample: Tensor) -> Tensor:
        return torch.bincount(3 * sample[:, 0] + sample[:, 1], minlength=6) / n

    assert ((frequencies(p.sample(noise)) - joint).abs() < 4 * standard_error).all()
    shared = frequencies(p.sample(noise[:, :1].expand(-1, 2)))
    assert ((shared - joint).abs() > 10 * standard_error).any()  # control: one number for both components


@pytest.mark.parametrize("sizes", [(7,), (7, 7), (7, 2, 3)])
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.float64])
def test_the_greatest_noise_stays_among_the_categories(sizes, noise_dtype) -> None:
    logits = random_logits(0, sizes, (2000,)).float()
    p = Categorical(logits, sizes)
    greatest = 1 - (2.0**-24 if noise_dtype == torch.float32 else 2.0**-53)
    sample = p.sample(torch.full((2000, len(sizes)), greatest, dtype=noise_dtype))
    assert (sample < torch.tensor(sizes)).all()
    cumulative = logits[:, :7].softmax(-1).cumsum(-1)
    naive = (torch.tensor(greatest, dtype=noise_dtype) >= cumulative).sum(-1)
    assert (naive == 7).any()  # control: without the care taken, rounding leads out of the categories


def test_a_sum_that_rises_after_its_last_category_does_not_lead_out_of_the_categories() -> None:
    p = Categorical(torch.zeros(5), (2, 3))
    vars(p)["table"] = torch.tensor([[0.5, 0.5, 1e-6], [0.3, 0.3, 0.4]])  # as a sum in parallel may round the padding
    assert p.sample(torch.full((2,), 1 - 2.0**-24)).tolist() == [1, 2]


@pytest.mark.parametrize("noise", [0.0, 0.3, 1 - 2.0**-24])
def test_a_category_without_probability_is_never_drawn(noise) -> None:
    logits = torch.tensor([-300.0, 0.1, -300.0, 0.2, -300.0])
    for sizes, rows in (((5,), logits), ((5, 5), logits.repeat(2)), ((5, 6), torch.cat([logits, logits, logits[:1]]))):
        sample = Categorical(rows, sizes).sample(torch.full((len(sizes),), noise))
        assert set(sample.tolist()) <= {1, 3}


# ---------------------------------------------------------------------------------------------------- what both share


def both_kinds(seed: int, lead: tuple[int, ...] = ()) -> list[Distribution]:
    draw = torch.Generator().manual_seed(seed)
    mean, log_std = torch.randn(2, *lead, 3, generator=draw, dtype=torch.float64)
    return [DiagonalGaussian(mean, log_std), *(Categorical(random_logits(seed, sizes, lead), sizes) for sizes in SIZES)]


@pytest.mark.parametrize("index", range(1 + len(SIZES)))
def test_the_parameters_rebuild_the_distribution(index) -> None:
    p = both_kinds(0, (2, 4))[index]
    again = p.rebuild(p.parameters_tensor())
    assert type(again) is type(p)
    assert kl(p, again).tolist() == torch.zeros(2, 4).tolist()
    torch.testing.assert_close(again.parameters_tensor(), p.parameters_tensor(), rtol=0, atol=0)


def test_the_parameters_of_a_gaussian_are_mean_then_log_std() -> None:
    shared = DiagonalGaussian(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([5.0, 6]))
    assert shared.parameters_tensor().tolist() == [[1, 2, 5, 6], [3, 4, 5, 6]]
    assert shared.mode().tolist() == [[1, 2], [3, 4]]
    vector = torch.arange(8.0).reshape(2, 4)
    full = shared.rebuild(shared.parameters_tensor())
    torch.testing.assert_close(shared.fisher_product(vector), full.fisher_product(vector))


@pytest.mark.parametrize("index", range(1 + len(SIZES)))
def test_the_fisher_matrix_is_the_hessian_of_the_divergence(index) -> None:
    p, elsewhere = both_kinds(0)[index], both_kinds(1)[index]
    at = p.parameters_tensor()
    in_q = hessian(lambda x: kl(p, p.rebuild(x)), at)
    in_p = hessian(lambda x: kl(p.rebuild(x), p), at)
    fisher = p.fisher_product(torch.eye(len(at), dtype=at.dtype))  # one row for each unit vector
    torch.testing.assert_close(fisher, in_q)
    torch.testing.assert_close(fisher, in_p)
    if index != 1 + SIZES.index((1,)):  # of one category there is nothing to differ
        away = hessian(lambda x: kl(elsewhere, p.rebuild(x)), at) - hessian(lambda x: kl(p.rebuild(x), elsewhere), at)
        assert away.abs().max() > 1e-3  # control: off the diagonal p = q the two Hessians differ


@pytest.mark.parametrize("index", range(1 + len(SIZES)))
def test_the_fisher_product_of_a_batch_is_that_of_its_rows(index) -> None:
    p = both_kinds(0, (2, 4))[index]
    vector = p.parameters_tensor().flip(0, 1)
    product = p.fisher_product(vector)
    row = p.rebuild(p.parameters_tensor()[1, 2])
    torch.testing.assert_close(product[1, 2], row.fisher_product(vector[1, 2]))


def test_kl_of_unlike_distributions_is_refused() -> None:
    with pytest.raises(TypeError, match="DiagonalGaussian and Categorical"):
        kl(P, categorical([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        kl(Categorical(torch.zeros(5), (2, 3)), Categorical(torch.zeros(5), (3, 2)))


@pytest.mark.parametrize("sizes", [(3,), (3, 3)])
def test_actions_of_another_batch_are_refused(sizes) -> None:
    with pytest.raises(RuntimeError, match="size"):
        Categorical(torch.zeros(4, sum(sizes)), sizes).log_prob(torch.zeros(2, len(sizes), dtype=torch.int64))


def test_each_kind_names_its_noise() -> None:
    assert (DiagonalGaussian.noise, Categorical.noise, SquashedGaussian.noise) == ("normal", "uniform", "normal")


@pytest.mark.parametrize("which", ["log_prob", "entropy"])
@pytest.mark.parametrize("sizes", [(), (4,), (3, 3), (2, 3, 4)], ids=str)
def test_gradients_in_the_parameters_are_autograds(which, sizes) -> None:
    generator = torch.Generator().manual_seed(3)
    width = sum(sizes) or 6
    parameters = torch.randn(5, 7, width, generator=generator, dtype=torch.float64, requires_grad=True)
    kind = Categorical(parameters, sizes) if sizes else DiagonalGaussian(*parameters.chunk(2, -1))
    if sizes:
        action = torch.stack([torch.randint(n, (5, 7), generator=generator) for n in sizes], -1)
    else:
        action = torch.randn(5, 7, 3, generator=generator, dtype=torch.float64)
    value = kind.log_prob(action) if which == "log_prob" else kind.entropy()
    (expected,) = torch.autograd.grad(value.sum(), parameters)
    frozen = kind.rebuild(parameters.detach())
    found = frozen.log_prob_gradient(action) if which == "log_prob" else frozen.entropy_gradient()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (expected.abs() > 0.1).any()
