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
from toy_checkpoint import toy_checkpoint, toy_domain
from toy_dynamics import same

from hma_gym.dynamics.body import TRUST
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hma_gym.dynamics.pose import Pose
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import CheckpointError, EnvironmentState, InvalidArgument, UnknownName
from hma_gym.policies.functions import FunctionPolicy
from hma_gym.policies.loading import EpisodeSeed, load_policy
from hma_gym.policies.mpc import (
    CEM,
    ICEM,
    MPPI,
    BodyDynamics,
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
from hma_gym.policies.mpc.loading import BODY_SEARCH
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


def test_the_mean_of_the_best_is_carried_out_where_that_is_asked_for() -> None:
    """After one round without momentum it is the plain mean of the elites, from which the next search begins too."""
    proposals = TARGET[:, None, None] + torch.tensor([0.1, -0.1, 0.1])[:, None, None].expand(2, 3, 4, 1)
    search = ICEM(8, 3, 1, reach=1e-6, momentum=0.0, carry="mean")
    plan = search.plan(problem(proposals), first_plan(2, 4, -3 * torch.ones(2)), generators(0, 1))
    torch.testing.assert_close(plan.actions_NHA, proposals.mean(dim=1))
    torch.testing.assert_close(plan.actions_NHA, plan.mean_NHA)
    assert (plan.value_N < -0.01).all()


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
    with pytest.raises(InvalidArgument, match=r"carry 'best' or 'mean'"):
        ICEM(carry="first")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"temperature > 0"):
        MPPI(temperature=0.0)


# ---------------------------------------------------------------------- on the learned model, and on its body alone

Planning = LearnedDynamics | BodyDynamics


@pytest.fixture(scope="module")
def handling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint that knows an object, and whose trunk corrects nothing: its poses are the body's."""
    place, turn = (0.1, 0.2, 0.8), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    fields = {"target_mean": place + turn, "target_std": (0.05,) * 3 + (0.3,) * 6, "object_turns": 4}
    toy = toy_checkpoint(dataclasses.replace(toy_domain(), target_dim=9, **fields))
    toy.dynamics.set_corrected(0, torch.zeros(9))
    last = toy.dynamics.adapter(0).body.coast.handling[-1]  # type: ignore[union-attr]
    last.bias.data[-3] = -1.0  # type: ignore[union-attr, index]  # the object does not just stay where it is
    return save_checkpoint(toy, tmp_path_factory.mktemp("handling") / "toy", half=False)


@pytest.fixture(scope="module")
def thing(handling: Path) -> Checkpoint:
    """The same, loaded once."""
    return load_checkpoint(handling)


@pytest.fixture(params=["model", "body"])
def dynamics(request: pytest.FixtureRequest, toy: Checkpoint, thing: Checkpoint) -> Planning:
    """Both kinds; what is said of planning holds for either."""
    return LearnedDynamics(toy, batch=4) if request.param == "model" else BodyDynamics(thing, batch=4)


def hand_height(futures: Futures) -> Tensor:
    """An objective of a few characters."""
    return futures.agent_pos_BHP[:, -1, 2]


def mpc(dynamics: Planning, objective: Any = hand_height, **arguments: Any) -> MPCPolicy[Any]:
    arguments = {"planner": ICEM(8, 2, 2), "seeds": [3, 4], "horizon": 4, "execute": 2, **arguments}
    planner, seeds = arguments.pop("planner"), arguments.pop("seeds")
    policy: MPCPolicy[Any] = MPCPolicy(dynamics, objective, planner, seeds, **arguments)  # type: ignore[arg-type]
    policy.reset(np.ones(len(policy._seeds), dtype=np.bool_))
    return policy


def learned(toy: Checkpoint, rows: int = 2) -> tuple[HMAVectorEnv, Any]:
    envs = HMAVectorEnv(rows, checkpoint=toy, obs_type="pixels_agent_pos")
    observation, _ = envs.reset(seed=5)
    return envs, observation


