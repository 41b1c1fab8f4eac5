"""MPC by name: the kinds ``mpc:PLANNER:CHECKPOINT``, ``mpc:PLANNER:CHECKPOINT:POLICY`` and ``mpc:FILE.json``.

The file holds the fields of :class:`MPCOptions` that differ from their defaults.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.dynamics.precision import with_precision
from hma_gym.errors import CheckpointError, InvalidArgument, UnknownName
from hma_gym.nn.precision import Precision
from hma_gym.policies.loading import EpisodeSeed, PolicySource, load_policy
from hma_gym.policies.mpc.body import BodyDynamics
from hma_gym.policies.mpc.learned import LearnedDynamics
from hma_gym.policies.mpc.objectives import Cautious, JudgedByTokens, JudgedSuccess, ReachAndLift
from hma_gym.policies.mpc.planners import CEM, ICEM, MPPI, Planner
from hma_gym.policies.mpc.policy import MPCPolicy
from hma_gym.policies.mpc.proposals import PolicyProposals
from hma_gym.policies.mpc.protocol import Objective, PlanningDynamics

PLANNERS: dict[str, type[CEM] | type[ICEM] | type[MPPI]] = {"cem": CEM, "icem": ICEM, "mppi": MPPI}
DYNAMICS = ("auto", "body", "model")
PlannedOn = Literal["auto", "body", "model"]
OBJECTIVES = ("auto", "judge", "feature", "lift")


#: What a search on the body has more than the planner's defaults, which suit the whole model.
BODY_SEARCH: dict[str, Any] = {"samples": 256, "elites": 24, "carry": "mean"}


@dataclass(frozen=True)
class MPCOptions:
    """Model predictive control.

    Attributes:
        checkpoint: name, folder or hub id of the model to plan with.
        dynamics: ``body`` plans on its body alone (:class:`~hma_gym.policies.mpc.body.BodyDynamics`), ``model`` on the
            whole model; ``auto``: on the body where the model knows an object.
        planner: ``cem``, ``icem`` or ``mppi``.
        search: the planner's own arguments, e.g. ``{"samples": 64, "rounds": 2}``; the others are its defaults, or on
            the body :data:`BODY_SEARCH`.
        objective: ``lift`` (hand to cube, and up), ``judge`` (its probability of success at the plan's end),
            ``feature`` (the same of the judge that reads tokens), or ``auto``: ``lift`` for that task where the model
            predicts the cube's place, else ``judge``.
        uncertainty_weight: penalty for steps that the model is unsure of; not on the body.
        policy: whose plans are tried too, see :mod:`hma_gym.policies.loading`; None for noise alone.
        proposals: how many plans of the policy.
        horizon, execute: steps of a plan, by default 16 on the body and 12 on the whole model, and how many are carried
            out before the next.
        precision: of the whole model's matrix products; the body's poses need float32.
        batch: rows that the model is given at once; None for as many as suits it.
    """

    checkpoint: str = "lift-64"
    dynamics: PlannedOn = "auto"
    planner: Literal["cem", "icem", "mppi"] = "icem"
    search: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: Literal["auto", "judge", "feature", "lift"] = "auto"
    uncertainty_weight: float = 0.0
    policy: str | None = None
    proposals: int = 8
    horizon: int | None = None
    execute: int = 4
    precision: Precision = "bfloat16"
    batch: int | None = None


def read_options(text: str) -> MPCOptions:
    """The options that the text after ``mpc:`` means.

    Raises:
        InvalidArgument: it is malformed, or the file has an unknown field.
    """
    if text.endswith(".json"):
        try:
            fields = json.loads(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"mpc:{text} must name a readable JSON file of MPCOptions, got: {error}.") from error
        known = sorted(f.name for f in dataclasses.fields(MPCOptions))
        if not isinstance(fields, dict) or not set(fields) <= set(known):
            raise InvalidArgument(f"mpc:{text} must be a JSON object with keys of {known}, got {fields!r}.")
        return MPCOptions(**fields)
    planner, _, rest = text.partition(":")
    checkpoint, _, policy = rest.partition(":")
    if not planner or not checkpoint:
        raise InvalidArgument(
            f"MPC is mpc:PLANNER:CHECKPOINT, mpc:PLANNER:CHECKPOINT:POLICY or mpc:FILE.json, got 'mpc:{text}'."
        )
    return MPCOptions(checkpoint=checkpoint, planner=planner, policy=policy or None)  # type: ignore[arg-type]


def on_body(checkpoint: Checkpoint, dynamics: PlannedOn = "auto") -> bool:
    """Whether plans are made on the body alone; see :class:`MPCOptions`."""
    return checkpoint.domain.object_turns > 0 if dynamics == "auto" else dynamics == "body"


def planning_dynamics(
    checkpoint: Checkpoint, dynamics: PlannedOn = "auto", *, precision: Precision = "bfloat16", batch: int | None = None
) -> BodyDynamics | LearnedDynamics:
    """A checkpoint of one domain as something to plan with; see :class:`MPCOptions`.

    Raises:
        InvalidArgument: the checkpoint has several domains.
        UnknownName: no such dynamics.
        CheckpointError: the body is asked for, and knows no object.
    """
    if dynamics not in DYNAMICS:
        raise UnknownName("dynamics", dynamics, list(DYNAMICS))
    if on_body(checkpoint, dynamics):
        return BodyDynamics(checkpoint) if batch is None else BodyDynamics(checkpoint, batch=batch)
    whole = with_precision(checkpoint, precision)
    return LearnedDynamics(whole) if batch is None else LearnedDynamics(whole, batch=batch)


def mpc_source(options: MPCOptions) -> PolicySource:
    """The policy that the options describe, for any number of environments.

    Raises:
        UnknownName: no such planner, dynamics, objective or policy.
        InvalidArgument: a planner's argument is unknown or out of its range, or a penalty is asked for on the body.
        CheckpointError: the checkpoint cannot be read, or lacks the judge, object or calibration that is needed.
    """
    if options.planner not in PLANNERS:
        raise UnknownName("planner", options.planner, list(PLANNERS))
    if options.objective not in OBJECTIVES:
        raise UnknownName("objective", options.objective, list(OBJECTIVES))
    base = None if options.policy is None else load_policy(options.policy)
    loaded = load_checkpoint(options.checkpoint)
    dynamics: PlanningDynamics[Any] = planning_dynamics(
        loaded, options.dynamics, precision=options.precision, batch=options.batch
    )
    body = isinstance(dynamics, BodyDynamics)
    planner, horizon = _planner(options, body), options.horizon
    if horizon is None:
        horizon = 16 if body else 12
    objective: Objective
    if options.objective == "lift" or (
        options.objective == "auto" and loaded.task == "lift" and loaded.domain.target_dim >= 3
    ):
        objective = ReachAndLift()
    elif options.objective == "feature":
        if loaded.feature_judge is None:
            raise CheckpointError(
                f"checkpoint {loaded.name!r} has no feature judge to plan on; choose another objective, or train one: "
                "hma-gym train feature-judge."
            )
        objective = JudgedByTokens(loaded.feature_judge)
    elif loaded.judge is None:
        raise CheckpointError(
            f"checkpoint {loaded.name!r} has no judge to plan on; choose another objective, or train a judge."
        )
    else:
        objective = JudgedSuccess(loaded.judge)
    if options.uncertainty_weight and body:
        raise InvalidArgument(
            f"uncertainty_weight must be 0 where plans are made on the body, whose uncertainty is not told, got "
            f"{options.uncertainty_weight}; set dynamics='model'."
        )
    if options.uncertainty_weight and loaded.uncertainty is None:
        raise CheckpointError(
            f"uncertainty_weight needs a calibrated checkpoint, and {loaded.name!r} is not; run: hma-gym calibrate."
        )
    if options.uncertainty_weight:
        objective = Cautious(objective, options.uncertainty_weight)

    def make(episodes: Sequence[EpisodeSeed]) -> MPCPolicy[Any]:
        seeds = [episode.seed for episode in episodes]
        proposer: PolicyProposals[Any] | None = None
        if base is not None:
            proposer = PolicyProposals(dynamics, base.make, seeds, count=options.proposals, horizon=horizon)
        return MPCPolicy(
            dynamics,
            objective,
            planner,
            seeds,
            horizon=horizon,
            execute=options.execute,
            proposer=proposer,
        )

    told = json.dumps(dataclasses.asdict(options), sort_keys=True)
    digest = hashlib.sha256(f"{told}{loaded.digest}{'' if base is None else base.digest}".encode()).hexdigest()[:16]
    family = f"mpc {options.planner}" if base is None else f"mpc {options.planner} over {base.family}"
    return PolicySource(family, make, digest)


def _planner(options: MPCOptions, on_body: bool) -> Planner:
    kind = PLANNERS[options.planner]
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(options.search) - set(known))
    if unknown:
        raise InvalidArgument(f"search must be arguments of {options.planner}, {known}, got also {unknown}.")
    usual = {name: value for name, value in BODY_SEARCH.items() if name in known} if on_body else {}
    return kind(**{**usual, **options.search})
