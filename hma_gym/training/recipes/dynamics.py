"""Recipes that train the dynamics model on a dataset of episodes, and make a checkpoint of it.

    hma-gym train dynamics --data lift.hdf5 --tokenizer runs/soft/tokenizer --out runs/dynamics --minutes 60

Frames are encoded once into ``<out>/<name>.tokens.h5`` (see :mod:`hma_gym.data.cache`). Two CPU cores, bf16,
Muon for the hidden matrices. The scores to expect are in each recipe's docstring.

Shape legend: B rows, T transitions, S tokens, P agent_pos dims, X target dims.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hma_gym.data.cache import (
    TokenCache,
    build_token_cache,
    episode_names,
    join_caches,
    load_token_cache,
    targets_of,
)
from hma_gym.data.robomimic_hdf5 import Dataset, open_dataset
from hma_gym.data.windows import ClipBatches, ClipConfig
from hma_gym.domains import Domain
from hma_gym.dynamics.body import BodyConfig
from hma_gym.dynamics.checkpoint import Checkpoint, StartBank, load_checkpoint, save_checkpoint, start_bank
from hma_gym.dynamics.mar import DiffusionHeadConfig, FlowHeadConfig, SoftHeadConfig
from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.dynamics.refresh import refreshed
from hma_gym.dynamics.sizes import named_trunk
from hma_gym.errors import CheckpointError, DatasetError, InvalidArgument
from hma_gym.judges.classifier import load_judge
from hma_gym.judges.feature import load_feature_judge
from hma_gym.metrics.video import psnr
from hma_gym.nn.parameters import load_fitting
from hma_gym.tokenizers.files import load_tokenizer
from hma_gym.tokenizers.protocol import Tokenizer
from hma_gym.training import Every, OptimizerConfig, TrainConfig, TrainResult, saved_weights, train
from hma_gym.training.mixture import mixture_probabilities
from hma_gym.training.recipes.body import train_bodies

#: Batches of the held-out loss; as many as a training step has, each.
HELD_OUT_BATCHES = 8

#: How the names of the weights of a soft head's noise model begin.
NOISE_MODEL = "head.flow."

#: Lift succeeds where the cube's centre is more than 4 cm above the table top at 0.8 m (robosuite's predicate).
LIFT_HEIGHT = 0.84


def check_files(data: Sequence[Path], names: Sequence[str]) -> None:
    """Raises :class:`InvalidArgument` on no files, or on names that are not one a file."""
    if not data:
        raise InvalidArgument("data must name one or more dataset files, got none.")
    if names and len(names) != len(data):
        raise InvalidArgument(f"names must be one a dataset, got {len(names)} names for {len(data)} datasets.")


@dataclass(frozen=True)
class DynamicsOptions:
    """Options of ``hma-gym train dynamics``; everything else is the recipe's.

    Attributes:
        data: robomimic HDF5 files (or ``.parts`` folders). Those without images teach the body alone how things move
            (``hma-gym collect --no-images``); each domain needs one with images.
        tokenizer: folder of a trained tokenizer; its kind decides whether the model is soft or discrete.
        out: folder of the run; the checkpoint goes to ``<out>/checkpoint``.
        names: names of the files' domains, one a file; files of the same name belong to one domain. By default the
            files' stems.
        judge: folder of a trained classifier judge to put into the checkpoint.
        feature_judge: folder of a trained feature judge to put into the checkpoint.
        head: of soft tokens: ``flow``, or the paper's ``diffusion`` (see docs/soft_tokens.md).
        init: a run's folder or a checkpoint to start from (same shapes), instead of random weights. Domains of the same
            name keep the statistics that they have there, by which its weights see them; bodies have the size that they
            have there.
        head_only: train the noise model of soft tokens alone, anew, and leave all else as it is in ``init``: another
            ``head`` for a trained model.
        task: key of the task that the checkpoint is for; "" for your own robot.
        body_steps: length of the training of the bodies, before the trunk's (see :mod:`hma_gym.training.recipes.body`);
            with 0 they are trained with the trunk, or stay those of ``init``.
        size: named size of the trunk, see :data:`hma_gym.dynamics.sizes.TRUNKS`.
        minutes: length of the training.
        steps: length in steps, in place of minutes (then a resumed run is exact).
        max_minutes: stop this session, saved, before so many minutes are over; call again to go on.
        batch_size, frames: clips a step, and transitions a clip.
        rollout_share, rollout_max: share of batches that see the model's own frames, and their longest rollout.
        token_noise: largest noise on the tokens of the frame before (of unit deviation), soft tokens only.
        refresh: in a rollout, soft tokens make a round trip through the tokenizer every so many steps (see
            :mod:`hma_gym.dynamics.refresh`); 0 for never, which will do where much ``token_noise`` was trained with.
        action_mask: share of rows whose actions are hidden (passive, policy and full dynamics).
        stride: environment steps per model step.
        object_turns: in how many positions of a full turn about its upright axis the object looks alike, where the data
            has its pose (``obs/object`` with position and quaternion): 4 for a cube, 1 for most things; 0 to leave
            objects to the trunk, as it is where no body is trained.
        lr, muon_lr: peak learning rates.
        decay_fraction: share of the run in which the learning rate goes down to 0.
        starts: how many start frames the checkpoint gets, from held-out (test) episodes where there are some.
        starts_data: another dataset to take the starts from, e.g. one recorded for evaluation only.
        compile: compile the loss.
        device: ``cpu`` or ``cuda``.
        seed: of everything random.
    """

    data: tuple[Path, ...]
    tokenizer: Path
    out: Path
    names: tuple[str, ...] = ()
    judge: Path | None = None
    feature_judge: Path | None = None
    head: Literal["flow", "diffusion"] = "flow"
    init: Path | None = None
    head_only: bool = False
    task: str = ""
    body_steps: int = 6000
    size: Literal["toy", "lift", "small", "shallow"] = "lift"
    minutes: float = 60.0
    steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 8
    frames: int = 16
    rollout_share: float = 0.0
    rollout_max: int = 32
    token_noise: float = 0.1
    refresh: int = 8
    action_mask: float = 0.03
    stride: int = 1
    object_turns: int = 1
    lr: float = 1e-3
    muon_lr: float = 0.02
    decay_fraction: float = 0.3
    starts: int = 200
    starts_data: Path | None = None
    compile: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check_files(self.data, self.names)
        if self.body_steps < 0 or self.object_turns < 0:
            raise InvalidArgument(
                f"body_steps and object_turns must be 0 or more, got {self.body_steps} and {self.object_turns}."
            )
        if self.head_only and (self.init is None or self.body_steps):
            raise InvalidArgument(
                "head_only keeps the rest of a trained model, so init must name it and body_steps must be 0, got "
                f"init={self.init} and body_steps={self.body_steps}."
            )
        if self.refresh < 0:
            raise InvalidArgument(f"refresh must be 0 or more, got {self.refresh}.")
        if self.starts < 1:
            raise InvalidArgument(f"starts must be 1 or more, got {self.starts}.")


def dynamics_config(
    options: DynamicsOptions, tokenizer: Tokenizer, change_scale: float, body: BodyConfig
) -> DynamicsConfig:
    """The model of a recipe, for either kind of token; 2 x 2 tokens share a trunk position, as the paper's."""
    head: SoftHeadConfig | MaskGITHeadConfig
    if tokenizer.kind == "soft":
        kind = DiffusionHeadConfig if options.head == "diffusion" else FlowHeadConfig
        head = kind(
            grid=tokenizer.grid,
            channels=tokenizer.channels,
            patch=2,
            change_scale=change_scale,
            noise_max=options.token_noise,
        )
    else:
        head = MaskGITHeadConfig(grid=tokenizer.grid, vocabulary=tokenizer.vocabulary, patch=2)
    return DynamicsConfig(
        trunk=named_trunk(options.size),
        head=head,
        body=body,
        refresh=options.refresh if tokenizer.kind == "soft" else 0,
        mask_full=0.9 if tokenizer.kind == "soft" else 0.6,
        rollout_share=options.rollout_share,
        rollout_max=options.rollout_max,
        action_mask=options.action_mask,
    )


