"""The benchmark: that it measures what the fuser does, that its numbers are those of its times, and what it prints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest

from refusion.cli import main
from runtime import Fuser, InputError
from runtime.bench import END_TO_END, FEWEST, ROUNDS, STAGES, Case, Pipeline, measure, run_cases, statistics_of
from runtime.bench_plot import COLOURS, draw
from runtime.bench_report import compare, describe_machine, make_report, read_report, text_of
from runtime.scenes import night_road


def make_model(path: Path, size: str = "height,width") -> Path:
    """The mean of two grey pictures."""
    onnx.save(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 18], metadata_props: ["task": "ivif", "precision": "fp32"]>
            tiny (float[1,1,{size}] a, float[1,1,{size}] b) => (float[1,1,{size}] fused)
            {{ fused = Mean(a, b) }}"""
        ),
        path,
    )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models") / "mean.onnx"))


def nothing(*_: object) -> None:
    pass


def test_the_stages_are_what_the_fuser_does(model, tmp_path):
    """Bit for bit, so that the two can't drift apart."""
    pipeline = Pipeline(Case(model, "onnxruntime", 64, 48, 1), tmp_path)
    fuser = Fuser(model, threads=1)
    infrared, visible = night_road(3, (48, 64))
    counts = np.random.default_rng(0).integers(0, 65536, (48, 64), dtype=np.uint16)
    for a, b in ((infrared, visible), (infrared, infrared[::-1]), (counts, visible)):
        laps: list[str] = []
        np.testing.assert_array_equal(pipeline.fuse(a, b, laps.append), fuser(a, b))
        assert laps == ["tone", "network", "colour"]


def test_statistics_of_known_times():
    found = statistics_of(np.arange(101.0))
    assert found == {"min": 0, "mean": 50, "max": 100, "p50": 50, "p90": 90, "p95": 95, "p99": 99}


def test_measure_gives_every_stage(model):
    shares: list[float] = []
    result = measure(Case(model, "auto", 64, 48, 1, iterations=20), shares.append)
    assert (result["model"], result["precision"], result["size"], result["threads"]) == ("mean", "fp32", "64x48", 1)
    assert result["backend"] == "onnxruntime" or result["backend"].startswith("onnxruntime-")
    assert result["iterations"] == len(shares) == 20
    assert shares[-1] == 1
    assert set(result["stages"]) == {*STAGES, END_TO_END}
    for values in result["stages"].values():
        assert 0 < values["min"] <= values["p50"] <= values["p90"] <= values["p95"] <= values["p99"] <= values["max"]
    means = [result["stages"][stage]["mean"] for stage in STAGES]
    assert result["stages"][END_TO_END]["mean"] == pytest.approx(sum(means), rel=1e-2)
    assert result["fps"] == pytest.approx(1000 / result["stages"][END_TO_END]["mean"], rel=1e-2)
    assert all(len(rounds) == ROUNDS for rounds in result["rounds_ms"].values())
    assert result["memory_mb"]["peak"] >= result["memory_mb"]["loaded"] > 10


def test_a_slow_case_ends_by_time_but_not_too_early(model):
    result = measure(Case(model, "onnxruntime", 64, 48, 1, iterations=100_000, seconds=1e-6), nothing)
    assert result["iterations"] == FEWEST


@pytest.mark.slow
def test_cases_that_do_not_run_here_leave_the_others(model, tmp_path):
    fixed = str(make_model(tmp_path / "fixed.onnx", "48,64"))
    shown: list[tuple[str, float]] = []
    cases = [Case(fixed, "onnxruntime", 80, 60, 1, 10), Case(model, "onnxruntime", 80, 60, 1, 10)]
    failed, good = run_cases(cases, lambda label, done: shown.append((label, done)))
    assert failed["error"] == "model fixed is built for 64x48, not for 80x60"
    assert good["iterations"] == 10
    assert good["case"]["model"] == model
    assert shown[0] == ("fixed, onnxruntime, 80x60", 0)
    assert shown[-1] == ("done", 2)
    assert [done for _, done in shown] == sorted(done for _, done in shown)
    text = text_of(make_report([failed, good], "2026-01-01"))
    assert "not measured" in text and "built for 64x48" in text
    with pytest.raises(InputError, match="nothing could be measured: model fixed is built for"):
        run_cases(cases[:1], nothing)


