"""Fusing one 640x480 pair: the runtime's default against eager PyTorch of the same network, in turn.

    python -m benchmarks.fuse [--rounds 5] [--threads 2]

Arms, each a process of its own that stays alive and is asked for one frame at a time:
    runtime         runtime.Fuser (ONNX Runtime), colour and file formats left out
    textbook        PyTorch under inference_mode, layers as the authors' code has them (contiguous NCHW)
    eager           our layers (channels_last), the allocator as it comes
    eager, tuned    the same with freed memory kept in the process (refusion.allocator)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import numpy as np

ARMS = ("runtime", "textbook", "eager", "eager, tuned")


def serve(arm: str, threads: int, size: tuple[int, int]) -> None:
    """Fuse a frame for every line on stdin and answer with the seconds it took."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, *size), dtype=np.float32)
    if arm == "runtime":
        from runtime import Fuser

        fuser = Fuser("ivif", threads=threads, warm_size=size)

        def frame() -> None:
            fuser.fuse_luma(a, b)
    else:
        import torch

        from benchmarks.textbook import use_textbook_layers
        from refusion import FusionNet
        from refusion.allocator import keep_freed_memory

        if arm == "eager, tuned":
            keep_freed_memory()
        if arm == "textbook":
            use_textbook_layers()
        torch.set_num_threads(threads)
        net = FusionNet.from_pretrained("ivif")
        x, y = torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None]

        @torch.inference_mode()
        def frame() -> None:
            net(x, y)

    frame()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        frame()
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        serve(args.arm, args.threads, tuple(args.size))
        return
    height, width = args.size
    command = [
        sys.executable,
        "-m",
        "benchmarks.fuse",
        "--threads",
        str(args.threads),
        "--size",
        str(height),
        str(width),
    ]
    children = {
        arm: subprocess.Popen([*command, "--arm", arm], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for arm in ARMS
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for child in children.values():
        assert child.stdout is not None
        child.stdout.readline()
    for _ in range(args.rounds):
        for arm, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            seconds[arm].append(float(child.stdout.readline()))
    for child in children.values():
        child.communicate()
    print(f"{width}x{height}, {args.threads} threads, {args.rounds} rounds")
    print("arm            s a frame: median (min - max)   arm / runtime: median (min - max)")
    for arm, values in seconds.items():
        ratios = [value / ours for value, ours in zip(values, seconds["runtime"], strict=True)]
        print(
            f"{arm:13}  {statistics.median(values):7.3f} ({min(values):.3f} - {max(values):.3f})"
            f"           {statistics.median(ratios):6.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
