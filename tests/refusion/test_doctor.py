"""`refusion doctor`: what it says of this machine, of a Jetson and of a bare one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from refusion.cli.machines import Finding, describe, examine, next_commands, table
from runtime.cuda_driver import Gpu
from runtime.machine import Machine, probe

ROOT = Path(__file__).resolve().parents[2]
BARE = Machine("linux-x86_64", "3.11.2", 2, 4 << 30, gpu_problem="no driver", packages={"onnxruntime": "1.23.2"})
JETSON = Machine(
    platform="linux-aarch64",
    python="3.10.12",
    cores=6,
    memory=8 << 30,
    jetpack="JetPack 6 (L4T 36.4.3)",
    cuda="12.6",
    gpus=(Gpu("Orin", (8, 7), 8 << 30),),
    packages={"onnxruntime": "1.23.2", "tensorrt": "10.3.0", "pycuda": "2024.1", "gi": "3.42.1"},
)


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "refusion", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def findings(machine: Machine) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(machine)}


def test_it_reads_like_a_table_and_ends_with_commands() -> None:
    done = doctor()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"machine      {probe().platform}, Python ")
    assert any(line.startswith("  yes  onnxruntime ") for line in lines)
    assert lines[lines.index("next:") + 1].startswith("  refusion demo")


def test_json_holds_the_same() -> None:
    done = doctor("--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert set(report) == {"machine", "findings", "next"}
    assert report["machine"]["packages"]["onnxruntime"]
    assert {"group", "what", "works", "found", "advice"} == set(report["findings"][0])
    assert [finding["what"] for finding in report["findings"]] == list(findings(probe()))


def test_every_no_says_what_to_do() -> None:
    for machine in (BARE, JETSON, probe()):
        for finding in examine(machine):
            assert finding.works or finding.advice, finding
            assert finding.found, finding


def test_a_bare_machine() -> None:
    found = findings(BARE)
    assert [what for what, finding in found.items() if finding.works and finding.group == "run a model"] == [
        "onnxruntime"
    ]
    assert found["ONNX model, fp32, fp16 and int8"].found == "no torch, onnx, onnxscript"
    assert found["ONNX model, fp32, fp16 and int8"].advice == "pip install 'refusion[export]'"
    assert found["TensorRT engine for this GPU"].found == "no driver"
    commands = [command for command, _ in next_commands(BARE, list(found.values()))]
    assert commands[0] == "refusion demo" and not any("export.build" in command for command in commands)


def test_a_jetson_builds_and_runs_engines() -> None:
    found = findings(JETSON)
    assert found["TensorRT engine for this GPU"].works
    assert found["TensorRT engine for this GPU"].found == "TensorRT 10.3.0, Orin (sm_87)"
    assert found["tensorrt"].works and found["tensorrt"].found == "TensorRT 10.3.0, pycuda 2024.1"
    assert found["GStreamer pipelines, Jetson cameras"].works
    commands = [command for command, _ in next_commands(JETSON, list(found.values()))]
    assert any("--format engine" in command for command in commands)
    assert "refusion bench --model ivif.engine" in commands
    assert any("jetson_clocks" in command for command in commands)
    assert "GPU 0        Orin (sm_87), 8.0 GiB" in describe(JETSON)


def test_what_a_jetson_lacks_is_named() -> None:
    without = replace(JETSON, packages={"onnxruntime": "1.23.2"})
    assert "sudo apt install python3-libnvinfer" in findings(without)["TensorRT engine for this GPU"].advice
    old = replace(JETSON, packages={"onnxruntime": "1.16", "tensorrt": "8.5.2", "pycuda": "2024.1"})
    assert findings(old)["tensorrt"].found == "TensorRT 8.5.2 is too old"
    half = replace(JETSON, packages={"onnxruntime": "1.23.2", "tensorrt": "10.3.0"})
    assert findings(half)["TensorRT engine for this GPU"].works
    assert findings(half)["tensorrt"].found == "no pycuda"


def test_the_table_is_aligned() -> None:
    lines = table([Finding("g", "one", True, "found"), Finding("g", "longer", False, "nothing", "do that")])
    assert lines == ["g:", "  yes  one     found", "  no   longer  nothing: do that"]
