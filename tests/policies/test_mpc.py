"""Planning: the searches find known optima, the model is kept in step, and no environment is ever changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_dynamics import same

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import CheckpointError, EnvironmentState, InvalidArgument, UnknownName
from hma_gym.policies.functions import FunctionPolicy
from hma_gym.policies.loading import EpisodeSeed, load_policy
from hma_gym.policies.mpc import (
    CEM,
    ICEM,
    MPPI,
    Cautious,
    Futures,
    GoalImage,
    JudgedByTokens,
    JudgedSuccess,
    LearnedDynamics,
    MPCPolicy,
    PolicyProposals,
    Problem,
    ReachAndLift,
    first_plan,
    imagine,
)
from hma_gym.policies.mpc.learned import PlanState
from hma_gym.policies.mpc.noise import coloured_noise
from hma_gym.policies.mpc.policy import plan_values

ALL = np.array([True, True])
TARGET = torch.tensor([[0.6, -0.4], [-0.2, 0.9]])  # two problems, two dims


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def quadratic(plans_NKHA: Tensor) -> Tensor:
    """Best where every step is the target."""
    return -(plans_NKHA - TARGET[:, None, None]).square().sum(dim=(2, 3))


def problem(proposals: Tensor | None = None, high: float = 1.0) -> Problem:
    bound = torch.full((2,), high)
    return Problem(
        quadratic,
        -torch.ones(2),
        bound,
        torch.full((2,), 0.5),
        torch.zeros(2, 0, 4, 2) if proposals is None else proposals,
    )


PLANNERS = [CEM(64, 8, 6), ICEM(64, 8, 6, beta=1.0), MPPI(128, 8, temperature=0.2)]


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda p: type(p).__name__)
def test_every_search_finds_the_optimum_of_a_quadratic(planner: Any) -> None:
    start = first_plan(2, 4, torch.zeros(2))
    plan = planner.plan(problem(), start, generators(0, 1))
    before = quadratic(start.mean_NHA[:, None])[:, 0]
    found = quadratic(plan.actions_NHA[:, None])[:, 0]
    assert (found > 0.05 * before).all()  # 95 percent of the way, both problems
    alone = planner.plan(problem(), start, generators(0, 7))
    torch.testing.assert_close(alone.actions_NHA[0], plan.actions_NHA[0])  # whatever its neighbour draws
    assert not torch.equal(alone.actions_NHA[1], plan.actions_NHA[1])


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda p: type(p).__name__)
def test_actions_stay_inside_the_bounds(planner: Any) -> None:
    plan = planner.plan(problem(high=0.3), first_plan(2, 4, torch.zeros(2)), generators(0, 1))
    assert plan.actions_NHA.max() <= 0.3
    assert plan.actions_NHA[1, :, 1].mean() > 0.15  # pressed against the bound, the target lies beyond


def test_a_good_proposal_is_taken() -> None:
    good = TARGET[:, None, None].expand(2, 1, 4, 2)
    plan = ICEM(8, 2, 1, reach=0.01).plan(problem(good), first_plan(2, 4, torch.zeros(2)), generators(0, 1))
    torch.testing.assert_close(plan.actions_NHA, good[:, 0])
    assert plan.value_N.tolist() == [0.0, 0.0]


def test_a_warm_start_is_the_last_plan_shifted() -> None:
    plan = ICEM(16, 2, 2).plan(problem(), first_plan(2, 4, torch.zeros(2)), generators(0, 1))
    shifted = plan.shifted(2)
    torch.testing.assert_close(shifted.mean_NHA[:, :2], plan.mean_NHA[:, 2:])
    torch.testing.assert_close(shifted.mean_NHA[:, 3], plan.mean_NHA[:, 3])  # the last action goes on
    torch.testing.assert_close(shifted.elites_NEHA[:, :, 1], plan.elites_NEHA[:, :, 3])
    fresh = shifted.where(torch.tensor([True, False]), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(fresh.mean_NHA[0], torch.tensor([0.1, 0.2]).expand(4, 2))
    torch.testing.assert_close(fresh.mean_NHA[1], shifted.mean_NHA[1])


@pytest.mark.parametrize("steps", [16, 15])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_coloured_noise_has_unit_variance_and_the_stated_spectrum(beta: float, steps: int) -> None:
    noise = coloured_noise(generators(0), 20_000, steps, 1, beta, torch.zeros(1, dtype=torch.float64))[0, :, :, 0]
    torch.testing.assert_close(noise.std(dim=0), torch.ones(steps, dtype=torch.float64), atol=0.03, rtol=0)
    power = torch.fft.rfft(noise, dim=-1).abs().square().mean(dim=0)[1 : (steps + 1) // 2]
    frequency = torch.arange(1, len(power) + 1, dtype=torch.float64)
    slope = (power[1:] / power[0]).log() / frequency[1:].log()
    torch.testing.assert_close(slope, torch.full_like(slope, -beta), atol=0.06, rtol=0)


def test_a_planner_that_cannot_search_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"samples >= 2 elites"):
        CEM(samples=8, elites=8)
    with pytest.raises(InvalidArgument, match=r"beta >= 0"):
        ICEM(beta=-1.0)
    with pytest.raises(InvalidArgument, match=r"temperature > 0"):
        MPPI(temperature=0.0)


# ---------------------------------------------------------------------- on the learned model


def hand_height(futures: Futures) -> Tensor:
    """An objective of a few characters."""
    return futures.agent_pos_BHP[:, -1, 2]


def mpc(dynamics: LearnedDynamics, objective: Any = hand_height, **arguments: Any) -> MPCPolicy[PlanState]:
    arguments = {"planner": ICEM(8, 2, 2), "seeds": [3, 4], "horizon": 4, "execute": 2, **arguments}
    policy = MPCPolicy(dynamics, objective, arguments.pop("planner"), arguments.pop("seeds"), **arguments)
    policy.reset(np.ones(len(policy._seeds), dtype=np.bool_))
    return policy


def learned(toy: Checkpoint, rows: int = 2) -> tuple[HMAVectorEnv, Any]:
    envs = HMAVectorEnv(rows, checkpoint=toy, obs_type="pixels_agent_pos")
    observation, _ = envs.reset(seed=5)
    return envs, observation


def test_planning_never_changes_the_environment(toy: Checkpoint) -> None:
    envs, first = learned(toy)
    twin, _ = learned(toy)
    dynamics = LearnedDynamics(toy)
    policy = mpc(dynamics, JudgedSuccess(toy.judge))  # type: ignore[arg-type]
    rng = torch.get_rng_state()
    actions = policy.act(first)
    exact = dynamics.resume(envs.save_state())  # also on the environment's own state
    before = exact.rollout.clone()
    policy.search(exact, first)
    assert same(exact.rollout, before)
    assert torch.equal(rng, torch.get_rng_state())
    for step in range(2):
        planned, plain = envs.step(actions[:, step]), twin.step(actions[:, step])
        np.testing.assert_array_equal(planned[0]["pixels"], plain[0]["pixels"])
        np.testing.assert_array_equal(planned[0]["agent_pos"], plain[0]["agent_pos"])
        policy.observe(planned[0]) if step == 0 else policy.act(planned[0])


def test_a_plan_comes_true_in_the_world_that_it_was_made_for(toy: Checkpoint) -> None:
    envs, _ = learned(toy)
    dynamics = LearnedDynamics(toy)
    state = dynamics.resume(envs.save_state())
    plans = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 7)).astype(np.float32))
    values = plan_values(dynamics, state, hand_height, plans, 4)  # two rows at a time and the third apart
    futures = imagine(dynamics, dynamics.fork(state, 3), plans.flatten(0, 1))
    torch.testing.assert_close(hand_height(futures).unflatten(0, (2, 3)), values)
    chunk = envs.step_chunk(plans[:, 1].numpy())
    np.testing.assert_allclose(futures.agent_pos_BHP[[1, 4], -1], envs._observed()["agent_pos"], atol=1e-5)
    seen = futures.frames(1)[[1, 4], 0].numpy().astype(int)
    assert np.abs(seen - chunk.observations["pixels"].astype(int)).max() <= 1
    assert futures.frames(6).shape == (6, 6, 40, 40, 3)  # longer than the plan: the first frame stands in


def test_the_context_is_that_of_the_real_frames(toy: Checkpoint) -> None:
    """The policy's state after two real steps is the one that ``observe`` of the model gives."""
    envs, first = learned(toy)
    dynamics = LearnedDynamics(toy)
    policy = mpc(dynamics)
    actions = policy.act(first)
    policy.observe(envs.step(actions[:, 0])[0])
    second = envs.step(actions[:, 1])[0]
    policy.act(second)
    tokens = toy.tokenizer.encode(torch.from_numpy(second["pixels"]))
    assert policy._state is not None
    torch.testing.assert_close(policy._state.rollout.tokens, tokens)
    torch.testing.assert_close(policy._state.rollout.agent_pos_BP, torch.from_numpy(second["agent_pos"]))
    assert policy._state.rollout.step_B.tolist() == [2, 2]
    policy.reset(np.array([False, True]))
    policy.act(second)  # environment 1 begins anew
    assert policy._state.rollout.step_B.tolist() == [3, 0]


