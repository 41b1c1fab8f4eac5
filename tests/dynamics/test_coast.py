"""What robot and object do without a picture: an object stays, or goes with the hand, and both are learned."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from toy_dynamics import handling
from toy_object import OWN, TOKENS, drawn, handled

from hma_gym.dynamics.body import FADES, GONE, Body, BodyConfig
from hma_gym.dynamics.coast import OBJECT_STEP, ManipulationCoast
from hma_gym.dynamics.pose import Pose, first_pose
from hma_gym.nn.rotations import matrix_of_quaternion
from hma_gym.training import Optimizer, OptimizerConfig

#: What an object does: bias of the network's last three numbers.
STAY, HOLD, FALL = (30.0, 0.0, 0.0), (0.0, 30.0, 0.0), (0.0, 0.0, 30.0)
STEP = torch.tensor(OBJECT_STEP)


def _coast(does: tuple[float, float, float] | None = None, moving: bool = True) -> ManipulationCoast:
    """Untrained; or with an object that does what is told, and a hand that actions move and turn."""
    torch.manual_seed(0)
    coast = ManipulationCoast(handling(), history=2, octaves=2, width=16, layers=2).requires_grad_(False)
    if does is not None:
        coast.handling[-1].bias[-3:] = torch.tensor(does)  # type: ignore[operator]
        if moving:
            torch.nn.init.normal_(coast.inertia.weight[:, 2 * (9 + 1) :], std=0.3)  # of actions: motions would build up
    return coast


def _start(rows: int, seed: int = 0) -> Pose:
    """Hands and things near them, turned in any way; the quaternions have either sign."""
    turns = Rotation.random(2 * rows, random_state=seed)
    rng = np.random.default_rng(seed)
    place = 0.1 * rng.normal(size=(rows, 3))
    quaternion = turns[:rows].as_quat() * np.where(np.arange(rows) % 2, 1.0, -1.0)[:, None]
    agent_pos = np.concatenate((place, quaternion, 0.02 * rng.normal(size=(rows, 2))), axis=1)
    matrix = turns[rows:].as_matrix()
    targets = np.concatenate((place + 0.05 * rng.normal(size=(rows, 3)), matrix[..., 0], matrix[..., 1]), axis=1)
    at_rest = torch.ones(rows, dtype=torch.bool)
    return first_pose(torch.from_numpy(agent_pos).float(), torch.from_numpy(targets).float(), 2, 4, at_rest)


def _coasted(coast: ManipulationCoast, pose: Pose, steps: int) -> Pose:
    generator, given = torch.Generator().manual_seed(1), torch.ones(len(pose.agent_pos), dtype=torch.bool)
    for _ in range(steps):
        action = torch.randn(len(pose.agent_pos), 4, generator=generator)
        pose = pose.after(*_next(coast, pose, action, given), action, given)
    return pose


def test_untrained_everything_stays_where_it_is() -> None:
    coast, before = _coast(), _start(8)
    coast.set_floor(1.0)  # on which all lie
    after = _coasted(coast, before, 200)
    torch.testing.assert_close(after.agent_pos, before.agent_pos, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(after.targets, before.targets, rtol=0.0, atol=1e-5)


def test_a_quaternion_that_leaves_what_was_seen_is_replaced_by_its_negative() -> None:
    """Data in which x is never negative: the hand turns on beyond x = 0 as the same rotation, and nothing jumps."""
    coast, given = _coast(), torch.ones(1, dtype=torch.bool)
    coast.inertia.bias[3:7] = torch.tensor([-0.01, 0.0, 0.0, 0.0]) / coast.get_buffer("delta_std")[3:7]

    def within(agent_pos: Tensor) -> Tensor:
        return torch.cat((agent_pos[..., :3], agent_pos[..., 3:4].clamp(min=0.0), agent_pos[..., 4:]), dim=-1)

    quaternion = torch.nn.functional.normalize(torch.tensor([0.025, 0.6, -0.5, 0.3]), dim=0)
    before = _start(1)
    pose = dataclasses.replace(
        before, agent_pos=torch.cat((before.agent_pos[:, :3], quaternion[None], before.agent_pos[:, 7:]), 1)
    )
    turned = []
    for _ in range(3):
        action = torch.zeros(1, 4)
        pose = pose.after(*coast(pose, action, given, within), action, given)
        turned.append(pose.agent_pos[0, 3:7])
    assert all(q[0] >= 0 and abs(float(q.norm()) - 1) < 1e-5 for q in turned)
    matrices = matrix_of_quaternion(torch.stack([quaternion, *turned]))
    assert float((matrices[1:] - matrices[:-1]).abs().max()) < 0.05
    assert float(turned[-1][1]) < 0 < float(turned[0][1])
    assert float(coast._motions(pose)[0, :, 3:7].abs().max()) < 0.05 < float(pose.motions[0, :, 3:7].abs().max())


def test_an_object_that_stays_does_so_whatever_the_hand_does() -> None:
    before = _start(8)
    after = _coasted(_coast(STAY), before, 200)
    assert float((after.agent_pos - before.agent_pos)[:, :3].norm(dim=-1).min()) > 0.02
    torch.testing.assert_close(after.targets, before.targets, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_let_go_falls_as_things_fall_and_ends_where_things_lie(stride: int) -> None:
    """Positions are a second time the sum of accelerations, 9.81 m/s^2 at 20 Hz."""
    torch.manual_seed(0)
    coast = ManipulationCoast(handling(stride=stride), history=2, octaves=2, width=16, layers=2).requires_grad_(False)
    coast.handling[-1].bias[-3:] = torch.tensor(FALL)  # type: ignore[operator]
    before = _start(8)
    pose, actions, given = before, torch.zeros(8, 4 * stride), torch.ones(8, dtype=torch.bool)
    pose = dataclasses.replace(pose, actions=torch.zeros(8, 2, 4 * stride))
    thrown = pose.target_motions.clone()
    thrown[:, 0, :3] = torch.tensor([0.002, 0.0, 0.03])
    pose = dataclasses.replace(pose, target_motions=thrown)
    drop = 9.81 * (stride / 20.0) ** 2
    for step in range(1, 6):
        pose = pose.after(*_next(coast, pose, actions, given), actions, given)
        fallen = (pose.targets - before.targets)[:, :3]
        wanted = torch.tensor([0.002 * step, 0.0, 0.03 * step - drop * step * (step + 1) / 2]).expand(8, 3)
        torch.testing.assert_close(fallen, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pose.targets[:, 3:], before.targets[:, 3:])
    floor = float(pose.targets[:, 2].min()) - 1.0
    coast.set_floor(floor)
    for _ in range(60):
        pose = pose.after(*_next(coast, pose, actions, given), actions, given)
    torch.testing.assert_close(pose.targets[:, 2], torch.full((8,), floor))


def _next(
    coast: ManipulationCoast, pose: Pose, actions: torch.Tensor, given: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    agent_pos, targets = coast(pose, actions, given, torch.Tensor.clone)
    return agent_pos, targets


def _in_the_hand(pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Position and rotation of the object in the hand's frame, by scipy."""
    hand = Rotation.from_quat(pose.agent_pos[:, 3:7].double().numpy())
    place = hand.inv().apply((pose.targets[:, :3] - pose.agent_pos[:, :3]).double().numpy())
    first, second = pose.targets[:, 3:6].double().numpy(), pose.targets[:, 6:].double().numpy()
    thing = Rotation.from_matrix(np.stack((first, second, np.cross(first, second)), axis=-1))
    return place, (hand.inv() * thing).as_matrix()


