"""How long a tiny method takes on a CPU, and how much memory: 128 px to 512 px, default steps, loading included.

    python benchmarks/tiny_cpu.py --threads 2 --output benchmarks/results/tiny_cpu.json

Each run is a process of its own, so that imports, model loading and peak memory are those of a first picture. A matrix
product timed in the same process tells what the machine gave at that moment: machines are shared, so compare ratios.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

PIXELS = 128  # side of the LR picture
SCALE = 4


def measure_here(method: str, threads: int) -> dict:
    """One cold restoration in this process."""
    started = time.perf_counter()
    import torch

    torch.set_num_threads(threads)
    import fourfold

    imported = time.perf_counter()
    lr = torch.rand(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    steps = []
    fourfold.restore(lr, method=method, device="cpu", scale=SCALE, on_step=lambda *_: steps.append(time.perf_counter()))
    first = time.perf_counter()
    fourfold.restore(lr, method=method, device="cpu", scale=SCALE)
    second = time.perf_counter()
    return {
        "method": method,
        "threads": threads,
        "output_px": PIXELS * SCALE,
        "steps": len(steps),
        "seconds_imports": round(imported - started, 2),
        "seconds_first_picture": round(first - imported, 2),
        "seconds_total": round(first - started, 2),
        "seconds_second_picture": round(second - first, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "matmul_gflops": round(matmul_gflops(torch), 1),
        "torch": torch.__version__,
    }


def matmul_gflops(torch) -> float:
    """float32 matrix products on the same threads, 10^9 operations a second."""
    side, repeats = 1024, 10
    a, b = torch.randn(side, side), torch.randn(side, side)
    a @ b
    started = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return 2 * side**3 * repeats / (time.perf_counter() - started) / 1e9


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dit4sr"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tiny_cpu.json"))
    parser.add_argument("--here", metavar="METHOD", help="measure one method in this process and print the JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure_here(options.here, options.threads)))
        return
    runs = []
    for method in options.methods:
        command = [sys.executable, __file__, "--here", method, "--threads", str(options.threads)]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(runs[-1])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
