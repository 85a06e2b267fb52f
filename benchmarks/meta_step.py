"""One meta step, 128x128, batch 2 doubled to 4: our JVP meta-gradient against double backwards, time and peak memory.

    python -m benchmarks.meta_step [--rounds 3] [--threads 2]

Arms, each in processes of its own, in turn:
    jvp      refusion.meta, the default
    double   refusion.meta with method="double": the same networks and layout, backward through the backward
    authors  theta' keeps its graph and the outer loss is differentiated through it; layers written as the authors'
             code has them (contiguous NCHW, q and k normalised first), the default allocator
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

ARMS = ("jvp", "double", "authors")


def run_arm(arm: str, threads: int, size: int, steps: int) -> dict[str, float]:
    """Time `steps` meta steps after one warm-up, in this process; seconds of the median and peak memory in GB."""
    import torch

    from benchmarks.textbook import meta_step_by_definition, use_textbook_layers
    from refusion.allocator import keep_freed_memory
    from refusion.losses import ReconstructionLoss
    from refusion.meta import exchange, meta_step
    from refusion.model import FusionNet, LossProposalNet

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    nets = FusionNet(), LossProposalNet(), ReconstructionLoss()
    images = torch.rand(4, 2, 1, size, size)
    batches = exchange(images[0], images[1]), exchange(images[2], images[3])
    if arm == "authors":
        use_textbook_layers()
    else:
        keep_freed_memory()
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        if arm == "authors":
            meta_step_by_definition(*nets, *batches, gradient_weight=0.5, lr=1e-4)
        else:
            meta_step(*nets, *batches, gradient_weight=0.5, lr=1e-4, method=arm)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    return {"seconds": statistics.median(seconds[1:]), "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a process, after one warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.threads, args.size, args.steps)))
        return
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            command = [sys.executable, "-m", "benchmarks.meta_step", "--arm", arm]
            for name in ("threads", "size", "steps"):
                command += [f"--{name}", str(getattr(args, name))]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[arm].append(json.loads(output.splitlines()[-1]))
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, {args.size}x{args.size}, batch 4")
    print("arm       s a step: median (min - max)   of authors' (min - max of the rounds)   peak GB")
    for arm, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        ratios = [run["seconds"] / other["seconds"] for run, other in zip(runs, results["authors"], strict=True)]
        print(
            f"{arm:8}  {statistics.median(seconds):6.2f} ({min(seconds):.2f} - {max(seconds):.2f})"
            f"            {statistics.median(ratios):5.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
            f"                      {max(run['peak_gb'] for run in runs):5.2f}"
        )
    halves = [a["seconds"] / b["seconds"] for a, b in zip(results["jvp"], results["double"], strict=True)]
    print(f"jvp / double: {statistics.median(halves):.3f} ({min(halves):.3f} - {max(halves):.3f})")


if __name__ == "__main__":
    main()
