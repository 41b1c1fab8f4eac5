"""The ``hma-gym`` command: a table of subcommands, each imported only when it is called.

A subcommand is one row of :data:`COMMANDS`: a module, its frozen config dataclass, and the function that
takes the config. tyro makes the options from the dataclass. A benchmark is found by its name: module
``some_table`` of :mod:`hma_gym.benchmarks` has ``SomeTableConfig`` and ``some_table(config)``.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hma_gym.errors import HMAError, UnknownName
from hma_gym.version import __version__

PROGRAM = "hma-gym"


@dataclass(frozen=True)
class Command:
    """One subcommand: ``function(config)`` of ``module``, with the options of its dataclass ``config``.

    With ``positional``, the fields without a default are given by place: ``hma-gym data info FILE``.
    """

    summary: str
    module: str
    config: str
    function: str
    positional: bool = False


COMMANDS: dict[str, Command] = {
    "collect": Command(
        "record a dataset of mixed quality in the ground truth",
        "hma_gym.collection.collect",
        "CollectConfig",
        "collect",
    ),
    "data import": Command(
        "bring a robomimic file into our layout, its images rendered from its states",
        "hma_gym.collection.importer",
        "ImportConfig",
        "import_dataset",
        positional=True,
    ),
    "data stills": Command(
        "make pictures of recorded states, in part with the object put elsewhere",
        "hma_gym.collection.stills",
        "StillsConfig",
        "make_stills",
        positional=True,
    ),
    "data info": Command(
        "say what a dataset holds: demos, splits, outcomes, sizes",
        "hma_gym.data.info",
        "InfoConfig",
        "info",
        positional=True,
    ),
    "data view": Command(
        "draw demos of a dataset: a contact sheet and a video",
        "hma_gym.collection.view",
        "ViewConfig",
        "view",
        positional=True,
    ),
    "train world": Command(
        "train all that a learned world of your own data needs: one command, one checkpoint",
        "hma_gym.training.recipes.world",
        "WorldOptions",
        "train_world",
    ),
    "train tokenizer": Command(
        "train a tokenizer on a dataset", "hma_gym.training.recipes.tokenizer", "TokenizerOptions", "main"
    ),
    "train dynamics": Command(
        "train the learned simulator on datasets, one a domain, and write its checkpoint",
        "hma_gym.training.recipes.dynamics",
        "DynamicsOptions",
        "train_dynamics",
    ),
    "train look": Command(
        "train how a checkpoint draws robot and object, on tokens and pixels, all else left as it is",
        "hma_gym.training.recipes.look",
        "LookOptions",
        "train_look",
    ),
    "train policy": Command(
        "train a diffusion policy on demonstrations, checkpoints kept along the way",
        "hma_gym.training.recipes.policy",
        "PolicyOptions",
        "train_policy",
    ),
    "train judge": Command(
        "train the judge of success on a dataset", "hma_gym.training.judge", "JudgeTrainConfig", "train_judge"
    ),
    "train feature-judge": Command(
        "train the judge that reads tokens and needs no pixels",
        "hma_gym.training.feature_judge",
        "FeatureTrainConfig",
        "train_feature_judge",
    ),
    "train rl": Command(
        "improve a policy by reinforcement learning in the learned world",
        "hma_gym.learning.rl",
        "RLOptions",
        "train_rl",
    ),
    "calibrate": Command(
        "teach a checkpoint how sure it may be of its frames, on validation episodes",
        "hma_gym.training.recipes.uncertainty",
        "CalibrateOptions",
        "calibrate",
    ),
    "evaluate": Command(
        "play policies in the learned world and in ground truth from the same starts, and report how they compare",
        "hma_gym.evaluation.policies",
        "EvaluateConfig",
        "main",
    ),
    "serve": Command(
        "open the web app: label videos, drive the learned robot, browse reports",
        "hma_gym.web.serve",
        "ServeConfig",
        "serve",
    ),
    "demo": Command(
        "compare the learned world with the true one: videos and a report",
        "hma_gym.evaluation.demo",
        "DemoConfig",
        "demo",
    ),
}
BENCH = "bench"


def benchmark_names() -> list[str]:
    """Names of the modules in :mod:`hma_gym.benchmarks`, without importing any of them."""
    package = importlib.import_module("hma_gym.benchmarks")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def usage() -> str:
    """The text of ``hma-gym --help``."""
    rows = {name: command.summary for name, command in COMMANDS.items()}
    rows[f"{BENCH} NAME"] = f"run a benchmark: {', '.join(benchmark_names()) or 'none yet'}"
    width = max(map(len, rows))
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<{width}}  {summary}" for name, summary in rows.items()]
    lines += ["", f"{PROGRAM} COMMAND --help shows the options of a command; {PROGRAM} --version the version."]
    return "\n".join(lines)


def resolve(words: Sequence[str]) -> tuple[str, Command, list[str]]:
    """The command that ``words`` begin with: its full name, its row and the remaining words.

    Raises:
        UnknownName: no command or benchmark of that name.
    """
    if words[0] == BENCH:
        names = benchmark_names()
        name = words[1] if len(words) > 1 else ""
        if name not in names:
            raise UnknownName("benchmark", name, names)
        config = "".join(part.capitalize() for part in name.split("_")) + "Config"
        return f"{BENCH} {name}", Command("", f"hma_gym.benchmarks.{name}", config, name), list(words[2:])
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, COMMANDS[name], list(words[length:])
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    received = " ".join(words[: 2 if group else 1])
    raise UnknownName("command", received, group or [*COMMANDS, f"{BENCH} NAME"])


def run(words: Sequence[str]) -> None:
    """Import the command that ``words`` name, read its options, call it, and print the paths that it returns."""
    import tyro

    name, command, options = resolve(words)
    module = importlib.import_module(command.module)
    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName) if command.positional else ()
    config = tyro.cli(getattr(module, command.config), prog=f"{PROGRAM} {name}", args=options, config=markers)
    result = getattr(module, command.function)(config)
    for path in result if isinstance(result, tuple) else (result,):
        if isinstance(path, Path):
            print(f"written: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 for a mistake of the caller, 130 when interrupted.

    An :class:`~hma_gym.errors.HMAError` becomes one line on stderr. Any other exception is a fault of this
    package and keeps its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    try:
        run(words)
    except HMAError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