def alike(a: Any, b: Any) -> bool:
    """Whether two states of a kind are equal to the last bit."""
    if isinstance(a, Pose):
        return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Pose))
    return same(a.rollout, b.rollout)


def test_planning_never_changes_the_environment(dynamics: Any) -> None:
    world = dynamics.checkpoint
    envs, first = learned(world)
    twin, _ = learned(world)
    policy = mpc(dynamics, JudgedSuccess(world.judge))
    rng = torch.get_rng_state()
    actions = policy.act(first)
    exact = dynamics.resume(envs.save_state())  # also on the environment's own state
    before = dynamics.fork(exact, 1)
    policy.search(exact, first)
    assert alike(exact, before)
    assert torch.equal(rng, torch.get_rng_state())
    for step in range(2):
        planned, plain = envs.step(actions[:, step]), twin.step(actions[:, step])
        np.testing.assert_array_equal(planned[0]["pixels"], plain[0]["pixels"])
        np.testing.assert_array_equal(planned[0]["agent_pos"], plain[0]["agent_pos"])
        policy.observe(planned[0]) if step == 0 else policy.act(planned[0])


def test_a_plan_comes_true_in_the_world_that_it_was_made_for(dynamics: Any) -> None:
    envs, _ = learned(dynamics.checkpoint)
    state = dynamics.resume(envs.save_state())
    plans = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 7)).astype(np.float32))
    values = plan_values(dynamics, state, hand_height, plans)  # two rows at a time and the third apart
    futures = imagine(dynamics, dynamics.fork(state, 3), plans.flatten(0, 1))
    torch.testing.assert_close(hand_height(futures).unflatten(0, (2, 3)), values)
    chunk = envs.step_chunk(plans[:, 1].numpy())
    np.testing.assert_allclose(futures.agent_pos_BHP[[1, 4], -1], envs._observed()["agent_pos"], atol=1e-5)
    assert futures.frames(6).shape == (6, 6, 40, 40, 3)  # longer than the plan: the first frame stands in
    if isinstance(dynamics, LearnedDynamics):
        seen = futures.frames(1)[[1, 4], 0].numpy().astype(int)
        assert np.abs(seen - chunk.observations["pixels"].astype(int)).max() <= 1


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


def test_the_body_alone_foretells_what_the_model_does(thing: Checkpoint) -> None:
    """From real frames, over real frames, and from the state of an environment."""
    envs, first = learned(thing)
    body, model = BodyDynamics(thing), LearnedDynamics(thing)
    rng = np.random.default_rng(0)

    def compare(pose: Pose, state: Any) -> None:
        rollout = state.rollout
        for own, other in (
            (pose.agent_pos, rollout.agent_pos_BP),
            (pose.targets, rollout.targets_BO),
            (pose.motions, rollout.motions_BKP),
            (pose.target_motions, rollout.target_motions_BKO),
            (pose.actions, rollout.actions_BKA),
            (pose.acted, rollout.acted_BK),
        ):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
        actions = torch.from_numpy(rng.uniform(-1, 1, (2, 4, 7)).astype(np.float32))
        mine = imagine(body, body.fork(pose, 1), actions)
        theirs = imagine(model, model.fork(state, 1), actions)
        torch.testing.assert_close(mine.agent_pos_BHP, theirs.agent_pos_BHP, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.targets_BHX, theirs.targets_BHX, atol=1e-5, rtol=1e-4)
        assert mine.targets_BHX.std(dim=1).max() > 1e-3  # it does move

    pose, state = body.start(first), model.start(first)
    compare(pose, state)
    for fresh in ([False, False], [False, True]):
        action = rng.uniform(-1, 1, (2, 7)).astype(np.float32)
        seen = envs.step(action)[0]
        pose = body.observe(pose, action, seen, np.array(fresh))
        state = model.observe(state, action, seen, np.array(fresh))
        rollout = state.rollout  # it believes what it reads; the body does so at first, and later see below
        torch.testing.assert_close(pose.targets[fresh], rollout.targets_BO[fresh])
        pose = dataclasses.replace(pose, targets=rollout.targets_BO, target_motions=rollout.target_motions_BKO)
        compare(pose, state)
    saved = envs.save_state()
    compare(body.resume(saved), model.resume(saved))


