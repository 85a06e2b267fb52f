"""Who may import whom, held for every file of the four packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("refusion", "kernels", "export", "runtime")
# package -> what of ours it may import
ALLOWED = {
    "runtime": {"runtime"},
    "kernels": {"kernels"},
    "refusion": {"refusion", "kernels", "runtime"},
    "export": {"export", "refusion", "runtime"},
}
# The command line stands on top: it alone reaches export, and nothing imports it.
CLI = ROOT / "refusion" / "cli"
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package] | ({"export"} if CLI in path.parents else set())
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in PACKAGES or top in allowed, f"{path} imports {name}"
        if package == "runtime":
            assert top not in {"torch", "triton", "onnx"}, f"{path} imports {name}"
        if path.name != "__main__.py" and CLI not in path.parents:
            assert not name.startswith("refusion.cli"), f"{path} imports the command line"


def test_every_package_was_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize(
    "module", ["runtime", "runtime.fuser", "runtime.batch", "refusion", "refusion.cli", "refusion.evaluate"]
)
def test_lean_modules_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'triton', 'onnx', 'tensorboard'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_no_file_says_nothing_by_its_name() -> None:
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}]
