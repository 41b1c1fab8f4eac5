"""robomimic files become ours: re-rendered from states across robosuite versions, or refused with the reason."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hma_gym.collection.importer import ImportConfig, carry_over, check_same_control, import_dataset, joints_of
from hma_gym.data.episodes import Episode, agent_pos_from_obs
from hma_gym.data.robomimic_hdf5 import EpisodeWriter, open_dataset
from hma_gym.envs.simulation import Simulation
from hma_gym.envs.tasks import get_task
from hma_gym.errors import DatasetError, InvalidArgument, ResumeError

ROWS = 3
OLD_CONTROLLER = {"type": "OSC_POSE", "control_delta": True, "impedance_mode": "fixed", "kp": 150}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Two short episodes recorded by this version."""
    simulation = Simulation(get_task("lift"))
    writer = EpisodeWriter(tmp_path_factory.mktemp("import") / "ours.hdf5", env_args=simulation.env_args, info={})
    for seed in range(2):
        simulation.reset(seed)
        rng = np.random.default_rng(seed)
        images, observations, states, actions = [], [], [], rng.uniform(-1, 1, (ROWS, 7))
        for action_A in actions:
            images.append(simulation.render(32))
            observations.append(simulation.observe())
            states.append(simulation.flattened_state())
            simulation.step(action_A)
        obs = {key: np.stack([row[key] for row in observations]) for key in observations[0]}
        writer.append(
            Episode(
                images_THWC=np.stack(images),
                agent_pos_TP=agent_pos_from_obs(obs),
                actions_TA=actions.astype(np.float32),
                states_TS=np.stack(states),
                rewards_T=np.zeros(ROWS, np.float32),
                dones_T=np.arange(ROWS) == ROWS - 1,
                obs=obs,
                attrs={"model_file": simulation.model_xml},
            )
        )
    simulation.close()
    return writer.merge()


def make_old(ours, path):
    """The same episodes as robosuite 1.4 would have kept them: low-dim, joints named and ordered otherwise."""
    shutil.copy(ours, path)
    with h5py.File(path, "r+") as file:
        data = file["data"]
        del data.attrs["hma_gym"]
        args = json.loads(data.attrs["env_args"])
        args["env_version"] = "1.4.1"
        args["env_kwargs"] |= {"robots": ["Panda"], "controller_configs": OLD_CONTROLLER}
        data.attrs["env_args"] = json.dumps(args)
        for demo in data.values():
            del demo["obs/agentview_image"], demo["obs/agent_pos"]
            root = ElementTree.fromstring(demo.attrs["model_file"])
            world = root.find("worldbody")
            cube = next(body for body in world.findall("body") if body.get("name") == "cube_main")
            world.remove(cube)
            world.insert(0, cube)
            xml = ElementTree.tostring(root, encoding="unicode")
            demo.attrs["model_file"] = xml.replace("gripper0_right_", "gripper0_")
            time_T1, qpos_TQ, qvel_TV = np.split(demo["states"][()], [1, 17], axis=1)
            demo["states"][...] = np.concatenate([time_T1, np.roll(qpos_TQ, 7, 1), np.roll(qvel_TV, 6, 1)], axis=1)
    return path


@pytest.mark.gl
def test_an_old_low_dim_file_gives_the_very_images_that_it_was_recorded_with(ours, tmp_path):
    old = make_old(ours, tmp_path / "old.hdf5")
    out = tmp_path / "new.hdf5"
    import_dataset(ImportConfig(old, out, image_size=32, limit=1))
    assert len(open_dataset(out)) == 1
    import_dataset(ImportConfig(old, out, image_size=32))  # goes on where the first one stopped
    expected, found = open_dataset(ours), open_dataset(out)
    assert len(found) == 2
    for a, b in zip(expected, found, strict=True):
        assert np.array_equal(a.images_THWC, b.images_THWC)
        assert np.array_equal(a.states_TS, b.states_TS)
        assert np.array_equal(a.agent_pos_TP, b.agent_pos_TP)
        assert np.array_equal(a.actions_TA, b.actions_TA)
        assert b.attrs["category"] == "other" and b.attrs["success"] is False
        assert set(a.obs) - set(b.obs) == {"robot0_joint_acc"}
    with pytest.raises(ResumeError, match="other settings"):
        import_dataset(ImportConfig(old, out, image_size=48))


@pytest.mark.gl
def test_a_robot_that_stands_elsewhere_is_refused_and_nothing_is_written(ours, tmp_path):
    moved = tmp_path / "moved.hdf5"
    shutil.copy(ours, moved)
    with h5py.File(moved, "r+") as file:
        file["data/demo_0/obs/robot0_eef_pos"][...] += 0.1
    with pytest.raises(DatasetError, match="demo_0.*0.100 m.*stands elsewhere"):
        import_dataset(ImportConfig(moved, tmp_path / "new.hdf5"))
    assert [path.name for path in tmp_path.iterdir()] == ["moved.hdf5"]