def test_a_held_object_keeps_its_pose_in_the_hand() -> None:
    before = _start(8)
    after = _coasted(_coast(HOLD), before, 50)
    moved = (
        Rotation.from_quat(after.agent_pos[:, 3:7].numpy()) * Rotation.from_quat(before.agent_pos[:, 3:7].numpy()).inv()
    )
    assert moved.magnitude().min() > 0.05  # rad: the hand has turned
    assert float((after.targets - before.targets)[:, :3].norm(dim=-1).min()) > 0.02
    for now, then in zip(_in_the_hand(after), _in_the_hand(before), strict=True):
        np.testing.assert_allclose(now, then, atol=1e-4)


def test_what_the_network_adds_is_in_units_of_a_usual_step_in_the_hand_s_frame() -> None:
    coast = _coast(HOLD, moving=False)
    coast.handling[-1].bias[-12:-3] = torch.tensor([1.0, -2.0, 0.5] + [0.0] * 6)  # type: ignore[operator]
    before = _start(3)
    after = _coasted(coast, before, 2)
    hand = Rotation.from_quat(before.agent_pos[:, 3:7].numpy())
    pushed = torch.from_numpy(hand.apply((2 * torch.tensor([1.0, -2.0, 0.5]) * STEP[:3]).numpy())).float()
    torch.testing.assert_close(after.targets[:, :3], before.targets[:, :3] + pushed)
    torch.testing.assert_close(after.targets[:, 3:], before.targets[:, 3:])


