r"""Networks with a seed axis: every parameter carries the runs of an experiment as its first axis S.

One forward pass evaluates all seeds (and all critics of an ensemble, axis M) through :func:`corollary.kernels.mlp.mlp`.
Layers are initialised exactly as :class:`torch.nn.Linear` would be, from one generator per seed, so seed 7 starts from
the same numbers alone or among ten.

Axes: ``S`` seeds, ``M`` members of an ensemble, ``B`` batch.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.mlp import Activation as Activation
from ..kernels.mlp import Backend, LayerNorm, finish_hidden, mlp, mlp_vjp
from ..kernels.mlp import Place as Place
from ..kernels.streams import RandomStream
from .distributions import DiagonalGaussian

Initialisation = Literal["torch", "orthogonal", "xavier", "uniform", "torch_bias"]


class _Layers(NamedTuple):
    """Parameters of every layer; `scales` and `shifts` are the hidden layers' normalisation, empty without one."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    scales: Sequence[Tensor]
    shifts: Sequence[Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Layers":
        return _Layers(*([function(tensor) for tensor in each] for each in self))


class StackedMLP(nn.Module):
    """``S`` seeds (times `members`) of a multilayer perceptron ``n_in - hidden... - n_out``, linear in the last layer.

    Args:
        sizes: widths of input, hidden layers and output.
        generators: one per seed; layer by layer (member by member) weight then bias are drawn from it.
        members: size M of the ensemble axis, or ``None`` for no such axis.
        activation: of the hidden layers.
        init: of the hidden layers, and of the last unless `output_init` says otherwise; see :func:`initial_linear`.
        output_init: of the last layer.
        output_gain: gain (or bound) of the last layer; with 0.01 a policy starts almost the same in every state, 1
            suits a value; no part of ``"torch"``.
        layer_norm: :class:`torch.nn.LayerNorm` in every hidden layer, ``"before"`` or ``"after"`` the activation.
        precision: ``"bf16"`` rounds the inputs of wide products (see :mod:`corollary.kernels.mlp`).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        generators: Sequence[torch.Generator],
        *,
        members: int | None = None,
        activation: Activation = "relu",
        init: Initialisation = "torch",
        output_init: Initialisation | None = None,
        output_gain: float = math.sqrt(2),
        layer_norm: Place = "none",
        precision: Literal["float32", "bf16"] = "float32",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.members = members
        self.activation = activation
        self.layer_norm = layer_norm
        self.precision = precision
        weights: list[list[Tensor]] = [[] for _ in sizes[1:]]
        biases: list[list[Tensor]] = [[] for _ in sizes[1:]]
        for generator in generators:
            for _ in range(members or 1):
                for layer, (n_in, n_out) in enumerate(pairwise(sizes)):
                    last = layer == len(sizes) - 2
                    kind = output_init if last and output_init else init
                    gain = output_gain if last else math.sqrt(2)
                    weight, bias = initial_linear(n_in, n_out, generator, kind, gain)
                    weights[layer].append(weight)
                    biases[layer].append(bias)
        lead = (len(generators),) if members is None else (len(generators), members)

        def stacked(tensors: list[Tensor]) -> nn.Parameter:
            return nn.Parameter(torch.stack(tensors).unflatten(0, lead).to(dtype))

        self.weights = nn.ParameterList([stacked(layer) for layer in weights])
        self.biases = nn.ParameterList([stacked(layer) for layer in biases])
        normalised = sizes[1:-1] if layer_norm != "none" else ()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(*lead, width, dtype=dtype)) for width in normalised])
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(*lead, width, dtype=dtype)) for width in normalised])
        # A ParameterList takes microseconds per entry to read, which a small network's step would feel.
        self._layers = _Layers(*(tuple(each) for each in (self.weights, self.biases, self.scales, self.shifts)))

    def forward(self, x: Tensor, masks: Sequence[Tensor] = (), *, backend: Backend = "auto") -> Tensor:
        """Map ``[S, B, n_in]`` to ``[S, B, n_out]``, or ``[S, M, B, n_out]`` with an ensemble axis.

        `masks` (no ensemble axis), one ``[S, B, width]`` per hidden layer, multiply the layers' outputs: dropout.
        `backend` ``"reference"`` is differentiable any number of times (see :mod:`corollary.kernels.mlp`).
        """
        return self._outputs(x, self._layers, masks, backend)

    def vjp(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """Evaluate a network without ensemble axis or normalisation; also return the map from output to gradients.

        The gradients come in the order of :meth:`parameters`; see :func:`corollary.kernels.mlp.mlp_vjp`.
        """
        return mlp_vjp(x, self._layers.weights, self._layers.biases, activation=self.activation)

    def constant(self, x: Tensor) -> Tensor:
        """Evaluate like :meth:`forward`, the parameters held constant: gradients flow into `x` alone."""
        return self._outputs(x, self._layers.map(torch.Tensor.detach))

    def member(self, x: Tensor, index: int) -> Tensor:
        """Evaluate one ensemble member, ``[S, B, n_in]`` to ``[S, B, n_out]``, its parameters held constant."""
        return self._evaluate(x, self._layers.map(lambda tensor: tensor[:, index].detach()))

    def _outputs(self, x: Tensor, layers: _Layers, masks: Sequence[Tensor] = (), backend: Backend = "auto") -> Tensor:
        if self.members is None:
            return self._evaluate(x, layers, masks, backend)
        flat = x.unsqueeze(1).expand(-1, self.members, -1, -1).flatten(0, 1)
        outputs = self._evaluate(flat, layers.map(lambda tensor: tensor.flatten(0, 1)), masks, backend)
        return outputs.view(-1, self.members, *outputs.shape[1:])

    def _evaluate(self, x: Tensor, layers: _Layers, masks: Sequence[Tensor] = (), backend: Backend = "auto") -> Tensor:
        """Map ``[E, B, n_in]`` to ``[E, B, n_out]`` with parameters ``[E, ...]``."""
        weights, biases, scales, shifts = layers
        norm = None if self.layer_norm == "none" else LayerNorm(scales, shifts, self.layer_norm)
        if not masks:
            return self._mlp(x, weights, biases, backend, norm)
        for index, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
            x = finish_hidden(self._mlp(x, [weight], [bias], backend), index, self.activation, norm) * masks[index]
        return self._mlp(x, weights[-1:], biases[-1:], backend)

    def _mlp(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        backend: Backend,
        norm: LayerNorm | None = None,
    ) -> Tensor:
        return mlp(x, weights, biases, activation=self.activation, norm=norm, backend=backend, precision=self.precision)

    def plain(self, seed_index: int) -> nn.Sequential:
        """Return one seed's network as ordinary ``nn.Linear``, normalisation and activation modules (for export)."""
        if self.members is not None:
            raise ValueError("Only a network without an ensemble axis has a plain form.")
        activation = nn.ReLU if self.activation == "relu" else nn.Tanh
        layers: list[nn.Module] = []
        for index, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            layers.append(_filled(nn.Linear(w.shape[2], w.shape[1], dtype=w.dtype), w[seed_index], b[seed_index]))
            if index < len(self.weights) - 1:
                layers.append(activation())
                if self.layer_norm != "none":
                    norm = nn.LayerNorm(w.shape[1], dtype=w.dtype)
                    place = -1 if self.layer_norm == "before" else len(layers)
                    layers.insert(place, _filled(norm, self.scales[index][seed_index], self.shifts[index][seed_index]))
        return nn.Sequential(*layers)


def _filled(module: nn.Linear | nn.LayerNorm, weight: Tensor, bias: Tensor) -> nn.Module:
    """Copy `weight` and `bias` into a module and move it to their device."""
    module.to(weight.device)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


def initial_linear(
    n_in: int,
    n_out: int,
    generator: torch.Generator,
    init: Initialisation = "torch",
    gain: float = math.sqrt(2),
) -> tuple[Tensor, Tensor]:
    """Draw the weight ``[n_out, n_in]`` and bias ``[n_out]`` of one layer.

    ``"torch"``: as ``nn.Linear``, both from U(-1/sqrt(n_in), 1/sqrt(n_in)). ``"torch_bias"``: such a weight, all
    biases 0.1 (ReBRAC's hidden layers). ``"orthogonal"``: orthonormal rows or columns times `gain`, zero bias.
    ``"xavier"``: Xavier's uniform with `gain`, zero bias. ``"uniform"``: both from U(-gain, gain).
    """
    weight, bias = torch.empty(n_out, n_in), torch.zeros(n_out)
    if init == "orthogonal":
        nn.init.orthogonal_(weight, gain, generator=generator)
    elif init == "xavier":
        nn.init.xavier_uniform_(weight, gain, generator=generator)
    elif init == "uniform":
        nn.init.uniform_(weight, -gain, gain, generator=generator)
        nn.init.uniform_(bias, -gain, gain, generator=generator)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        if init == "torch":
            bound = 1 / math.sqrt(n_in)
            nn.init.uniform_(bias, -bound, bound, generator=generator)
        else:
            bias.fill_(0.1)
    return weight, bias


class ActionBox(nn.Module):
    """The affine map from (-1, 1) to the action box, ``a = centre + half_range * u``."""

    low: Tensor
    high: Tensor
    centre: Tensor
    half_range: Tensor

    def __init__(self, low: Sequence[float], high: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        low_, high_ = torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype)
        self.register_buffer("low", low_, persistent=False)
        self.register_buffer("high", high_, persistent=False)
        self.register_buffer("centre", (low_ + high_) / 2, persistent=False)
        self.register_buffer("half_range", (high_ - low_) / 2, persistent=False)

    def forward(self, unit: Tensor) -> Tensor:
        """Map ``[..., d_a]`` from (-1, 1) into the box."""
        return self.centre + self.half_range * unit

    def unit(self, action: Tensor) -> Tensor:
        """Map ``[..., d_a]`` from a bounded box to [-1, 1], the inverse of :meth:`forward`."""
        return (action - self.centre) / self.half_range

    def clip(self, action: Tensor, margin: float = 0.0) -> Tensor:
        """Clip ``[..., d_a]`` to the box, or `margin` half-ranges inside it."""
        if margin == 0:  # half_range is infinite where the box has no bounds
            return torch.clamp(action, self.low, self.high)
        inset = margin * self.half_range  # from the bounds, which centre + half_range misses by a rounding
        return torch.clamp(action, self.low + inset, self.high - inset)


class DeterministicActor(nn.Module):
    """``pi(s) = centre + half_range * tanh(f(s))`` for every seed."""

    def __init__(self, net: StackedMLP, box: ActionBox) -> None:
        super().__init__()
        self.net = net
        self.box = box

    def forward(self, obs: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Map states ``[S, B, d_s]`` to actions ``[S, B, d_a]``; `masks` are dropout's."""
        action: Tensor = self.box(torch.tanh(self.net(obs, masks)))
        return action

    def plain(self, seed_index: int) -> nn.Module:
        """Return one seed's policy as an ordinary module on ``[n, d_s]`` (for export)."""
        return nn.Sequential(self.net.plain(seed_index), nn.Tanh(), self.box)


class GaussianActor(nn.Module):
    """``pi(.|s) = N(centre + half_range * u(s), diag(exp(log_std))^2)`` with a state-independent ``log_std``.

    u is ``tanh(f(s))``, or ``f(s)`` itself without `squash_mean`. The density is unsquashed: samples may leave the box
    and are clipped only when they act (IQL's choice).
    """

    def __init__(
        self, net: StackedMLP, box: ActionBox, log_std_range: tuple[float, float], *, squash_mean: bool = True
    ) -> None:
        super().__init__()
        self.net = net
        self.box = box
        self.log_std_range = log_std_range
        self.squash_mean = squash_mean
        last = net.biases[-1]
        self.log_std = nn.Parameter(torch.zeros_like(last))  # [S, d_a]

    def forward(self, obs: Tensor, masks: Sequence[Tensor] = ()) -> DiagonalGaussian:
        """Map states ``[S, B, d_s]`` to distributions over actions ``[S, B, d_a]``; `masks` are dropout's."""
        return self._distribution(self.net(obs, masks), self.log_std)

    def constant(self, obs: Tensor) -> DiagonalGaussian:
        """Evaluate like :meth:`forward`, the parameters held constant: gradients flow into the input alone."""
        return self._distribution(self.net.constant(obs), self.log_std.detach())

    def _distribution(self, outputs: Tensor, log_std: Tensor) -> DiagonalGaussian:
        mean = self.box(torch.tanh(outputs) if self.squash_mean else outputs)
        return DiagonalGaussian(mean, log_std.clamp(*self.log_std_range).unsqueeze(1))

    def plain(self, seed_index: int) -> nn.Module:
        """Return one seed's mean action as an ordinary module on ``[n, d_s]`` (for export)."""
        squash = nn.Tanh() if self.squash_mean else nn.Identity()
        return nn.Sequential(self.net.plain(seed_index), squash, self.box)


class Critics(nn.Module):
    """An ensemble of state-action values ``Q_m(s, a)`` for every seed."""

    def __init__(self, net: StackedMLP) -> None:
        super().__init__()
        self.net = net

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Map ``[S, B, d_s]`` and ``[S, B, d_a]`` to values ``[S, M, B]``."""
        return self.net(torch.cat([obs, action], -1)).squeeze(-1)  # type: ignore[no-any-return]

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """Evaluate ``Q_1(s, a)`` as ``[S, B]`` with the critic held constant: the policy loss's view of it."""
        return self.net.member(torch.cat([obs, action], -1), 0).squeeze(-1)

    def constant(self, obs: Tensor, action: Tensor) -> Tensor:
        """Evaluate like :meth:`forward`, the critics held constant: gradients flow into the action alone."""
        return self.net.constant(torch.cat([obs, action], -1)).squeeze(-1)


class ValueNetwork(nn.Module):
    """State values ``V(s)`` for every seed."""

    def __init__(self, net: StackedMLP) -> None:
        super().__init__()
        self.net = net

    def forward(self, obs: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Map ``[S, B, d_s]`` to values ``[S, B]``, or ``[S, M, B]`` of an ensemble; `masks` are dropout's."""
        return self.net(obs, masks).squeeze(-1)  # type: ignore[no-any-return]

    def vjp(self, obs: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """Return values ``[S, B]`` and the map from a loss's derivative in them to that in the parameters."""
        outputs, pull = self.net.vjp(obs)
        return outputs.squeeze(-1), lambda gradient: pull(gradient.unsqueeze(-1))


def dropout_masks(stream: RandomStream, step: int, batch_size: int, widths: Sequence[int], rate: float) -> list[Tensor]:
    """Draw inverted-dropout masks ``[S, B, width]``, one per hidden layer: 1 / (1 - rate), or 0 with that `rate`."""
    keep = 1 - rate
    if keep == 1:
        return []
    uniforms = stream.uniform(step, (batch_size, sum(widths)))
    return [(u < keep).to(u.dtype) / keep for u in uniforms.split(list(widths), dim=-1)]


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """Move every target parameter towards its online twin: ``target <- target + rate * (online - target)``."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)
