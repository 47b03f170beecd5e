"""Networks with a seed axis: initialisation against `nn.Linear`, forward passes, and who gets gradients."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from corollary.core.networks import (
    ActionBox,
    Critics,
    DeterministicActor,
    GaussianActor,
    StackedMLP,
    ValueNetwork,
    initial_linear,
    polyak_update,
)

SIZES = (5, 40, 33, 2)
SEEDS = (7, 0, 123)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- initialisation


@pytest.mark.parametrize("members", [None, 1, 3])
def test_initialisation_is_bit_for_bit_that_of_linear_modules(members) -> None:
    net = StackedMLP(SIZES, generators(*SEEDS), members=members)
    for s, seed in enumerate(SEEDS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for m in range(members or 1):
                for layer, (n_in, n_out) in enumerate(pairwise(SIZES)):
                    linear = nn.Linear(n_in, n_out)
                    where = s if members is None else (s, m)
                    assert torch.equal(net.weights[layer][where], linear.weight)
                    assert torch.equal(net.biases[layer][where], linear.bias)


def test_the_bounds_are_those_of_the_layers_inputs() -> None:
    """U(-1/sqrt(n_in), 1/sqrt(n_in)); an initialiser run on a transposed weight would use n_out instead."""
    net = StackedMLP((400, 9, 1), generators(0))
    for parameter in (net.weights[0], net.biases[0]):
        assert parameter.abs().max() <= 1 / 20
    assert net.weights[0].abs().max() > 0.99 / 20
    torch.testing.assert_close(net.weights[0].std(), torch.tensor(1 / 20 / 3**0.5), rtol=0.05, atol=0)


@pytest.mark.parametrize("init", ["torch", "orthogonal"])
def test_a_seed_starts_from_the_same_bits_alone_and_among_others(init) -> None:
    together = StackedMLP(SIZES, generators(*SEEDS), members=2, init=init)
    for s, seed in enumerate(SEEDS):
        alone = StackedMLP(SIZES, generators(seed), members=2, init=init)
        for mine, theirs in zip(alone.parameters(), together.parameters(), strict=True):
            assert torch.equal(mine[0], theirs[s])
            assert not torch.equal(mine[0], theirs[(s + 1) % 3]) or not mine.any()  # zero biases are equal


def test_global_generators_are_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    first = StackedMLP(SIZES, generators(0))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    for a, b in zip(first.parameters(), StackedMLP(SIZES, generators(0)).parameters(), strict=True):
        assert torch.equal(a, b)
    torch.set_rng_state(before)


@pytest.mark.parametrize(("n_in", "n_out"), [(6, 6), (20, 4), (4, 20)])
def test_orthogonal_layers_have_gain_root_two_and_no_bias(n_in, n_out) -> None:
    weight, bias = initial_linear(n_in, n_out, *generators(0), "orthogonal")
    gram = weight @ weight.T if n_out <= n_in else weight.T @ weight
    torch.testing.assert_close(gram, 2 * torch.eye(min(n_in, n_out)), rtol=1e-5, atol=1e-5)
    assert not bias.any()


@pytest.mark.parametrize("members", [None, 2])
def test_the_output_gain_scales_the_last_layer_alone(members) -> None:
    """A policy's head: W W^T = gain^2 I, zero bias, and the hidden layers those of the default."""
    usual, head = (
        StackedMLP(SIZES, generators(*SEEDS), members=members, init="orthogonal", **options)
        for options in ({}, {"output_gain": 0.01})
    )
    for default, hidden in zip(usual.weights[:-1], head.weights[:-1], strict=True):
        assert torch.equal(default, hidden)
    for net, gain in ((usual, 2**0.5), (head, 0.01)):
        gram = net.weights[-1] @ net.weights[-1].mT  # 2 rows of 33
        torch.testing.assert_close(gram, (gain**2 * torch.eye(2)).expand_as(gram), rtol=1e-5, atol=1e-5 * gain**2)
        assert not any(bias.any() for bias in net.biases)


def test_float64_networks_hold_the_same_numbers() -> None:
    single, double = (StackedMLP(SIZES, generators(0), dtype=dtype) for dtype in (torch.float32, torch.float64))
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert b.dtype == torch.float64
        assert torch.equal(a.double(), b)


