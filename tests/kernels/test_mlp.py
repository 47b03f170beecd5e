"""The batched perceptrons: all back ends against `nn.Linear`, values and gradients, and their refusals."""

import math
import re
import sys
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.kernels.mlp import LayerNorm, mlp, mlp_vjp, numpy_mlp

# Layer widths on both sides of 32, where the kernel changes from narrow to wide products.
NARROW, MIXED, WIDE = (3, 8, 1), (17, 64, 48, 31, 33, 4), (40, 48, 64)
BACKENDS = ("reference", "fused", "onednn")
WITH_BF16 = ("reference", "onednn")
PLACES = ("none", "before", "after")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}

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


def layer_norm(
    members: int, sizes: tuple[int, ...], place: str, dtype: torch.dtype = torch.float32
) -> LayerNorm | None:
    """Scales near one and shifts near zero that require gradients; ``None`` for the place "none"."""
    draw = torch.Generator().manual_seed(2)

    def each() -> list[Tensor]:
        return [torch.randn(members, width, generator=draw, dtype=dtype) / 3 for width in sizes[1:-1]]

    if place == "none":
        return None
    scales = [(1 + scale).requires_grad_() for scale in each()]
    return LayerNorm(scales, [shift.requires_grad_() for shift in each()], place)


def all_of(weights: list[Tensor], biases: list[Tensor], norm: LayerNorm | None) -> list[Tensor]:
    return [*weights, *biases, *((*norm.scales, *norm.shifts) if norm else ())]


