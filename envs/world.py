"""A checkpoint as a world: how a batch of rollouts begins, goes on, is seen and is judged.

Knows nothing of episodes, seeds or Gymnasium: those are the environments' part. All state is in :class:`Rows`, which
the caller owns; the world itself never changes, so that many environments can share one.

Always the whole batch goes through a network, also when some rows stand still, and frames are encoded in batches that
do not depend on who resets: so a row's numbers do not depend on what its neighbours do, to the last bit.

Shape legend: N rows, R rows that begin, K window of the judge, F frames of it that are kept as pixels (K, or 1 where
the judge reads none), D numbers of a judge's code of a frame, T frames of context, H W frame, S tokens of a frame, P
agent_pos dims (in the rows those that the judge is told: 0 where it is told none), A numbers of an action (action dims
times stride).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.refresh import in_groups
from hma_gym.dynamics.rollout import RolloutState, StepOutput
from hma_gym.dynamics.steppers import InOrder, Stepper
from hma_gym.envs.outputs import on_device
from hma_gym.envs.tasks import get_task
from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.judges.classifier import ClassifierJudge
from hma_gym.judges.feature import FeatureJudge
from hma_gym.judges.protocol import FrameCoder, Judge, TokenJudge, ask, told_state
from hma_gym.judges.registry import get_step_judge
from hma_gym.judges.trained import TrainedJudge
from hma_gym.nn.graphs import Graphed

Mask = NDArray[np.bool_]
_ENCODE_BATCH = 32


@dataclass(frozen=True)
class Rows:
    """N rollouts and what was last seen of them.

    Attributes:
        rollout: the dynamics model's state.
        tokens_NK: tokens of the last K frames, oldest first; at the start the first frame fills the window.
        frames_NFHWC: the last F of those frames, uint8; meaningless where hidden.
        agent_pos_NFP: agent_pos of them in its own units, float32; P = 0 for judges that are not told it.
        codes_NFD: what the judge noted of them, float32; D = 0 for judges that note nothing.
        uncertainty_N: how far the current frame may be wrong, 0 to 1 (see :mod:`hma_gym.dynamics.uncertainty`); 0 for
            real frames, and where the checkpoint is not calibrated.
        hidden_NF: host mask of frames that were not decoded yet.
        step_N: int64, the rollouts' steps, on the host, so that nothing waits for the device to know them.
    """

    rollout: RolloutState
    tokens_NK: Tensor
    frames_NFHWC: Tensor
    agent_pos_NFP: Tensor
    codes_NFD: Tensor
    uncertainty_N: Tensor
    hidden_NF: Mask
    step_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.hidden_NF)

    @property
    def frame_NHWC(self) -> Tensor:
        """The current frames."""
        return self.frames_NFHWC[:, -1]

    def select(self, index_R: NDArray[np.int64]) -> Rows:
        """These rows, in that order, as a copy; rows may repeat."""
        index = on_device(index_R, self.tokens_NK.device)
        return Rows(
            self.rollout.select(index),
            self.tokens_NK.index_select(0, index),
            self.frames_NFHWC.index_select(0, index),
            self.agent_pos_NFP.index_select(0, index),
            self.codes_NFD.index_select(0, index),
            self.uncertainty_N.index_select(0, index),
            self.hidden_NF[index_R],
            self.step_N[index_R],
        )

    def put(self, index_R: NDArray[np.int64], other: Rows) -> None:
        """Overwrite these rows with the R rows of ``other``, in place."""
        index = on_device(index_R, self.tokens_NK.device)
        for field in dataclasses.fields(RolloutState):
            getattr(self.rollout, field.name).index_copy_(0, index, getattr(other.rollout, field.name))
        self.tokens_NK.index_copy_(0, index, other.tokens_NK)
        self.frames_NFHWC.index_copy_(0, index, other.frames_NFHWC)
        self.agent_pos_NFP.index_copy_(0, index, other.agent_pos_NFP)
        self.codes_NFD.index_copy_(0, index, other.codes_NFD)
        self.uncertainty_N.index_copy_(0, index, other.uncertainty_N)
        self.hidden_NF[index_R] = other.hidden_NF
        self.step_N[index_R] = other.step_N

    def reseed(self, seed_N: NDArray[np.int64]) -> Rows:
        """The same situations with other random numbers ahead."""
        return dataclasses.replace(self, rollout=self.rollout.reseed(torch.tensor(seed_N)))


@dataclass(frozen=True)
class Context:
    """Real frames to begin from, for R rows, or one that all rows share (leading 1).

    Attributes:
        frames_RTHWC: uint8.
        actions_RTA: float32, the actions between the frames (T - 1 of them), env units.
        agent_pos_RTP: float32 in its own units, of every frame or of the first one only (then the model predicts it).
    """

    frames_RTHWC: NDArray[np.uint8]
    actions_RTA: NDArray[np.float32]
    agent_pos_RTP: NDArray[np.float32]

    def select(self, index_R: NDArray[np.int64]) -> Context:
        """The context of these rows only."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Context(**{name: x if len(x) == 1 else x[index_R] for name, x in fields.items()})