@pytest.mark.gl
def test_joints_read_from_xml_are_those_that_mujoco_compiles():
    simulation = Simulation(get_task("lift"))
    model, joints = simulation.model, joints_of(simulation.model_xml)
    assert [joint.qpos.start - 1 for joint in joints] == model.jnt_qposadr.tolist()
    assert [joint.qvel.start - 1 - model.nq for joint in joints] == model.jnt_dofadr.tolist()
    compiled = [model.joint(number).name.replace("gripper0_right_", "gripper0_") for number in range(model.njnt)]
    assert [joint.name for joint in joints] == compiled
    simulation.close()


def test_images_can_be_kept_without_any_simulation(tmp_path):
    rng = np.random.default_rng(0)
    writer = EpisodeWriter(tmp_path / "other_robot.hdf5", env_args={"env_name": "Kitchen"}, info={})
    images_THWC = rng.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    zeros = np.zeros((4, 2))
    writer.append(Episode(images_THWC, zeros, zeros, zeros, np.array([0.0, 1, 0, 0]), np.zeros(4)))
    out = import_dataset(ImportConfig(writer.merge(), images="keep"))
    assert out == tmp_path / "other_robot_imported.hdf5"
    episode = open_dataset(out)[0]
    assert np.array_equal(episode.images_THWC, images_THWC)
    assert (episode.attrs["category"], episode.attrs["success"], episode.attrs["success_ever"]) == (
        "dropped",
        False,
        True,
    )
    with pytest.raises(DatasetError, match="'Kitchen'.*add a row.*images='keep'"):
        import_dataset(ImportConfig(writer.path, tmp_path / "rendered.hdf5"))


def source(action_dim=7, **kwargs):
    env_args = {"env_name": "Lift", "env_kwargs": {"robots": ["Panda"], "control_freq": 20, **kwargs}}
    return SimpleNamespace(path="file.hdf5", env_args=env_args, action_dim=action_dim)


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (source(robots=["Sawyer"]), "robot is 'Sawyer'.*'Panda'"),
        (source(robots=["Panda", "Panda"]), "robot is"),
        (source(action_dim=4), "action dims is 4.* is 7"),
        (source(control_freq=10), "control rate in Hz is 10"),
        (source(controller_configs={"type": "JOINT_VELOCITY"}), "controller is 'JOINT_VELOCITY'"),
        (source(controller_configs=OLD_CONTROLLER | {"control_delta": False}), "relative actions is False"),
        (source(controller_configs=OLD_CONTROLLER | {"impedance_mode": "variable"}), "impedance mode is 'variable'"),
        (
            source(controller_configs={"body_parts": {"right": {"type": "OSC_POSE", "input_type": "absolute"}}}),
            "relative actions is False",
        ),
    ],
)
def test_actions_that_mean_something_else_are_refused(recorded, message):
    with pytest.raises(DatasetError, match=message):
        check_same_control(recorded, get_task("lift"))


@pytest.mark.parametrize(
    "config", [None, OLD_CONTROLLER, [OLD_CONTROLLER], {"body_parts": {"arms": {"right": {"type": "OSC_POSE"}}}}]
)
def test_actions_that_mean_the_same_are_accepted(config):
    check_same_control(source(controller_configs=config), get_task("lift"))


def model(*joints):
    return "<mujoco><worldbody><body>" + "".join(joints) + "</body></worldbody></mujoco>"


CUBE, FINGER = '<joint name="cube_joint0" type="free"/>', '<joint name="gripper0_finger_joint1" type="slide"/>'


def test_states_are_carried_over_by_joint_name_and_extra_joints_dropped():
    states_TS = np.arange(1 + 9 + 8, dtype=float)[None]
    extra = '<joint name="visual_slide" type="slide"/>'
    carried_TS = carry_over(states_TS, joints_of(model(extra, CUBE, FINGER)), joints_of(model(FINGER, CUBE)))
    assert carried_TS.tolist() == [[0, 9, 2, 3, 4, 5, 6, 7, 8, 17, 11, 12, 13, 14, 15, 16]]


def test_a_joint_that_is_missing_is_named():
    with pytest.raises(DatasetError, match=r"no joint gripper0_finger_joint1 \(slide\); it has cube_joint0"):
        carry_over(np.zeros((1, 14)), joints_of(model(CUBE)), joints_of(model(CUBE, FINGER)))


def test_states_of_another_model_are_refused():
    with pytest.raises(DatasetError, match="states have 20 numbers and its model_file has 14"):
        carry_over(np.zeros((1, 20)), joints_of(model(CUBE)), joints_of(model(CUBE)))


def test_a_broken_model_is_refused():
    with pytest.raises(DatasetError, match="XML"):
        joints_of("<mujoco><worldbody>")


def test_a_camera_is_only_for_kept_images(tmp_path):
    with pytest.raises(InvalidArgument, match="images='keep'"):
        ImportConfig(tmp_path / "a", tmp_path / "b", camera="wrist")
