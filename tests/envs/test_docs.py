"""The examples of docs/environments.md run as they stand (with the toy checkpoint under the shipped one's name)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import hma_gym.dynamics.checkpoint as checkpoint

PAGE = Path(__file__).resolve().parents[2] / "docs" / "environments.md"


def test_every_example_runs(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toy_folder, tmp_path / "lift-64")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) == 6
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), namespace)