# -- forward


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("index", range(3))
def test_each_seed_is_its_plain_module(index, activation) -> None:
    net = StackedMLP(SIZES, generators(*SEEDS), activation=activation)
    obs = draw(3, 7, 5)
    hidden = [nn.ReLU if activation == "relu" else nn.Tanh] * 2
    assert [type(layer) for layer in net.plain(index)] == [nn.Linear, hidden[0], nn.Linear, hidden[1], nn.Linear]
    torch.testing.assert_close(net(obs)[index], net.plain(index)(obs[index]))
    assert not torch.allclose(net(obs)[index], net.plain((index + 1) % 3)(obs[index]), atol=1e-3)


def test_ensemble_members_have_no_plain_form() -> None:
    with pytest.raises(ValueError, match="without an ensemble axis"):
        StackedMLP(SIZES, generators(0), members=2).plain(0)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_masks_multiply_the_hidden_layers(activation) -> None:
    """Masks of ones change nothing; dropping a unit is dropping its column of the next weight."""
    net = StackedMLP(SIZES, generators(*SEEDS), activation=activation)
    obs = draw(3, 7, 5)
    ones = [torch.ones(3, 7, width) for width in SIZES[1:-1]]
    torch.testing.assert_close(net(obs, ones), net(obs))
    ones[1][:, :, 4] = 0
    masked = net(obs, ones)
    with torch.no_grad():
        net.weights[2][:, :, 4] = 0
    torch.testing.assert_close(masked, net(obs))


@pytest.mark.parametrize("members", [None, 2])
def test_the_reference_back_end_has_second_derivatives(members) -> None:
    """What trust-region methods ask for: products with a Hessian. The default refuses rather than dropping them."""
    net = StackedMLP(SIZES, generators(*SEEDS), members=members, activation="tanh")
    obs = draw(3, 7, 5)
    loss = net(obs, backend="reference").square().mean()
    (gradient,) = torch.autograd.grad(loss, net.weights[0], create_graph=True)
    (product,) = torch.autograd.grad(gradient.square().sum(), net.weights[0])
    assert product.any()
    with pytest.raises(RuntimeError, match="pass backend='reference'"):
        torch.autograd.grad(net(obs).square().mean(), net.weights[0], create_graph=True)


@pytest.mark.parametrize("actor_type", ["deterministic", "gaussian"])
def test_actors_stay_in_an_asymmetric_box(actor_type) -> None:
    box = ActionBox([-1.0, 2.0], [3.0, 2.5])
    net = StackedMLP(SIZES, generators(*SEEDS))
    actor = DeterministicActor(net, box) if actor_type == "deterministic" else GaussianActor(net, box, (-5, 2))
    obs = 100 * draw(3, 50, 5)
    proposed = actor(obs)
    action = proposed if isinstance(proposed, torch.Tensor) else proposed.mean
    expected = torch.tensor([1.0, 2.25]) + torch.tensor([2.0, 0.25]) * torch.tanh(net(obs))
    torch.testing.assert_close(action, expected)
    assert action[..., 0].min() < -0.9  # the observations above are extreme: the box is reached
    assert action[..., 0].max() > 2.9
    torch.testing.assert_close(actor.plain(1)(obs[1]), action[1])


def test_the_gaussian_actor_starts_at_unit_deviation_within_its_range() -> None:
    net = StackedMLP(SIZES, generators(*SEEDS))
    actor = GaussianActor(net, ActionBox([-1, -1], [1, 1]), (-5.0, 2.0))
    obs = draw(3, 7, 5)
    assert actor(obs).log_std.shape == (3, 1, 2)
    assert not actor(obs).log_std.any()
    with torch.no_grad():
        actor.log_std[0], actor.log_std[1] = -9.0, 9.0
    assert actor(obs).log_std[:, 0, 0].tolist() == [-5.0, 2.0, 0.0]


def test_value_networks_have_one_number_per_row() -> None:
    assert ValueNetwork(StackedMLP((5, 8, 1), generators(*SEEDS)))(draw(3, 7, 5)).shape == (3, 7)


# -- critics


def critics_and_batch() -> tuple[Critics, torch.Tensor, torch.Tensor]:
    critic = Critics(StackedMLP((5 + 2, 40, 1), generators(*SEEDS), members=2))
    return critic, draw(3, 7, 5), draw(3, 7, 2, seed=1).requires_grad_()


