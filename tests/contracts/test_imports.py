"""What importing costs, what it needs, and which names may be imported."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "mujoco", "robosuite", "robomimic", "h5py", "imageio", "PIL", "tyro", "einops", "safetensors")
TRAINING_STACK = ("torch", "numpy", "h5py", "einops", "safetensors", "tqdm")
TRAINING_PACKAGES = ("nn", "tokenizers", "dynamics", "data", "training")
OPTIONAL = ("hma_gym.nn.kernels",)  # needs an extra, and is imported by who asks for it


def python(program: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["hma_gym", "hma_gym.cli", "hma_gym.envs.tasks", "hma_gym.domains"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    done = python(f"import sys, {module}; print(sorted(set(sys.modules) & set({HEAVY!r})))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_registers_every_row_of_the_task_table() -> None:
    import gymnasium

    from hma_gym.envs.tasks import TASKS

    for task in TASKS.values():
        truth = gymnasium.spec(f"GroundTruth-{task.id_stem}-v0")
        assert truth.max_episode_steps == task.horizon and truth.kwargs == {"task": task.key}
        learned_id = f"HMA-{task.id_stem}-v0"
        assert (learned_id in gymnasium.registry) == (task.checkpoint is not None)
        if task.checkpoint is not None:
            learned = gymnasium.spec(learned_id)
            assert learned.vector_entry_point == "hma_gym.envs.vector:HMAVectorEnv"
            assert learned.max_episode_steps == task.horizon and learned.kwargs == {"task": task.key}
    assert gymnasium.spec("HMA-v0").max_episode_steps is None


def test_gymnasium_imports_the_package_by_the_prefix_of_an_id() -> None:
    done = python("import gymnasium; print(gymnasium.make('hma_gym:HMA-Lift-v0').spec.id)")
    assert done.stdout.strip() == "HMA-Lift-v0", done.stderr


@pytest.mark.parametrize("name", ["envs", "policies", "benchmarks"])
def test_the_top_level_folders_refuse_their_bare_names(name: str) -> None:
    done = python(f"import {name}")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(f"ImportError: import hma_gym.{name} instead of {name}")


def closure(names: tuple[str, ...]) -> set[str]:
    """The distributions that ``names`` are and depend on, as installed here."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = canonicalize_name(pending.pop())
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                pending.append(needed.name)
    return found


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """A folder of packages that holds the training stack, what that depends on, hma_gym, and nothing else."""
    site = tmp_path / "site"
    site.mkdir()
    for name in closure(TRAINING_STACK):
        for top in {file.parts[0] for file in metadata.files(name) or [] if file.parts[0] != ".."}:
            if not (site / top).exists() and top != "__pycache__":
                (site / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    (site / "hma_gym").symlink_to(ROOT / "hma_gym")
    return site


def test_the_training_side_imports_with_the_training_stack_alone(bare_machine: Path, tmp_path: Path) -> None:
    program = (
        "import importlib, importlib.util, pkgutil, sys\n"
        f"sys.path.append({str(bare_machine)!r})\n"
        "assert importlib.util.find_spec('gymnasium') is None\n"
        f"for name in {TRAINING_PACKAGES!r}:\n"
        "    package = importlib.import_module(f'hma_gym.{name}')\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        f"        if module.name not in {OPTIONAL!r}:\n"
        "            importlib.import_module(module.name)\n"
        "print('imported')\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stderr
