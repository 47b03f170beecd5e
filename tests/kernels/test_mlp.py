"""The batched perceptrons: both back ends against `nn.Linear`, values and gradients, and their refusals."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.kernels.mlp import mlp

# Layer widths on both sides of 32, where the kernel changes from narrow to wide products.
NARROW, MIXED, WIDE = (3, 8, 1), (17, 64, 31, 33, 4), (40, 48, 64)
BACKENDS = ("reference", "onednn")

Parameters = tuple[list[Tensor], list[Tensor]]


def parameters(members: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Parameters:
    """Weights and biases whose outputs are of order one; all of them require gradients."""
    draw = torch.Generator().manual_seed(0)
    weights, biases = [], []
    for n_in, n_out in pairwise(sizes):
        weights.append(torch.randn(members, n_out, n_in, generator=draw, dtype=dtype) / n_in**0.5)
        biases.append(torch.randn(members, n_out, generator=draw, dtype=dtype) / 4)
    for parameter in (*weights, *biases):
        parameter.requires_grad_()
    return weights, biases


def inputs(members: int, batch: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(members, batch, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def linear_chains(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and gradients of a fixed weighted sum of them, of ordinary PyTorch modules, one per member."""
    outputs, gradients = [], []
    for e in range(len(x)):
        layers: list[nn.Module] = []
        for w, b in zip(weights, biases, strict=True):
            linear = nn.Linear(w.shape[2], w.shape[1], dtype=w.dtype)
            linear.load_state_dict({"weight": w[e], "bias": b[e]})
            layers += [linear, nn.ReLU()]
        chain = nn.Sequential(*layers[:-1])
        row = x[e].detach().requires_grad_()
        y = chain(row)
        outputs.append(y.detach())
        leaves = [row, *(layer.weight for layer in layers[::2]), *(layer.bias for layer in layers[::2])]
        gradients.append(torch.autograd.grad(probe(y), leaves))
    return torch.stack(outputs), [torch.stack(column) for column in zip(*gradients, strict=True)]


def probe(y: Tensor) -> Tensor:
    """A scalar whose gradient differs from output to output."""
    return (y * torch.linspace(-1, 1, y.shape[-1] * y.shape[-2], dtype=y.dtype).view(y.shape[-2:])).sum()


