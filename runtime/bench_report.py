"""Reports of `runtime.bench`: the machine they were measured on, tables, comparison with a stored one."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime.bench import END_TO_END, PERCENTILES, STAGES
from runtime.errors import InputError
from runtime.machine import probe

FORMAT_VERSION = 1
Report = dict[str, Any]

_TITLES = {"network": "the network alone, ms", END_TO_END: "file to JPEG, one pair at a time, ms"}


def make_report(results: Sequence[dict[str, Any]], date: str) -> Report:
    """What is stored as JSON: the machine, the date and the results of `runtime.bench.run_cases`."""
    return {"format_version": FORMAT_VERSION, "date": date, "machine": describe_machine(), "results": list(results)}


def describe_machine() -> dict[str, Any]:
    """Processor, cores, system, GPUs, versions, and what else moves a latency: power mode, governor, load."""
    machine = probe()
    return {
        "cpu": _cpu_name(),
        "cores": machine.cores,
        "memory_gb": round(machine.memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "jetpack": machine.jetpack,
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "cuda": machine.cuda,
        "power_mode": _power_mode(),
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load": round(os.getloadavg()[0], 2),
        "python": machine.python,
        "packages": {
            name: version
            for name, version in machine.packages.items()
            if name in ("onnxruntime", "openvino", "tensorrt", "cv2")
        },
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _power_mode() -> str:
    """Of a Jetson, as `nvpmodel -q` tells it; "" elsewhere."""
    program = shutil.which("nvpmodel")
    if program is None:
        return ""
    answer = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=10, check=False).stdout
    found = re.search(r"NV Power Mode:\s*(\S+)", answer)
    return found[1] if found else ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def read_report(path: str | Path) -> Report:
    """Read a stored report.

    Raises:
        InputError: no such file, or not a report of this format.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON; give a file that refusion bench --json wrote") from error
    if not isinstance(report, dict) or report.get("format_version") != FORMAT_VERSION or "results" not in report:
        raise InputError(f"{path}: not a report of format {FORMAT_VERSION} of refusion bench; measure it anew")
    return report


def text_of(report: Report) -> str:
    """The report as tables for a terminal; times in ms."""
    results = [result for result in report["results"] if "error" not in result]
    failed = [result for result in report["results"] if "error" in result]
    width = max(*(len(_name(result)) for result in results), *map(len, _TITLES.values()))
    parts = [_header(report["machine"])]
    for stage, title in _TITLES.items():
        parts.append(_percentile_table(results, stage, title, width))
    parts.append(_stage_table(results, width))
    for result in failed:
        case = result["case"]
        parts.append(f"not measured: {case['model']}, {case['backend']}: {result['error']}")
    return "\n\n".join(parts)


def _name(result: dict[str, Any]) -> str:
    return f"{result['model']}  {result['backend']}  {result['precision']}  {result['size']}"


def _header(machine: dict[str, Any]) -> str:
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    facts = [f"{machine['cpu']}, {machine['cores']} cores", gpus, machine["system"], f"Python {machine['python']}"]
    facts += [machine["jetpack"]] if machine["jetpack"] else []
    facts += [f"power mode {machine['power_mode']}"] if machine["power_mode"] else []
    facts += [f"governor {machine['governor']}"] if machine["governor"] else []
    facts += [f"{name} {version}" for name, version in machine["packages"].items()]
    lines = ", ".join(facts)
    if machine["load"] > machine["cores"] / 2:
        lines += f"\nother programs were running (load {machine['load']:.1f}): these times are too long"
    return lines


def _percentile_table(results: list[dict[str, Any]], stage: str, title: str, width: int) -> str:
    columns = [f"p{p}" for p in PERCENTILES]
    lines = [f"{title:{width}}" + "".join(f"{column:>10}" for column in columns) + f"{'max':>10}{'n':>7}"]
    if stage == END_TO_END:
        lines[0] += f"{'frames/s':>10}{'peak MB':>9}"
    for result in results:
        values = result["stages"][stage]
        cells = "".join(f"{values[column]:10.2f}" for column in (*columns, "max"))
        line = f"{_name(result):{width}}{cells}{result['iterations']:7}"
        if stage == END_TO_END:
            line += f"{result['fps']:10.1f}{result['memory_mb']['peak']:9.0f}"
        lines.append(line)
    return "\n".join(lines)


def _stage_table(results: list[dict[str, Any]], width: int) -> str:
    lines = [f"{'p50 of each stage, ms':{width}}" + "".join(f"{stage:>10}" for stage in STAGES)]
    for result in results:
        cells = "".join(f"{result['stages'][stage]['p50']:10.2f}" for stage in STAGES)
        lines.append(f"{_name(result):{width}}{cells}")
    return "\n".join(lines)


def compare(new: Report, old: Report) -> str:
    """New against stored medians as a table of ratios; above 1 is slower now.

    The spread is what the parts of both measurements leave open: from the fastest new to the slowest stored part, and
    the other way round. Where it holds 1 the difference may be chance.

    Raises:
        InputError: they have no case in common.
    """
    before = {_name(result): result for result in old["results"] if "error" not in result}
    pairs = [(r, before[_name(r)]) for r in new["results"] if "error" not in r and _name(r) in before]
    if not pairs:
        raise InputError(f"the stored report has none of these cases; it has {'; '.join(before) or 'none'}")
    width = max(len(_name(result)) for result, _ in pairs)
    lines = []
    if old["machine"]["cpu"] != new["machine"]["cpu"] or old["machine"]["gpus"] != new["machine"]["gpus"]:
        lines.append(f"stored on another machine: {_header(old['machine'])}")
    titles = "".join(f"{title:>26}" for title in ("network", END_TO_END))
    lines.append(f"{'now / stored':{width}}{titles}{'peak memory':>14}")
    for result, stored in pairs:
        cells = "".join(f"{_ratio(result, stored, stage):>26}" for stage in ("network", END_TO_END))
        memory = result["memory_mb"]["peak"] / stored["memory_mb"]["peak"]
        lines.append(f"{_name(result):{width}}{cells}{memory:14.2f}")
    return "\n".join(lines)


def _ratio(new: dict[str, Any], old: dict[str, Any], stage: str) -> str:
    middle = new["stages"][stage]["p50"] / old["stages"][stage]["p50"]
    low = min(new["rounds_ms"][stage]) / max(old["rounds_ms"][stage])
    high = max(new["rounds_ms"][stage]) / min(old["rounds_ms"][stage])
    verdict = "faster" if high < 1 else "slower" if low > 1 else "equal"
    return f"{middle:.2f} ({low:.2f}-{high:.2f}) {verdict}"
