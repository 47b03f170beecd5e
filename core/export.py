"""Policies for use elsewhere: one seed's deterministic policy as a plain module and as ONNX."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import CorollaryError
from .networks import ActionBox

if TYPE_CHECKING:
    from .agent import Agent


class PlainPolicy(nn.Module):
    """Raw observations ``[n, d_s]`` to actions: a fixed map of the observation, the actor, a clip to the box if any."""

    def __init__(self, actor: nn.Module, states: Callable[[Tensor], Tensor], box: ActionBox | None) -> None:
        super().__init__()
        self.states = states
        self.actor = actor
        self.box = box

    def forward(self, obs: Tensor) -> Tensor:
        """Map raw observations to actions."""
        action: Tensor = self.actor(self.states(obs))
        return action if self.box is None else self.box.clip(action)


def export_onnx(agent: "Agent[Any]", path: str | Path, seed_index: int = 0) -> Path:
    """Write one seed's deterministic policy as an ONNX model.

    The model has one input ``observation [n, d_s]`` (raw, float32) and one output ``action [n, d_a]``; n is free.

    Raises:
        CorollaryError: if the package ``onnx`` is missing (install ``corollary[onnx]``).
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise CorollaryError("Exporting needs the package onnx: pip install 'corollary[onnx]'.") from error
    policy = agent.plain_policy(seed_index).to("cpu", torch.float32).eval()
    example = torch.zeros(2, agent.problem.observation_dim)
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
