"""The promises about errors: our own classes, one gate for optional packages, nothing swallowed."""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hma_gym import errors
from hma_gym.extras import require

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hma_gym"
BUILTIN_ERRORS = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
}
# What the language itself asks for, and the refusal of a bare `import envs`.
ALLOWED_RAISES = {"AttributeError", "StopIteration"}
GUARDED = {PACKAGE / name / "__init__.py" for name in ("envs", "policies", "benchmarks")}
# The gate, and the one place where a broken OpenGL shows itself as an ImportError of MuJoCo's.
# The last one imports what a user names.
MAY_CATCH_IMPORT_ERROR = {PACKAGE / "extras.py", PACKAGE / "envs" / "rendering.py", PACKAGE / "policies" / "loading.py"}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                yield path, ast.parse(path.read_text())


def names_of(node: ast.expr | None) -> list[str]:
    if node is None:
        return ["<everything>"]
    if isinstance(node, ast.Tuple):
        return [name for item in node.elts for name in names_of(item)]
    return [node.id] if isinstance(node, ast.Name) else []


def test_every_error_is_ours_and_also_what_a_stranger_would_catch() -> None:
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]
    assert len(classes) > 10
    for value in classes:
        assert issubclass(value, errors.HMAError) and value.__doc__
        if value is not errors.HMAError:
            builtin = [base for base in value.__mro__ if base.__module__ == "builtins" and base is not Exception]
            assert any(issubclass(base, Exception) for base in builtin), f"{value} has no built-in base"


def test_only_our_own_errors_are_raised() -> None:
    found = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            call = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = call.id if isinstance(call, ast.Name) else ""
            if name in BUILTIN_ERRORS - ALLOWED_RAISES and not (path in GUARDED and name == "ImportError"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} raises {name}")
    assert not found


def test_nothing_catches_everything_and_only_the_gate_catches_import_errors() -> None:
    found = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            for name in names_of(node.type):
                swallows = name in ("<everything>", "Exception", "BaseException") and not _reraises(node)
                passes_the_gate = name in ("ImportError", "ModuleNotFoundError") and path not in MAY_CATCH_IMPORT_ERROR
                if swallows or passes_the_gate:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} catches {name}")
    assert not found


def _reraises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def test_every_extra_that_an_error_names_exists() -> None:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    offered = set(re.findall(r"^([a-z]+) = \[", section, flags=re.MULTILINE))
    assert {"sim", "robomimic", "diffusion", "rl", "web", "metrics", "dev", "all"} <= offered
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "require":
                for keyword in node.keywords:
                    if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant):
                        assert keyword.value.value in offered, f"{path}:{node.lineno}"


def third_party(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Top-level packages imported anywhere in a module, but for those under ``if TYPE_CHECKING``."""
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in hidden:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "hma_gym":
                yield node.lineno, top


def test_optional_packages_pass_the_gate() -> None:
    base = {"torch", "numpy", "gymnasium", "einops", "safetensors", "h5py", "imageio", "PIL", "tqdm", "tyro"}
    base |= {"vector_quantize_pytorch", "imageio_ffmpeg"}  # the latter comes with imageio[ffmpeg]
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path, tree in modules()
        for line, name in third_party(tree)
        if name not in base
    ]
    assert not found, "use hma_gym.extras.require at the point of use"


def test_a_missing_package_is_one_error_with_the_pip_line() -> None:
    with pytest.raises(errors.MissingExtra, match=r'pip install "hma_gym\[sim\]"') as caught:
        require("package_that_is_not_there.part", extra="sim", purpose="this test")
    assert isinstance(caught.value, ImportError)
    assert "'package_that_is_not_there' is needed for this test" in str(caught.value)


def test_a_fault_of_our_own_is_not_taken_for_a_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError, match="hma_gym.no_such_module") as caught:
        require("hma_gym.no_such_module", extra="sim", purpose="this test")
    assert not isinstance(caught.value, errors.HMAError)


def test_an_unknown_name_lists_the_known_ones() -> None:
    error = errors.UnknownName("task", "lfit", ["lift", "can"], "See envs/tasks.py.")
    assert str(error) == "unknown task 'lfit'; choose one of: can, lift. See envs/tasks.py."
    assert isinstance(error, LookupError)
