"""Stacked perceptrons: the back ends against the reference, forward and backward, over widths, batches and members.

    python benchmarks/mlp.py [--threads 2] [--rounds 5]

Every row is a network 17 - width - width - 6; back ends alternate within each round. A second table is the forward pass
of few rows, as in acting: arrays against tensors.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corollary.core.runs import versions
from corollary.kernels.mlp import mlp, numpy_mlp

RESULTS = Path(__file__).parent / "results"
VARIANTS = (
    ("reference", "float32"),
    ("fused", "float32"),
    ("onednn", "float32"),
    ("reference", "bf16"),
    ("onednn", "bf16"),
)
Function = Callable[[], object]


def networks(width: int, members: int, batch: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return inputs, weights and biases of networks 17 - width - width - 6."""
    generator = torch.Generator().manual_seed(0)
    sizes = (17, width, width, 6)
    weights = [
        torch.empty(members, o, i).uniform_(-1 / i**0.5, 1 / i**0.5, generator=generator).requires_grad_()
        for i, o in pairwise(sizes)
    ]
    biases = [torch.zeros(members, o, requires_grad=True) for o in sizes[1:]]
    return torch.randn(members, batch, 17, generator=generator), weights, biases


def step(activation: str, width: int, members: int, batch: int, backend: str, precision: str) -> Function:
    """Return a function that evaluates the networks and the gradient of their mean square."""
    x, weights, biases = networks(width, members, batch)

    def once() -> object:
        y = mlp(x, weights, biases, activation=activation, backend=backend, precision=precision)
        return torch.autograd.grad(y.square().mean(), [*weights, *biases])

    return once


def acting(members: int, rows: int) -> dict[str, Function]:
    """Return functions that evaluate 17-64-64-6 tanh networks on a few rows, without gradients."""
    x, weights, biases = networks(64, members, rows)
    arrays = x.numpy(), [w.detach().numpy() for w in weights], [b.detach().numpy() for b in biases]

    def tensors() -> object:
        with torch.no_grad():
            return mlp(x, weights, biases, activation="tanh")

    return {"mlp": tensors, "numpy_mlp": lambda: numpy_mlp(*arrays, "tanh")}


def milliseconds(function: Function) -> float:
    """Time enough calls to last about a twentieth of a second."""
    function()
    began = time.perf_counter()
    function()
    calls = max(1, int(0.05 / (time.perf_counter() - began)))
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls * 1e3


def alternate(functions: dict[str, Function], rounds: int, unit: float) -> dict[str, dict[str, float]]:
    """Time every function once per round, in units of `unit` milliseconds."""
    times = zip(*([milliseconds(f) / unit for f in functions.values()] for _ in range(rounds)), strict=True)
    return {
        name: {"min": min(t), "median": statistics.median(t), "max": max(t)}
        for name, t in zip(functions, times, strict=True)
    }


def table(rows: list[dict[str, Any]], keys: list[str], ratios: list[tuple[str, str]]) -> str:
    """Write `rows` as Markdown: their keys, median [min, max] of each function, and ratios of medians."""
    names = [name for name in rows[0] if name not in keys]
    lines = ["| " + " | ".join([*keys, *names, *(f"{a} / {b}" for a, b in ratios)]) + " |"]
    lines.append("|---" * (len(keys) + len(names) + len(ratios)) + "|")
    for row in rows:
        cells = [str(row[key]) for key in keys]
        cells += [f"{row[n]['median']:.2f} [{row[n]['min']:.2f}, {row[n]['max']:.2f}]" for n in names]
        cells += [f"{row[a]['median'] / row[b]['median']:.2f}" for a, b in ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, alternate, write JSON and two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    training = []
    for activation, width, batch, members in product(
        ("relu", "tanh"), (16, 32, 64, 128, 256, 512), (64, 256, 1024), (1, 2, 6)
    ):
        steps = {" ".join(v): step(activation, width, members, batch, *v) for v in VARIANTS}
        keys = {"activation": activation, "width": width, "batch": batch, "members": members}
        training.append(keys | alternate(steps, chosen.rounds, unit=1))
        print(training[-1], flush=True)
    few = [
        {"members": members, "rows": rows} | alternate(acting(members, rows), chosen.rounds, unit=1e-3)
        for members, rows in product((1, 4, 10), (1, 8))
    ]
    about = {"threads": chosen.threads, "rounds": chosen.rounds, "versions": versions()}
    results = about | {"milliseconds": training, "acting_microseconds": few}
    (RESULTS / "mlp.json").write_text(json.dumps(results, indent=2) + "\n")
    ratios = [("reference float32", "fused float32"), ("fused float32", "onednn float32")]
    told = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    text = "Made by `benchmarks/mlp.py`. Milliseconds per forward and backward pass, median [min, max].\n\n"
    text += table(training, ["activation", "width", "batch", "members"], ratios)
    text += "\n\nMicroseconds per forward pass without gradients, 17-64-64-6 tanh, median [min, max].\n\n"
    text += table(few, ["members", "rows"], [("mlp", "numpy_mlp")])
    (RESULTS / "mlp.md").write_text(f"{text}\n\nthreads {chosen.threads}. {told}.\n")


if __name__ == "__main__":
    main()
