"""Our use of TensorRT's API against its real packages: scripts/tensorrt_api_check, with misspelt names as controls."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "tensorrt_api_check"


@pytest.fixture(scope="module")
def api_check() -> ModuleType:
    """The script as a module; it has no suffix."""
    loader = SourceFileLoader("tensorrt_api_check", str(SCRIPT))
    spec = spec_from_loader("tensorrt_api_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["tensorrt_api_check"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9", "11.4.0.106", "1.7.1.116"])
def test_every_name_and_signature_is_there(api_check: ModuleType, version: str, tmp_path: Path) -> None:
    release = next(release for release in api_check.RELEASES if release.version == version)
    try:
        stubs = api_check.make_stubs(release, tmp_path)
    except api_check.UnavailableError as error:
        pytest.skip(str(error))
    assert api_check.type_errors(release.files, stubs) == []
    if version == "11.4.0.106":
        for file in release.files:
            count, left = api_check.unchecked(file, stubs, tmp_path)
            assert count > 40
            assert left == []
    if version == "10.3.0":
        controls = {
            "config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)": "config.set_flag()",
            "profile.set_shape(name, smallest, usual, largest)": "profile.set_shape(name, smallest, usual)",
            "trt.BuilderFlag.VERSION_COMPATIBLE": "trt.MemoryPoolType.WORKSPACE",
        }
        for right, wrong in controls.items():
            source = api_check.BUILDER.read_text()
            assert right in source
            copy = tmp_path / f"wrong_{abs(hash(wrong))}.py"
            copy.write_text(source.replace(right, wrong))
            assert len(api_check.type_errors([copy], stubs)) == 1, wrong


def test_what_python_can_not_read_of_a_stub_is_repaired(api_check: ModuleType) -> None:
    stub = "import typing\nbool: DataType\nclass Dims:\n    def get(self, x: a::b<c>) -> bool:\n        ...\n"
    repaired = api_check.repair(stub)
    compile(repaired, "stub", "exec")
    assert "def get(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:" in repaired
    assert "__iter__" in repaired and "bool: DataType" not in repaired