def result(p50: float, name: str = "mean") -> dict[str, Any]:
    stages = {stage: {"p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0, "max": 1.0} for stage in STAGES}
    stages["network"] = {"p50": p50, "p90": 2 * p50, "p95": 2 * p50, "p99": 3 * p50, "max": 4 * p50}
    stages[END_TO_END] = {key: value + 6 for key, value in stages["network"].items()}
    rounds = {stage: [values["p50"] * factor for factor in (0.9, 1, 1.1)] for stage, values in stages.items()}
    facts = {"model": name, "backend": "onnxruntime", "precision": "fp32", "size": "640x480", "iterations": 200}
    return {**facts, "stages": stages, "rounds_ms": rounds, "fps": 50.0, "memory_mb": {"loaded": 90, "peak": 100}}


def test_comparison_gives_ratios_with_their_spread():
    old, new = make_report([result(10.0), result(10.0, "b")], "x"), make_report([result(20.0), result(10.5, "b")], "x")
    lines = compare(new, old).splitlines()
    assert "2.00 (1.64-2.44) slower" in lines[1]
    assert "1.62 (1.33-1.99) slower" in lines[1]  # (20 + 6) / (10 + 6)
    assert lines[1].endswith("1.00")
    assert "1.05 (0.86-1.28) equal" in lines[2]
    assert "0.50 (0.41-0.61) faster" in compare(old, new)


def test_comparison_tells_of_another_machine():
    new = make_report([result(10.0)], "x")
    old = copy.deepcopy(new)
    old["machine"]["cpu"] = "Abacus 1"
    assert compare(new, old).startswith("stored on another machine: Abacus 1")
    old["results"] = [result(10.0, "other")]
    with pytest.raises(InputError, match="none of these cases; it has other"):
        compare(new, old)


def test_the_machine_has_a_name():
    machine = describe_machine()
    assert machine["cpu"] and machine["cores"] >= 1
    assert machine["packages"]["onnxruntime"]


def test_a_busy_machine_is_told():
    report = make_report([result(10.0)], "x")
    report["machine"] |= {"cores": 4, "load": 0.1}
    assert "other programs" not in text_of(report)
    report["machine"]["load"] = 3.0
    assert "other programs were running (load 3.0)" in text_of(report)


def test_plot_is_to_scale():
    picture = draw(make_report([result(10.0), result(40.0)], "x"))
    network = (np.abs(picture.astype(int) - COLOURS[STAGES.index("network")]).max(axis=2) < 3).sum(axis=1)
    first, second = np.split(network[90:], [58])  # one row of the plot for each case
    assert np.median(second[second > 100]) == pytest.approx(4 * np.median(first[first > 20]), rel=0.05)
    legend = picture[54:66]
    assert all((np.abs(legend.astype(int) - colour).max(axis=2) < 3).sum() >= 80 for colour in COLOURS)


@pytest.mark.slow
def test_command(model, tmp_path, capsys):
    command = ["bench", "--model", model, "--size", "64x48", "--size", "96x64", "--threads", "1", "--iterations", "30"]
    stored, plot = tmp_path / "bench.json", tmp_path / "out" / "bench.png"
    assert main([*command, "--json", str(stored), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert out.count("mean  onnxruntime") == 6  # two cases in three tables
    report = read_report(stored)
    assert [r["size"] for r in report["results"]] == ["64x48", "96x64"]
    assert f"{report['results'][0]['stages']['network']['p99']:.2f}" in out
    assert cv2.imread(str(plot)).shape[1] == 1200
    assert main([*command[:5], "--iterations", "10", "--vs", str(stored)]) == 0
    ratios = capsys.readouterr().out.split("now / stored")[1]
    assert ratios.count("mean  onnxruntime") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "640"], "give WxH"),
        (["--size", "8x8"], "too small"),
        (["--model", "nope.onnx"], "nope.onnx is missing"),
        (["--model", "nonsense"], "unknown model 'nonsense'"),
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--iterations", "3"], "give 10 or more"),
        (["--seconds", "0"], "more than 0"),
        (["--plot", "out.txt"], "suffix '.txt'"),
        (["--vs", "{tmp}/none.json"], "cannot be read"),
        (["--vs", "{tmp}/text.json"], "not JSON"),
        (["--vs", "{tmp}/other.json"], "not a report of format 1"),
    ],
)
def test_bad_use_is_one_line(arguments, words, tmp_path, capsys):
    (tmp_path / "text.json").write_text("latency: low")
    (tmp_path / "other.json").write_text(json.dumps({"results": []}))
    assert main(["bench", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
