r"""Multilayer perceptrons over a batch of members: one network per seed and per critic, evaluated together.

For each member e, with h_0 = x[e] and an activation f, relu(z) = max(0, z) or tanh(z), between layers,

    h_{l+1} = f(h_l W_l[e]^T + b_l[e])     (l < L-1),      y[e] = h_{L-1} W_{L-1}[e]^T + b_{L-1}[e].

Backwards, f'(z) is read off h = f(z): 1 where h > 0 for ReLU, 1 - h^2 for tanh.

With a :class:`LayerNorm` the hidden layers are f(N(.)) or N(f(.)) in the place of f(.), N being
:class:`torch.nn.LayerNorm`: ``(z - mean z) / sqrt(var z + 1e-5) * scale + shift`` over each row's entries.

Back ends
---------
``reference``  a chain of :func:`torch.baddbmm`; every device and dtype, differentiable any number of times, works
               under :mod:`torch.func` and ``torch.compile``.
``fused``      the same products as one autograd node with a hand-written backward pass; every device, float32 and
               float64, no LayerNorm, differentiable once. Saves autograd's bookkeeping per operation, which shows in
               narrow networks. On the CPU tanh is NumPy's: right to 4 units in the last place and several times as
               fast.
``onednn``     CPU, float32, differentiable once. One autograd node too, and products go through oneDNN instead of
               the BLAS that PyTorch links. On processors with AVX-512 that are not Intel's, that BLAS stays on its
               256-bit path, so wide float32 products run about twice as fast here (``benchmarks/mlp.py``); the
               arithmetic is ordinary float32 in both.

``auto`` takes ``reference`` under ``torch.compile``, ``onednn`` where it applies and one product is large enough
(2^22 multiplications per member with one thread, twice as many with more: 256 rows at width 128 or 181), and ``fused``
elsewhere; with a LayerNorm ``onednn`` where it applies and ``reference`` elsewhere.

With ``precision="bf16"`` the wide products take bfloat16 inputs and accumulate in float32; parameters, biases' sums,
gradients of parameters and the narrow first and last layers stay float32. An opt-in: it changes results. ``fused``
has no such products; ``auto`` then takes ``onednn`` where it applies and ``reference`` elsewhere.

To act in an environment, one or a few rows at a time, :func:`numpy_mlp` is the same forward pass on arrays: there
PyTorch's cost per operation exceeds the arithmetic.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice, product, zip_longest
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Activation = Literal["relu", "tanh"]
Backend = Literal["auto", "reference", "fused", "onednn"]
Place = Literal["none", "before", "after"]
T = TypeVar("T")

# Below this width on either side a product is too thin to repay oneDNN's set-up (benchmarks/mlp.py).
_NARROW = 32
# Multiplications B n_{l+1} n_l of a member's largest product from which on `onednn` is no slower than `fused` with one
# thread; with two it is twice that. The two break even there at widths 64, 128 and 256 alike (benchmarks/mlp.py).
_ONEDNN_PAYS = 2**22
# Numbers in the widest layer's output for one block of rows of `onednn`: 1 MiB, so that a block's outputs stay in the
# processor's cache from layer to layer, and memory that one block has given back serves the next.
_BLOCK = 2**18
_EPS = 1e-5  # torch.nn.LayerNorm's


class LayerNorm(NamedTuple):
    """Normalisation of every hidden layer.

    Attributes:
        scales, shifts: one tensor per hidden layer, ``[E, n_l]``.
        place: ``"before"`` or ``"after"`` the activation.
    """

    scales: Sequence[Tensor]
    shifts: Sequence[Tensor]
    place: Literal["before", "after"]


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: Activation = "relu",
    norm: LayerNorm | None = None,
    backend: Backend = "auto",
    precision: Literal["float32", "bf16"] = "float32",
) -> Tensor:
    """Evaluate E multilayer perceptrons, linear in the last layer (formula in the module's head).

    Args:
        x: inputs ``[E, B, n_0]``; an expanded (stride 0) first axis is fine and is not copied.
        weights: one tensor per layer, ``[E, n_{l+1}, n_l]``, laid out as in :class:`torch.nn.Linear`.
        biases: one tensor per layer, ``[E, n_{l+1}]``.
        activation: of the hidden layers.
        norm: normalisation of the hidden layers.
        backend: see the module's head.
        precision: ``"bf16"`` rounds the inputs of wide products to bfloat16.

    Returns:
        Outputs ``[E, B, n_L]``.

    Raises:
        ValueError: if the shapes do not chain, or a forced back end cannot take these tensors.
        RuntimeError: in a backward pass with ``create_graph=True`` through ``"fused"`` or ``"onednn"``.
    """
    _check_shapes(x, weights, biases, norm)
    if activation not in ("relu", "tanh"):
        raise ValueError(f"mlp activation must be 'relu' or 'tanh', not {activation!r}.")
    if precision not in ("float32", "bf16"):
        raise ValueError(f"mlp precision must be 'float32' or 'bf16', not {precision!r}.")
    bf16 = precision == "bf16"
    if backend == "auto":
        backend = _automatic(x, weights, bf16, norm is not None)
    if backend == "reference":
        return _reference(x, weights, biases, activation, bf16, norm)
    parameters = (*weights, *biases, *(() if norm is None else (*norm.scales, *norm.shifts)))
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    outputs: Tensor
    if backend == "fused":
        if norm is not None:
            raise ValueError("mlp backend 'fused' takes no norm: pass 'auto', 'reference' or 'onednn'.")
        if bf16 or not _fused_takes(x):
            raise ValueError(
                "mlp backend 'fused' needs float32 or float64 tensors, precision 'float32' and no torch.compile; "
                f"got {x.dtype} and precision {precision!r}."
            )
        if not tracked:
            return _fused_forward(x, weights, biases, activation)[-1]
        outputs = _Fused.apply(activation, len(weights), x, *parameters)  # type: ignore[no-untyped-call]
        return outputs
    if backend != "onednn":
        raise ValueError(f"mlp backend must be 'auto', 'reference', 'fused' or 'onednn', not {backend!r}.")
    if not _onednn_takes(x):
        raise ValueError(f"mlp backend 'onednn' needs float32 tensors on the CPU; got {x.dtype} on {x.device}.")
    shape = _Shape(activation, bf16, "none" if norm is None else norm.place, len(weights))
    if tracked:
        outputs = _OneDNN.apply(shape, x, *parameters)  # type: ignore[no-untyped-call]
        return outputs
    return _forward_blocks(shape, x, parameters, lambda outputs: None)


def mlp_vjp(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, activation: Activation = "relu"
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Evaluate the networks of :func:`mlp` and return their vector-Jacobian product, both outside autograd.

    For losses whose derivative in the outputs is known in closed form: autograd's engine takes about as long as the
    products of a narrow network.

    Args:
        x: inputs ``[E, B, n_0]``.
        weights: one tensor per layer, ``[E, n_{l+1}, n_l]``.
        biases: one tensor per layer, ``[E, n_{l+1}]``.
        activation: of the hidden layers.

    Returns:
        Outputs ``[E, B, n_L]``, and a function from the loss's derivative in them to its derivatives in the weights,
        then in the biases.
    """
    _check_shapes(x, weights, biases)
    weights, biases = [w.detach() for w in weights], [b.detach() for b in biases]
    if _automatic(x, weights, bf16=False, normalised=False) == "fused":
        *hidden, y = _fused_forward(x, weights, biases, activation)

        def pull(gradient: Tensor) -> list[Tensor]:
            needed = [True] * len(weights)
            _, *found = _fused_backward(gradient, [x, *hidden], weights, activation, needed, needed, need_x=False)
            return [each for part in found for each in part if each is not None]

        return y, pull
    parameters = [p.requires_grad_() for p in (*weights, *biases)]
    with torch.enable_grad():
        outputs = mlp(x, weights, biases, activation=activation)
    return outputs.detach(), lambda gradient: list(torch.autograd.grad(outputs, parameters, gradient))


def numpy_mlp(
    x: NDArray[Any],
    weights: Sequence[NDArray[Any]],
    biases: Sequence[NDArray[Any]],
    activation: Activation = "relu",
) -> NDArray[Any]:
    """Evaluate the networks of :func:`mlp` on float arrays of one dtype, without gradients.

    Args:
        x: inputs ``[E, B, n_0]``.
        weights: one array per layer, ``[E, n_{l+1}, n_l]``; views of parameters, ``p.detach().numpy()``, will do.
        biases: one array per layer, ``[E, n_{l+1}]``.
        activation: of the hidden layers.

    Returns:
        Outputs ``[E, B, n_L]``.
    """
    if activation not in ("relu", "tanh"):
        raise ValueError(f"numpy_mlp activation must be 'relu' or 'tanh', not {activation!r}.")
    h, last = x, len(weights) - 1
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = np.matmul(h, w.swapaxes(1, 2))
        h += b[:, None]
        if layer < last:
            if activation == "relu":
                np.maximum(h, 0, out=h)
            else:
                np.tanh(h, out=h)
    return h


def _automatic(x: Tensor, weights: Sequence[Tensor], bf16: bool, normalised: bool) -> Backend:
    if torch.compiler.is_compiling():
        return "reference"
    pays = _ONEDNN_PAYS * min(2, torch.get_num_threads())
    large = any(_wide(w) and x.shape[1] * w.shape[1] * w.shape[2] >= pays for w in weights)
    if (large or bf16 or normalised) and _onednn_takes(x):
        return "onednn"
    return "fused" if _fused_takes(x) and not bf16 and not normalised else "reference"


def _check_shapes(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: LayerNorm | None = None
) -> None:
    if x.ndim != 3 or not weights or len(weights) != len(biases):
        raise ValueError(
            f"mlp needs x [E, B, n_0] and one bias per weight; got x {tuple(x.shape)}, "
            f"{len(weights)} weights and {len(biases)} biases."
        )
    members, width = x.shape[0], x.shape[2]
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.ndim != 3 or w.shape[0] != members or w.shape[2] != width or b.shape != w.shape[:2]:
            raise ValueError(
                f"mlp layer {layer} needs weight [{members}, n, {width}] and bias [{members}, n]; "
                f"got {tuple(w.shape)} and {tuple(b.shape)}."
            )
        width = w.shape[1]
    if norm is None:
        return
    if norm.place not in ("before", "after"):
        raise ValueError(f"mlp norm.place must be 'before' or 'after', not {norm.place!r}.")
    expected = [tuple(b.shape) for b in biases[:-1]]
    for name, found in (("scales", norm.scales), ("shifts", norm.shifts)):
        if [tuple(each.shape) for each in found] != expected:
            raise ValueError(f"mlp norm.{name} needs {expected}; got {[tuple(each.shape) for each in found]}.")


# ---------------------------------------------------------------------------------------------------- reference


def _reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: Activation,
    bf16: bool,
    norm: LayerNorm | None,
) -> Tensor:
    h = x
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if bf16 and _wide(w):
            product = torch.bmm(h.bfloat16(), w.bfloat16().mT).to(h.dtype)
            h = product + b.unsqueeze(1)
        else:
            h = torch.baddbmm(b.unsqueeze(1), h, w.mT)
        if layer < len(weights) - 1:
            h = finish_hidden(h, layer, activation, norm)
    return h


