r"""Multilayer perceptrons over a batch of members: one network per seed and per critic, evaluated together.

For each member e, with h_0 = x[e] and ReLU between layers,

    h_{l+1} = relu(h_l W_l[e]^T + b_l[e])     (l < L-1),      y[e] = h_{L-1} W_{L-1}[e]^T + b_{L-1}[e].

Back ends
---------
``reference``  a chain of :func:`torch.baddbmm`; every device and dtype, differentiable any number of times.
``onednn``     CPU, float32, differentiable once. The whole network is one autograd node, and products go through
               oneDNN instead of the BLAS that PyTorch links. On processors with AVX-512 that are not Intel's, that
               BLAS stays on its 256-bit path, so float32 products run about twice as fast here
               (``benchmarks/mlp.py``); the arithmetic is ordinary float32 in both.

``auto`` takes ``onednn`` where it applies and ``reference`` elsewhere (GPU, float64, under ``torch.compile``).

With ``precision="bf16"`` the wide products take bfloat16 inputs and accumulate in float32; parameters, biases' sums,
gradients of parameters and the narrow first and last layers stay float32. An opt-in: it changes results.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "onednn"]

# Below this width on either side a product is too thin to repay oneDNN's set-up (benchmarks/mlp.py).
_NARROW = 32


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    backend: Backend = "auto",
    precision: Literal["float32", "bf16"] = "float32",
) -> Tensor:
    """Evaluate E multilayer perceptrons with ReLU hidden layers (formula in the module's head).

    Args:
        x: inputs ``[E, B, n_0]``; an expanded (stride 0) first axis is fine and is not copied.
        weights: one tensor per layer, ``[E, n_{l+1}, n_l]``, laid out as in :class:`torch.nn.Linear`.
        biases: one tensor per layer, ``[E, n_{l+1}]``.
        backend: see the module's head.
        precision: ``"bf16"`` rounds the inputs of wide products to bfloat16.

    Returns:
        Outputs ``[E, B, n_L]``.

    Raises:
        ValueError: if the shapes do not chain, or a forced back end cannot take these tensors.
        RuntimeError: in a backward pass with ``create_graph=True`` through ``"onednn"``.
    """
    _check_shapes(x, weights, biases)
    if precision not in ("float32", "bf16"):
        raise ValueError(f"mlp precision must be 'float32' or 'bf16', not {precision!r}.")
    if backend == "auto":
        backend = "onednn" if _onednn_takes(x) else "reference"
    if backend == "reference":
        return _reference(x, weights, biases, precision)
    if backend != "onednn":
        raise ValueError(f"mlp backend must be 'auto', 'reference' or 'onednn', not {backend!r}.")
    if not _onednn_takes(x):
        raise ValueError(f"mlp backend 'onednn' needs float32 tensors on the CPU; got {x.dtype} on {x.device}.")
    bf16 = precision == "bf16"
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in (*weights, *biases))):
        outputs: Tensor = _OneDNN.apply(bf16, len(weights), x, *weights, *biases)  # type: ignore[no-untyped-call]
        return outputs
    return torch.stack([_forward(member, ws, bs, bf16)[-1] for member, ws, bs in _members(x, weights, biases)])


def _check_shapes(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
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


# ---------------------------------------------------------------------------------------------------- reference


def _reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], precision: str) -> Tensor:
    h = x
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if precision == "bf16" and _wide(w):
            product = torch.bmm(h.bfloat16(), w.bfloat16().mT).to(h.dtype)
            h = product + b.unsqueeze(1)
        else:
            h = torch.baddbmm(b.unsqueeze(1), h, w.mT)
        if layer < len(weights) - 1:
            h = torch.relu(h)
    return h


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


def _members(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    unbound_w = zip(*(w.unbind(0) for w in weights), strict=True)
    unbound_b = zip(*(b.unbind(0) for b in biases), strict=True)
    return list(zip(x.unbind(0), unbound_w, unbound_b, strict=True))


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], bf16: bool) -> list[Tensor]:
    """Return every layer's output (after its ReLU) of one member; the last one is the network's."""
    outputs: list[Tensor] = []
    h = x
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if not _wide(w):
            h = torch.addmm(b, h, w.mT)
        elif bf16:
            h = _matmul_t(h, w, bf16).add_(b)
        else:
            # Not fused with the product's "relu" attribute: that one turns nan into 0 and hides a diverged network.
            h = torch.ops.mkldnn._linear_pointwise(h, w, b, "none", [], "")
        if layer < len(weights) - 1:
            h = h.relu_()
        outputs.append(h)
    return outputs


class _OneDNN(torch.autograd.Function):
    """All members' networks as one node: saves the layers' outputs, from which ReLU's mask is read back."""

    @staticmethod
    def forward(ctx: Any, bf16: bool, n_layers: int, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:n_layers], parameters[n_layers:]
        hidden: list[Tensor] = []
        y: list[Tensor] = []
        for member, ws, bs in _members(x, weights, biases):
            *inner, last = _forward(member, ws, bs, bf16)
            hidden += inner
            y.append(last)
        ctx.bf16, ctx.n_layers = bf16, n_layers
        ctx.save_for_backward(x, *weights, *hidden)
        return torch.stack(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: it raises only for a second backward pass that reaches this node, and silently
        # drops a penalty on the gradient of a loss that is linear in the network's output.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "mlp backend 'onednn' is differentiable once: pass backend='reference' for create_graph=True."
            )
        (grad,) = grads
        n_layers, bf16 = ctx.n_layers, ctx.bf16
        x, *rest = ctx.saved_tensors
        weights, hidden = rest[:n_layers], rest[n_layers:]
        need_x, *need = ctx.needs_input_grad[2:]
        need_w, need_b = need[:n_layers], need[n_layers:]
        first = next((layer for layer in range(n_layers) if need_w[layer] or need_b[layer]), n_layers)
        grad_w = [torch.empty_like(w) if n else None for w, n in zip(weights, need_w, strict=True)]
        grad_b = [w.new_empty(w.shape[:2]) if n else None for w, n in zip(weights, need_b, strict=True)]
        grad_x = torch.empty(x.shape, dtype=x.dtype) if need_x else None
        for e in range(x.shape[0]):
            inputs = [x[e], *hidden[e * (n_layers - 1) : (e + 1) * (n_layers - 1)]]
            g = grad[e]
            for layer in reversed(range(n_layers)):
                w, h = weights[layer][e], inputs[layer]
                wide = _wide(w)
                if (gw := grad_w[layer]) is not None:
                    if wide:
                        gw[e] = _matmul_t(g.mT, h.mT, bf16)
                    elif h.shape[1] < g.shape[1]:  # BLAS is twice as fast with the long side last
                        gw[e] = (h.mT @ g).mT
                    else:
                        torch.mm(g.mT, h, out=gw[e])
                if (gb := grad_b[layer]) is not None:
                    torch.sum(g, 0, out=gb[e])
                if layer > 0 and (need_x or layer > first):
                    g = _matmul_t(g, w.mT, bf16) if wide else g @ w
                    torch.ops.aten.threshold_backward.grad_input(g, h, 0, grad_input=g)  # in place: g is fresh
                elif layer == 0 and grad_x is not None:
                    grad_x[e] = g @ w
                else:
                    break
        return (None, None, grad_x, *grad_w, *grad_b)
