"""The hma-gym command: lazy, complete, and one clean line for a mistake."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from hma_gym import __version__, cli


def command_names() -> list[str]:
    return [*cli.COMMANDS, *(f"{cli.BENCH} {name}" for name in cli.benchmark_names())]


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_a_frozen_config_with_help_for_each_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, command, rest = cli.resolve([*name.split(" "), "--help"])
    module = importlib.import_module(command.module)
    config = getattr(module, command.config)
    assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
    assert callable(getattr(module, command.function)) and rest == ["--help"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(" "), "--help"])
    assert stopped.value.code == 0
    assert f"hma-gym {name}" in capsys.readouterr().out


def test_help_names_every_command_and_imports_none() -> None:
    program = (
        "import sys\n"
        "from hma_gym.cli import main\n"
        "main(['--help'])\n"
        "print(sorted({'torch', 'tyro', 'h5py'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *text, heavy = done.stdout.strip().splitlines()
    assert heavy == "[]", done.stderr
    for name in (*cli.COMMANDS, *cli.benchmark_names()):
        assert any(name in line for line in text), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hma-gym {__version__}\n"


def test_no_command_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: hma-gym COMMAND")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["colect"], "unknown command 'colect'"),
        (["data", "lok"], "unknown command 'data lok'"),
        (["bench", "nothing"], "unknown benchmark 'nothing'"),
        (["bench"], "unknown benchmark ''"),
    ],
)
def test_an_unknown_command_is_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"hma-gym: error: {text}") and printed.err.count("\n") == 1


TOY = '''
from dataclasses import dataclass
from pathlib import Path
from hma_gym.errors import StorageError

@dataclass(frozen=True)
class Config:
    """A toy command."""

    fault: str = "none"
    """what goes wrong"""

def main(config: Config) -> tuple[Path, Path]:
    if config.fault == "ours":
        raise StorageError("out: cannot be written\\n  (disk full); free some space.")
    if config.fault == "interrupt":
        raise KeyboardInterrupt
    if config.fault == "bug":
        raise ZeroDivisionError("a fault of the program")
    print("fault:", config.fault)
    return Path("out.png"), Path("out.mp4")
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_command.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "toy", cli.Command("a toy", "toy_command", "Config", "main"))


@pytest.mark.usefixtures("toy")
def test_options_reach_the_command_and_its_paths_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--fault", "small"]) == 0
    assert capsys.readouterr().out == "fault: small\nwritten: out.png\nwritten: out.mp4\n"


@pytest.mark.usefixtures("toy")
def test_our_errors_are_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--fault", "ours"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "hma-gym: error: out: cannot be written (disk full); free some space.\n" and not printed.out


@pytest.mark.usefixtures("toy")
def test_an_interruption_is_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--fault", "interrupt"]) == 130
    assert capsys.readouterr().err == "hma-gym: interrupted\n"


@pytest.mark.usefixtures("toy")
def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["toy", "--fault", "bug"])


@pytest.mark.usefixtures("toy")
def test_a_wrong_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["toy", "--falt", "x"])
    assert stopped.value.code == 2 and "--falt" in capsys.readouterr().err