def linear_chains(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str = "relu", norm: LayerNorm | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and gradients of a fixed weighted sum of them, of ordinary PyTorch modules, one per member."""
    outputs, gradients = [], []
    for e in range(len(x)):
        layers: list[nn.Module] = []
        linears, norms = [], []
        for index, (w, b) in enumerate(zip(weights, biases, strict=True)):
            linears.append(nn.Linear(w.shape[2], w.shape[1], dtype=w.dtype))
            linears[-1].load_state_dict({"weight": w[e], "bias": b[e]})
            layers.append(linears[-1])
            if index == len(weights) - 1:
                break
            layers.append(ACTIVATIONS[activation]())
            if norm:
                norms.append(nn.LayerNorm(w.shape[1], dtype=w.dtype))
                norms[-1].load_state_dict({"weight": norm.scales[index][e], "bias": norm.shifts[index][e]})
                layers.insert(len(layers) - (norm.place == "before"), norms[-1])
        row = x[e].detach().requires_grad_()
        y = nn.Sequential(*layers)(row)
        outputs.append(y.detach())
        parts = [getattr(each, name) for kind in (linears, norms) for name in ("weight", "bias") for each in kind]
        leaves = [row, *parts]
        gradients.append(torch.autograd.grad(probe(y), leaves))
    return torch.stack(outputs), [torch.stack(column) for column in zip(*gradients, strict=True)]


def probe(y: Tensor) -> Tensor:
    """A scalar whose gradient differs from output to output."""
    return (y * torch.linspace(-1, 1, y.shape[-1] * y.shape[-2], dtype=y.dtype).view(y.shape[-2:])).sum()


@pytest.mark.parametrize("members", [1, 2, 6])
@pytest.mark.parametrize("sizes", [NARROW, MIXED, WIDE, (5, 3)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "place"), [("fused", "none"), *product(("reference", "onednn"), PLACES)])
def test_values_and_all_gradients_are_those_of_modules(backend, place, activation, sizes, members) -> None:
    weights, biases = parameters(members, sizes)
    norm = layer_norm(members, sizes, place)
    x = inputs(members, 9, sizes[0]).requires_grad_()
    expected, expected_gradients = linear_chains(x, weights, biases, activation, norm)
    y = mlp(x, weights, biases, activation=activation, norm=norm, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(probe(y), [x, *all_of(weights, biases, norm)])
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_blocks_of_rows_change_nothing(place, activation, rows, monkeypatch) -> None:
    """Blocks of eight rows: none of them full, one, one and a rest, and no rows at all."""
    monkeypatch.setattr(sys.modules["corollary.kernels.mlp"], "_BLOCK", 8 * max(MIXED[1:]))
    weights, biases = parameters(2, MIXED)
    norm = layer_norm(2, MIXED, place)
    x = inputs(2, rows, MIXED[0]).requires_grad_()
    expected, expected_gradients = linear_chains(x, weights, biases, activation, norm)
    y = mlp(x, weights, biases, activation=activation, norm=norm, backend="onednn")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(mlp(x, weights, biases, activation=activation, norm=norm, backend="onednn"), y)
    gradients = torch.autograd.grad(probe(y), [x, *all_of(weights, biases, norm)])
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tanh_network_of_one_unit_by_hand(backend) -> None:
    """y = 3 tanh(2x - 1) + 1/2, so dy/dx = 6 (1 - tanh(2x - 1)^2)."""
    x = torch.tensor([[[0.25], [2.0], [30.0]]], requires_grad=True)
    weights, biases = [torch.full((1, 1, 1), v) for v in (2.0, 3.0)], [torch.full((1, 1), v) for v in (-1.0, 0.5)]
    y = mlp(x, weights, biases, activation="tanh", backend=backend)
    inner = [math.tanh(2 * v - 1) for v in (0.25, 2.0, 30.0)]
    torch.testing.assert_close(y.flatten(), torch.tensor([3 * h + 0.5 for h in inner]), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([6 * (1 - h * h) for h in inner]), rtol=1e-5, atol=0)
    assert gradient[0, 2] == 0  # saturated


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_right_to_four_units_in_the_last_place(dtype) -> None:
    """Through a network with unit weights; the reference for float32 is float64's tanh."""
    x = torch.cat([torch.linspace(-10, 10, 20_001, dtype=dtype), torch.logspace(-30, 0, 300, dtype=dtype)])
    one, none = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    y = mlp(x.view(1, -1, 1), [one, one], [none, none], activation="tanh", backend="fused").flatten()
    torch.testing.assert_close(y.double(), torch.tanh(x.double()), rtol=4 * torch.finfo(dtype).eps, atol=0)


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
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_the_back_ends_agree_for_any_shape(members, batch, sizes, activation) -> None:
    weights, biases = parameters(members, sizes)
    x = inputs(members, batch, sizes[0]).requires_grad_()
    leaves = [x, *weights, *biases]
    results = []
    for backend in BACKENDS:
        y = mlp(x, weights, biases, activation=activation, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().mean(), leaves)])
    for result in results[1:]:
        for actual, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_input_expanded_to_all_members(backend) -> None:
    """An expanded axis gives what copies give, and its gradient is the sum over members."""
    weights, biases = parameters(3, MIXED)
    one = inputs(1, 9, MIXED[0]).requires_grad_()
    copies = one.detach().repeat(3, 1, 1).requires_grad_()
    y, y_copies = (mlp(x, weights, biases, backend=backend) for x in (one.expand(3, -1, -1), copies))
    torch.testing.assert_close(y, y_copies, rtol=1e-6, atol=1e-6)
    (gradient,), (by_member,) = (
        torch.autograd.grad(probe(y), one),
        torch.autograd.grad(probe(y_copies), copies),
    )
    torch.testing.assert_close(gradient, by_member.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["strided batch", "transposed"])