def test_the_same_happens_anywhere_on_the_table_and_whichever_way_around() -> None:
    coast, given = _coast((0.0, 0.0, 0.0), moving=False), torch.ones(6, dtype=torch.bool)
    for parameter in coast.handling.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    turn, shift = Rotation.from_euler("z", 0.9), np.array([0.4, -0.3, 0.0])

    def elsewhere(pose: Pose) -> Pose:
        places = [turn.apply(vectors[:, :3].numpy()) + shift for vectors in (pose.agent_pos, pose.targets)]
        quaternion = (turn * Rotation.from_quat(pose.agent_pos[:, 3:7].numpy())).as_quat()
        columns = [turn.apply(pose.targets[:, i : i + 3].numpy()) for i in (3, 6)]
        agent_pos = np.concatenate((places[0], quaternion, pose.agent_pos[:, 7:].numpy()), axis=1)
        targets = np.concatenate((places[1], *columns), axis=1)
        return dataclasses.replace(
            pose, agent_pos=torch.from_numpy(agent_pos).float(), targets=torch.from_numpy(targets).float()
        )

    here, there = _start(6), elsewhere(_start(6))
    for pose in (here, there):  # they fall, whichever way they moved
        pose.target_motions[..., :2] = 0.0
        pose.target_motions[..., 2] = -0.01
    action = torch.ones(6, 4)
    found = coast(here, action, given, torch.Tensor.clone)[1]
    wanted = elsewhere(dataclasses.replace(here, targets=found)).targets
    torch.testing.assert_close(coast(there, action, given, torch.Tensor.clone)[1], wanted, rtol=0.0, atol=1e-5)
    assert float((found - here.targets)[:, :3].norm(dim=-1).min()) > 1e-4


def test_a_rotation_stays_one() -> None:
    coast = _coast((0.0, 1.0, -30.0))
    torch.nn.init.normal_(coast.handling[-1].weight)  # type: ignore[arg-type]
    after = _coasted(coast, _start(8), 20)
    first, second = after.targets[:, 3:6], after.targets[:, 6:]
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(8))
    torch.testing.assert_close(second.norm(dim=-1), torch.ones(8))
    torch.testing.assert_close((first * second).sum(dim=-1), torch.zeros(8), rtol=0.0, atol=1e-5)


def test_what_is_known_of_an_object_counts_and_what_is_not_does_not() -> None:
    coast = _coast((0.0, 0.0, 0.0))
    for parameter in coast.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    pose = dataclasses.replace(_start(4), known=torch.zeros(4, 2, dtype=torch.bool))
    action, given = torch.ones(4, 4), torch.ones(4, dtype=torch.bool)
    expected = coast(pose, action, given, torch.Tensor.clone)
    moving = dataclasses.replace(pose, target_motions=pose.target_motions + 0.01)
    for ours, theirs in zip(coast(moving, action, given, torch.Tensor.clone), expected, strict=True):
        assert torch.equal(ours, theirs)
    known = torch.ones_like(pose.known)
    still, moved = (
        coast(dataclasses.replace(p, known=known), action, given, torch.Tensor.clone) for p in (pose, moving)
    )
    for ours, theirs in zip(moved, still, strict=True):
        assert not torch.allclose(ours, theirs)
    # the other name of the hand's rotation moves the object alike
    quaternion = pose.agent_pos.clone()
    quaternion[:, 3:7] *= -1.0
    seen, other = (coast._seen(p, *_frames(p)) for p in (pose, dataclasses.replace(pose, agent_pos=quaternion)))
    for ours, theirs in zip(seen, other, strict=True):
        torch.testing.assert_close(ours, theirs)


