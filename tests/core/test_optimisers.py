"""One Adam per seed over stacked parameters: each seed must move as if a torch optimiser of its own moved it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from corollary.core.errors import ConfigError
from corollary.core.optimisers import FlatParameters, SeedwiseAdam

S = 3
SHAPES = {"actor": [(4, 3), (4,)], "critic": [(2, 3)]}


def stacked(seed: int = 0) -> dict[str, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [nn.Parameter(torch.randn(S, *shape, generator=generator, dtype=torch.float64)) for shape in shapes]
        for name, shapes in SHAPES.items()
    }


def loss(parameters: list[Tensor], scale: Tensor) -> Tensor:
    """A different quartic for each seed; the last axes are summed."""
    return sum((scale * p.flatten(1) ** 4).sum(1) + p.flatten(1).sum(1) for p in parameters)


SCALE = torch.tensor([[0.1], [1.0], [30.0]], dtype=torch.float64)


def everything(blocks: dict[str, list[nn.Parameter]]) -> list[nn.Parameter]:
    return [p for block in blocks.values() for p in block]


def alone(seed_index: int, n_steps: int, clip: Callable[[dict[str, list[nn.Parameter]]], None]) -> list[Tensor]:
    """The same training of one seed by torch's Adam and torch's clip."""
    blocks = {
        n: [nn.Parameter(p[seed_index : seed_index + 1].detach().clone()) for p in b] for n, b in stacked().items()
    }
    adam = torch.optim.Adam(everything(blocks), lr=0.01, eps=1e-5)
    for _ in range(n_steps):
        adam.zero_grad()
        loss(everything(blocks), SCALE[seed_index : seed_index + 1]).sum().backward()
        clip(blocks)
        adam.step()
    return [p.detach() for p in everything(blocks)]


def no_clip(blocks: dict[str, list[nn.Parameter]]) -> None:
    pass


def clip_each(blocks: dict[str, list[nn.Parameter]]) -> None:
    for block in blocks.values():
        nn.utils.clip_grad_norm_(block, 0.5)


def clip_all(blocks: dict[str, list[nn.Parameter]]) -> None:
    nn.utils.clip_grad_norm_(everything(blocks), 0.5)


@pytest.mark.parametrize(
    ("options", "clip"),
    [({}, no_clip), ({"max_grad_norm": 0.5}, clip_each), ({"max_grad_norm": 0.5, "joint_norm": True}, clip_all)],
    ids=["no clip", "a norm each", "one norm"],
)
def test_every_seed_moves_as_it_would_alone(options, clip) -> None:
    blocks = stacked()
    optimizer = SeedwiseAdam(blocks, 0.01, eps=1e-5, **options)
    for _ in range(5):
        optimizer.step(loss(everything(blocks), SCALE))
    for seed_index in range(S):
        for ours, theirs in zip(everything(blocks), alone(seed_index, 5, clip), strict=True):
            torch.testing.assert_close(ours[seed_index], theirs[0], rtol=1e-12, atol=1e-12)


def test_a_seed_that_sits_out_is_untouched_and_continues_as_if_nothing_had_happened() -> None:
    blocks = stacked()
    optimizer = SeedwiseAdam(blocks, 0.01, eps=1e-5, max_grad_norm=0.5)
    for active in ([True] * S, [True, False, True], [False, False, True], [True] * S):
        before = [p.detach().clone() for p in everything(blocks)]
        optimizer.step(loss(everything(blocks), SCALE), active=active)
        for parameter, old in zip(everything(blocks), before, strict=True):
            moved = (parameter != old).flatten(1).any(1).tolist()
            assert moved == active
    for seed_index, n_steps in enumerate((3, 2, 4)):
        for ours, theirs in zip(everything(blocks), alone(seed_index, n_steps, clip_each), strict=True):
            torch.testing.assert_close(ours[seed_index], theirs[0], rtol=1e-12, atol=1e-12)


def test_only_the_named_block_moves() -> None:
    blocks = stacked()
    optimizer = SeedwiseAdam(blocks, 0.01)
    critic = [p.detach().clone() for p in blocks["critic"]]
    optimizer.step(loss(everything(blocks), SCALE), only=["actor"])
    assert all(torch.equal(p, old) for p, old in zip(blocks["critic"], critic, strict=True))
    optimizer.step(loss(everything(blocks), SCALE))
    assert optimizer.state_tensors()["critic/step"].tolist() == [1] * S
    assert optimizer.state_tensors()["actor/step"].tolist() == [2] * S


def test_the_norm_returned_is_that_before_clipping() -> None:
    blocks = {"one": [nn.Parameter(torch.zeros(2, 2))]}
    weights = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    norm = SeedwiseAdam(blocks, 0.1, max_grad_norm=1e-3).step((blocks["one"][0] * weights).sum(1))
    torch.testing.assert_close(norm, torch.tensor([5.0, 2.0]))


def test_state_goes_on_exactly_in_a_new_optimiser() -> None:
    blocks = stacked()
    optimizer = SeedwiseAdam(blocks, 0.01)
    optimizer.step(loss(everything(blocks), SCALE), active=[True, False, True])
    copies = {name: [nn.Parameter(p.detach().clone()) for p in block] for name, block in blocks.items()}
    other = SeedwiseAdam(copies, 0.01)
    other.load_state_tensors({name: t.clone() for name, t in optimizer.state_tensors().items()})
    for each, chosen in ((optimizer, blocks), (other, copies)):
        for _ in range(3):
            each.step(loss(everything(chosen), SCALE))
    assert all(torch.equal(p, q) for p, q in zip(everything(blocks), everything(copies), strict=True))


def test_a_state_of_other_networks_is_refused() -> None:
    optimizer = SeedwiseAdam(stacked(), 0.01)
    with pytest.raises(ConfigError, match="actor/exp_avg is missing or has another shape"):
        optimizer.load_state_tensors({})


def test_flat_parameters_are_the_parameters_and_their_gradient() -> None:
    (actor, _) = stacked().values()
    values = [p.detach().clone() for p in actor]
    flat = FlatParameters(actor)
    assert flat.values.shape == (S, 16)
    assert all(torch.equal(p, old) for p, old in zip(actor, values, strict=True))
    flat.values[1] = 0
    assert all((p[1] == 0).all() and (p[0] != 0).all() for p in actor)
    gradient = flat.gradient(loss(actor, SCALE))
    expected = 4 * SCALE * flat.values**3 + 1
    torch.testing.assert_close(gradient, expected)