class LearnedWorld:
    """Tokenizer, dynamics, judge and start bank of one domain of a checkpoint.

    Args:
        checkpoint: loaded; its weights are shared, and its device is the world's.
        domain: name of the domain; needed where the checkpoint has several.
        judge: a judge, or the name of a registered one; ``classifier`` and ``feature`` are the checkpoint's own. None
            takes its classifier, if it has one.
        temperature, decode_steps: sampling, in place of the checkpoint's own settings.
        stepper: makes what runs the model's steps, e.g. :class:`~hma_gym.dynamics.steppers.CudaGraphs` or
            :class:`~hma_gym.dynamics.steppers.Sketch`; None runs them one operation after the other. Where
            it records graphs, decoding and a trained judge are graphs too.

    Attributes:
        checkpoint, tokenizer, dynamics, judge, domain: the parts in use.
        uncertainty: the checkpoint's, None where it is not calibrated or the stepper does not run the trunk.
        bank: the checkpoint's starts that serve this domain; ``options["start"]`` is an index into it.
        device: where the weights are.
        image_size: (H, W).
        action_size: A.
        window: K, 1 without a judge.
        frames_for_judge: how many frames must be decoded for a verdict: none for a judge of tokens.

    Raises:
        InvalidArgument: no domain named where there are several.
        UnknownName: no such domain or judge.
        CheckpointError: a start bank that does not fit the model, a checkpoint without the judge of its own that is
            named, or a judge that is told another agent_pos than the domain's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        domain: str | None = None,
        judge: Judge | TokenJudge | str | None = None,
        temperature: float | None = None,
        decode_steps: int | None = None,
        stepper: Callable[[Dynamics], Stepper] | None = None,
    ) -> None:
        if domain is None and len(checkpoint.dynamics.domains) > 1:
            raise InvalidArgument(
                f"domain must name one of {[d.name for d in checkpoint.dynamics.domains]}: checkpoint "
                f"{checkpoint.name!r} has several."
            )
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        self.dynamics = _with_sampling(checkpoint.dynamics, temperature, decode_steps)
        self.judge: Judge | TokenJudge | None = checkpoint.judge if judge is None else _judge_of(checkpoint, judge)
        self._stepper: Stepper = InOrder(self.dynamics) if stepper is None else stepper(self.dynamics)
        self.uncertainty = checkpoint.uncertainty if self._stepper.whole else None
        self._domain_index = 0 if domain is None else self.dynamics.domain_index(domain)
        self.domain = self.dynamics.domains[self._domain_index]
        self.device = self.dynamics.position_embedding.device
        self.image_size = self.tokenizer.image_size
        self.action_size = self.domain.action_dim * self.domain.stride
        self.window = 1 if self.judge is None else self.judge.window
        self.frames_for_judge = self.judge.window if isinstance(self.judge, Judge) else 0
        self._told = told_state(self.judge)
        # What kind of judge it is, found out once: to ask a protocol takes longer than many an operation.
        self._token_judge = self.judge if isinstance(self.judge, TokenJudge) else None
        self._coder = self.judge if isinstance(self.judge, FrameCoder) else None
        if self.judge is not None and self._told not in (0, self.domain.state_dim):
            raise CheckpointError(
                f"judge {self.judge.name!r} is told {self._told} dims of agent_pos, and domain {self.domain.name!r} of "
                f"checkpoint {checkpoint.name!r} has {self.domain.state_dim}; train a judge on data of this domain, or "
                "one of frames alone (hma-gym train judge --no-state)."
            )
        self._read: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = self._shown
        self._ruled: Callable[[Tensor], tuple[Tensor, ...]] = self._ruling
        if self._stepper.recorded and (self.judge is None or isinstance(self.judge, TrainedJudge)):
            self._read, self._ruled = Graphed(self._shown), Graphed(self._ruling)
        self.bank = bank = checkpoint.starts.of_domain(self._domain_index)
        if bank.frames_NHWC.shape[1:] != (*self.image_size, 3) or bank.agent_pos_NP.shape[1] < self.domain.state_dim:
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r}: its starts must be images of {self.image_size} pixels with "
                f"{self.domain.state_dim} agent_pos dims, got frames {bank.frames_NHWC.shape} and agent_pos "
                f"{bank.agent_pos_NP.shape}; save it again with starts of its own domain."
            )
        self._bank_frames = torch.from_numpy(bank.frames_NHWC).to(self.device)
        self._bank_agent_pos = torch.from_numpy(bank.agent_pos_NP[:, : self.domain.state_dim]).to(self.device)
        with torch.inference_mode():
            self._bank_tokens = torch.cat(
                [self.tokenizer.encode(part) for part in self._bank_frames.split(_ENCODE_BATCH)]
            )
            self._bank_codes = self._codes_apart(self._bank_frames, self._bank_agent_pos, _ENCODE_BATCH)
            self._bank_known = self._known(self._bank_tokens, self._bank_agent_pos, _ENCODE_BATCH)

    def nearest_start(self, frame_HWC: NDArray[np.uint8]) -> int:
        """Index of the bank's frame with the least squared pixel difference."""
        frame = torch.from_numpy(np.array(frame_HWC)).to(self.device)
        return int((self._bank_frames.float() - frame.float()).square().flatten(1).sum(dim=1).argmin())

    def start_agent_pos(self, index: int) -> NDArray[np.float32]:
        """agent_pos (P,) of a start of the bank."""
        return np.array(self._bank_agent_pos[index].cpu().numpy())

    def begin(self, index_R: NDArray[np.int64], seed_R: NDArray[np.int64]) -> Rows:
        """Rollouts from starts of the bank."""
        index = torch.from_numpy(index_R).to(self.device)
        return self._rows(
            self._bank_frames.index_select(0, index),
            self._bank_tokens.index_select(0, index),
            self._bank_codes.index_select(0, index),
            self._bank_agent_pos.index_select(0, index),
            seed_R,
            (self._bank_known[0].index_select(0, index), self._bank_known[1].index_select(0, index)),
        )

    def begin_from(self, context: Context, seed_R: NDArray[np.int64]) -> Rows:
        """Rollouts from given real frames; the last one of each row is the current frame."""
        R = len(seed_R)
        frames_RT = torch.from_numpy(np.array(context.frames_RTHWC)).to(self.device)
        # One at a time: a frame's tokens must not depend, to the last bit, on how many come with it.
        singles = frames_RT.flatten(0, 1).split(1)
        tokens_RT = torch.cat([self.tokenizer.encode(frame) for frame in singles]).unflatten(0, frames_RT.shape[:2])
        coded_RT = frames_RT.expand(R, *frames_RT.shape[1:]) if self._told else frames_RT
        tokens_RT, frames_RT, agent_pos, actions = (
            x.expand(R, *x.shape[1:]).contiguous()
            for x in (
                tokens_RT,
                frames_RT,
                torch.from_numpy(np.array(context.agent_pos_RTP)).to(self.device),
                torch.from_numpy(np.array(context.actions_RTA)).to(self.device),
            )
        )
        known = self._known(tokens_RT[:, 0], agent_pos[:, 0], 1)
        codes_RD = self._codes_apart(coded_RT[:, 0], agent_pos[: len(coded_RT), 0], 1).expand(R, -1)
        rows = self._rows(frames_RT[:, 0], tokens_RT[:, 0], codes_RD, agent_pos[:, 0], seed_R, known)
        for t in range(1, frames_RT.shape[1]):
            given = self._pad(agent_pos[:, t], self.dynamics.state_size) if agent_pos.shape[1] > 1 else None
            rollout = self.dynamics.observe(
                rows.rollout, self._pad(actions[:, t - 1], self.dynamics.action_size), tokens_RT[:, t], given
            )
            codes_RD = self._codes_apart(coded_RT[:, t], rollout.agent_pos_BP[: len(coded_RT)], 1).expand(R, -1)
            rows = Rows(
                rollout,
                torch.cat((rows.tokens_NK[:, 1:], tokens_RT[:, t, None]), dim=1),
                torch.cat((rows.frames_NFHWC[:, 1:], frames_RT[:, t, None]), dim=1),
                torch.cat((rows.agent_pos_NFP[:, 1:], rollout.agent_pos_BP[:, None, : self._told]), dim=1),
                torch.cat((rows.codes_NFD[:, 1:], codes_RD[:, None]), dim=1),
                rows.uncertainty_N,
                rows.hidden_NF,
                rows.step_N + 1,
            )
        return rows

    def step(self, rows: Rows, actions_NA: Tensor, active_N: Mask) -> Rows:
        """One frame, not decoded yet. Gives up ``rows``: their memory is used again.

        Args:
            actions_NA: env units, on the world's device.
            active_N: rows where it is False stand still.
        """
        frozen = np.flatnonzero(~active_N)
        kept = rows.select(frozen) if len(frozen) else None
        actions = self._pad(actions_NA, self.dynamics.action_size)
        rollout, out = self._stepper.step(rows.rollout, actions)
        after = Rows(
            rollout,
            torch.cat((rows.tokens_NK[:, 1:], out.tokens[:, None]), dim=1),
            torch.cat((rows.frames_NFHWC[:, 1:], rows.frames_NFHWC[:, -1:]), dim=1),
            torch.cat((rows.agent_pos_NFP[:, 1:], rollout.agent_pos_BP[:, None, : self._told]), dim=1),
            torch.cat((rows.codes_NFD[:, 1:], rows.codes_NFD[:, -1:]), dim=1),
            self._uncertainty(rollout, out),
            np.concatenate((rows.hidden_NF[:, 1:], np.ones_like(rows.hidden_NF[:, :1])), axis=1),
            rows.step_N + 1,
        )
        every = self.dynamics.config.refresh if self._stepper.whole else 0
        if every and (due_R := np.flatnonzero(active_N & (after.step_N % every == 0))).size:
            after = self._refreshed(after, due_R)
        if kept is not None:
            after.put(frozen, kept)
        return after

    def _refreshed(self, rows: Rows, due_R: NDArray[np.int64]) -> Rows:
        """Some rows' tokens after their round trip (see :mod:`hma_gym.dynamics.refresh`), which shows their frames."""

        def read(tokens_B: Tensor, agent_pos_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            frames_BHWC = self.tokenizer.decode(tokens_B)
            codes_BD = self._codes(frames_BHWC, agent_pos_BP)
            return self.tokenizer.encode(frames_BHWC).to(tokens_B.dtype), frames_BHWC, codes_BD

        index = on_device(due_R, self.device)
        given = (rows.rollout.tokens, rows.rollout.agent_pos_BP)
        tokens_R, frames_RHWC, codes_RD = in_groups(read, given, due_R.tolist())
        rows.frames_NFHWC[:, -1].index_copy_(0, index, frames_RHWC)
        rows.codes_NFD[:, -1].index_copy_(0, index, codes_RD)
        rows.hidden_NF[due_R, -1] = False
        tokens = rows.rollout.tokens.index_copy(0, index, tokens_R)
        return dataclasses.replace(rows, rollout=dataclasses.replace(rows.rollout, tokens=tokens))

    def see(self, rows: Rows, last: int) -> Rows:
        """Decode what is hidden of the ``last`` frames, at most F. Gives up ``rows``: their memory is used again."""
        hidden_NF = rows.hidden_NF.copy()
        for back in range(last, 0, -1):
            column_N = hidden_NF[:, -back]
            if not column_N.any():
                continue
            decoded, noted = self._read(rows.tokens_NK[:, -back], rows.agent_pos_NFP[:, -back])
            for kept, new in ((rows.frames_NFHWC, decoded), (rows.codes_NFD, noted)):
                if not column_N.all():
                    mask = on_device(column_N, self.device).view(-1, *(1,) * (new.ndim - 1))
                    new = torch.where(mask, new, kept[:, -back])
                kept[:, -back] = new
            hidden_NF[:, -back] = False
        return dataclasses.replace(rows, hidden_NF=hidden_NF)

    def judged(self, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
        """The judge on windows of which ``frames_for_judge`` frames were seen: infos by name, (N,) each, and the
        verdict (N,) bool.

        Raises:
            InvalidArgument: the judge gave something else than one probability for each row.
        """
        judge = self.judge
        sure = {} if self.uncertainty is None else {"uncertainty": rows.uncertainty_N}
        if judge is None:
            return sure, torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        if self._token_judge is not None:
            (probability_N,) = self._ruled(rows.tokens_NK)
        elif self._coder is not None:
            (probability_N,) = self._ruled(rows.codes_NFD)
        else:
            assert isinstance(judge, Judge)
            agent_pos_NFP = rows.agent_pos_NFP if self._told else None
            probability_N = ask(judge, judge.probability, rows.frames_NFHWC, agent_pos_NFP)
        probability_N = probability_N.to(self.device)
        if probability_N.shape != (len(rows),):
            raise InvalidArgument(
                f"judge {judge.name!r} must give one probability for each of {len(rows)} rows, got shape "
                f"{tuple(probability_N.shape)}."
            )
        verdict_N = probability_N >= judge.threshold
        return {"is_success": verdict_N, "success_probability": probability_N, **sure}, verdict_N

    def _shown(self, tokens_N: Tensor, agent_pos_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (N, H, W, 3) and the judge's codes of them (N, D)."""
        frames_NHWC = self.tokenizer.decode(tokens_N)
        return frames_NHWC, self._codes(frames_NHWC, agent_pos_NP)

    def _ruling(self, window_NK: Tensor) -> tuple[Tensor]:
        """The judge's probability (N,), of a window of tokens or of codes."""
        if self._token_judge is not None:
            return (self._token_judge.probability_of_tokens(window_NK),)
        assert self._coder is not None
        return (self._coder.probability_of_codes(window_NK),)

    def _uncertainty(self, rollout: RolloutState, out: StepOutput) -> Tensor:
        """(N,) of the frames just made."""
        if self.uncertainty is None:
            return torch.zeros(len(rollout), device=self.device)
        score_N: Tensor = self.uncertainty(out.features_BD, rollout.step_B)
        return score_N

    def _codes(self, frames_BHWC: Tensor, agent_pos_BP: Tensor) -> Tensor:
        """What the judge notes of each frame, (B, D), told its agent_pos (the first of P or more dims) if it can be."""
        if self._coder is None:
            return torch.zeros(len(frames_BHWC), 0, device=self.device)
        return ask(self._coder, self._coder.code, frames_BHWC, agent_pos_BP[:, : self._told]).to(self.device)

    def _codes_apart(self, frames_BHWC: Tensor, agent_pos_BP: Tensor, batch: int) -> Tensor:
        """The same in batches that do not depend on who begins."""
        pairs = zip(frames_BHWC.split(batch), agent_pos_BP.split(batch), strict=True)
        return torch.cat([self._codes(frames, agent_pos) for frames, agent_pos in pairs])

    def agent_pos(self, rows: Rows) -> Tensor:
        """(N, P) in its own units."""
        return rows.rollout.agent_pos_BP[:, : self.domain.state_dim]

    def _known(self, tokens_R: Tensor, agent_pos_RP: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """What the bodies see and draw of first frames, worked out in batches that do not depend on who begins."""
        found = []
        for tokens, pose in zip(tokens_R.split(batch), agent_pos_RP.split(batch), strict=True):
            domain = torch.full((len(tokens),), self._domain_index, dtype=torch.int64, device=self.device)
            padded = self._pad(pose, self.dynamics.state_size).contiguous()
            found.append(self.dynamics.first_look(tokens, padded, domain))
        targets, drawn = zip(*found, strict=True)
        return torch.cat(targets), torch.cat(drawn)

    def _rows(
        self,
        frames_RHWC: Tensor,
        tokens_R: Tensor,
        codes_RD: Tensor,
        agent_pos_RP: Tensor,
        seed_R: NDArray[np.int64],
        known: tuple[Tensor, Tensor],
    ) -> Rows:
        R, kept = len(seed_R), max(self.frames_for_judge, 1)
        domain = torch.full((R,), self._domain_index, dtype=torch.int64, device=self.device)
        agent_pos = self._pad(agent_pos_RP, self.dynamics.state_size).contiguous()
        tokens_R = tokens_R.contiguous()
        return Rows(
            self.dynamics.start(tokens_R, agent_pos, torch.tensor(seed_R), domain, known),
            tokens_R[:, None].repeat_interleave(self.window, dim=1),
            frames_RHWC[:, None].repeat_interleave(kept, dim=1),
            agent_pos_RP[:, None, : self._told].repeat_interleave(kept, dim=1),
            codes_RD[:, None].repeat_interleave(kept, dim=1),
            torch.zeros(R, device=self.device),
            np.zeros((R, kept), dtype=bool),
            np.zeros(R, dtype=np.int64),
        )

    def _pad(self, x: Tensor, size: int) -> Tensor:
        """Zeros up to the widest domain's size."""
        return torch.nn.functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def _judge_of(checkpoint: Checkpoint, judge: Judge | TokenJudge | str) -> Judge | TokenJudge:
    """A judge given, one of the checkpoint's own by name, or one that is registered."""
    own: dict[str, ClassifierJudge | FeatureJudge | None] = {
        "classifier": checkpoint.judge,
        "feature": checkpoint.feature_judge,
    }
    if not isinstance(judge, str) or judge not in own:
        return get_step_judge(judge)
    found = own[judge]
    if found is None:
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r} has no {judge} judge; train one (hma-gym train judge, hma-gym train "
            "feature-judge) and put it into the checkpoint, or choose another judge."
        )
    return found


def load_world(
    task: str | None,
    checkpoint: str | Path | Checkpoint | LearnedWorld | None,
    domain: str | None,
    judge: Judge | TokenJudge | str | None,
    temperature: float | None,
    decode_steps: int | None,
    device: str | torch.device | None,
) -> LearnedWorld:
    """The world that an environment's arguments mean; a world given as ``checkpoint`` is shared as it is.

    Raises:
        InvalidArgument: arguments that are missing or contradict each other.
        UnknownName: no such task, domain or judge.
        CheckpointError: see :func:`hma_gym.dynamics.checkpoint.load_checkpoint`.
    """
    if isinstance(checkpoint, LearnedWorld):
        changes = {"domain": domain, "judge": judge, "temperature": temperature, "decode_steps": decode_steps}
        given = [name for name, value in changes.items() if value is not None]
        if given:
            raise InvalidArgument(f"{', '.join(given)} cannot be given with a LearnedWorld; build it with them.")
        world = checkpoint
    else:
        world = LearnedWorld(_checkpoint(task, checkpoint, device), domain, judge, temperature, decode_steps)
    if device is not None and torch.zeros(0, device=device).device != world.device:
        raise InvalidArgument(
            f"device is {str(device)!r} and the given weights are on {str(world.device)!r}; move them first with "
            "checkpoint.to(device), or leave device out."
        )
    if task is not None and world.checkpoint.task not in ("", task):
        raise InvalidArgument(
            f"checkpoint {world.checkpoint.name!r} was made for task {world.checkpoint.task!r}, not for {task!r}; "
            "make it with gymnasium.make('HMA-v0', checkpoint=...)."
        )
    return world


def _checkpoint(
    task: str | None, checkpoint: str | Path | Checkpoint | None, device: str | torch.device | None
) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    source: str | Path | None = checkpoint
    if source is None:
        if task is None:
            raise InvalidArgument(
                "checkpoint must be given where no task is: a shipped name, a folder, a hub id or a loaded Checkpoint."
            )
        source = get_task(task).checkpoint
        if source is None:
            raise InvalidArgument(
                f"task {task!r} has no checkpoint of its own yet; train one and pass checkpoint=FOLDER."
            )
    # Building modules draws their first weights from torch's global generator, which is not ours to move.
    with torch.random.fork_rng(devices=[]):
        return load_checkpoint(source, device="cpu" if device is None else device)


def _with_sampling(dynamics: Dynamics, temperature: float | None, decode_steps: int | None) -> Dynamics:
    """The same weights (shared) with other sampling settings."""
    changes: dict[str, Any] = {"temperature": temperature, "decode_steps": decode_steps}
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return dynamics
    twin = copy.copy(dynamics)  # its layers may be of another precision, or compiled
    twin.config = dataclasses.replace(dynamics.config, **changes)
    return twin
