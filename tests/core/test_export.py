"""Policies for use elsewhere: the plain module and the ONNX file against `predict`, and what exporting leaves alone."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from corollary.core.errors import CorollaryError
from corollary.offline import BC, IQL, TD3BC

SMALL = {"hidden": (16, 16), "batch_size": 8}
OBSERVATIONS = np.random.default_rng(0).normal(scale=3, size=(50, 3)).astype(np.float32)


def run_onnx(path, obs: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (action,) = session.run(None, {"observation": obs})
    return action


@pytest.fixture(scope="module", params=["float32", "float64", "bf16"])
def agent(request, pendulum) -> TD3BC:
    """Standardised states, a box of -2..2, two seeds, weights far from their start."""
    return TD3BC(seeds=[3, 1], precision=request.param, actor_lr=0.03, **SMALL).fit(pendulum, 10)


@pytest.mark.parametrize("index", [0, 1])
def test_onnx_gives_the_actions_of_predict(agent, tmp_path, index) -> None:
    path = agent.export_onnx(tmp_path / "policy.onnx", index)
    expected, _ = agent.select(index).predict(OBSERVATIONS)
    actual = run_onnx(path, OBSERVATIONS)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    other, _ = agent.select(1 - index).predict(OBSERVATIONS)
    assert np.abs(actual - other).max() > 1e-2  # control: the other seed's policy is another one


def test_the_model_is_valid_and_its_interface_named(agent, tmp_path) -> None:
    model = onnx.load(agent.export_onnx(tmp_path / "policy.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [node.name for node in model.graph.input] == ["observation"]
    assert [node.name for node in model.graph.output] == ["action"]


def test_any_number_of_rows(agent, tmp_path) -> None:
    path = agent.export_onnx(tmp_path / "policy.onnx")
    for n in (1, 7):
        assert run_onnx(path, OBSERVATIONS[:n]).shape == (n, 1)


def test_actions_stay_in_the_box(agent, tmp_path) -> None:
    path = agent.export_onnx(tmp_path / "policy.onnx")
    extreme = run_onnx(path, 1e4 * OBSERVATIONS)
    assert np.abs(extreme).max() <= 2
    assert np.abs(extreme).max() > 1.9


def test_the_plain_policy_is_predict(agent) -> None:
    plain = agent.plain_policy(1)
    with torch.no_grad():
        actual = plain(torch.tensor(OBSERVATIONS, dtype=agent.dtype))
    np.testing.assert_allclose(actual.float(), agent.select(1).predict(OBSERVATIONS)[0], rtol=0, atol=1e-5)


def test_moving_an_exported_policy_leaves_the_agent_as_it_was(agent, tmp_path) -> None:
    """Export converts to float32 on the CPU; an agent on a GPU or in float64 must not follow."""
    before = agent.predict(OBSERVATIONS)[0]
    dtypes = {name: tensor.dtype for name, tensor in agent.networks.state_dict(keep_vars=True).items()}
    agent.export_onnx(tmp_path / "policy.onnx")
    plain = agent.plain_policy(0).to(torch.float16)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert agent.box.half_range.dtype == agent.dtype
    assert dtypes == {name: t.dtype for name, t in agent.networks.state_dict(keep_vars=True).items()}
    assert np.array_equal(agent.predict(OBSERVATIONS)[0], before)


def test_a_gaussian_policy_exports_its_mean(pendulum, tmp_path) -> None:
    agent = IQL(**SMALL).fit(pendulum, 5)
    actual = run_onnx(agent.export_onnx(tmp_path / "policy.onnx"), OBSERVATIONS)
    np.testing.assert_allclose(actual, agent.predict(OBSERVATIONS)[0], rtol=0, atol=1e-5)


def test_an_untrained_agent_and_a_missing_package_are_named(pendulum, tmp_path, monkeypatch) -> None:
    with pytest.raises(CorollaryError, match="BC has not learnt yet"):
        BC().export_onnx(tmp_path / "policy.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CorollaryError, match=r"pip install 'corollary\[onnx\]'"):
        BC(**SMALL).fit(pendulum, 1).export_onnx(tmp_path / "policy.onnx")
