"""Policies by name: what ``hma-gym evaluate --policies`` and :func:`hma_gym.evaluation.evaluate` take.

A name is ``SPEC`` or ``LABEL=SPEC``, and SPEC one of

* ``FOLDER``                        a diffusion policy's checkpoint (``hma-gym train policy``);
* ``FILE.pth``                      a robomimic checkpoint;
* ``sb3:ALGORITHM:FILE.zip``        a stable-baselines3 model, e.g. ``sb3:PPO:lift.zip``;
* ``sighted:MODE:COMPETENCE:FOLDER``  the scripted policy that sees through a diffusion policy's encoder;
* ``mpc:PLANNER:CHECKPOINT[:POLICY]``  planning with a learned model (``cem``, ``icem``, ``mppi``), also over a policy's
  own plans; ``mpc:FILE.json`` sets everything (:class:`hma_gym.policies.mpc.loading.MPCOptions`);
* ``python:MODULE:FUNCTION``        your own: ``FUNCTION(episodes)`` returns a policy for that many environments;
* ``random``                        uniform random actions.

An installed package adds a kind of its own through the entry point group ``hma_gym.policies``: the name before the
first colon, and a function of the text after it that returns a :class:`PolicySource`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from hma_gym.errors import InvalidArgument, UnknownName
from hma_gym.policies.protocol import Policy

ENTRY_POINT_GROUP = "hma_gym.policies"


@dataclass(frozen=True)
class EpisodeSeed:
    """All that a policy may make an episode depend on, beside what it sees: so that it can be repeated.

    Attributes:
        start: index into the start bank.
        seed: of the policy's own random numbers.
    """

    start: int
    seed: int


PolicyFactory = Callable[[Sequence[EpisodeSeed]], Policy]
"""Makes a policy for as many environments as there are episodes, environment n playing episode n."""


@dataclass(frozen=True)
class PolicySource:
    """A policy that is not made yet.

    Attributes:
        family: for reports: ``diffusion``, ``robomimic bc`` ...
        make: the factory.
        digest: hash of the weights, "" where there are none.
    """

    family: str
    make: PolicyFactory
    digest: str = ""


def split_label(name: str) -> tuple[str, str]:
    """``LABEL=SPEC`` to its two parts; without a label, a path's last two parts or the SPEC itself."""
    label, separator, spec = name.partition("=")
    if separator and label and "/" not in label:
        return label, spec
    path = Path(name)
    return ("-".join(path.parts[-2:]) if path.exists() else name), name


def load_policy(spec: str) -> PolicySource:
    """The source of a policy.

    Raises:
        UnknownName: no such file, folder or kind.
        CheckpointError: it cannot be read (robomimic's and SB3's files are read when the policy is made).
        InvalidArgument: the text after the kind is malformed.
    """
    path = Path(spec)
    if path.is_dir():
        return _diffusion(spec)
    if path.suffix == ".pth" and path.is_file():
        return _robomimic(spec)
    kind, _, rest = spec.partition(":")
    if kind in KINDS:
        return KINDS[kind](rest)
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == kind]
    if points:
        source = points[0].load()(rest)
        if not isinstance(source, PolicySource):
            raise InvalidArgument(f"policy kind {kind!r} must return a PolicySource, got {type(source).__name__}.")
        return source
    raise UnknownName(
        "policy", spec, [f"{name}:..." for name in KINDS], "Or give the path of a checkpoint that exists."
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _diffusion(folder: str) -> PolicySource:
    from hma_gym.policies.diffusion import DiffusionPolicy, load_diffusion
    from hma_gym.policies.diffusion.files import WEIGHTS_FILE

    model = load_diffusion(folder)
    return PolicySource(
        f"diffusion {model.config.network}",
        lambda episodes: DiffusionPolicy(model, [episode.seed for episode in episodes]),
        file_digest(Path(folder) / WEIGHTS_FILE),
    )


def _sighted(text: str) -> PolicySource:
    from hma_gym.policies.diffusion import load_diffusion
    from hma_gym.policies.diffusion.files import WEIGHTS_FILE
    from hma_gym.policies.scripted import ScriptedConfig
    from hma_gym.policies.sighted import SightedLift

    parts = text.split(":", 2)
    try:
        mode, competence, folder = parts[0], float(parts[1]), parts[2]
    except (IndexError, ValueError) as error:
        raise InvalidArgument(f"a sighted script is sighted:MODE:COMPETENCE:FOLDER, got 'sighted:{text}'.") from error
    config, model = ScriptedConfig(mode, competence), load_diffusion(folder)
    return PolicySource(
        "sighted script",
        lambda episodes: SightedLift(config, model, [episode.seed for episode in episodes]),
        file_digest(Path(folder) / WEIGHTS_FILE),
    )


def _robomimic(file: str) -> PolicySource:
    from hma_gym.policies.robomimic import RobomimicPolicy, load_robomimic

    checkpoint = load_robomimic(file)
    return PolicySource(
        f"robomimic {checkpoint.algorithm}",
        lambda episodes: RobomimicPolicy(checkpoint, len(episodes)),
        file_digest(Path(file)),
    )


def _sb3(text: str) -> PolicySource:
    from hma_gym.policies.sb3 import SB3Policy, load_sb3

    algorithm, separator, file = text.partition(":")
    if not separator:
        raise InvalidArgument(f"a stable-baselines3 model is sb3:ALGORITHM:FILE.zip, got 'sb3:{text}'.")
    model = load_sb3(algorithm, file)
    return PolicySource(f"sb3 {algorithm}", lambda episodes: SB3Policy(model), file_digest(Path(file)))


def _mpc(text: str) -> PolicySource:
    from hma_gym.policies.mpc.loading import mpc_source, read_options

    return mpc_source(read_options(text))


def _python(text: str) -> PolicySource:
    module_name, _, function_name = text.rpartition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UnknownName(
            "policy",
            f"python:{text}",
            ["python:MODULE:FUNCTION"],
            f"It cannot be imported ({error}); is its folder on PYTHONPATH?",
        ) from error
    return PolicySource(f"python {text}", factory)


def _random(text: str) -> PolicySource:
    from hma_gym.policies.functions import RandomPolicy

    if text:
        raise InvalidArgument(f"the random policy takes nothing after its name, got 'random:{text}'.")
    return PolicySource("random", lambda episodes: RandomPolicy([episode.seed for episode in episodes]))


KINDS: dict[str, Callable[[str], PolicySource]] = {
    "diffusion": _diffusion,
    "robomimic": _robomimic,
    "sb3": _sb3,
    "sighted": _sighted,
    "mpc": _mpc,
    "python": _python,
    "random": _random,
}
"""What stands before the first colon -> its loader."""