def test_a_reading_moves_the_belief_but_not_of_what_is_in_the_hand(
    thing: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs, first = learned(thing)
    dynamics = BodyDynamics(thing)
    body = thing.dynamics.adapter(0).body
    start, action = dynamics.start(first), np.zeros((2, 7), np.float32)
    given = torch.ones(2, dtype=torch.bool)
    foretold, believed = body.coasted(
        start, (torch.zeros(2, 7) - dynamics.action_mean_A) / dynamics.action_std_A, given
    )
    told = believed + torch.tensor([0.1, 0.0, 0.0] + [0.0] * 6)
    monkeypatch.setattr(body, "sighted", lambda tokens, agent_pos, belief: told)

    def moved(floor: float, fingers: float, hand: float = 0.0) -> Tensor:
        """By how much the belief is moved where objects lie at a height and the hand is not quite where foretold."""
        body.set_floor(floor)
        off = torch.tensor([hand, 0.0, 0.0] + [0.0] * 4 + [fingers, 0.0])
        seen = {**first, "agent_pos": (foretold + off).numpy()}
        after = dynamics.observe(start, action, seen, np.zeros(2, np.bool_))
        return (after.targets - believed)[:, 0]

    height = float(believed[:, 2].min())
    try:
        lying, aloft = height + 1.0, height - 1.0
        torch.testing.assert_close(moved(lying, 0.0), torch.full((2,), 0.1 * TRUST), atol=1e-5, rtol=0)
        torch.testing.assert_close(moved(aloft, 0.0), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(moved(aloft, 0.01), torch.full((2,), 0.1 * TRUST), atol=1e-5, rtol=0)
        taken = moved(aloft, 0.0, hand=0.05)  # a part of the way, as far as it goes with the hand
        assert (taken > 1e-3).all() and (taken < 0.05).all()
    finally:
        body.set_floor(-np.inf)


def test_frames_are_drawn_only_when_they_are_asked_for(thing: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = learned(thing)
    dynamics = BodyDynamics(thing)
    body, drawn = thing.dynamics.adapter(0).body, []
    draw = type(body).drawn
    monkeypatch.setattr(type(body), "drawn", lambda *inputs: drawn.append(1) or draw(*inputs))
    futures = imagine(dynamics, dynamics.start(first), torch.rand(2, 3, 7))
    ReachAndLift()(futures)
    assert not drawn
    reader = Reader()
    JudgedByTokens(reader)(futures)
    assert reader.seen == [5] and len(drawn) == 3
    tokens = body.drawn(futures.agent_pos_BHP, futures.targets_BHX)
    torch.testing.assert_close(futures.tokens, tokens)
    assert futures.frames(1).shape == (2, 1, 40, 40, 3)


def test_a_body_without_an_object_is_refused(toy: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"knows no object in domain 'lift' .* plan on the whole model"):
        BodyDynamics(toy)


def test_the_same_seed_gives_the_same_actions_and_neighbours_change_nothing(dynamics: Any) -> None:
    _, first = learned(dynamics.checkpoint)
    together = mpc(dynamics).act(first)
    np.testing.assert_array_equal(together, mpc(dynamics).act(first))
    one = {key: value[1:] for key, value in first.items()}
    np.testing.assert_allclose(mpc(dynamics, seeds=[4]).act(one)[0], together[1], atol=1e-4)
    assert not np.array_equal(mpc(dynamics, seeds=[8, 9]).act(first), together)


def test_too_many_observations_are_noticed(dynamics: Any) -> None:
    _, first = learned(dynamics.checkpoint)
    policy = mpc(dynamics)
    policy.observe(first)
    with pytest.raises(EnvironmentState, match="without an action before it"):
        policy.observe(first)
    with pytest.raises(InvalidArgument, match=r"execute <= horizon"):
        mpc(dynamics, execute=5)
    with pytest.raises(InvalidArgument, match="needs observations with"):
        dynamics.start(first["pixels"])
    with pytest.raises(EnvironmentState, match="must be of checkpoint 'toy'"):
        dynamics.resume({"world": ("other", "123"), "tensors": {}})
    with pytest.raises(InvalidArgument, match="at least 1 row"):
        type(dynamics)(dynamics.checkpoint, batch=0)


class Feeling:
    """A judge that is told agent_pos: the first number of the oldest of five frames."""

    name, window, threshold, state_dim = "feeling", 5, 0.5, 9

    def __init__(self) -> None:
        self.felt: torch.Tensor | None = None

    def probability(self, frames_BKHWC: torch.Tensor, agent_pos_BKP: torch.Tensor | None = None) -> torch.Tensor:
        assert agent_pos_BKP is not None and frames_BKHWC.shape[:2] == agent_pos_BKP.shape[:2]
        self.felt = agent_pos_BKP
        return agent_pos_BKP[:, 0, 0]


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
    feeling = Feeling()
    assert JudgedSuccess(feeling)(futures).tolist() == futures.agent_pos_BHP[:, 0, 0].tolist()
    assert feeling.felt is not None and torch.equal(feeling.felt[:, 2:], futures.agent_pos_BHP)
    assert torch.equal(futures.agent_pos(2), futures.agent_pos_BHP[:, 1:])
    reader = Reader()
    torch.testing.assert_close(JudgedByTokens(reader)(futures), futures.tokens[:, 0].flatten(1).mean(dim=1))
    assert reader.seen == [5]  # longer than the plan: the first frame stands in
    goal = GoalImage(futures.tokens[1, -1], at_end=1.0)(futures)
    assert goal[1] == 0 and goal[0] == 0 and (goal[2:] < 0).all()  # plans 0 and 1 are the same
    doubtful = dataclasses.replace(futures, uncertainty_BH=torch.full((4, 3), 0.5))
    torch.testing.assert_close(Cautious(hand_height, 2.0)(doubtful), hand_height(futures) - 1.0)
    with pytest.raises(InvalidArgument, match="plan on the judge"):
        ReachAndLift()(futures)  # the toy predicts no cube


def test_proposals_are_what_a_policy_would_do_in_the_imagined_world(dynamics: Any) -> None:
    _, first = learned(dynamics.checkpoint)
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


def test_lift_is_by_stages() -> None:
    """Above the cube, around it, closed, lifted: each better than the one before; and the ways that do not count."""

    def value(
        hand: tuple[float, ...], fingers: float, height: float, yaw: float = 0.0, columns: int = 9, command: float = 0.0
    ) -> float:
        half = torch.tensor(yaw / 2)
        turn = torch.stack((half.cos(), half.sin(), half * 0, half * 0))  # pointing down
        pose = torch.cat((torch.tensor(hand), turn, torch.tensor([fingers, -fingers])))
        cube = torch.tensor([0.0, 0.0, height, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])[:columns]
        nothing = torch.zeros(1, 1)
        actions = torch.tensor([0.0] * 6 + [command])
        futures = Futures(
            actions[None, None], [], pose[None, None], torch.zeros(1, 1, 0), cube[None, None], nothing, lambda x: x
        )
        return float(ReachAndLift()(futures))

    rest, open_, shut = 0.82, 0.04, 0.02
    stages = [
        value((0.2, 0.0, 1.0), open_, rest),
        value((0.05, 0.0, 0.9), open_, rest),
        value((0.0, 0.0, 0.87), open_, rest),
        value((0.0, 0.0, rest), open_, rest),
        value((0.0, 0.0, rest), shut, rest),
        value((0.0, 0.0, 0.85), shut, 0.85),
        value((0.0, 0.0, 0.9), shut, 0.9),
    ]
    assert all(better > worse for worse, better in zip(stages, stages[1:], strict=False))
    assert value((0.06, 0.0, rest + 0.05), open_, rest) > value((0.06, 0.0, rest), open_, rest)  # it comes from above
    assert value((0.0, 0.0, 0.9), shut, rest) < value((0.0, 0.0, 0.9), open_, rest)  # nothing in the hand
    assert value((0.0, 0.0, rest), shut, 0.9) < stages[4] + 0.1  # thrown up, not lifted
    assert value((0.0, 0.0, 0.85), shut, 0.85, command=1.0) > stages[5]  # and held
    assert value((0.0, 0.0, 0.99), shut, 0.99) < stages[6]  # no higher than need be
    assert value((0.0, 0.0, rest), open_, rest, yaw=0.5) < stages[3]  # askew
    assert value((0.0, 0.0, rest), open_, rest, yaw=np.pi / 2) == pytest.approx(stages[3])  # a cube has four sides
    assert value((0.0, 0.0, rest), open_, rest, yaw=0.5, columns=3) == pytest.approx(stages[3])  # rotation not known


def test_mpc_is_on_the_body_where_there_is_an_object(handling: Path, thing: Checkpoint, tmp_path: Path) -> None:
    _, first = learned(thing)
    policy: Any = load_policy(f"mpc:icem:{handling}").make([EpisodeSeed(0, 1), EpisodeSeed(1, 2)])
    assert isinstance(policy.dynamics, BodyDynamics) and isinstance(policy.objective, ReachAndLift)
    assert policy.planner.samples == BODY_SEARCH["samples"] and policy.horizon == 16
    file = tmp_path / "plan.json"

    def options(**fields: Any) -> str:
        search = {"samples": 4, "elites": 1, "rounds": 1}
        file.write_text(json.dumps({"checkpoint": str(handling), "search": search, "horizon": 2, **fields}))
        return f"mpc:{file}"

    small: Any = load_policy(options(execute=1)).make([EpisodeSeed(0, 1), EpisodeSeed(1, 2)])
    small.reset(ALL)
    assert small.act(first).shape == (2, 1, 7) and small.planner.samples == 4
    whole: Any = load_policy(options(dynamics="model", execute=1, batch=2)).make([EpisodeSeed(0, 1)])
    assert isinstance(whole.dynamics, LearnedDynamics) and whole.dynamics.batch == 2
    over: Any = load_policy(options(policy="random", proposals=2, execute=1)).make([EpisodeSeed(0, 1)])
    over.reset(ALL[:1])
    assert over.act({key: value[:1] for key, value in first.items()}).shape == (1, 1, 7)
    with pytest.raises(InvalidArgument, match="must be 0 where plans are made on the body"):
        load_policy(options(uncertainty_weight=1.0))
    with pytest.raises(UnknownName, match="unknown dynamics 'trunk'"):
        load_policy(options(dynamics="trunk"))


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
    file.write_text(json.dumps({"checkpoint": str(toy_folder), "dynamics": "body"}))
    with pytest.raises(CheckpointError, match="knows no object"):
        load_policy(f"mpc:{file}")
    file.write_text(json.dumps({"checkpoint": str(toy_folder), "search": {"sample": 4}}))
    with pytest.raises(InvalidArgument, match=r"got also \['sample'\]"):
        load_policy(f"mpc:{file}")
    with pytest.raises(UnknownName, match="unknown planner 'sgd'"):
        load_policy(f"mpc:sgd:{toy_folder}")
    with pytest.raises(InvalidArgument, match=r"mpc:PLANNER:CHECKPOINT"):
        load_policy("mpc:icem")
    with pytest.raises(CheckpointError, match="must be a shipped name"):
        load_policy("mpc:icem:nowhere")