def _frames(pose: Pose) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hand = torch.from_numpy(Rotation.from_quat(pose.agent_pos[:, 3:7].numpy()).as_matrix()).float()
    place = (hand.mT @ (pose.targets[:, :3] - pose.agent_pos[:, :3])[..., None])[..., 0]
    return hand, pose.targets[:, 3:], place


def test_low_precision_around_it_changes_nothing() -> None:
    body = Body(handling(), BodyConfig(history=2, octaves=2, coast_width=16), TOKENS).requires_grad_(False)
    torch.manual_seed(0)
    assert body.coast is not None
    for parameter in body.coast.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    pose, action, given = _start(4), torch.ones(4, 4), torch.ones(4, dtype=torch.bool)
    expected = body.coasted(pose, action, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = body.coasted(pose, action, given)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- a toy that a body learns


SMALL = BodyConfig(
    history=2, octaves=2, coast_width=64, coast_layers=2, look_width=64, look_layers=1, sight_width=64, sight_layers=1
)
STEPS = 400


@pytest.fixture(scope="module")
def learned() -> Body:
    torch.manual_seed(0)
    body = Body(OWN, SMALL, TOKENS)
    frames = torch.cat([handled(256, 1, -seed - 1)[0]["tokens"] for seed in range(4)])
    body.set_token_statistics(frames.mean(dim=0), frames.std(dim=0))
    optimizer = Optimizer(body, body.parameter_groups(), OptimizerConfig(lr=5e-3, weight_decay=0.0))
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        loss, metrics = body.loss(handled(96, 4, step)[0], generator)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0 - step / STEPS)
    assert {"coast_loss", "object_loss", "look_loss", "sight_loss"} == metrics.keys()
    return body.requires_grad_(False)


def test_it_learns_what_is_carried_and_what_stays(learned: Body) -> None:
    clip, held = handled(128, 12, 100_000)
    given = torch.ones(128, dtype=torch.bool)
    pose = first_pose(clip["agent_pos"][:, 0], clip["targets"][:, 0], 2, 4, clip["at_rest"])
    for t in range(12):
        pose = pose.after(*learned.coasted(pose, clip["actions"][:, t], given), clip["actions"][:, t], given)
    truth, first = clip["targets"][:, -1], clip["targets"][:, 0]
    wrong, path = (pose.targets - truth)[:, :3].norm(dim=-1), (truth - first)[:, :3].norm(dim=-1)
    assert 16 < int(held.sum()) < 112 and float(path[~held].max()) == 0.0
    assert float(wrong[held].mean()) < 0.3 * float(path[held].mean())
    assert float(wrong[~held].mean()) < 0.1 * float(path[held].mean())
    turned = (pose.targets - truth)[:, 3:].norm(dim=-1)
    assert float(turned[held].mean()) < 0.5 * float((first - truth)[held, 3:].norm(dim=-1).mean())


def test_it_learns_to_draw_the_object_where_it_is(learned: Body) -> None:
    clip, _ = handled(128, 1, 200_000)
    shown = learned.drawn(clip["poses"], clip["places"])
    assert shown is not None
    error = (shown - clip["tokens"]).square().mean() / learned.get_buffer("token_std").square().mean()
    assert float(error) < 0.2
    elsewhere = clip["places"].roll(1, dims=0)
    shown = learned.drawn(clip["poses"], elsewhere)
    assert shown is not None
    wanted = drawn(clip["poses"], elsewhere)
    assert float((shown - wanted).square().mean()) < 0.3 * float((shown - clip["tokens"]).square().mean())


