"""Adam over parameters with a seed axis, as if every seed had an optimiser of its own.

The seeds of a run learn side by side from stacked parameters ``[S, ...]``, but some methods stop some seeds earlier
than others (an early stop on the divergence, a repair phase). Here each seed has its own step count, its own clipped
gradient norm, and may sit out a step, so what a seed learns does not depend on its neighbours.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import ConfigError

_BETA_1, _BETA_2 = 0.9, 0.999


class FlatParameters:
    """Parameters ``[S, ...]`` that become views of one matrix ``values [S, P]``, a row per seed.

    Args:
        parameters: each with the seed axis first; their storage is replaced, their values are kept.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        with torch.no_grad():
            self._view(torch.cat([p.flatten(1) for p in self.parameters], 1))

    def _view(self, values: Tensor) -> None:
        self.values = values
        for parameter, view in zip(self.parameters, self.split(values), strict=True):
            parameter.data = view

    def split(self, rows: Tensor) -> list[Tensor]:
        """View ``[S, P]`` as one tensor for each parameter, of its shape."""
        columns = rows.split([p[0].numel() for p in self.parameters], 1)
        return [each.view(p.shape) for each, p in zip(columns, self.parameters, strict=True)]

    def gradient(self, loss_S: Tensor) -> Tensor:
        """Return each seed's gradient of its own loss, ``[S, P]``; zero where the loss does not depend on it.

        The seeds' parameters are disjoint, so the gradient of the sum of losses is each seed's own gradient.
        """
        return _side_by_side(_gradients(loss_S, self.parameters))


def _gradients(loss_S: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(loss_S.sum(), parameters, allow_unused=True, materialize_grads=True)


def _side_by_side(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten(1) for gradient in gradients], 1)