def test_first_is_the_first_member_and_sees_the_action_alone() -> None:
    critic, obs, action = critics_and_batch()
    values = critic(obs, action)
    assert values.shape == (3, 2, 7)
    first = critic.first(obs, action)
    torch.testing.assert_close(first, values[:, 0])
    assert not torch.allclose(first, values[:, 1], atol=1e-3)
    (expected,) = torch.autograd.grad(values[:, 0].sum(), action)
    first.sum().backward()
    torch.testing.assert_close(action.grad, expected)
    assert action.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in critic.parameters())
    critic(obs, action).sum().backward()  # control: the full forward does reach the critic
    assert all(parameter.grad.any() for parameter in critic.parameters())


def test_constant_critics_give_their_values_to_the_action_alone() -> None:
    critic, obs, action = critics_and_batch()
    values, constant = critic(obs, action), critic.constant(obs, action)
    assert torch.equal(constant, values)
    (expected,) = torch.autograd.grad(values.amin(1).sum(), action)
    constant.amin(1).sum().backward()
    torch.testing.assert_close(action.grad, expected)
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_seeds_and_members_do_not_mix() -> None:
    critic, obs, action = critics_and_batch()
    critic(obs, action)[1, 1].sum().backward()
    for parameter in critic.parameters():
        touched = parameter.grad.flatten(2).any(-1)
        assert touched.tolist() == [[False, False], [False, True], [False, False]]


# -- target


@pytest.mark.parametrize("rate", [0.005, 0.7, 1.0])
def test_polyak_steps_have_their_closed_form(rate) -> None:
    """After k steps towards a constant: target_k = online + (1 - rate)^k (target_0 - online)."""
    online, target = (StackedMLP(SIZES, generators(seed), members=2, dtype=torch.float64) for seed in (0, 1))
    start = [parameter.detach().clone() for parameter in target.parameters()]
    for _ in range(4):
        polyak_update(target, online, rate)
    for moved, first, goal in zip(target.parameters(), start, online.parameters(), strict=True):
        torch.testing.assert_close(moved, goal + (1 - rate) ** 4 * (first - goal), rtol=1e-12, atol=1e-14)
        assert not torch.equal(first, goal)
        assert moved.grad is None
        assert rate < 1 or torch.equal(moved, goal)


# -- box


bounds = st.tuples(st.floats(-50, 50, width=32), st.floats(2**-5, 50, width=32)).map(
    lambda b: (b[0], float(np.float32(b[0] + b[1])))
)


@given(st.lists(bounds, min_size=1, max_size=3))
def test_clipped_actions_are_inside_the_box_to_the_last_bit(box) -> None:
    """Environments assert `low <= a <= high`; centre + half_range may miss a bound by a rounding."""
    low, high = (torch.tensor(side) for side in zip(*box, strict=True))
    action_box = ActionBox(low.tolist(), high.tolist())
    for raw in (
        action_box(torch.ones(len(box))),
        action_box(-torch.ones(len(box))),
        1e6 * torch.ones(len(box)),
    ):
        clipped = action_box.clip(raw)
        assert (low <= clipped).all()
        assert (clipped <= high).all()


def test_the_box_by_hand() -> None:
    box = ActionBox([-1.0, 2.0], [3.0, 2.5])
    assert box(torch.tensor([[0.0, 0.0], [1.0, -1.0], [-0.5, 0.5]])).tolist() == [
        [1, 2.25],
        [3, 2],
        [0, 2.375],
    ]
    outside = torch.tensor([[9.0, 0.0], [-9.0, 9.0], [0.5, 2.25]])
    assert box.clip(outside).tolist() == [[3, 2], [-1, 2.5], [0.5, 2.25]]
    # A tenth of the half ranges 2 and 0.25 inside.
    inner = torch.tensor([[2.8, 2.025], [-0.8, 2.475], [0.5, 2.25]])
    torch.testing.assert_close(box.clip(outside, margin=0.1), inner)
    assert box.unit(torch.tensor([[1.0, 2.25], [3.0, 2.0], [0.0, 2.375]])).tolist() == [[0, 0], [1, -1], [-0.5, 0.5]]
