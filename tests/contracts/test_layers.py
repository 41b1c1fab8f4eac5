"""The floors of the house: imports run one way, and the check that says so can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("hma_gym", "envs", "policies", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=folder, capture_output=True, text=True)


def test_imports_run_one_way() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("hma_gym/errors.py", "import hma_gym.cli\n"),
        ("hma_gym/nn/__init__.py", "from hma_gym.envs import tasks\n"),
        ("policies/__init__.py", "import hma_gym.benchmarks\n"),
    ],
)
def test_an_import_upwards_is_found(tree: Path, file: str, line: str) -> None:
    path = tree / file
    path.write_text(path.read_text() + line)
    done = lint(tree)
    assert done.returncode != 0 and "BROKEN" in done.stdout


def test_a_module_without_a_floor_is_found(tree: Path) -> None:
    (tree / "hma_gym" / "homeless.py").write_text('"""On no floor."""\n')
    assert lint(tree).returncode != 0