class SeedwiseAdam:
    """Adam (Kingma and Ba, 2015, beta 0.9 and 0.999) with the gradient-norm clip of policy optimisation, seed by seed.

    All parameters of all blocks lie in one matrix ``[S, P]``, so a step is a few operations however many layers there
    are: the networks are small, and an operation costs more than its arithmetic.

    Args:
        blocks: stacked parameters by the name of their network; each name has its own gradient norm unless
            `joint_norm`.
        learning_rate: step size, > 0; can be set between steps.
        eps: added to the root of the second moment; 1e-5 in PPO's reference code, 1e-8 elsewhere.
        max_grad_norm: each gradient is scaled down to this Euclidean norm; ``None`` does not clip.
        joint_norm: take one norm over all blocks together, as code with one optimiser for policy and critic does.
    """

    def __init__(
        self,
        blocks: Mapping[str, Iterable[nn.Parameter]],
        learning_rate: float,
        *,
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        joint_norm: bool = False,
    ) -> None:
        self.blocks = {name: FlatParameters(parameters) for name, parameters in blocks.items()}
        self.learning_rate = learning_rate
        self.eps = eps
        self.max_grad_norm = max_grad_norm
        self.joint_norm = joint_norm
        self._values = torch.cat([block.values for block in self.blocks.values()], 1)
        self._first, self._second = torch.zeros_like(self._values), torch.zeros_like(self._values)
        self._steps = {name: [0] * len(self._values) for name in self.blocks}
        self._columns: dict[str, slice] = {}
        end = 0
        for name, block in self.blocks.items():
            start, end = end, end + block.values.shape[1]
            self._columns[name] = slice(start, end)
            block._view(self._values[:, start:end])

    def step(self, loss_S: Tensor, *, only: Sequence[str] = (), active: Sequence[bool] | None = None) -> Tensor:
        """Descend the per-seed losses ``[S]``; return the gradient norms ``[S]`` before clipping (over all blocks).

        The arguments `only` and `active` are those of :meth:`apply`.
        """
        return self.apply(self.gradients(loss_S, only=only), only=only, active=active)

    def gradients(self, loss_S: Tensor, *, only: Sequence[str] = ()) -> Sequence[Tensor]:
        """Return what :meth:`apply` takes: each seed's gradients of its own loss ``[S]``."""
        return _gradients(loss_S, [p for name in only or self.blocks for p in self.blocks[name].parameters])

    def apply(
        self, gradients: Sequence[Tensor], *, only: Sequence[str] = (), active: Sequence[bool] | None = None
    ) -> Tensor:
        """Descend along the gradients; return their norms ``[S]`` before clipping (over all blocks).

        Args:
            gradients: of the parameters, block by block, each ``[S, ...]``.
            only: names of the blocks to move; all of them when empty. The others, their moments included, stay.
            active: which seeds take the step; the others, their moments and step counts included, stay.
        """
        names = list(only) or list(self.blocks)
        gradient = _side_by_side(gradients)
        parts = gradient.split([self.blocks[name].values.shape[1] for name in names], 1)
        norm_S: Tensor = torch.linalg.vector_norm(gradient, dim=1)
        if self.max_grad_norm is not None:
            for part in [gradient] if self.joint_norm else parts:
                part_norm = norm_S if part.shape == gradient.shape else torch.linalg.vector_norm(part, dim=1)
                # As torch.nn.utils.clip_grad_norm_ has it, the small number included.
                part.mul_((self.max_grad_norm / (part_norm + 1e-6)).clamp_(max=1.0).unsqueeze(1))
        together = not only and all(self._steps[name] == self._steps[names[0]] for name in names)
        for name in names:
            self._steps[name] = [n + (active is None or active[seed]) for seed, n in enumerate(self._steps[name])]
        if together:
            self._move(gradient, slice(None), self._steps[names[0]], active)
        else:
            for name, part in zip(names, parts, strict=True):
                self._move(part, self._columns[name], self._steps[name], active)
        return norm_S

    @torch.no_grad()
    def _move(self, gradient: Tensor, columns: slice, steps: Sequence[int], active: Sequence[bool] | None) -> None:
        """Take Adam's step number ``steps[s]`` with each active seed s."""
        state = [each[:, columns] for each in (self._values, self._first, self._second)]
        if active is None or all(active):
            moved = state
        else:  # on copies of the active rows
            rows = [seed for seed, moves in enumerate(active) if moves]
            moved, gradient, steps = [each[rows] for each in state], gradient[rows], [steps[seed] for seed in rows]
        values, first, second = moved
        first.lerp_(gradient, 1 - _BETA_1)
        second.mul_(_BETA_2).addcmul_(gradient, gradient, value=1 - _BETA_2)
        size = [self.learning_rate / (1 - _BETA_1**n) for n in steps]
        root = [math.sqrt(1 - _BETA_2**n) for n in steps]
        if len(set(steps)) == 1:
            values.addcdiv_(first, second.sqrt().div_(root[0]).add_(self.eps), value=-size[0])
        else:
            denominator = (second.sqrt() / second.new_tensor(root).unsqueeze(1)).add_(self.eps)
            values.sub_(first / denominator * first.new_tensor(size).unsqueeze(1))
        if moved is not state:
            for whole, part in zip(state, moved, strict=True):
                whole[rows] = part

    def state_tensors(self) -> dict[str, Tensor]:
        """Return moments ``[S, P]`` and step counts ``[S]`` of every block."""
        found = {}
        for name, columns in self._columns.items():
            found[f"{name}/exp_avg"] = self._first[:, columns].contiguous()
            found[f"{name}/exp_avg_sq"] = self._second[:, columns].contiguous()
            found[f"{name}/step"] = torch.tensor(self._steps[name])
        return found

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_tensors` returned.

        Raises:
            ConfigError: if a tensor is missing or of another shape.
        """
        for name, expected in self.state_tensors().items():
            if name not in tensors or tensors[name].shape != expected.shape:
                raise ConfigError(
                    f"the optimiser state {name} is missing or has another shape than {list(expected.shape)}"
                )
        for name, columns in self._columns.items():
            self._first[:, columns] = tensors[f"{name}/exp_avg"].to(self._first.device)
            self._second[:, columns] = tensors[f"{name}/exp_avg_sq"].to(self._second.device)
            self._steps[name] = [int(n) for n in tensors[f"{name}/step"]]
