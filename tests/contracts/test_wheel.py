"""The wheel: one top-level name, nothing missing, and it works outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hma_gym"
RESULTS = PACKAGE / "benchmarks" / "results"  # figures of the repository, not part of the package
SOURCES = ("hma_gym", "envs", "policies", "benchmarks", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def copy_sources(target: Path) -> Path:
    """A copy of what the build needs, symlinks kept, so that no stale build folder takes part."""
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy2(source, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = copy_sources(folder / "tree")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(tree)])
    (built,) = folder.glob("hma_gym-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)])
    return target


def test_one_top_level_name_and_nothing_missing(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    top = {path.parts[0] for path in names}
    info = {part for part in top if part.endswith(".dist-info")}
    assert top - info == {"hma_gym"} and len(info) == 1
    expected = {
        Path(folder).relative_to(ROOT) / file
        for folder, _, files in os.walk(PACKAGE, followlinks=True)
        for file in files
        if "__pycache__" not in folder and not Path(folder).is_relative_to(RESULTS)
    }
    packed = {path for path in names if path.parts[0] == "hma_gym"}
    assert packed == expected
    for needed in ("py.typed", "envs/tasks.py", "policies/__init__.py", "benchmarks/__init__.py"):
        assert Path("hma_gym", needed) in packed
    assert (info.pop() + "/licenses/LICENSE") in {path.as_posix() for path in names}


def test_the_installed_wheel_works_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    program = (
        "import gymnasium, hma_gym, hma_gym.envs, hma_gym.policies, hma_gym.benchmarks\n"
        "print(hma_gym.__file__)\n"
        "print(gymnasium.spec('GroundTruth-Lift-v0').entry_point)\n"
        "print(gymnasium.spec('HMA-Lift-v0').vector_entry_point)\n"
        "env = gymnasium.make('HMA-Lift-v0')\n"
        "env.reset(seed=0)\n"
        "print(env.step(env.action_space.sample())[0].shape)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    lines = run([sys.executable, "-c", program], cwd=tmp_path, env=environment).splitlines()
    assert Path(lines[0]).is_relative_to(installed)
    assert lines[1:3] == ["hma_gym.envs.ground_truth:GroundTruthEnv", "hma_gym.envs.vector:HMAVectorEnv"]
    assert lines[3] == "(64, 64, 3)"
    command = run([str(installed / "bin" / "hma-gym"), "--help"], cwd=tmp_path, env=environment)
    assert "usage: hma-gym" in command


def test_an_editable_installation_sees_new_files(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    target = tmp_path / "site"
    run([*PIP, "install", "--no-deps", "--no-build-isolation", "--target", str(target), "-e", str(tree)])
    (tree / "envs" / "brought_later.py").write_text("ANSWER = 42\n")
    # -S leaves out this environment's own editable installation; its packages are added behind the new one.
    program = (
        "import site, sys\n"
        f"site.addsitedir({str(target)!r})\n"
        f"sys.path.append({sysconfig.get_paths()['purelib']!r})\n"
        "import hma_gym.envs.brought_later as module\n"
        "print(module.__file__, module.ANSWER)\n"
    )
    path, answer = run([sys.executable, "-S", "-c", program], cwd=tmp_path).split()
    assert answer == "42" and Path(path).resolve() == tree / "envs" / "brought_later.py"