def train_config(options: DynamicsOptions, model: DynamicsConfig) -> TrainConfig:
    """The loop's configuration of a recipe."""
    return TrainConfig(
        out=options.out,
        steps=options.steps,
        schedule_minutes=None if options.steps is not None else options.minutes,
        max_minutes=options.max_minutes,
        optimizer=OptimizerConfig(name="muon", lr=options.lr, muon_lr=options.muon_lr, weight_decay=0.01),
        warmup_steps=min(200, options.steps // 5 if options.steps else 200),
        decay="wsd",
        decay_fraction=options.decay_fraction,
        ema_decay=0.998,
        precision="bf16",
        compile=options.compile,
        device=options.device,
        seed=options.seed,
        evaluation=Every(minutes=8.0),
        checkpoint=Every(minutes=4.0),
        prefetch=4 if options.device.startswith("cuda") else 0,
        recipe={
            "dynamics": model.to_dict(),
            "batch_size": options.batch_size,
            "frames": options.frames,
            "stride": options.stride,
            "names": list(options.names),
        },
    )


@dataclass(frozen=True)
class OpenLoopValidation:
    """Validation while training: open loop from one frame under the true actions, against the decoded true tokens.

    Attributes:
        held_out: batches of validation episodes for the training loss, or None where these are too short for a clip.
        tokenizer: decodes.
        caches, domains: where the episodes come from.
        episodes: how many of each domain.
        horizon: steps.
        success: (column of the targets, threshold) that defines success from the privileged targets, or None.
    """

    held_out: ClipBatches | None
    tokenizer: Tokenizer
    caches: Sequence[TokenCache]
    domains: Sequence[Domain]
    episodes: int = 32
    horizon: int = 60
    success: tuple[int, float] | None = None

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """The scores by name, prefixed by the domain's where there are several.

        ``valid_loss`` and the loss's metrics (``valid_changed_accuracy`` ...) on held-out clips, with discrete tokens
        ``valid_perplexity``; open loop ``psnr`` (mean over steps), ``psnr_last`` (last 10 steps), ``psnr_floor`` (the
        first frame copied),
        ``delta_psnr`` (last frame, against 5 random action sequences), ``state_error`` (position in m, at the last
        step), ``target_error``, and ``outcome`` (agreement of the outcome) and ``implied`` success minus the true one.
        """
        assert isinstance(model, Dynamics)
        scores = self._losses(model)
        for index, domain in enumerate(self.domains):
            tokens, actions, agent_pos, targets = self._episodes(index)
            truth = self._decode(tokens)
            shown, pos, found = self._rollout(model, tokens, actions, agent_pos, index, every=True)
            curve = psnr(shown, truth[:, 1:]).mean(dim=0)
            prefix = f"{domain.name}/" if len(self.domains) > 1 else ""
            scores[f"{prefix}psnr"] = float(curve.mean())
            scores[f"{prefix}psnr_last"] = float(curve[-10:].mean())
            scores[f"{prefix}psnr_floor"] = float(psnr(truth[:, :1].expand_as(truth[:, 1:]), truth[:, 1:]).mean())
            wrong = []
            generator = torch.Generator().manual_seed(0)
            for _ in range(5):
                random = torch.rand(actions.shape, generator=generator)
                low = torch.tensor(domain.action_low).repeat(domain.stride)
                high = torch.tensor(domain.action_high).repeat(domain.stride)
                other, _, _ = self._rollout(model, tokens, low + random * (high - low), agent_pos, index, every=False)
                wrong.append(psnr(other[:, -1], truth[:, -1]).mean())
            scores[f"{prefix}delta_psnr"] = float(curve[-1] - torch.stack(wrong).mean())
            if domain.state_dim >= 3:
                scores[f"{prefix}state_error"] = float(
                    np.linalg.norm(pos[:, -1, :3] - agent_pos[:, -1, :3], axis=-1).mean()
                )
            if domain.target_dim:
                wrong_by = (found - targets[:, 1:])[..., :3]  # of a pose, the place
                scores[f"{prefix}target_error"] = float(np.linalg.norm(wrong_by, axis=-1).mean())
            if self.success is not None and domain.target_dim:
                column, threshold = self.success
                seen, true = found[:, -1, column] > threshold, targets[:, -1, column] > threshold
                scores[f"{prefix}outcome"] = float((seen == true).mean())
                scores[f"{prefix}implied"] = float(seen.mean() - true.mean())
        return scores

    def choose_corrections(self, model: Dynamics) -> None:
        """Let the trunk correct each dim of agent_pos whose own error in rollouts that lowers, dim by dim."""
        for index, domain in enumerate(self.domains):
            if not domain.state_dim:
                continue
            if model.adapter(index).body.target_dim:  # what the hand holds would not follow
                model.set_corrected(index, torch.zeros(domain.state_dim))
                continue
            tokens, actions, agent_pos, _ = self._episodes(index)
            chosen = torch.zeros(domain.state_dim)
            errors = []
            for corrected in (torch.zeros(domain.state_dim), *torch.eye(domain.state_dim)):
                model.set_corrected(index, corrected)
                _, found, _ = self._rollout(model, tokens, actions, agent_pos, index, every=False)
                errors.append(np.abs(found - agent_pos[:, 1:]).mean(axis=(0, 1)))
            for dim in range(domain.state_dim):
                chosen[dim] = float(errors[1 + dim][dim] < errors[0][dim])
            model.set_corrected(index, chosen)

    def _losses(self, model: Dynamics) -> dict[str, float]:
        """Mean loss and metrics of the first held-out batches, with the same random choices at every call."""
        if self.held_out is None:
            return {}
        device = next(model.parameters()).device
        sums: dict[str, float] = {}
        for step in range(HELD_OUT_BATCHES):
            batch = {name: tensor.to(device) for name, tensor in self.held_out.batch(step).items()}
            loss, metrics = model.loss(batch, torch.Generator(device).manual_seed(step))
            for name, value in {"loss": loss, **metrics}.items():
                sums[f"valid_{name}"] = sums.get(f"valid_{name}", 0.0) + float(value) / HELD_OUT_BATCHES
        if "valid_cross_entropy" in sums:
            sums["valid_perplexity"] = math.exp(sums["valid_cross_entropy"])
        return sums

    def _episodes(self, index: int) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """Tokens (B, T + 1, S...), action chunks (B, T, A), agent_pos and targets (B, T + 1, ...) of one domain."""
        cache, domain = self.caches[index], self.domains[index]
        split, stride = "valid" if len(cache.moving("valid")) else "train", domain.stride
        room = np.diff(cache.starts_N1)
        chosen = [n for n in cache.episodes(split) if room[n] > stride][: self.episodes]
        if not chosen:
            raise DatasetError(
                f"no {split} episode of domain {domain.name!r} is longer than its stride of {stride} steps; "
                "record longer episodes, or move some to the filter key 'valid'."
            )
        horizon = min(self.horizon, *((int(room[n]) - 1) // stride for n in chosen))
        first = np.array([cache.starts_N1[n] for n in chosen])
        frames = first[:, None] + stride * np.arange(horizon + 1)
        steps = first[:, None, None] + stride * np.arange(horizon)[:, None] + np.arange(stride)
        soft = self.tokenizer.kind == "soft"
        tokens = torch.from_numpy(cache.tokens[frames].astype(np.float32 if soft else np.int64))
        actions = torch.from_numpy(cache.actions_FA[steps].reshape(len(chosen), horizon, -1))
        return tokens, actions, cache.agent_pos_FP[frames], cache.targets_FX[frames]

    def _decode(self, tokens: Tensor) -> Tensor:
        return torch.stack([self.tokenizer.decode(row) for row in tokens])

    def _rollout(
        self,
        model: Dynamics,
        tokens: Tensor,
        actions: Tensor,
        agent_pos: np.ndarray,
        domain: int,
        every: bool,
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Frames (B, T, H, W, 3) (only the last one unless ``every``), agent_pos and targets of all steps."""
        B, device = len(tokens), next(model.parameters()).device
        pos = np.zeros((B, model.state_size), np.float32)
        pos[:, : agent_pos.shape[-1]] = agent_pos[:, 0]
        padded = torch.zeros(B, actions.shape[1], model.action_size)
        padded[..., : actions.shape[-1]] = actions
        state = model.start(
            tokens[:, 0].to(device),
            torch.from_numpy(pos).to(device),
            torch.arange(B, device=device),
            domain=torch.full((B,), domain, device=device),
        )
        shown, states, targets = [], [], []
        for t in range(actions.shape[1]):
            state, out = model.step(state, padded[:, t].to(device), in_place=True)
            state = refreshed(state, self.tokenizer, model.config.refresh)
            if every or t == actions.shape[1] - 1:
                shown.append(self.tokenizer.decode(out.tokens.cpu()))
            states.append(out.agent_pos_BP.cpu().numpy()[:, : agent_pos.shape[-1]])
            targets.append(out.targets_BX.cpu().numpy()[:, : self.domains[domain].target_dim])
        return torch.stack(shown, dim=1), np.stack(states, axis=1), np.stack(targets, axis=1)


def cached_tokens(dataset: Dataset, tokenizer: Tokenizer, path: Path, domain: str) -> TokenCache:
    """The token cache of a dataset at ``path``, made or brought up to date where episodes were added since.

    Raises:
        DatasetError: the cache is of another tokenizer or of a longer dataset.
    """
    previous = load_token_cache(path) if path.exists() else None
    digest = tokenizer_digest(tokenizer)
    if previous is not None and previous.tokenizer not in ("", digest):
        raise DatasetError(
            f"token cache {str(path)!r} was made with another tokenizer ({previous.tokenizer}, this one is {digest}); "
            "delete it, or choose another out folder."
        )
    names = episode_names(dataset)
    if previous is not None:
        had, takes = previous.targets_FX.shape[1], targets_of(dataset.without_images(0)).shape[1]
        if had != takes:
            raise DatasetError(
                f"token cache {str(path)!r} has {had} targets a frame, where this version takes {takes} from the "
                "dataset; delete it to make it anew."
            )
    if previous is not None and (previous.name_N or names) == names and len(previous) == len(names):
        return previous
    missing = set() if previous is None else set(previous.name_N) - set(names)
    if missing:
        raise DatasetError(
            f"token cache {str(path)!r} holds {len(missing)} episodes that the dataset lacks, first {min(missing)!r}: "
            "it belongs to another dataset; delete it, or choose another out folder."
        )
    cache = build_token_cache(dataset, tokenizer.encode, domain=domain, tokenizer=digest, previous=previous)
    cache.save(path)
    return cache


@dataclass(frozen=True)
class Gathered:
    """The data of one domain.

    Attributes:
        datasets: its files, those with images first.
        cache: of the episodes with images.
        motions: of all episodes, without tokens; the cache itself where all have images.
    """

    datasets: tuple[Dataset, ...]
    cache: TokenCache
    motions: TokenCache


def gather(options: DynamicsOptions, tokenizer: Tokenizer) -> dict[str, Gathered]:
    """The data of each domain, in the order in which the domains are first named."""
    files = files_of_domains(options.data, options.names)
    return {name: _gather_domain(options, tokenizer, name, found) for name, found in files.items()}


def files_of_domains(data: Sequence[Path], names: Sequence[str]) -> dict[str, list[Dataset]]:
    """The files of each domain, in the order in which the domains are first named; without names, by the files' stems.

    Raises:
        InvalidArgument: without names, files have equal stems.
        DatasetError: a file cannot be read.
    """
    if not names:
        names = tuple(path.name.split(".")[0] for path in data)
        if len(set(names)) != len(names):
            raise InvalidArgument(
                f"the files have equal stems {list(names)}; tell with names whether they are of one domain or of "
                "several."
            )
    files: dict[str, list[Dataset]] = {}
    for path, name in zip(data, names, strict=True):
        files.setdefault(name, []).append(open_dataset(path))
    return files


def tokens_of_domain(name: str, files: Sequence[Dataset], tokenizer: Tokenizer, out: Path) -> TokenCache:
    """The joined token caches of a domain's files with images: ``<out>/<name>.tokens.h5``, ``<name>-2.tokens.h5``."""
    stems = [name if n == 0 else f"{name}-{n + 1}" for n in range(len(files))]
    return join_caches(
        [
            cached_tokens(dataset, tokenizer, out / f"{stem}.tokens.h5", name)
            for stem, dataset in zip(stems, files, strict=True)
        ]
    )


def _gather_domain(options: DynamicsOptions, tokenizer: Tokenizer, name: str, files: Sequence[Dataset]) -> Gathered:
    shown = [dataset for dataset in files if dataset.image_key is not None]
    unseen = [dataset for dataset in files if dataset.image_key is None]
    if not shown:
        raise DatasetError(
            f"data of domain {name!r} must have one file with images, got {[str(d.path) for d in files]}; render them "
            "with: hma-gym data import FILE."
        )
    cache = tokens_of_domain(name, shown, tokenizer, options.out).turned_alike(options.object_turns)
    if not unseen:
        return Gathered(tuple(shown), cache, cache)
    silent = [build_token_cache(dataset, None, domain=name).turned_alike(options.object_turns) for dataset in unseen]
    return Gathered((*shown, *unseen), cache, join_caches([cache.without_tokens(), *silent]))


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Tells one tokenizer's tokens from another's: 16 hexadecimal digits of a hash of its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Initial:
    """What a run may start from.

    Attributes:
        source: where it lies.
        weights: of the model.
        domains: by name.
        change_scale: see :class:`hma_gym.dynamics.mar.SoftHeadConfig`; None with discrete tokens.
        body: sizes of its bodies.
    """

    source: Path
    weights: dict[str, Tensor]
    domains: dict[str, Domain]
    change_scale: float | None
    body: BodyConfig

    def load(self, model: Dynamics, head_only: bool = False) -> None:
        """Put the weights into a model; all but those of its noise model with ``head_only``.

        Raises :class:`CheckpointError` where shapes differ.
        """
        weights = self.weights
        if head_only:
            kept = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(NOISE_MODEL)}
            weights = {name: weights[name] for name in weights if not name.startswith(NOISE_MODEL)} | kept
        wrong = load_fitting(model, weights)
        if wrong:
            raise CheckpointError(
                f"init {str(self.source)!r} does not fit this model: {len(wrong)} tensors differ, first {wrong[0]!r}; "
                "start from a model of the same size, kind of token and domains."
            )


def read_initial(source: Path) -> Initial:
    """A run's folder (its averaged weights) or a checkpoint.

    Raises :class:`CheckpointError` where it is neither, or damaged.
    """
    if (source / "saved").is_dir():
        weights = saved_weights(source)
        domains = [Domain.from_dict(fields) for fields in json.loads((source / "domains.json").read_text())]
        facts = json.loads((source / "dynamics.json").read_text())
        scale, body = facts["change_scale"], BodyConfig(**facts.get("body", {}))  # earlier runs had the sizes of today
    else:
        model = load_checkpoint(source).dynamics
        body = model.config.body
        weights, domains = model.state_dict(), list(model.domains)
        scale = getattr(model.config.head, "change_scale", None)
    return Initial(source, weights, {domain.name: domain for domain in domains}, scale, body)


def make_starts(datasets: Sequence[Dataset], count: int) -> StartBank:
    """First frames of test episodes, ``count`` of each domain (one dataset a domain, in the model's order).

    A dataset without test episodes gives its first ones. Stills are no starts.
    """
    frames, agent_pos, states, seeds, domains = [], [], [], [], []
    for index, dataset in enumerate(datasets):
        held_out = dataset.moving(dataset.split("test")) if dataset.masks.get("test") else []
        for n in (held_out or dataset.moving())[:count]:
            episode = dataset[n]
            frames.append(episode.images_THWC[0])
            agent_pos.append(episode.agent_pos_TP[0])
            states.append(episode.states_TS[0])
            seed = episode.attrs.get("seed")
            seeds.append(int(seed) if seed is not None else -1)
            domains.append(index)
    return start_bank(frames, agent_pos, states, seeds, domains)


def train_dynamics(options: DynamicsOptions) -> TrainResult:
    """Encode, train, and write ``<out>/checkpoint``. Interrupted, it saves; called again, it goes on."""
    began = time.monotonic()
    tokenizer = load_tokenizer(options.tokenizer)
    if options.head_only and tokenizer.kind != "soft":
        raise InvalidArgument(
            f"head_only trains the noise model of soft tokens, got a tokenizer of kind {tokenizer.kind!r}; do without."
        )
    gathered = gather(options, tokenizer)
    names, caches = tuple(gathered), [domain.cache for domain in gathered.values()]
    height, width = tokenizer.image_size
    initial = None if options.init is None else read_initial(options.init)
    domain_file = options.out / "domains.json"
    if domain_file.exists():  # statistics are fixed at the start of a run, also where the dataset has grown since
        domains = [Domain.from_dict(fields) for fields in json.loads(domain_file.read_text())]
        if [domain.name for domain in domains] != list(names):
            raise DatasetError(
                f"{str(domain_file)!r} is of a run on the domains {[domain.name for domain in domains]}, got "
                f"{list(names)}; give the same data and names, or another out folder."
            )
    else:
        domains = [_domain(options, name, found, (height, width), initial) for name, found in gathered.items()]
        domain_file.parent.mkdir(parents=True, exist_ok=True)
        domain_file.write_text(json.dumps([domain.to_dict() for domain in domains], indent=1))
    body = BodyConfig() if initial is None else initial.body
    model_file = options.out / "dynamics.json"
    if model_file.exists():
        scale = json.loads(model_file.read_text())["change_scale"]
    else:
        scale = round(caches[0].change_scale(options.stride), 4) if tokenizer.kind == "soft" else 1.0
        if initial is not None and initial.change_scale is not None:
            scale = initial.change_scale
        model_file.write_text(json.dumps({"change_scale": scale, "body": dataclasses.asdict(body)}))
    config = dynamics_config(options, tokenizer, scale, body)
    torch.manual_seed(options.seed)
    model = Dynamics(config, domains)
    if initial is not None:
        initial.load(model, options.head_only)
    if options.body_steps:
        bodies = train_bodies(
            model,
            caches,
            options.out,
            options.body_steps,
            motions=[domain.motions for domain in gathered.values()],
            max_minutes=options.max_minutes,
            device=options.device,
            seed=options.seed,
        )
        if bodies and not bodies[-1].finished:
            return bodies[-1]
    if options.body_steps or options.init is not None:
        model.freeze_bodies()
    if options.head_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(NOISE_MODEL))
    lead_in = options.rollout_max if options.rollout_share > 0 else 0
    margin = max(lead_in, options.frames // 2)  # starts, where each rollout begins, and ends, which show the outcome
    clips = ClipConfig(options.batch_size, options.frames + lead_in, options.seed, margin=margin)
    moving = [int(rows[rows > 1].sum()) for rows in (np.diff(cache.starts_N1) for cache in caches)]
    shares = mixture_probabilities(dict(zip(names, moving, strict=True)))
    batches = ClipBatches(caches, domains, clips, mixture=list(shares.values()))
    success = (2, LIFT_HEIGHT) if options.task == "lift" else None
    long_enough = all(
        (np.diff(cache.starts_N1)[cache.episodes("valid")] > clips.frames * domain.stride).any()
        for cache, domain in zip(caches, domains, strict=True)
    )
    held_out = ClipBatches(caches, domains, clips, split="valid") if long_enough else None
    validation = OpenLoopValidation(held_out, tokenizer, caches, domains, success=success)
    loop = train_config(options, config).since(began)
    result = train(model, batches, loop, evaluate=validation)
    with result.ema.applied_to(model), torch.no_grad():
        validation.choose_corrections(model)
        files = [domain.datasets for domain in gathered.values()]
        write_checkpoint(options, tokenizer, model, files, {**result.evaluation})
    return result


def _domain(
    options: DynamicsOptions, name: str, found: Gathered, image_size: tuple[int, int], initial: Initial | None
) -> Domain:
    """The domain of this name, measured on the data; or that of ``init``, where it has one of the same shape."""
    env_args = found.datasets[0].env_args
    made = found.cache.make_domain(
        name,
        stride=options.stride,
        object_turns=options.object_turns if options.body_steps or options.init is not None else 0,
        image_size=image_size,
        control_hz=float(env_args.get("env_kwargs", {}).get("control_freq", 20)),
        camera_projection=env_args.get("camera_projection", ()),
    )
    had = None if initial is None else initial.domains.get(name)
    shape = operator.attrgetter("action_dim", "state_dim", "target_dim", "object_turns", "stride", "image_size")
    return had if had is not None and shape(had) == shape(made) else made


def write_checkpoint(
    options: DynamicsOptions,
    tokenizer: Tokenizer,
    model: Dynamics,
    datasets: Sequence[Sequence[Dataset]],
    scores: dict[str, Any],
) -> Path:
    """The folder that ``gymnasium.make("HMA-v0", checkpoint=...)`` takes; ``datasets`` are the files of each domain."""
    sources = [next((file for file in files if file.moving()), files[0]) for files in datasets]
    if options.starts_data is not None:
        sources[0] = open_dataset(options.starts_data)
        sources[0].masks = {}  # recorded for evaluation only: every episode is held out
    provenance = {
        "recipe": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "episodes": [sum(map(len, files)) for files in datasets],
        "data": [dataset.info for files in datasets for dataset in files],
        "validation": {k: v for k, v in scores.items() if math.isfinite(v)},
    }
    folders = ("data", "tokenizer", "out", "judge", "feature_judge", "init", "starts_data")
    for key in folders:  # of the machine it was trained on
        provenance["recipe"].pop(key, None)
    checkpoint = Checkpoint(
        name=options.out.name,
        task=options.task,
        tokenizer=tokenizer,
        dynamics=model,
        judge=load_judge(options.judge) if options.judge is not None else None,
        feature_judge=load_feature_judge(options.feature_judge) if options.feature_judge is not None else None,
        starts=make_starts(sources, options.starts),
        provenance=provenance,
    )
    return save_checkpoint(checkpoint, options.out / "checkpoint")