def test_the_same_seed_gives_the_same_actions_and_neighbours_change_nothing(toy: Checkpoint) -> None:
    dynamics = LearnedDynamics(toy)
    _, first = learned(toy)
    together = mpc(dynamics).act(first)
    np.testing.assert_array_equal(together, mpc(dynamics).act(first))
    one = {key: value[1:] for key, value in first.items()}
    np.testing.assert_allclose(mpc(dynamics, seeds=[4]).act(one)[0], together[1], atol=1e-4)
    assert not np.array_equal(mpc(dynamics, seeds=[8, 9]).act(first), together)


def test_too_many_observations_are_noticed(toy: Checkpoint) -> None:
    envs, first = learned(toy)
    policy = mpc(LearnedDynamics(toy))
    policy.observe(first)
    with pytest.raises(EnvironmentState, match="without an action before it"):
        policy.observe(first)
    with pytest.raises(InvalidArgument, match=r"execute <= horizon"):
        mpc(LearnedDynamics(toy), execute=5)
    with pytest.raises(InvalidArgument, match="needs observations with"):
        LearnedDynamics(toy).start(first["pixels"])
    with pytest.raises(EnvironmentState, match="must be of checkpoint 'toy'"):
        LearnedDynamics(toy).resume({"world": ("other", "123"), "tensors": {}})


