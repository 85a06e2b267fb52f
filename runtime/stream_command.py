"""The command line of a stream: `refusion stream` and `python runtime/stream.py`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runtime.errors import InputError, exit_code
from runtime.files import check_writable, write_whole
from runtime.tasks import TASKS

if TYPE_CHECKING:
    from runtime.health import Event
    from runtime.offset import Offset
    from runtime.stream import Stream

DESCRIPTION = (
    "Fuse the pictures of two cameras, as they come: URI_A is the thermal camera (the task's first source), URI_B the "
    "visible one, which sets the pace. URIs: v4l2:///dev/video0, csi://0, rtsp://USER:PASSWORD@HOST/PATH, "
    "file:///data/a.mkv, file://folder/, 'gst:PIPELINE', shm://NAME, mcap://bag.mcap?topic=/TOPIC, demo://night (both "
    "cameras of a generated scene). Ctrl-C ends it and finishes the files."
)
PROGRESS = 0.5  # seconds between two states of the progress line
OFFSET_SECONDS = 20.0
# Seconds after which a thread that computes in Python lets another one go on: 5 ms, the default, are much of a frame.
SWITCH_INTERVAL = 0.0005

log = logging.getLogger("refusion")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a stream."""
    parser.add_argument("a", metavar="URI_A", help="thermal camera, or demo://night for both")
    parser.add_argument("b", metavar="URI_B", nargs="?", help="visible camera, the master")
    parser.add_argument(
        "--sink",
        action="append",
        default=[],
        metavar="URI",
        help="where the pictures go, may be repeated: file://out.mp4, file://frames/, display://, "
        "http://127.0.0.1:8000, rtsp://127.0.0.1:8554/fused, shm://fused, mcap://out.mcap, null:// (default: null://)",
    )
    parser.add_argument("--duration", type=float, metavar="S", help="end after so many seconds")
    parser.add_argument("--frames", type=int, metavar="N", help="end after so many pictures")
    parser.add_argument("--json", metavar="FILE", help="write the last status; - is the standard output")
    model = parser.add_argument_group("fusion")
    model.add_argument("--task", choices=tuple(TASKS), default="ivif", help="what is fused (default: %(default)s)")
    model.add_argument(
        "--model",
        default="auto",
        metavar="auto|lite|full|average|PATH",
        help="network: auto takes what this machine can run live; average is the mean of both, without a network",
    )
    model.add_argument("--backend", default="auto", help="what computes it (default: %(default)s)")
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads of one picture (default: all cores)")
    model.add_argument("--calibration", metavar="FILE", help="of refusion calibrate: aligns the cameras")
    model.add_argument(
        "--tone",
        default="percentile",
        metavar="percentile|clahe|full|LOW:HIGH",
        help="what is black and white in 16-bit thermal pictures: percentiles that follow the scene slowly, the same "
        "with local contrast, 0:65535, or fixed counts (default: %(default)s)",
    )
    model.add_argument(
        "--range",
        default="auto",
        metavar="auto|smooth|stretch|keep",
        help="stretch with limits that follow the scene slowly (auto), stretch each picture by itself, or keep the "
        "network's values; a model that makes the whole picture has one built in",
    )
    model.add_argument(
        "--chroma", default="auto", metavar="auto|a|b|mix|official|none", help="whose colour (default: %(default)s)"
    )
    _add_pairing_arguments(parser.add_argument_group("pairing"))


def _add_pairing_arguments(pairs: argparse._ArgumentGroup) -> None:
    from runtime.sync import Pairing

    default = Pairing()
    for name, text in (
        ("max_skew_ms", "pictures further apart are no pair"),
        ("hold_ms", "a picture waits at most this long for a nearer partner"),
        ("max_age_ms", "the last thermal picture is used this long; then the camera counts as away"),
        ("clock_offset_ms", "is added to the thermal camera's times"),
    ):
        option = f"--{name.replace('_', '-')}"
        help_ = f"{text} (default: %(default)g)"
        pairs.add_argument(option, type=float, default=getattr(default, name), metavar="MS", help=help_)
    pairs.add_argument(
        "--on-missing",
        default=default.on_missing,
        metavar="hold|pass|skip",
        help="without a thermal picture: use the last one until it is too old, pass the visible one, or give nothing "
        "(default: %(default)s)",
    )
    pairs.add_argument("--one-to-one", action="store_true", help="use each picture once: the slower camera's rate")
    pairs.add_argument(
        "--queue-size", type=int, default=default.queue_size, metavar="N", help="pictures of each camera that may wait"
    )
    pairs.add_argument(
        "--estimate-offset",
        action="store_true",
        help="measure the clocks' offset from what moves before both cameras, in place of fusing, for "
        f"{OFFSET_SECONDS:.0f} s or --duration",
    )


