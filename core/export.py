"""Policies for use elsewhere: one seed's deterministic policy as a plain module and as ONNX."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import CorollaryError
from .networks import ActionBox

if TYPE_CHECKING:
    from .agent import Agent


class PlainPolicy(nn.Module):
    """Raw observations ``[n, d_s]`` to actions: a fixed map of the observation, the actor, and last the environment's.

    Args:
        actor: transformed observations to actions, or to indices of categories.
        states: what the agent does to observations.
        space: for a continuous space its box, to which actions are clipped; for a discrete one the number of each
            component's first category, ``[d_a]``.
    """

    start: Tensor

    def __init__(self, actor: nn.Module, states: Callable[[Tensor], Tensor], space: ActionBox | Sequence[int]) -> None:
        super().__init__()
        self.states = states
        self.actor = actor
        self.box = space if isinstance(space, ActionBox) else None
        start = [] if isinstance(space, ActionBox) else space
        self.register_buffer("start", torch.tensor(start, dtype=torch.int64), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """Map raw observations to actions."""
        action: Tensor = self.actor(self.states(obs))
        return action + self.start if self.box is None else self.box.clip(action)


def export_onnx(agent: "Agent[Any]", path: str | Path, seed_index: int = 0) -> Path:
    """Write one seed's deterministic policy as an ONNX model.

    The model has one input ``observation [n, d_s]`` (raw, float32) and one output ``action [n, d_a]``; n is free.
    Discrete actions are int64 and counted as the environment counts them, from its space's ``start``.

    Raises:
        ConfigError: if there is no seed of that index.
        CorollaryError: if the package ``onnx`` is missing (install ``corollary[onnx]``).
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise CorollaryError("Exporting needs the package onnx: pip install 'corollary[onnx]'.") from error
    policy = agent.plain_policy(agent.seed_position(seed_index)).to("cpu", torch.float32).eval()
    example = torch.zeros(2, agent.problem.observation_dim)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Tracing is enough for a perceptron; the exporter that PyTorch recommends instead needs more packages.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            policy,
            (example,),
            str(path),
            input_names=["observation"],
            output_names=["action"],
            dynamic_axes={"observation": {0: "n"}, "action": {0: "n"}},
            dynamo=False,
        )
    return Path(path)
