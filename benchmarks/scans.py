"""Which form of the backward recursion wins at which size: ``python benchmarks/scans.py`` (under a minute).

Times ``gae`` end to end per back end, and the two numpy forms of the bare recursion between which
``backend="cpu"`` chooses. Forms alternate within every repetition, so that a busy machine slows all of them
alike. On a machine with a GPU the tensors live there. Writes ``results/scans.json`` and ``results/scans.md``
beside this file.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from corollary.kernels.scans import _blocks, _rows, gae

RESULTS = Path(__file__).parent / "results"
SIZES = (
    *((128, 1), (2048, 1), (128, 8), (2048, 8), (2048, 64), (16, 256), (128, 256), (512, 256), (2048, 512)),
    *((128, 1024), (16, 4096), (128, 4096)),
)
SECONDS_PER_SIZE = 1.5
MAX_REPETITIONS = 200


def machine(device: str) -> dict[str, str | int]:
    """Processor type and versions; nothing that names a particular computer."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "triton")},
    }


def forms(n_rows: int, n_columns: int, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Named callables that do the same work at this size, float32."""
    generator = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, n_rows, n_columns, generator=generator).to(device)
    terminated, truncated = (torch.rand(2, n_rows, n_columns, generator=generator) < 0.005).to(device)
    batch = (rewards, values, next_values, terminated, truncated)
    for backend in ("reference", "cpu") if device == "cpu" else ("reference", "triton"):
        yield (
            f"gae, {backend}",
            lambda backend=backend: gae(*batch, discount=0.99, trace_decay=0.95, backend=backend),
        )
    if device == "cpu":
        increments, coefficients = rewards.numpy(), (0.94 * ~(terminated | truncated)).numpy()
        yield "recursion, rows", lambda: _rows(increments, coefficients)
        yield "recursion, blocks", lambda: _blocks(increments, coefficients)


def measure(named: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Milliseconds of every repetition of every form, alternating; the first repetition warms up."""
    times: dict[str, list[float]] = {name: [] for name in named}
    stop = time.perf_counter() + SECONDS_PER_SIZE
    for repetition in range(MAX_REPETITIONS + 1):
        for name, call in named.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repetition > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() > stop and repetition >= 5:
            break
    return times


def main() -> None:
    """Measure every size, print the table and write it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device)
    raw = {(t, n): measure(dict(forms(t, n, device)), device) for t, n in SIZES}
    names = list(raw[SIZES[0]])
    lines = [
        "# Backward recursion: which form wins",
        "",
        "Milliseconds, median [min, max]; float32. Made by `benchmarks/scans.py`.",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "",
        f"| T | N | {' | '.join(names)} | gae speed-up |",
        f"|{'---|' * (len(names) + 3)}",
    ]
    for (t, n), times in raw.items():
        cells = [f"{median(x):.3f} [{min(x):.3f}, {max(x):.3f}]" for x in times.values()]
        reference, fast = (median(times[name]) for name in names[:2])
        lines.append(f"| {t} | {n} | {' | '.join(cells)} | {reference / fast:.1f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scans.md").write_text(table)
    summary = [
        {
            "T": t,
            "N": n,
            "form": name,
            "runs": len(x),
            "milliseconds": {"min": min(x), "median": median(x), "max": max(x)},
        }
        for (t, n), times in raw.items()
        for name, x in times.items()
    ]
    (RESULTS / "scans.json").write_text(json.dumps({"machine": about, "sizes": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