def run(args: argparse.Namespace) -> None:
    """Run a stream, or the estimate of the offset, as the options say."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # before it is imported: what goes wrong comes as an exception
    if args.estimate_offset:
        print_offset(_estimate_offset(args))
        return
    if args.json and args.json != "-":
        check_writable(Path(args.json))
    stream = _open(args)
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, frame: object) -> None:
        stream.stop()
        for each, handler in previous.items():  # a second Ctrl-C ends at once
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, end)
    print(f"refusion: {stream.fusion.fuser.choice}", file=sys.stderr)
    for sink in stream.status()["sinks"]:
        print(f"refusion: to {sink['url']}", file=sys.stderr)
    try:
        with stream, _Progress(stream):
            status = stream.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(summary(status), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        _write_json(args.json, status)


def _open(args: argparse.Namespace) -> Stream:
    from runtime.stream import Stream
    from runtime.sync import Pairing

    pairing = Pairing(
        args.max_skew_ms,
        args.hold_ms,
        args.max_age_ms,
        args.queue_size,
        args.clock_offset_ms,
        args.on_missing,
        args.one_to_one,
    )
    return Stream(
        args.a,
        args.b,
        task=args.task,
        model=args.model,
        backend=args.backend,
        threads=args.threads,
        calibration=args.calibration,
        tone=args.tone,
        range=args.range,
        chroma=args.chroma,
        pairing=pairing,
        sinks=args.sink,
        duration=args.duration,
        frames=args.frames,
        on_event=_print_event,
    )


def _estimate_offset(args: argparse.Namespace) -> Offset:
    from runtime.offset import measure_offset

    return measure_offset(args.a, args.b, args.duration or OFFSET_SECONDS)


def print_offset(offset: Offset) -> None:
    """The measured offset, and the option that takes it into account."""
    print(
        f"clock offset: {1000 * offset.seconds:+.0f} ms, 95 % within {1000 * offset.uncertainty:.0f} ms "
        f"(correlation {offset.correlation:.2f})\nuse it: --clock-offset-ms {1000 * offset.seconds:.0f}"
    )


def _print_event(event: Event) -> None:
    from tqdm import tqdm

    detail = f": {event.detail}" if event.detail else ""
    with tqdm.external_write_mode(file=sys.stderr):
        print(f"refusion: {event.source} {event.kind}{detail}", file=sys.stderr)


class _Progress:
    """A line on a terminal that tells how the stream goes, written by a thread of its own."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        from tqdm import tqdm

        with tqdm(unit=" frames", disable=None, file=sys.stderr, bar_format="{desc}") as line:
            while not self._stop.wait(PROGRESS):
                line.set_description_str(progress_line(self._stream.status()))


def progress_line(status: dict[str, Any]) -> str:
    """State, rate, age and drops in a line."""
    age = status["age_ms"]["p50"] if status["age_ms"] else 0
    dropped = sum(source["dropped"] for source in status["sources"].values())
    cameras = ", ".join(f"{side} {source['state']} {source['fps']:.0f}/s" for side, source in status["sources"].items())
    return f"{status['state']}: {status['frames']} frames, {status['fps']:.1f}/s, {age:.0f} ms old; {cameras}; " \
           f"{dropped} dropped"  # fmt: skip


def summary(status: dict[str, Any]) -> str:
    """What a stream did, as a table."""
    lines = [
        f"{status['frames']} frames in {status['seconds']:.1f} s, model {status['model']}: "
        + (", ".join(f"{state} {count}" for state, count in status["states"].items()) or "nothing came out")
    ]
    for name, key in (("age", "age_ms"), ("skew", "skew_ms")):
        if status[key]:
            lines.append(f"{name:10}{_percentiles(status[key])}")
    lines += [f"{name:10}{_percentiles(values)}" for name, values in status["stages_ms"].items() if values]
    for side, source in status["sources"].items():
        troubles = {name: source[name] for name in _TROUBLES if source[name]}
        troubles_text = "".join(f", {name.replace('_', ' ')} {count}" for name, count in troubles.items())
        lines.append(f"{side} {source['name']}: {source['state']}, {source['frames']} frames{troubles_text}")
    clocks = {side: source["clock"] for side, source in status["sources"].items() if source["clock"]}
    if len(set(clocks.values())) > 1:
        told = " and ".join(f"{side}'s by {clock}" for side, clock in clocks.items())
        lines.append(f"note: {told}: these clocks differ by the delay on the way; measure it with --estimate-offset")
    for sink in status["sinks"]:
        error = f", {sink['error']}" if sink["error"] else ""
        lines.append(f"sink {sink['url']}: {sink['written']} written, {sink['dropped']} dropped{error}")
    return "\n".join(lines)


_TROUBLES = ("dropped", "corrupt", "silences", "freezes", "losses", "reconnects", "clock_jumps", "clock_refused",
             "size_changes")  # fmt: skip


def _percentiles(values: dict[str, float]) -> str:
    return f"p50 {values['p50']:7.1f}  p90 {values['p90']:7.1f}  p99 {values['p99']:7.1f}  max {values['max']:7.1f} ms"


def _write_json(file: str, status: dict[str, Any]) -> None:
    text = json.dumps(status, indent=1) + "\n"
    if file == "-":
        sys.stdout.write(text)
    else:
        write_whole(Path(file), text.encode())


class _Parser(argparse.ArgumentParser):
    """Wrong use gives one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """`python runtime/stream.py`; returns the exit code."""
    logging.basicConfig(format="refusion: %(message)s", level=logging.WARNING)

    def command() -> None:
        parser = _Parser("stream.py", description=DESCRIPTION)
        add_arguments(parser)
        run(parser.parse_args(argv))

    return exit_code(command)