class Reader:
    """A judge of tokens: the mean of the oldest of five frames."""

    name, window, threshold = "reader", 5, 0.5

    def __init__(self) -> None:
        self.seen: list[int] = []

    def probability_of_tokens(self, tokens_BK: Tensor) -> Tensor:
        self.seen.append(tokens_BK.shape[1])
        return tokens_BK[:, 0].flatten(1).mean(dim=1)


def test_objectives(toy: Checkpoint) -> None:
    _, first = learned(toy)
    dynamics = LearnedDynamics(toy)
    plans = torch.zeros(4, 3, 7)
    futures = imagine(dynamics, dynamics.fork(dynamics.start(first), 2), plans)
    judge = toy.judge
    assert judge is not None
    torch.testing.assert_close(JudgedSuccess(judge)(futures), judge.probability(futures.frames(judge.window)))
    reader = Reader()
    torch.testing.assert_close(JudgedByTokens(reader)(futures), futures.tokens[:, 0].flatten(1).mean(dim=1))
    assert reader.seen == [5]  # longer than the plan: the first frame stands in
    goal = GoalImage(futures.tokens[1, -1], at_end=1.0)(futures)
    assert goal[1] == 0 and goal[0] == 0 and (goal[2:] < 0).all()  # plans 0 and 1 are the same
    doubtful = dataclasses.replace(futures, uncertainty_BH=torch.full((4, 3), 0.5))
    torch.testing.assert_close(Cautious(hand_height, 2.0)(doubtful), hand_height(futures) - 1.0)
    with pytest.raises(InvalidArgument, match="plan on the judge"):
        ReachAndLift()(futures)  # the toy predicts no cube
    steps = torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.0, 0.82], [0.0, 0.0, 0.82], [0.0, 0.0, 0.92]])  # hand
    opening = torch.tensor([0.04, 0.04, 0.02, 0.02])
    pose = torch.cat((steps, torch.zeros(4, 4), opening[:, None], -opening[:, None]), dim=1)[:, None]
    cube = torch.tensor([0.82, 0.82, 0.82, 0.92])
    made = dataclasses.replace(
        futures, agent_pos_BHP=pose, targets_BHX=torch.stack((cube * 0, cube * 0, cube), dim=1)[:, None]
    )
    assert ReachAndLift()(made).diff().gt(0).all()  # above it, around it, closed, lifted: each better than the last


