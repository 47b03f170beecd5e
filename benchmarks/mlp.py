"""Stacked perceptrons: the oneDNN back end against the reference, forward and backward, over widths and members.

    python benchmarks/mlp.py [--threads 2] [--rounds 5]

Every row is a network 17 - width - width - 6 at batch 256; back ends alternate within each round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from corollary.core.runs import versions
from corollary.kernels import mlp

RESULTS = Path(__file__).parent / "results"
VARIANTS = (("reference", "float32"), ("onednn", "float32"), ("reference", "bf16"), ("onednn", "bf16"))


def step(width: int, members: int, backend: str, precision: str) -> Callable[[], object]:
    """Return a function that evaluates the networks and the gradient of their mean square."""
    generator = torch.Generator().manual_seed(0)
    sizes = (17, width, width, 6)
    weights = [
        torch.empty(members, o, i).uniform_(-1 / i**0.5, 1 / i**0.5, generator=generator).requires_grad_()
        for i, o in pairwise(sizes)
    ]
    biases = [torch.zeros(members, o, requires_grad=True) for o in sizes[1:]]
    x = torch.randn(members, 256, 17, generator=generator)

    def once() -> object:
        y = mlp(x, weights, biases, backend=backend, precision=precision)
        return torch.autograd.grad(y.square().mean(), [*weights, *biases])

    return once


def milliseconds(function: Callable[[], object]) -> float:
    """Time enough calls to last about a twentieth of a second."""
    function()
    began = time.perf_counter()
    function()
    calls = max(1, int(0.05 / (time.perf_counter() - began)))
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls * 1e3


def main() -> None:
    """Measure, alternate, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for width in (16, 32, 64, 128, 256, 512):
        for members in (1, 2, 6):
            steps = [step(width, members, *variant) for variant in VARIANTS]
            times = list(zip(*([milliseconds(s) for s in steps] for _ in range(chosen.rounds)), strict=True))
            rows.append(
                {"width": width, "members": members}
                | {
                    f"{backend} {precision}": {"min": min(t), "median": statistics.median(t), "max": max(t)}
                    for (backend, precision), t in zip(VARIANTS, times, strict=True)
                }
            )
            print(rows[-1], flush=True)
    about = {"threads": chosen.threads, "rounds": chosen.rounds, "versions": versions()}
    (RESULTS / "mlp.json").write_text(json.dumps(about | {"milliseconds": rows}, indent=2) + "\n")
    names = [" ".join(variant) for variant in VARIANTS]
    lines = ["| width | members | " + " | ".join(names) + " | reference / onednn, float32 |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in rows:
        cells = [f"{row[n]['median']:.2f} [{row[n]['min']:.2f}, {row[n]['max']:.2f}]" for n in names]
        ratio = row[names[0]]["median"] / row[names[1]]["median"]
        lines.append(f"| {row['width']} | {row['members']} | " + " | ".join(cells) + f" | {ratio:.2f} |")
    told = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    text = "Milliseconds per forward and backward pass, median [min, max].\n\n" + "\n".join(lines)
    (RESULTS / "mlp.md").write_text(f"{text}\n\nthreads {chosen.threads}. {told}.\n")


if __name__ == "__main__":
    main()