def test_memory_layout_of_the_input_does_not_matter(layout, backend) -> None:
    weights, biases = parameters(2, WIDE)
    x = inputs(2, 9, WIDE[0])
    other = x.mT.contiguous().mT if layout == "transposed" else torch.stack([x, x], 2)[:, :, 0]
    assert not other.is_contiguous()
    y, y_other = (mlp(rows, weights, biases, backend=backend) for rows in (x, other))
    torch.testing.assert_close(y_other, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("trained", ["x", "scales", "first shift", "last bias", "second weight"])
def test_only_the_asked_gradients_are_computed_through_normalised_layers(trained, place) -> None:
    weights, biases = parameters(2, MIXED)
    norm = layer_norm(2, MIXED, place)
    x = inputs(2, 9, MIXED[0])
    _, everything = linear_chains(x, weights, biases, norm=norm)
    n = len(weights)
    chosen = {
        "x": [0],
        "second weight": [2],
        "last bias": [2 * n],
        "scales": list(range(2 * n + 1, 3 * n)),
        "first shift": [3 * n],
    }[trained]
    leaves = [x, *all_of(weights, biases, norm)]
    for position, leaf in enumerate(leaves):
        leaf.requires_grad_(position in chosen)
    probe(mlp(x, weights, biases, norm=norm, backend="onednn")).backward()
    for position, leaf in enumerate(leaves):
        if position in chosen:
            torch.testing.assert_close(leaf.grad, everything[position], rtol=1e-4, atol=1e-4)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", ["fused", "onednn"])
@pytest.mark.parametrize("trained", ["x", "biases", "weights", "last layer", "first weight", "middle bias"])
def test_only_the_asked_gradients_are_computed(trained, backend) -> None:
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
    probe(mlp(x, weights, biases, backend=backend)).backward()
    for position, leaf in enumerate(leaves):
        if position in chosen:
            torch.testing.assert_close(leaf.grad, everything[position], rtol=1e-5, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("backend", "precision"), [*((b, "float32") for b in BACKENDS), *((b, "bf16") for b in WITH_BF16)]
)
def test_without_gradients_the_values_are_the_same_bits(backend, precision, activation) -> None:
    weights, biases = parameters(2, MIXED)
    x = inputs(2, 9, MIXED[0])
    tracked = mlp(x, weights, biases, activation=activation, backend=backend, precision=precision)
    with torch.no_grad():
        untracked = mlp(x, weights, biases, activation=activation, backend=backend, precision=precision)
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "place"), [("fused", "none"), *product(("reference", "onednn"), PLACES)])
def test_not_a_number_passes_through(backend, place, activation) -> None:
    """A diverged layer must show in the output: a ReLU computed as max(0, x) could turn nan into 0."""
    weights, biases = parameters(1, WIDE)
    x = inputs(1, 3, WIDE[0])
    x[0, 1, 0] = torch.nan
    y = mlp(x, weights, biases, activation=activation, norm=layer_norm(1, WIDE, place), backend=backend)
    assert y[0, 1].isnan().all()
    assert y[0, [0, 2]].isfinite().all()


# -- bfloat16


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("backend", WITH_BF16)
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


@pytest.mark.parametrize("backend", WITH_BF16)
def test_bf16_leaves_narrow_products_alone(backend) -> None:
    weights, biases = parameters(2, NARROW)
    x = inputs(2, 9, NARROW[0])
    rounded, exact = (mlp(x, weights, biases, backend=backend, precision=p) for p in ("bf16", "float32"))
    assert torch.equal(rounded, exact)


# -- derivatives in float64, second derivatives


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "place"), [("fused", "none"), *product(["reference"], PLACES)])
def test_gradients_are_those_of_finite_differences(backend, place, activation) -> None:
    weights, biases = parameters(2, (3, 5, 4, 2), torch.float64)
    norm = layer_norm(2, (3, 5, 4, 2), place, torch.float64)
    x = inputs(2, 4, 3, torch.float64).requires_grad_()

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        own = LayerNorm(rest[6:8], rest[8:], place) if norm else None
        return mlp(x, rest[:3], rest[3:6], activation=activation, norm=own, backend=backend)

    leaves = [x, *all_of(weights, biases, norm)]
    assert torch.autograd.gradcheck(function, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["fused", "onednn"])
def test_single_nodes_refuse_a_second_derivative(backend) -> None:
    """Even of a loss linear in the output, where PyTorch's own guard would silently drop the penalty."""
    weights, biases = parameters(1, WIDE)
    x = inputs(1, 4, WIDE[0]).requires_grad_()
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        with pytest.raises(RuntimeError, match=f"'{backend}' is differentiable once: pass backend='reference'"):
            torch.autograd.grad(loss(mlp(x, weights, biases, backend=backend)), x, create_graph=True)


