"""The part of building an engine that talks to TensorRT: the same code for 10.3 to 11.x, and for TensorRT-RTX.

Importing this module imports TensorRT, which may crash where there is no CUDA driver: `export.engine` looks first.
Networks are strongly typed: precision is what the ONNX model says. Flags are named, since their numbers differ
between versions. Source: TensorRT Python API of 10.3.0, 10.13.3 and 11.4.0.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tensorrt as trt
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from export.builder_errors import explain
from runtime.errors import InputError
from runtime.files import write_whole

Shape = tuple[int, ...]

LIBRARY = f"{'TensorRT-RTX' if trt.__name__ == 'tensorrt_rtx' else 'TensorRT'} {trt.__version__}"

log = logging.getLogger("refusion.tensorrt")


@dataclass(frozen=True)
class Options:
    """What the builder is told; None leaves TensorRT's own default."""

    shapes: dict[str, tuple[Shape, Shape, Shape]]  # dynamic inputs -> smallest, usual, largest shape
    workspace_gb: float | None = None
    optimization_level: int | None = None  # 0 (fast build) to 5 (fast engine)
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    timing_cache: Path | None = None


def build_plan(
    model: bytes, name: str, options: Options, configure: Callable[[trt.IBuilderConfig], None] | None = None
) -> bytes:
    """ONNX model -> serialised engine.

    Args:
        model: the ONNX file's content.
        name: what messages call the model.
        options: what the builder is told.
        configure: what else the builder's configuration needs, for TensorRT-RTX.

    Raises:
        InputError: the model can't be parsed or built: one line that names the node or limit and what to do.
        KeyboardInterrupt: as Ctrl-C; TensorRT has stopped by then.
    """
    messages = Messages()
    try:
        builder = trt.Builder(messages)
    except TypeError as error:  # what pybind11 makes of TensorRT's null pointer
        raise InputError(f"{LIBRARY} does not start: {explain(messages.errors)}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(model, name, network, messages)
    config = builder.create_builder_config()
    _configure(config, options)
    if configure is not None:
        configure(config)
    if options.shapes:
        _add_profile(builder, config, options.shapes)
    cache = _load_timing_cache(config, options.timing_cache)
    progress = Progress()
    config.progress_monitor = progress
    with logging_redirect_tqdm():
        plan = builder.build_serialized_network(network, config)
    progress.close()
    if progress.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise InputError(f"{LIBRARY} can't build {name}: {explain(messages.errors)}")
    if options.timing_cache is not None and cache is not None:
        write_whole(options.timing_cache, memoryview(cache.serialize()))
    return bytes(memoryview(plan))


def _parse(model: bytes, name: str, network: trt.INetworkDefinition, messages: Messages) -> None:
    parser = trt.OnnxParser(network, messages)
    if parser.parse(model):
        return
    errors = []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        node = f"node {error.node_name() or error.node()} ({error.node_operator()}): " if error.node() >= 0 else ""
        errors.append(f"{node}{error.desc()}")
    raise InputError(f"{LIBRARY} can't read {name}: {explain(errors or messages.errors)}")


def _configure(config: trt.IBuilderConfig, options: Options) -> None:
    if options.workspace_gb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * (1 << 30)))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        # SAME_COMPUTE_CAPABILITY is younger than 10.3.
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper(), None)
        if level is None:
            raise InputError(
                f"{LIBRARY} has no hardware compatibility '{options.hardware_compatibility}'; leave it out"
            )
        config.hardware_compatibility_level = level


def _add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, shapes: dict[str, tuple[Shape, Shape, Shape]]
) -> None:
    profile = builder.create_optimization_profile()
    for name, steps in shapes.items():
        smallest, usual, largest = (trt.Dims(list(shape)) for shape in steps)
        profile.set_shape(name, smallest, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise InputError(f"{LIBRARY} refuses the sizes {shapes}")


def _load_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache | None:
    if path is None:
        return None
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return cache
    log.warning("timing cache %s is of another TensorRT or GPU, or damaged: it is made anew", path)
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


class Messages(trt.ILogger):
    """TensorRT's log as Python's: errors are kept for the message of a failed build, each warning is shown once."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self._warned: set[str] = set()
        severity = trt.ILogger.Severity
        self._levels: dict[trt.ILogger.Severity, Callable[[str], None]] = {
            severity.INTERNAL_ERROR: self._error,
            severity.ERROR: self._error,
            severity.WARNING: self._warning,
            severity.INFO: log.info,
            severity.VERBOSE: log.debug,
        }

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        self._levels[severity](msg)

    def _error(self, message: str) -> None:
        self.errors.append(message)
        log.debug("error: %s", message)

    def _warning(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", " ".join(message.split()))


class Progress(trt.IProgressMonitor):
    """A bar for each phase of the build that is under way, the outer above the inner; Ctrl-C stops the build."""

    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)
        self.interrupted = False
        self._bars: dict[str, tqdm] = {}
        self._lock = threading.Lock()  # phases may come from several threads of TensorRT

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        with self._lock:
            self._bars[phase_name] = tqdm(
                total=num_steps, desc=phase_name, unit="step", leave=False, position=len(self._bars), disable=None
            )

    def step_complete(self, phase_name: str, step: int) -> bool:
        """False asks TensorRT to stop. An exception would not get through its C++."""
        try:
            with self._lock:
                bar = self._bars.get(phase_name)
                if bar is not None:
                    bar.update(step + 1 - bar.n)
        except KeyboardInterrupt:
            self.interrupted = True
        return not self.interrupted

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            bar = self._bars.pop(phase_name, None)
            if bar is not None:
                bar.close()

    def close(self) -> None:
        """Close what a failed build left open."""
        for name in list(self._bars):
            self.phase_finish(name)