def finish_hidden(z: Tensor, layer: int, activation: Activation, norm: LayerNorm | None) -> Tensor:
    """Turn hidden layer number `layer`'s product ``z [E, B, n]`` into its output: activation and normalisation."""
    if norm is not None and norm.place == "before":
        z = _normalised(z, norm.scales[layer], norm.shifts[layer])
    h = torch.relu(z) if activation == "relu" else torch.tanh(z)
    if norm is not None and norm.place == "after":
        h = _normalised(h, norm.scales[layer], norm.shifts[layer])
    return h


def _normalised(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift.unsqueeze(1), F.layer_norm(z, z.shape[-1:], eps=_EPS), scale.unsqueeze(1))


# --------------------------------------------------------------------------- shared by the hand-written passes


def _activate_(h: Tensor, activation: Activation) -> Tensor:
    """Apply the activation in place, outside autograd's sight."""
    if activation == "relu":
        return h.relu_()
    if h.device.type == "cpu":
        array = h.numpy()
        np.tanh(array, out=array)  # PyTorch's takes longer than the product before it
        return h
    return h.tanh_()


def _activation_backward_(grad: Tensor, h: Tensor, activation: Activation) -> Tensor:
    """Multiply `grad` in place by the activation's derivative, read off the activation's output `h`."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)
    else:
        torch.ops.aten.tanh_backward.grad_input(grad, h, grad_input=grad)
    return grad


def _refuse_second_derivative(backend: Backend) -> None:
    # Not `once_differentiable`: it raises only for a second backward pass that reaches this node, and silently
    # drops a penalty on the gradient of a loss that is linear in the network's output.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"mlp backend {backend!r} is differentiable once: pass backend='reference' for create_graph=True."
        )


# -------------------------------------------------------------------------------------------------------- fused


def _fused_takes(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def _fused_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: Activation
) -> list[Tensor]:
    """Return every layer's output (after its activation); the last one is the networks'."""
    outputs: list[Tensor] = []
    h = x
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = torch.baddbmm(b.unsqueeze(1), h, w.mT)
        if layer < len(weights) - 1:
            h = _activate_(h, activation)
        outputs.append(h)
    return outputs


class _Fused(torch.autograd.Function):
    """All members' networks as one node of products batched over members; saves the layers' outputs."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, n_layers: int, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:n_layers], parameters[n_layers:]
        *hidden, y = _fused_forward(x, weights, biases, activation)
        ctx.activation, ctx.n_layers = activation, n_layers
        ctx.save_for_backward(x, *hidden, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative("fused")
        n_layers, saved = ctx.n_layers, ctx.saved_tensors
        need_x, *need = ctx.needs_input_grad[2:]
        grad_x, grad_w, grad_b = _fused_backward(
            grads[0], saved[:n_layers], saved[n_layers:], ctx.activation, need[:n_layers], need[n_layers:], need_x
        )
        return (None, None, grad_x, *grad_w, *grad_b)


def _fused_backward(
    g: Tensor,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    activation: Activation,
    need_w: Sequence[bool],
    need_b: Sequence[bool],
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Return the needed gradients of x, weights and biases, from that of the outputs and every layer's input."""
    n_layers = len(weights)
    first = next((layer for layer in range(n_layers) if need_w[layer] or need_b[layer]), n_layers)
    grad_w: list[Tensor | None] = [None] * n_layers
    grad_b: list[Tensor | None] = [None] * n_layers
    grad_x = None
    for layer in reversed(range(n_layers)):
        w, h = weights[layer], inputs[layer]
        if need_w[layer]:
            grad_w[layer] = torch.bmm(g.mT, h)
        if need_b[layer]:
            grad_b[layer] = g.sum(1)
        if layer > 0 and (need_x or layer > first):
            g = _activation_backward_(torch.bmm(g, w), h, activation)
        elif layer == 0 and need_x:
            grad_x = torch.bmm(g, w)
        else:
            break
    return grad_x, grad_w, grad_b


# ------------------------------------------------------------------------------------------------------- oneDNN


@cache
def _onednn_available() -> bool:
    """Whether this build of PyTorch has the fused oneDNN product, found by trying it once."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        one = torch.ones(1, 1)
        torch.ops.mkldnn._linear_pointwise(one, one, one[0], "relu", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


def _onednn_takes(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and _onednn_available()
    )


def _wide(weight: Tensor) -> bool:
    return min(weight.shape[-2:]) >= _NARROW


def _matmul_t(a: Tensor, b: Tensor, bf16: bool) -> Tensor:
    """``a b^T`` for a wide product, through oneDNN."""
    if bf16:
        return (a.bfloat16() @ b.bfloat16().mT).float()
    exact: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return exact


class _Shape(NamedTuple):
    """What the passes below must know beside the tensors, which are all weights, then biases, scales, shifts."""

    activation: Activation
    bf16: bool
    place: Place
    n_layers: int

    def parts(self, parameters: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T], Sequence[T]]:
        """Return weights, biases, scales and shifts; the last two are empty without a LayerNorm."""
        n, rest = self.n_layers, (len(parameters) - 2 * self.n_layers) // 2
        middle = 2 * n + rest
        return parameters[:n], parameters[n : 2 * n], parameters[2 * n : middle], parameters[middle:]

    @property
    def n_kept(self) -> int:
        """How many tensors a hidden layer leaves for the backward pass, its output the first of them."""
        return 1 if self.place == "none" else 4


def _forward(shape: _Shape, x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Evaluate one member: what each hidden layer leaves for the backward pass, then the network's output."""
    weights, biases, scales, shifts = shape.parts(parameters)
    outputs: list[Tensor] = []
    h = x
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if not _wide(w):
            h = torch.addmm(b, h, w.mT)
        elif shape.bf16:
            h = _matmul_t(h, w, bf16=True).add_(b)
        else:
            # Not fused with the product's "relu" attribute: that one turns nan into 0 and hides a diverged network.
            h = torch.ops.mkldnn._linear_pointwise(h, w, b, "none", [], "")
        if layer == shape.n_layers - 1:
            outputs.append(h)
        elif shape.place == "none":
            outputs.append(_activate_(h, shape.activation))
        else:
            outputs += _hidden_normalised(shape, h, scales[layer], shifts[layer])
            h = outputs[-4]
    return outputs


def _hidden_normalised(shape: _Shape, z: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    """Return a hidden layer's output, what was normalised, and its rows' means and inverse deviations."""
    inner = z if shape.place == "before" else _activate_(z, shape.activation)
    h, mean, inverse_std = torch.native_layer_norm(inner, inner.shape[-1:], scale, shift, _EPS)
    return [_activate_(h, shape.activation) if shape.place == "before" else h, inner, mean, inverse_std]


def _blocks(n_rows: int, weights: Sequence[Tensor]) -> list[slice]:
    """Split a batch so that the widest layer's output for one block has at most :data:`_BLOCK` numbers."""
    size = max(1, _BLOCK // max(w.shape[1] for w in weights))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def _forward_blocks(
    shape: _Shape, x: Tensor, parameters: Sequence[Tensor], keep: Callable[[list[Tensor]], object]
) -> Tensor:
    """Return all members' outputs; `keep` is handed what the hidden layers leave, member by member, block by block."""
    weights = parameters[: shape.n_layers]
    y = x.new_empty(*x.shape[:2], weights[-1].shape[1])
    for e, own in enumerate(zip(*(p.unbind(0) for p in parameters), strict=True)):
        for rows in _blocks(x.shape[1], weights):
            *hidden, y[e, rows] = _forward(shape, x[e, rows], own)
            keep(hidden)
    return y


class _OneDNN(torch.autograd.Function):
    """All members' networks as one node, block of rows by block of rows: saves what the hidden layers leave."""

    @staticmethod
    def forward(ctx: Any, shape: _Shape, x: Tensor, *parameters: Tensor) -> Tensor:
        hidden: list[Tensor] = []
        y = _forward_blocks(shape, x, parameters, hidden.extend)
        ctx.shape = shape
        ctx.save_for_backward(x, *parameters, *hidden)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative("onednn")
        (grad,) = grads
        shape: _Shape = ctx.shape
        need_x, *need = ctx.needs_input_grad[1:]
        x, *rest = ctx.saved_tensors
        parameters, kept = rest[: len(need)], iter(rest[len(need) :])
        weights, _, scales, shifts = shape.parts(parameters)
        found = [torch.empty_like(p) if n else None for p, n in zip(parameters, need, strict=True)]
        grad_w, grad_b, grad_scale, grad_shift = shape.parts(found)
        grad_x = torch.empty(x.shape, dtype=x.dtype) if need_x else None
        if x.shape[1] == 0:  # oneDNN refuses products over no rows
            return (None, grad_x, *(None if each is None else each.zero_() for each in found))
        wanted = zip_longest(*shape.parts(need), fillvalue=False)
        first = next((layer for layer, any_of in enumerate(wanted) if any(any_of)), shape.n_layers)
        for e, rows in product(range(x.shape[0]), _blocks(x.shape[1], weights)):
            hidden = [list(islice(kept, shape.n_kept)) for _ in weights[1:]]
            put = Tensor.copy_ if rows.start == 0 else Tensor.add_
            g = grad[e, rows]
            for layer in reversed(range(shape.n_layers)):
                if layer < shape.n_layers - 1:
                    if shape.place == "none":
                        g = _activation_backward_(g, hidden[layer][0], shape.activation)
                    else:
                        scale, shift = scales[layer][e], shifts[layer][e]
                        g, *moved = _hidden_normalised_backward(shape, g, hidden[layer], scale, shift)
                        for total, part in zip((grad_scale[layer], grad_shift[layer]), moved, strict=True):
                            if total is not None:
                                put(total[e], part)
                w, h = weights[layer][e], hidden[layer - 1][0] if layer > 0 else x[e, rows]
                wide = _wide(w)
                if (gw := grad_w[layer]) is not None:
                    if wide:
                        put(gw[e], _matmul_t(g.mT, h.mT, shape.bf16))
                    elif h.shape[1] < g.shape[1]:  # BLAS is twice as fast with the long side last
                        put(gw[e], (h.mT @ g).mT)
                    else:
                        put(gw[e], g.mT @ h)
                if (gb := grad_b[layer]) is not None:
                    put(gb[e], g.sum(0))
                if layer > 0 and (need_x or layer > first):
                    g = _matmul_t(g, w.mT, shape.bf16) if wide else g @ w
                elif layer == 0 and grad_x is not None:
                    grad_x[e, rows] = g @ w
                else:
                    break
        return (None, grad_x, *found)


def _hidden_normalised_backward(
    shape: _Shape, g: Tensor, kept: Sequence[Tensor], scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives in a hidden layer's product, scale and shift, from that in its output (overwritten)."""
    h, inner, mean, inverse_std = kept
    if shape.place == "before":
        g = _activation_backward_(g, h, shape.activation)
    g, g_scale, g_shift = torch.ops.aten.native_layer_norm_backward(
        g, inner, inner.shape[-1:], mean, inverse_std, scale, shift, [True, True, True]
    )
    if shape.place == "after":
        g = _activation_backward_(g, inner, shape.activation)
    return g, g_scale, g_shift