def test_the_reference_works_under_function_transforms() -> None:
    """The Jacobian of each row by `torch.func` against one backward pass per output."""
    weights, biases = parameters(1, (3, 5, 2), torch.float64)
    x = inputs(1, 4, 3, torch.float64)

    def row(x: Tensor) -> Tensor:
        return mlp(x.view(1, 1, 3), weights, biases, activation="tanh", backend="reference").view(2)

    jacobians = torch.func.vmap(torch.func.jacrev(row))(x[0])
    x.requires_grad_()
    y = mlp(x, weights, biases, activation="tanh", backend="reference")
    for output in range(2):
        (gradient,) = torch.autograd.grad(y[..., output].sum(), x, retain_graph=True)
        torch.testing.assert_close(jacobians[:, output], gradient[0])


# -- arrays


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(17, 64, 64, 6), MIXED, (5, 3)])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("members", [1, 3])
def test_arrays_give_what_the_reference_gives(members, rows, sizes, activation) -> None:
    weights, biases = parameters(members, sizes)
    x = inputs(members, rows, sizes[0])
    arrays = [x.numpy()], [w.detach().numpy() for w in weights], [b.detach().numpy() for b in biases]
    before = [[array.copy() for array in group] for group in arrays]
    y = numpy_mlp(arrays[0][0], arrays[1], arrays[2], activation)
    assert y.dtype == np.float32
    expected = mlp(x, weights, biases, activation=activation, backend="reference").detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert all(
        np.array_equal(a, b) for one, two in zip(arrays, before, strict=True) for a, b in zip(one, two, strict=True)
    )
    if len(sizes) > 2:  # control: the other activation
        (other,) = set(ACTIVATIONS) - {activation}
        assert np.abs(numpy_mlp(arrays[0][0], arrays[1], arrays[2], other) - expected).max() > 0.01


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_arrays_pass_not_a_number_through(activation) -> None:
    weights, biases = parameters(1, NARROW, torch.float64)
    x = np.ones((1, 2, 3))
    x[0, 1, 2] = np.nan
    y = numpy_mlp(x, [w.detach().numpy() for w in weights], [b.detach().numpy() for b in biases], activation)
    assert y.dtype == np.float64
    assert np.isnan(y[0, :, 0]).tolist() == [False, True]


# -- choice and refusal