@pytest.mark.parametrize("members", [1, 2, 6])
@pytest.mark.parametrize("sizes", [NARROW, MIXED, WIDE, (5, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_all_gradients_are_those_of_linear_modules(backend, sizes, members) -> None:
    weights, biases = parameters(members, sizes)
    x = inputs(members, 9, sizes[0]).requires_grad_()
    expected, expected_gradients = linear_chains(x, weights, biases)
    y = mlp(x, weights, biases, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(torch.autograd.grad(probe(y), [x, *weights, *biases]), expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_the_comparison_sees_a_missing_activation() -> None:
    weights, biases = parameters(2, WIDE)
    x = inputs(2, 9, WIDE[0])
    expected, _ = linear_chains(x, weights, biases)
    without_relu = mlp(mlp(x, weights[:1], biases[:1]), weights[1:], biases[1:])
    assert (without_relu - expected).abs().max() > 0.1


@given(
    members=st.integers(1, 3),
    batch=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 70), min_size=2, max_size=4).map(tuple),
)
def test_the_back_ends_agree_for_any_shape(members, batch, sizes) -> None:
    weights, biases = parameters(members, sizes)
    x = inputs(members, batch, sizes[0]).requires_grad_()
    leaves = [x, *weights, *biases]
    results = []
    for backend in BACKENDS:
        y = mlp(x, weights, biases, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().mean(), leaves)])
    for actual, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_input_expanded_to_all_members(backend) -> None:
    """An expanded axis gives what copies give, and its gradient is the sum over members."""
    weights, biases = parameters(3, MIXED)
    one = inputs(1, 9, MIXED[0]).requires_grad_()
    copies = one.detach().repeat(3, 1, 1).requires_grad_()
    y, y_copies = (mlp(x, weights, biases, backend=backend) for x in (one.expand(3, -1, -1), copies))
    assert torch.equal(y, y_copies)
    (gradient,), (by_member,) = (
        torch.autograd.grad(probe(y), one),
        torch.autograd.grad(probe(y_copies), copies),
    )
    torch.testing.assert_close(gradient, by_member.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["strided batch", "transposed"])
def test_memory_layout_of_the_input_does_not_matter(layout) -> None:
    weights, biases = parameters(2, WIDE)
    x = inputs(2, 9, WIDE[0])
    other = x.mT.contiguous().mT if layout == "transposed" else torch.stack([x, x], 2)[:, :, 0]
    assert not other.is_contiguous()
    torch.testing.assert_close(mlp(other, weights, biases), mlp(x, weights, biases), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", ["x", "biases", "weights", "last layer", "first weight", "middle bias"])
def test_only_the_asked_gradients_are_computed(trained) -> None:
    weights, biases = parameters(2, MIXED)
    x = inputs(2, 9, MIXED[0])
    _, everything = linear_chains(x, weights, biases)
    leaves = [x, *weights, *biases]
    layers = len(weights)
    chosen = {
        "x": [0],
        "weights": [1 + layer for layer in range(layers)],
        "biases": [1 + layers + layer for layer in range(layers)],
        "last layer": [layers, 2 * layers],
        "first weight": [1],
        "middle bias": [1 + layers + 1],
    }[trained]
    for position, leaf in enumerate(leaves):
        leaf.requires_grad_(position in chosen)
    probe(mlp(x, weights, biases, backend="onednn")).backward()
    for position, leaf in enumerate(leaves):
        if position in chosen:
            torch.testing.assert_close(leaf.grad, everything[position], rtol=1e-5, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_without_gradients_the_values_are_the_same_bits(backend, precision) -> None:
    weights, biases = parameters(2, MIXED)
    x = inputs(2, 9, MIXED[0])
    tracked = mlp(x, weights, biases, backend=backend, precision=precision)
    with torch.no_grad():
        untracked = mlp(x, weights, biases, backend=backend, precision=precision)
    assert tracked.requires_grad
    assert not untracked.requires_grad
    assert torch.equal(tracked, untracked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_member_is_the_same_bits_alone_and_among_others(backend) -> None:
    """What makes a seed's run independent of its neighbours as far as products of this size go."""
    weights, biases = parameters(6, MIXED)
    x = inputs(6, 9, MIXED[0])
    together = mlp(x, weights, biases, backend=backend)
    alone = mlp(x[4:5], [w[4:5] for w in weights], [b[4:5] for b in biases], backend=backend)
    torch.testing.assert_close(together[4:5], alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(together[3:4], alone, rtol=1e-2, atol=1e-2)  # control: another member


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_passes_through(backend) -> None:
    """A diverged layer must show in the output: a ReLU computed as max(0, x) could turn nan into 0."""
    weights, biases = parameters(1, WIDE)
    x = inputs(1, 3, WIDE[0])
    x[0, 1, 0] = torch.nan
    y = mlp(x, weights, biases, backend=backend)
    assert y[0, 1].isnan().all()
    assert y[0, [0, 2]].isfinite().all()


# -- bfloat16


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_errs_by_its_rounding_and_no_more(backend) -> None:
    """bfloat16 has 8 significant bits: a rounding errs by at most 2^-9, and only a few are chained here."""
    weights, biases = parameters(2, (40, 128, 128, 64))
    x = inputs(2, 64, 40).requires_grad_()
    leaves = [x, *weights, *biases]
    exact = mlp(x, weights, biases, backend="reference")
    rounded = mlp(x, weights, biases, backend=backend, precision="bf16")
    assert rounded.dtype == torch.float32
    assert 2**-12 < relative_error(rounded, exact) < 2**-6
    exact_gradients = torch.autograd.grad(probe(exact), leaves)
    for actual, wanted in zip(torch.autograd.grad(probe(rounded), leaves), exact_gradients, strict=True):
        assert actual.dtype == torch.float32
        # Units whose input lies within the rounding of zero switch sides: gradients err more than values.
        assert relative_error(actual, wanted) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_leaves_narrow_products_alone(backend) -> None:
    weights, biases = parameters(2, NARROW)
    x = inputs(2, 9, NARROW[0])
    rounded, exact = (mlp(x, weights, biases, backend=backend, precision=p) for p in ("bf16", "float32"))
    assert torch.equal(rounded, exact)


# -- second derivatives


def test_the_reference_is_differentiable_twice() -> None:
    weights, biases = parameters(2, (3, 5, 2), torch.float64)
    x = inputs(2, 4, 3, torch.float64).requires_grad_()
    leaves = [x, *weights, *biases]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        return mlp(x, rest[:2], rest[2:], backend="reference")

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_onednn_refuses_a_second_derivative() -> None:
    """Even of a loss linear in the output, where PyTorch's own guard would silently drop the penalty."""
    weights, biases = parameters(1, WIDE)
    x = inputs(1, 4, WIDE[0]).requires_grad_()
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        with pytest.raises(RuntimeError, match="differentiable once: pass backend='reference'"):
            torch.autograd.grad(loss(mlp(x, weights, biases, backend="onednn")), x, create_graph=True)


# -- choice and refusal


def test_the_automatic_choice() -> None:
    weights, biases = parameters(2, WIDE)
    x = inputs(2, 9, WIDE[0])
    assert torch.equal(mlp(x, weights, biases), mlp(x, weights, biases, backend="onednn"))
    weights64, biases64 = parameters(2, WIDE, torch.float64)
    assert mlp(x.double(), weights64, biases64).dtype == torch.float64


def test_forced_onednn_names_what_it_needs() -> None:
    weights, biases = parameters(2, WIDE, torch.float64)
    with pytest.raises(ValueError, match=r"'onednn' needs float32 tensors on the CPU; got torch\.float64 on cpu"):
        mlp(inputs(2, 9, WIDE[0], torch.float64), weights, biases, backend="onednn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: mlp(x[0], w, b), r"mlp needs x \[E, B, n_0\].*got x \(9, 40\)"),
        (lambda x, w, b: mlp(x, w, b[:1]), "2 weights and 1 biases"),
        (lambda x, w, b: mlp(x, [], []), "0 weights and 0 biases"),
        (lambda x, w, b: mlp(x[..., :39], w, b), r"layer 0 needs weight \[2, n, 39\].*got \(2, 48, 40\)"),
        (lambda x, w, b: mlp(x[:1], w, b), r"layer 0 needs weight \[1, n, 40\]"),
        (lambda x, w, b: mlp(x, [w[0], w[1].mT], b), r"layer 1 needs weight \[2, n, 48\].*got \(2, 48, 64\)"),
        (lambda x, w, b: mlp(x, w, [b[0], b[1][:, :3]]), r"layer 1.*and bias \[2, n\].*\(2, 3\)"),
        (
            lambda x, w, b: mlp(x, w, b, backend="blas"),
            "backend must be 'auto', 'reference' or 'onednn', not 'blas'",
        ),
        (lambda x, w, b: mlp(x, w, b, precision="fp8"), "precision must be 'float32' or 'bf16', not 'fp8'"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    weights, biases = parameters(2, WIDE)
    with pytest.raises(ValueError, match=message):
        change(inputs(2, 9, WIDE[0]), weights, biases)
