"""The dynamics recipe at toy size: two robots in one model, interrupted and resumed, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hma_gym.data.cache import load_token_cache
from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter, open_dataset
from hma_gym.data.windows import ClipBatches
from hma_gym.dynamics.checkpoint import load_checkpoint
from hma_gym.dynamics.mar import DiffusionHeadConfig
from hma_gym.errors import CheckpointError, DatasetError, InvalidArgument, ResumeError
from hma_gym.judges.feature import FeatureConfig, FeatureJudge, save_feature_judge
from hma_gym.tokenizers import SoftConfig, SoftTokenizer, VQConfig, VQTokenizer
from hma_gym.tokenizers.files import load_tokenizer, save_tokenizer
from hma_gym.training import saved_weights
from hma_gym.training.recipes.body import train_bodies
from hma_gym.training.recipes.dynamics import DynamicsOptions, OpenLoopValidation, train_dynamics
from hma_gym.training.recipes.look import LookOptions, train_look

SIZE, ROWS = 32, 14


def _episode(index: int, action_dim: int, state_dim: int) -> Episode:
    """A bright square that the first two actions move."""
    rng = np.random.default_rng((index, action_dim))
    actions_TA = rng.uniform(-1, 1, (ROWS, action_dim)).astype(np.float32)
    place_T2 = np.clip(SIZE / 2 + 2 * np.cumsum(actions_TA[:, :2], axis=0), 3, SIZE - 4)
    images_THWC = np.full((ROWS, SIZE, SIZE, 3), 60, np.uint8)
    for image_HWC, (x, y) in zip(images_THWC, place_T2.astype(int), strict=True):
        image_HWC[y - 3 : y + 3, x - 3 : x + 3] = (230, 40, 40)
    agent_pos_TP = np.tile(place_T2 / SIZE, (1, 2)).astype(np.float32)[:, :state_dim]
    return Episode(
        images_THWC=images_THWC,
        agent_pos_TP=agent_pos_TP,
        actions_TA=actions_TA,
        states_TS=np.full((ROWS, action_dim), float(index)),
        rewards_T=np.zeros(ROWS, np.float32),
        dones_T=np.arange(ROWS) == ROWS - 1,
        attrs={"success": False, "seed": index},
    )


def _writer(path: Path, action_dim: int, state_dim: int, episodes: int = 12) -> EpisodeWriter:
    writer = EpisodeWriter(path, env_args={"env_name": "Own", "type": 1, "env_kwargs": {"control_freq": 10}}, info={})
    for index in range(episodes):
        writer.write(index, _episode(index, action_dim, state_dim))
    return writer


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, and a tokenizer of each kind with random weights: enough to train a model on its tokens."""
    folder = tmp_path_factory.mktemp("material")
    _writer(folder / "small.hdf5", 2, 2).merge()
    _writer(folder / "large.hdf5", 14, 0).merge()
    widths: dict[str, Any] = {"encoder_widths": (4, 8, 16), "decoder_widths": (16, 8, 8), "decoder_blocks": (1, 1, 1)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        background = torch.full((SIZE, SIZE, 3), 60, dtype=torch.uint8)
        save_tokenizer(SoftTokenizer(SoftConfig((SIZE, SIZE), channels=4, **widths), background), folder / "soft")
        save_tokenizer(VQTokenizer(VQConfig((SIZE, SIZE), **widths), background), folder / "vq")
    return folder


def _options(material: Path, out: Path, **fields: Any) -> DynamicsOptions:
    settings: dict[str, Any] = {
        "data": (material / "small.hdf5", material / "large.hdf5"),
        "tokenizer": material / "soft",
        "size": "toy",
        "steps": 9,
        "body_steps": 5,
        "batch_size": 3,
        "frames": 3,
        "starts": 2,
        "rollout_share": 0.5,
        "rollout_max": 3,
        "action_mask": 0.3,
    }
    return DynamicsOptions(out=out, **{**settings, **fields})


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train_dynamics(_options(material, out))
    assert result.finished and result.step == 9
    scores = {
        f"{name}/{key}" for name in ("small", "large") for key in ("psnr", "psnr_last", "psnr_floor", "delta_psnr")
    }
    assert scores | {"valid_loss", "valid_mean_loss", "valid_state_loss"} <= set(result.evaluation)
    assert "small/state_error" not in result.evaluation  # two dims are no position in space
    return out


def _equal_weights(a: Path, b: Path) -> bool:
    ours, theirs = saved_weights(a), saved_weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_interrupted_at_five_steps_equals_uninterrupted(
    material: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, stops = tmp_path / "run", [1, 2, 4, 6, 7]
    original = ClipBatches.batch

    def interrupted(self: ClipBatches, step: int) -> dict[str, torch.Tensor]:
        if step + 1 in stops:
            stops.remove(step + 1)
            signal.raise_signal(signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(ClipBatches, "batch", interrupted)
    reached = []
    for _ in range(6):
        reached.append(train_dynamics(_options(material, out)).step)
    assert reached == [1, 2, 4, 6, 7, 9]
    assert _equal_weights(out, whole)
    ours, theirs = (load_file(run / "checkpoint" / "dynamics.safetensors") for run in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_file_without_images_teaches_the_body_alone(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = EpisodeWriter(tmp_path / "blind.hdf5", env_args={}, info={})
    for index in range(5):
        episode = _episode(index + 100, 2, 2)
        writer.write(index, dataclasses.replace(episode, images_THWC=np.zeros((ROWS, 0, 0, 3), np.uint8)))
    data = (writer.merge(), material / "small.hdf5")  # in any order
    seen: dict[str, Any] = {}

    def watched(model: Any, caches: Any, out: Path, steps: int, **options: Any) -> Any:
        seen.update(caches=caches, motions=options["motions"])
        return train_bodies(model, caches, out, steps, **options)

    monkeypatch.setattr("hma_gym.training.recipes.dynamics.train_bodies", watched)
    options = _options(material, tmp_path / "run", data=data, names=("a", "a"), steps=2)
    assert train_dynamics(options).finished
    (cache,), (motions,) = seen["caches"], seen["motions"]
    assert len(cache) == 12 and len(motions) == 17 and motions.tokens.shape == (17 * ROWS, 0)
    np.testing.assert_array_equal(motions.actions_FA[12 * ROWS :][:ROWS], _episode(100, 2, 2).actions_TA)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert checkpoint.provenance["episodes"] == [17] and checkpoint.starts.frames_NHWC.shape[1:] == (SIZE, SIZE, 3)
    with pytest.raises(DatasetError, match="data of domain 'a' must have one file with images"):
        train_dynamics(dataclasses.replace(options, out=tmp_path / "other", data=data[:1], names=("a",)))


def test_files_of_one_name_are_one_domain(material: Path, tmp_path: Path) -> None:
    data = (material / "small.hdf5", material / "large.hdf5", material / "small.hdf5")
    result = train_dynamics(_options(material, tmp_path / "run", data=data, names=("a", "b", "a"), steps=2))
    assert result.finished
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert [domain.name for domain in checkpoint.dynamics.domains] == ["a", "b"]
    assert checkpoint.provenance["episodes"] == [24, 12]


def test_stills_of_a_domain_are_no_motion_and_no_starts(material: Path, tmp_path: Path) -> None:
    """Also where they come first."""
    stills = EpisodeWriter(tmp_path / "stills.hdf5", env_args=open_dataset(material / "small.hdf5").env_args, info={})
    for index in range(12):
        shown = dataclasses.replace(_episode(index, 2, 2), images_THWC=np.zeros((ROWS, SIZE, SIZE, 3), np.uint8))
        stills.write(index, dataclasses.replace(shown, attrs={"category": "still", "still": True}))
    files = (stills.merge(), material / "small.hdf5")
    options = _options(material, tmp_path / "run", data=files, names=("small", "small"))
    assert train_dynamics(options).finished
    cache = load_token_cache(tmp_path / "run" / "small.tokens.h5")
    assert len(cache) == 12 * ROWS and cache.name_N[ROWS] == "demo_1[0]"
    assert len(load_token_cache(tmp_path / "run" / "small-2.tokens.h5")) == 12
    found = load_checkpoint(tmp_path / "run" / "checkpoint")
    alone = open_dataset(material / "small.hdf5")
    assert np.array_equal(found.starts.frames_NHWC[0], alone[11].images_THWC[0])
    train_dynamics(options)  # finds the caches


def test_the_head_and_the_judge_of_tokens_are_chosen(material: Path, tmp_path: Path) -> None:
    tokens = load_tokenizer(material / "soft").grid
    shape = FeatureConfig(window=2, tokens=tokens[0] * tokens[1], channels=4, hidden=8, width=4)
    folder = save_feature_judge(FeatureJudge(shape), tmp_path / "judge")
    fields = {"data": (material / "small.hdf5",), "steps": 1, "body_steps": 0, "rollout_share": 0.0}
    train_dynamics(_options(material, tmp_path / "run", head="diffusion", feature_judge=folder, **fields))
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert isinstance(checkpoint.dynamics.config.head, DiffusionHeadConfig)
    assert checkpoint.feature_judge is not None and checkpoint.feature_judge.window == 2
    assert str(folder) not in (tmp_path / "run" / "checkpoint" / "config.json").read_text()


def test_an_interrupted_body_goes_on_before_the_trunk(material: Path, tmp_path: Path) -> None:
    first = train_dynamics(_options(material, tmp_path / "run", max_minutes=1e-6))
    assert not first.finished and not (tmp_path / "run" / "saved").exists()
    assert train_dynamics(_options(material, tmp_path / "run")).finished


def test_the_trunk_corrects_where_that_helps_a_rollout(material: Path, whole: Path) -> None:
    """A state head that is right in one dim and wrong in the other is used in the first one only."""
    cache = load_token_cache(whole / "small.tokens.h5")
    dynamics = load_checkpoint(whole / "checkpoint").dynamics
    validation = OpenLoopValidation(None, load_tokenizer(material / "soft"), [cache], dynamics.domains[:1], episodes=4)
    adapter = dynamics.adapter(0)
    for parameter in (*adapter.body.parameters(), *adapter.state_out.parameters()):
        parameter.data.zero_()  # the body stands still
    drift = float(np.concatenate([np.diff(cache.agent_pos_FP[cache.rows(n)], axis=0) for n in range(4)])[:, 0].mean())
    assert abs(drift) > 1e-4
    adapter.state_out.bias.data[:2] = torch.tensor([drift, 100.0]) / adapter.get_buffer("delta_std")
    validation.choose_corrections(dynamics)
    assert adapter.get_buffer("corrected").tolist() == [1.0, 0.0]


def test_the_checkpoint_has_starts_of_every_domain(material: Path, whole: Path) -> None:
    checkpoint = load_checkpoint(whole / "checkpoint")
    assert [domain.name for domain in checkpoint.dynamics.domains] == ["small", "large"]
    assert [(d.action_dim, d.state_dim) for d in checkpoint.dynamics.domains] == [(2, 2), (14, 0)]
    assert checkpoint.domain.control_hz == 10.0 and checkpoint.judge is None
    for index, (name, action_dim) in enumerate((("small", 2), ("large", 14))):
        bank = checkpoint.starts.of_domain(index)
        held_out = open_dataset(material / f"{name}.hdf5")[11]  # the only test episode
        assert len(bank) == 1 and bank.seeds_N.tolist() == [11]
        assert np.array_equal(bank.frames_NHWC[0], held_out.images_THWC[0])
        assert bank.states_NS.tolist() == [[11.0] * action_dim]
    assert "data" not in checkpoint.provenance["recipe"]  # no folder of this machine
    assert checkpoint.provenance["episodes"] == [12, 12]


@pytest.mark.parametrize("stride", [1, 2])
def test_discrete_tokens_go_the_same_way(material: Path, tmp_path: Path, stride: int) -> None:
    options = _options(
        material,
        tmp_path / "run",
        data=(material / "small.hdf5",),
        tokenizer=material / "vq",
        steps=2,
        rollout_share=0.0,
        stride=stride,
    )
    result = train_dynamics(options)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert checkpoint.tokenizer.kind == checkpoint.dynamics.head.kind == "vq"
    assert checkpoint.dynamics.action_size == 2 * stride
    assert {"psnr", "delta_psnr", "valid_perplexity", "valid_changed_accuracy"} <= set(result.evaluation)
    assert 1.0 < result.evaluation["valid_perplexity"] <= 1100.0  # untrained: nearly uniform over 1000 codes


def test_warm_start(material: Path, whole: Path, tmp_path: Path) -> None:
    """From a run's averaged weights, and from its checkpoint: the first steps begin where the other ended."""
    for source in (whole, whole / "checkpoint"):
        out = tmp_path / source.name
        train_dynamics(_options(material, out, steps=1, body_steps=0, init=source, lr=1e-9, muon_lr=1e-9))
        ours, theirs = saved_weights(out), saved_weights(whole)
        chosen_afterwards = {name for name in theirs if name.endswith(".corrected")}
        for name in theirs.keys() - chosen_afterwards - {"head.residual_rms"}:  # a running statistic goes on
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=1e-4)
    with pytest.raises(CheckpointError, match="does not fit this model.*same size"):
        train_dynamics(_options(material, tmp_path / "other", init=whole, data=(material / "small.hdf5",)))
    with pytest.raises(CheckpointError, match="must hold a readable config.json"):
        train_dynamics(_options(material, tmp_path / "none", init=material))


def test_a_new_head_for_a_trained_model(material: Path, whole: Path, tmp_path: Path) -> None:
    """Its noise model is trained anew; all else stays, and so does what the data is measured by."""
    changes = {"head": "diffusion", "head_only": True, "init": whole, "body_steps": 0}
    out = tmp_path / "run"
    _writer(tmp_path / "small.hdf5", 2, 2, episodes=14).merge()  # more data, other statistics
    options = _options(material, out, steps=3, data=(tmp_path / "small.hdf5", material / "large.hdf5"), **changes)
    train_dynamics(options)
    checkpoint = load_checkpoint(out / "checkpoint")
    theirs = load_checkpoint(whole / "checkpoint").dynamics
    assert isinstance(checkpoint.dynamics.config.head, DiffusionHeadConfig)
    assert checkpoint.dynamics.domains == theirs.domains
    before, after = theirs.state_dict(), checkpoint.dynamics.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed - {"head.residual_rms"} <= {name for name in after if name.startswith("head.flow.")}
    assert "head.flow.out.weight" in changed
    for wrong, message in (
        ({"init": None}, "init must name it"),
        ({"body_steps": 3}, "body_steps must be 0"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            _options(material, out, **{**changes, **wrong})
    with pytest.raises(InvalidArgument, match="head_only trains the noise model of soft tokens, got .*'vq'"):
        train_dynamics(_options(material, tmp_path / "vq", **changes, tokenizer=material / "vq"))


def test_a_growing_dataset_is_encoded_once_and_keeps_its_statistics(material: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "grows.hdf5", tmp_path / "run"
    _writer(data, 2, 2, episodes=12)
    options = _options(material, out, data=(data,), steps=2, rollout_share=0.0)
    train_dynamics(options)
    domains = (out / "domains.json").read_text()
    before = load_token_cache(out / "grows.tokens.h5")
    _writer(data, 2, 2, episodes=14)
    train_dynamics(options)
    after = load_token_cache(out / "grows.tokens.h5")
    assert (len(before), len(after)) == (12, 14)
    assert np.array_equal(after.tokens[: len(before.tokens)], before.tokens)
    assert (out / "domains.json").read_text() == domains


def test_data_that_disagrees_with_its_run_is_refused(material: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "saved")
    _writer(tmp_path / "small.hdf5", 3, 2).merge()
    (run / "small.tokens.h5").unlink()
    other = (tmp_path / "small.hdf5", material / "large.hdf5")
    with pytest.raises(DatasetError, match="'small' has 2 dims of actions, the dataset 3"):
        train_dynamics(_options(material, run, data=other))
    with pytest.raises(DatasetError, match=r"of a run on the domains \['small', 'large'\], got \['small'\]"):
        train_dynamics(_options(material, run, data=(material / "small.hdf5",)))


def test_tokens_of_another_tokenizer_are_refused(material: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(DatasetError, match="made with another tokenizer"):
        train_dynamics(_options(material, run, tokenizer=material / "vq"))


def test_a_cache_with_other_targets_is_refused(material: Path, tmp_path: Path) -> None:
    """One of an earlier version, which knew no object in this data, or knew it otherwise."""
    out = tmp_path / "run"
    train_dynamics(_options(material, out, data=(material / "small.hdf5",), steps=1, rollout_share=0.0))
    cache = load_token_cache(out / "small.tokens.h5")
    dataclasses.replace(cache, targets_FX=np.zeros((len(cache.tokens), 3), np.float32)).save(out / "small.tokens.h5")
    with pytest.raises(DatasetError, match="has 3 targets a frame.*delete it"):
        train_dynamics(_options(material, out, data=(material / "small.hdf5",), steps=1, rollout_share=0.0))


def test_another_configuration_does_not_resume(material: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(ResumeError, match="rollout_max"):
        train_dynamics(_options(material, run, rollout_max=2))


def test_options_are_checked(material: Path, tmp_path: Path) -> None:
    twice = (material / "small.hdf5", material / "small.hdf5")
    with pytest.raises(InvalidArgument, match="equal stems"):
        train_dynamics(_options(material, tmp_path, data=twice))
    with pytest.raises(InvalidArgument, match="one a dataset"):
        _options(material, tmp_path, names=("a",))
    with pytest.raises(InvalidArgument, match="object_turns must be 0 or more, got 6 and -1"):
        _options(material, tmp_path, body_steps=6, object_turns=-1)
    with pytest.raises(InvalidArgument, match="refresh must be 0 or more, got -1"):
        _options(material, tmp_path, refresh=-1)
    with pytest.raises(InvalidArgument, match="one or more dataset files"):
        _options(material, tmp_path, data=())
    with pytest.raises(DatasetError, match="longer than a clip"):
        train_dynamics(_options(material, tmp_path, frames=30))


def test_a_trunk_goes_on_with_bodies_of_another_size_and_another_decoder(
    material: Path, whole: Path, tmp_path: Path
) -> None:
    look = LookOptions(
        checkpoint=str(whole / "checkpoint"),
        data=(material / "small.hdf5",),
        names=("small",),
        out=tmp_path / "look",
        steps=1,
        frames=8,
        pixel_frames=2,
        width=24,
        decoder=True,
    )
    train_look(look)
    fields: dict[str, Any] = {"steps": 1, "body_steps": 0, "tokenizer": look.out / "tokenizer"}
    drawn = load_file(look.out / "checkpoint" / "dynamics.safetensors")
    source = look.out / "checkpoint"
    for name in ("first", "second"):  # from a checkpoint, and from a run
        out = tmp_path / name
        train_dynamics(_options(material, out, init=source, **fields))
        assert load_checkpoint(out / "checkpoint").dynamics.config.body.look_width == 24
        found = load_file(out / "checkpoint" / "dynamics.safetensors")
        assert all(torch.equal(found[key], value) for key, value in drawn.items() if ".body.look." in key)
        source = out