@pytest.mark.parametrize(
    ("sizes", "rows", "dtype", "precision", "node"),
    [
        (WIDE, 9, torch.float32, "float32", "_Fused"),
        ((17, 256, 256, 6), 63, torch.float32, "float32", "_Fused"),
        ((17, 256, 256, 6), 64, torch.float32, "float32", "_OneDNN"),  # 64 * 256^2 = 2^22
        ((17, 128, 128, 6), 256, torch.float32, "float32", "_OneDNN"),
        ((17, 256, 6), 1024, torch.float32, "float32", "_Fused"),  # large but nowhere wide on both sides
        ((17, 256, 256, 6), 64, torch.float64, "float32", "_Fused"),
        (WIDE, 9, torch.float32, "bf16", "_OneDNN"),
        (WIDE, 9, torch.float64, "bf16", "Add"),
        ((3, 2), 9, torch.bfloat16, "float32", "Baddbmm"),
    ],
)
def test_the_automatic_choice(sizes, rows, dtype, precision, node, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    weights, biases = parameters(1, sizes, dtype)
    y = mlp(inputs(1, rows, sizes[0], dtype), weights, biases, precision=precision)
    assert y.dtype == dtype
    assert y.grad_fn.name().startswith(node)


@pytest.mark.parametrize("threads", [2, 16])
def test_with_more_threads_products_must_be_twice_as_large(threads, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weights, biases = parameters(1, (17, 256, 256, 6))
    for rows, node in ((127, "_Fused"), (128, "_OneDNN")):
        assert mlp(inputs(1, rows, 17), weights, biases).grad_fn.name().startswith(node)


@pytest.mark.parametrize(("dtype", "node"), [(torch.float32, "_OneDNN"), (torch.float64, "Add|Baddbmm")])
def test_the_automatic_choice_with_a_normalisation(dtype, node) -> None:
    weights, biases = parameters(1, NARROW, dtype)
    y = mlp(inputs(1, 9, NARROW[0], dtype), weights, biases, norm=layer_norm(1, NARROW, "after", dtype))
    assert re.match(node, y.grad_fn.name())


def test_compiled_functions_take_the_reference() -> None:
    weights, biases = parameters(2, WIDE)
    x = inputs(2, 9, WIDE[0])
    compiled = torch.compile(lambda x: mlp(x, weights, biases, activation="tanh"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), mlp(x, weights, biases, activation="tanh", backend="reference"))


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "float32"), (torch.float32, "bf16"), (torch.float64, "bf16")]
)
def test_forced_fused_names_what_it_needs(dtype, precision) -> None:
    weights, biases = parameters(2, WIDE, dtype)
    with pytest.raises(
        ValueError, match=f"'fused' needs float32 or float64.*; got {dtype} and precision '{precision}'"
    ):
        mlp(inputs(2, 9, WIDE[0], dtype), weights, biases, backend="fused", precision=precision)


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
            "backend must be 'auto', 'reference', 'fused' or 'onednn', not 'blas'",
        ),
        (lambda x, w, b: mlp(x, w, b, activation="gelu"), "mlp activation must be 'relu' or 'tanh', not 'gelu'"),
        (lambda x, w, b: numpy_mlp(x, w, b, "gelu"), "numpy_mlp activation must be 'relu' or 'tanh', not 'gelu'"),
        (lambda x, w, b: mlp(x, w, b, precision="fp8"), "precision must be 'float32' or 'bf16', not 'fp8'"),
        (
            lambda x, w, b: mlp(x, w, b, norm=layer_norm(2, WIDE, "before"), backend="fused"),
            "'fused' takes no norm: pass 'auto', 'reference' or 'onednn'",
        ),
        (
            lambda x, w, b: mlp(x, w, b, norm=layer_norm(2, WIDE, "between")),
            "norm.place must be 'before' or 'after', not 'between'",
        ),
        (
            lambda x, w, b: mlp(x, w, b, norm=layer_norm(2, (40, 47, 64), "after")),
            r"norm.scales needs \[\(2, 48\)\]; got \[\(2, 47\)\]",
        ),
        (
            lambda x, w, b: mlp(x, w, b, norm=layer_norm(2, WIDE, "after")._replace(shifts=[])),
            r"norm.shifts needs \[\(2, 48\)\]; got \[\]",
        ),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    weights, biases = parameters(2, WIDE)
    with pytest.raises(ValueError, match=message):
        change(inputs(2, 9, WIDE[0]), weights, biases)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gpu_gives_what_the_cpu_gives(activation) -> None:
    weights, biases = parameters(3, MIXED, torch.float64)
    x = inputs(3, 9, MIXED[0], torch.float64).requires_grad_()
    leaves = [x, *weights, *biases]
    y = mlp(x, weights, biases, activation=activation, backend="reference")
    on_gpu = mlp(x.cuda(), [w.cuda() for w in weights], [b.cuda() for b in biases], activation=activation)
    torch.testing.assert_close(on_gpu.cpu(), y)
    gradients = zip(
        torch.autograd.grad(probe(on_gpu.cpu()), leaves), torch.autograd.grad(probe(y), leaves), strict=True
    )
    for actual, wanted in gradients:
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"), [(7, 5, torch.float64), (7, 5, torch.float32), (64, 256, torch.float32)], ids=str
)
def test_the_vector_jacobian_product_is_autograds(activation, rows, width, dtype) -> None:
    """Narrow networks take the fused back end, the last case oneDNN where it exists."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) / width**0.5

    sizes = [(width, 3), (width, width), (2, width)]
    weights, biases = [draw(2, *size) for size in sizes], [draw(2, size[0]) for size in sizes]
    x, gradient = draw(2, rows, 3), draw(2, rows, 2)
    y, pull = mlp_vjp(x, weights, biases, activation=activation)
    parameters = [p.clone().requires_grad_() for p in (*weights, *biases)]
    expected = mlp(x, parameters[:3], parameters[3:], activation=activation, backend="reference")
    assert not y.requires_grad
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected, parameters, gradient)
    found = pull(gradient)
    assert len(found) == 6
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    doubled = mlp_vjp(x, weights, biases, activation=activation)[1](2 * gradient)
    assert not torch.allclose(found[0], doubled[0])  # control