def test_what_is_far_from_the_hand_is_not_shown_as_in_it() -> None:
    """Wherever a hand is that is far from the object, it is drawn by what there is of it, an empty hand."""
    body, pose = Body(OWN, BodyConfig(), TOKENS), _start(2, seed=3)
    hand, thing = pose.agent_pos, pose.targets[:1].expand(2, -1)
    for distance, same in ((1.05 * GONE, True), (0.95 * GONE, False)):
        direction = torch.nn.functional.normalize(torch.tensor([[0.3, 0.4, 0.5], [-0.6, 0.1, 0.2]]), dim=-1)
        hands = torch.cat((thing[:, :3] + distance * direction, hand[:, 3:]), dim=-1)
        shown = body.object_features(hands, thing, faded=True)
        assert torch.equal(shown[0], shown[1]) == same
        assert not torch.equal(*body.object_features(hands, thing))
    near = torch.cat((thing[:, :3] + 0.95 * FADES * direction, hand[:, 3:]), dim=-1)
    torch.testing.assert_close(body.object_features(near, thing, faded=True), body.object_features(near, thing))


def test_it_learns_to_see_place_and_yaw_up_to_a_quarter_of_a_turn(learned: Body) -> None:
    clip, _ = handled(128, 1, 300_000)
    truth = clip["places"]
    seen = learned.sighted(clip["tokens"], clip["poses"], None)
    assert float((seen - truth)[:, :3].norm(dim=-1).mean()) < 0.2 * float(truth[:, :3].norm(dim=-1).mean())
    yaw, true_yaw = (torch.atan2(pose[:, 4], pose[:, 3]) for pose in (seen, truth))
    assert float(yaw.abs().max()) <= torch.pi / 4 + 1e-5 and float(true_yaw.abs().max()) > 2.0
    away = torch.atan2((4 * (yaw - true_yaw)).sin(), (4 * (yaw - true_yaw)).cos()).abs() / 4
    assert float(away.mean()) < 0.1  # rad; 0.39 by chance
    torch.testing.assert_close(seen[:, 6:8], torch.stack((-seen[:, 4], seen[:, 3]), dim=-1))
    assert not seen[:, [5, 8]].any()


def test_what_is_seen_corrects_a_belief_in_its_place_only(learned: Body) -> None:
    clip, _ = handled(128, 1, 400_000)
    truth = clip["places"]
    generator = torch.Generator().manual_seed(0)
    off = 0.02 * torch.randn(128, 3, generator=generator)
    believed = torch.cat((truth[:, :3] + off, truth[:, 3:].roll(1, dims=0)), dim=-1)
    seen = learned.sighted(clip["tokens"], clip["poses"], believed)
    assert torch.equal(seen[:, 3:], believed[:, 3:])
    assert float((seen - truth)[:, :3].norm(dim=-1).mean()) < 0.5 * float(off.norm(dim=-1).mean())


def test_untrained_sight_sees_the_mean_and_keeps_a_belief() -> None:
    body = Body(OWN, SMALL, TOKENS).requires_grad_(False)
    clip, _ = handled(8, 1, 0)
    seen = body.sighted(clip["tokens"], clip["poses"], None)
    mean = torch.tensor(OWN.target_mean)
    torch.testing.assert_close(seen[:, :3], mean[:3].expand(8, 3))
    torch.testing.assert_close(seen[:, 3:], torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).expand(8, 6))
    assert torch.equal(body.sighted(clip["tokens"], clip["poses"], clip["places"]), clip["places"])


def test_what_is_held_goes_no_further_than_the_hand_may() -> None:
    """A hand that is pushed against its bounds keeps the object where it has it."""
    before = _start(6)
    ceiling = before.agent_pos[:, :3].amax(dim=0) + 0.01

    def within(agent_pos: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.minimum(agent_pos[..., :3], ceiling), agent_pos[..., 3:]), dim=-1)

    coast, pose = _coast(HOLD), before
    given = torch.ones(6, dtype=torch.bool)
    for _ in range(30):
        action = torch.ones(6, 4)
        pose = pose.after(*coast(pose, action, given, within), action, given)
    assert (pose.agent_pos[:, :3] <= ceiling).all()
    for ours, theirs in zip(_in_the_hand(pose), _in_the_hand(before), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
