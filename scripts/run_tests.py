"""Run every test, and say at the end how many ran, how many were skipped and why. `--quick` leaves out the slow ones.

The kernels' tests run in a process of their own: Triton's interpreter is chosen before Triton is imported. Every worker
computes with one thread, so that several do not wait for each other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUPS = (["tests/refusion", "tests/runtime", "tests/export", "tests/test_structure.py"], ["tests/kernels"])


def run(paths: list[str], quick: bool) -> tuple[int, dict[str, int]]:
    """Run one pytest; returns its exit code and the counts of its closing line."""
    command = [sys.executable, "-m", "pytest", "-n", str(os.cpu_count() or 1), "--dist", "worksteal", "-q", *paths]
    if quick:
        command += ["-m", "not slow"]
    print("+", " ".join(command), flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if re.search(r"\d+ (passed|failed|skipped|error)", line) else last
    return process.wait(), {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}


def main() -> int:
    quick = "--quick" in sys.argv[1:]
    totals = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
    codes = []
    for paths in GROUPS:
        code, counts = run([path for path in paths if (ROOT / path).exists()], quick)
        codes.append(code)
        for word, n in counts.items():
            totals[word] += n
    failed = totals["failed"] + totals["error"]
    print("The reasons for what was skipped stand above, in the lines SKIPPED.")
    print(f"{totals['passed']} passed, {failed} failed, {totals['skipped']} skipped")
    return 1 if failed or any(codes) or not totals["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