def test_proposals_are_what_a_policy_would_do_in_the_imagined_world(toy: Checkpoint) -> None:
    _, first = learned(toy)
    dynamics = LearnedDynamics(toy)
    seen: list[Any] = []

    def act(observation: Any) -> np.ndarray:
        seen.append(observation)
        return np.stack([observation["agent_pos"][:, :7]] * 2, axis=1)

    proposer = PolicyProposals(dynamics, lambda episodes: FunctionPolicy(act), [0, 1], count=2, horizon=3)
    state = dynamics.start(first)
    plans = proposer.propose(state, None, first, 0)
    assert plans.shape == (2, 2, 3, 7) and len(seen) == 2
    np.testing.assert_array_equal(plans[:, 0, 0], first["agent_pos"][:, :7])
    rows = dynamics.fork(state, 2)
    for step in range(2):
        rows, imagined = dynamics.step(rows, plans.flatten(0, 1)[:, step])
    np.testing.assert_allclose(plans.flatten(0, 1)[:, 2], imagined.agent_pos_BP[:, :7], atol=1e-6)
    np.testing.assert_array_equal(seen[1]["pixels"], dynamics.decode(imagined.tokens).numpy())
    randomly = PolicyProposals(dynamics, load_policy("random").make, [0, 1], count=2, horizon=3)
    first_time, second_time = (randomly.propose(state, None, first, step) for step in (0, 1))
    assert not torch.equal(first_time, second_time) and not torch.equal(first_time[:, 0], first_time[:, 1])
    torch.testing.assert_close(first_time, randomly.propose(state, None, first, 0))


def test_mpc_has_a_name(toy_folder: Path, tmp_path: Path, toy: Checkpoint) -> None:
    _, first = learned(toy)
    file = tmp_path / "plan.json"
    search = {"samples": 4, "elites": 1, "rounds": 1}
    file.write_text(json.dumps({"checkpoint": str(toy_folder), "search": search, "horizon": 2, "execute": 1}))
    source = load_policy(f"mpc:{file}")
    policy = source.make([EpisodeSeed(0, 1), EpisodeSeed(1, 2)])
    policy.reset(ALL)
    assert policy.act(first).shape == (2, 1, 7) and source.family == "mpc icem" and source.digest
    over = load_policy(f"mpc:mppi:{toy_folder}:random")
    assert over.family == "mpc mppi over random"
    file.write_text(json.dumps({"checkpoint": str(toy_folder), "serch": 1}))
    with pytest.raises(InvalidArgument, match="must be a JSON object with keys"):
        load_policy(f"mpc:{file}")
    file.write_text(json.dumps({"checkpoint": str(toy_folder), "objective": "feature"}))
    with pytest.raises(CheckpointError, match="no feature judge to plan on"):
        load_policy(f"mpc:{file}")
    file.write_text(json.dumps({"checkpoint": str(toy_folder), "uncertainty_weight": 1.0}))
    with pytest.raises(CheckpointError, match="needs a calibrated checkpoint"):
        load_policy(f"mpc:{file}")
    with pytest.raises(UnknownName, match="unknown planner 'sgd'"):
        load_policy(f"mpc:sgd:{toy_folder}")
    with pytest.raises(InvalidArgument, match=r"mpc:PLANNER:CHECKPOINT"):
        load_policy("mpc:icem")
    with pytest.raises(CheckpointError, match="must be a shipped name"):
        load_policy("mpc:icem:nowhere")
