"""Compiled networks and CUDA graphs are chosen by name, reported, and show what one operation after the other shows."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recorded import replay_on_the_host
from toy_checkpoint import discrete_checkpoint, toy_checkpoint, toy_domain

from hma_gym.dynamics import compiled as module
from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.compiled import MOST_ROUNDS, with_compilation
from hma_gym.dynamics.mar import SoftHeadConfig
from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.packed import with_packed_weights
from hma_gym.dynamics.precision import with_precision
from hma_gym.dynamics.rollout import RolloutState, StepOutput
from hma_gym.dynamics.steppers import CudaGraphs, InOrder, Sketch, SketchGraphs, Stepper
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import InvalidArgument
from hma_gym.nn.activations import gelu
from hma_gym.nn.packed import PackedLinear, packed
from hma_gym.nn.precision import Precision, in_precision
from hma_gym.nn.transformer import SpaceTimeTransformer, TrunkConfig

N = 2


def _steps(checkpoint: Checkpoint, stepper: Stepper, count: int = 7) -> list[tuple[RolloutState, StepOutput]]:
    """States and outputs of some steps of N rollouts, more than the window holds."""
    device = checkpoint.dynamics.position_embedding.device
    starts = checkpoint.starts
    generator = torch.Generator().manual_seed(0)
    found = []
    with torch.inference_mode():
        tokens = checkpoint.tokenizer.encode(torch.from_numpy(starts.frames_NHWC[:N]).to(device))
        pose = torch.from_numpy(starts.agent_pos_NP[:N]).to(device)
        domain = torch.arange(N) % len(checkpoint.dynamics.domains)
        state = checkpoint.dynamics.start(tokens, pose, torch.arange(N), domain.to(device))
        for _ in range(count):
            action = (2 * torch.rand(N, checkpoint.dynamics.action_size, generator=generator) - 1).to(device)
            state, out = stepper.step(state, action)
            found.append((state.clone(), out))
    return found


def _assert_alike(
    theirs: list[tuple[RolloutState, StepOutput]], ours: list[tuple[RolloutState, StepOutput]], tolerance: float = 1e-4
) -> None:
    for pair, other in zip(theirs, ours, strict=True):
        for part, again in zip(pair, other, strict=True):
            for field in dataclasses.fields(part):  # type: ignore[arg-type]
                expected, got = getattr(part, field.name), getattr(again, field.name)
                assert torch.allclose(got.float(), expected.float(), atol=tolerance, rtol=tolerance), field.name


def _kinds() -> dict[str, Callable[[Checkpoint], Checkpoint]]:
    """Other models in the toy checkpoint's place, with random weights."""

    def other(toy: Checkpoint, domains: int = 1, **changes: Any) -> Checkpoint:
        config = dataclasses.replace(toy.dynamics.config, **changes)
        own = [dataclasses.replace(toy_domain(), name=name) for name in ("lift", "other")[:domains]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Dynamics(config, own).eval().requires_grad_(False)
        return dataclasses.replace(toy, dynamics=model)

    def diffusing(toy: Checkpoint) -> Checkpoint:
        head = toy.dynamics.config.head
        assert isinstance(head, SoftHeadConfig)
        return other(toy, head=dataclasses.replace(head, flow_steps=MOST_ROUNDS + 1))

    return {
        "soft": lambda toy: toy,
        "in place, two passes": lambda toy: other(toy, conditioning="in_place", decode_steps=2),
        "discrete": lambda toy: discrete_checkpoint(),
        "integers": lambda toy: with_precision(toy, "int8"),
        "packed": lambda toy: with_packed_weights(toy, num_envs=N),
        "many noise steps": diffusing,
        "two domains": lambda toy: other(toy, domains=2),
    }


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [
        ("soft", 1),
        ("in place, two passes", 1),
        ("discrete", 1),
        pytest.param("integers", 1, marks=pytest.mark.int8),
        ("packed", 1),
        ("many noise steps", 5),
        ("two domains", 5),
    ],
)
def test_compiled_equals_eager(toy: Checkpoint, kind: str, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced by the compiler, but run without its C++ back end, which takes half a minute for all of it.
    monkeypatch.setattr(module, "lacks_compiler", lambda: "")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = _kinds()[kind](toy)
    fast = with_compilation(plain)
    assert fast.provenance["compiled"] is True and "compiled" not in plain.provenance
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # A number that lies between two integers falls to either side, from which rollouts drift apart.
    count, tolerance = (2, 0.1) if kind == "integers" else (7, 1e-4)
    _assert_alike(*(_steps(x, InOrder(x.dynamics), count) for x in (plain, fast)), tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    tokens = plain.tokenizer.encode(torch.from_numpy(plain.starts.frames_NHWC[:N]))
    with torch.inference_mode():
        shown, again = (checkpoint.tokenizer.decode(tokens).int() for checkpoint in (plain, fast))
    assert int((shown - again).abs().max()) <= 1
    with pytest.raises(InvalidArgument, match="compiled already"):
        with_compilation(fast)
    match = "packed weights already" if kind == "packed" else "compiled, and its weights must be packed before"
    with pytest.raises(InvalidArgument, match=match):
        with_packed_weights(fast, num_envs=N)


def test_compiled_bodies_equal_eager_ones(toy: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    fast = copy.deepcopy(toy.dynamics)
    fast.compile_bodies()
    low = in_precision(fast, "bfloat16")  # a copy, which must run its own weights
    _assert_alike(_steps(toy, InOrder(toy.dynamics)), _steps(toy, InOrder(fast)))
    plain = in_precision(toy.dynamics, "bfloat16")
    _assert_alike(_steps(toy, InOrder(plain), 2), _steps(toy, InOrder(low), 2))
    _assert_alike(_steps(toy, Sketch(plain), 3), _steps(toy, Sketch(low), 3))


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inside the compiler itself
def test_compiled_blocks_equal_eager_ones() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = SpaceTimeTransformer(TrunkConfig(layers=2, width=16, heads=2, window=3, mlp_ratio=1.0))
    fast = copy.deepcopy(trunk)
    fast.compile_extend()
    caches = [trunk.new_cache(2, 3, torch.device("cpu"), torch.float32) for _ in range(2)]
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 1, 3, 16, generator=generator)
        modulation = 0.1 * torch.randn(2, 1, 2, 6, 16, generator=generator)
        with torch.inference_mode():
            expected, caches[0] = trunk.extend(x, modulation, caches[0], 1)
            got, caches[1] = fast.extend(x, modulation, caches[1], 1)
        assert torch.allclose(got, expected, atol=1e-5)
        assert torch.allclose(caches[1].keys_BLWND, caches[0].keys_BLWND, atol=1e-5)


def test_a_missing_compiler_is_named(toy: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(InvalidArgument, match=r"no C\+\+ compiler here: apt-get install"):
        with_compilation(toy)


def test_other_sampling_keeps_the_precision(toy: Checkpoint) -> None:
    low = with_precision(toy, "bfloat16")
    world = LearnedWorld(low, temperature=0.0, decode_steps=2)
    assert (world.dynamics.config.temperature, world.dynamics.config.decode_steps) == (0.0, 2)
    assert low.dynamics.config.temperature == toy.dynamics.config.temperature == 1.0
    envs = HMAVectorEnv(N, checkpoint=world)
    envs.reset(seed=0)
    frames = [envs.step(envs.action_space.sample())[0] for _ in range(2)]
    assert frames[0].shape == (N, 40, 40, 3)


def test_cuda_graphs_need_one_domain_on_a_gpu(toy: Checkpoint) -> None:
    with pytest.raises(InvalidArgument, match="weights on the device 'cpu' and 1 domains"):
        LearnedWorld(toy, stepper=CudaGraphs)


def test_packed_weights_equal_plain_ones(toy: Checkpoint) -> None:
    fast = with_packed_weights(toy, num_envs=N)
    assert fast.provenance["packed"] is True and "packed" not in toy.provenance
    linear = [part for part in fast.dynamics.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linear) > 10 and all(type(part) is PackedLinear for part in linear)
    # Sums in another order; the toy's large weights make more of the difference at each step.
    _assert_alike(_steps(toy, InOrder(toy.dynamics)), _steps(fast, InOrder(fast.dynamics)), tolerance=2e-3)
    with pytest.raises(InvalidArgument, match="packed weights already"):
        with_packed_weights(fast, num_envs=N)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_packed_layer_is_the_layer(precision: Precision, bias: bool, rows: int) -> None:
    layer = in_precision(torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)).requires_grad_(False), precision)
    x = torch.randn(2, 24, rows, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    fast = packed(layer, rows)
    said = fast(x)
    assert said.dtype == torch.float32 and said.shape == (2, rows, 40)
    with torch.inference_mode():
        again = torch.compile(copy.deepcopy(fast).forward, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(again, said)
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert torch.allclose(said, layer(x), atol=tolerance)
    for approximate in ("tanh", "none"):
        said = packed(layer, rows)[0].gelu(x, approximate, layer)  # type: ignore[operator]
        assert said.dtype == layer[0].weight.dtype
        assert torch.allclose(said.float(), torch.nn.functional.gelu(layer(x), approximate=approximate), atol=tolerance)


def test_packing_is_for_cpus() -> None:
    with pytest.raises(InvalidArgument, match=r"weights on \['meta'\]"):
        packed(torch.nn.Linear(3, 4, device="meta"), rows=8)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_without_gradients_is_gelu(approximate: str) -> None:
    x = torch.cat((torch.linspace(-12, 12, 999), torch.tensor([-1e4, 1e4])))
    expected = torch.nn.functional.gelu(x, approximate=approximate)
    assert torch.equal(gelu(x, approximate), expected)
    with torch.no_grad():
        assert torch.allclose(gelu(x, approximate), expected, atol=1e-6)


def _assert_recorded_steps_equal(checkpoint: Checkpoint, kind: type[CudaGraphs], plain: Stepper) -> CudaGraphs:
    recorded = kind(checkpoint.dynamics)
    expected = _steps(checkpoint, plain)
    _assert_alike(expected, _steps(checkpoint, recorded))
    _assert_alike(expected, _steps(checkpoint, recorded))  # another rollout in the same memory
    return recorded


KINDS = [(CudaGraphs, InOrder), (SketchGraphs, Sketch)]


@pytest.mark.parametrize(("kind", "plain"), KINDS)
def test_recorded_steps_equal_plain_ones(
    toy: Checkpoint, monkeypatch: pytest.MonkeyPatch, kind: type[CudaGraphs], plain: type[InOrder]
) -> None:
    recorded = replay_on_the_host(monkeypatch)
    _assert_recorded_steps_equal(toy, kind, plain(toy.dynamics))
    assert len(recorded) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "plain"), KINDS)
def test_cuda_graphs_equal_one_operation_after_the_other(kind: type[CudaGraphs], plain: type[InOrder]) -> None:
    checkpoint = toy_checkpoint().to("cuda")
    _assert_recorded_steps_equal(checkpoint, kind, plain(checkpoint.dynamics))
    with pytest.raises(InvalidArgument, match="2 domains"):
        kind(toy_checkpoint(toy_domain("a"), toy_domain("b")).to("cuda").dynamics)


@pytest.mark.gpu
def test_graphs_of_compiled_networks_equal_eager_ones() -> None:
    checkpoint = toy_checkpoint().to("cuda")
    fast = with_compilation(checkpoint)
    expected = _steps(checkpoint, InOrder(checkpoint.dynamics))
    # Sums in another order; the toy's large weights make more of the difference at each step.
    _assert_alike(expected, _steps(fast, CudaGraphs(fast.dynamics)), tolerance=5e-3)


def test_batches_side_by_side_have_memory_of_their_own(toy: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = replay_on_the_host(monkeypatch)
    shared = CudaGraphs(toy.dynamics)
    worlds = [LearnedWorld(toy, stepper=lambda _: shared), LearnedWorld(toy)]
    first, other, plain, plain_other = (HMAVectorEnv(N, checkpoint=worlds[i // 2]) for i in range(4))
    for seed, pair in enumerate(((first, plain), (other, plain_other))):
        for each in pair:
            each.reset(seed=10 * seed)
    actions = [plain.action_space.sample() for _ in range(6)]
    for step, action in enumerate(actions):
        for ours, theirs in ((first, plain), (other, plain_other)):
            assert np.array_equal(ours.step(action)[0], theirs.step(action)[0])
        if step == 2:  # a saved state is a copy, and going back to it brings other memory
            saved, plain_saved = first.save_state(), plain.save_state()
    before = len([device for device in recorded])
    first.load_state(saved), plain.load_state(plain_saved)
    for action in actions:
        assert np.array_equal(first.step(action)[0], plain.step(action)[0])
    twin, plain_twin = first.fork(1), plain.fork(1)
    for action in actions[:2]:
        assert np.array_equal(twin.step(action)[0], plain_twin.step(action)[0])
        assert np.array_equal(first.step(-action)[0], plain.step(-action)[0])
    assert len(shared._recordings) == 3 and before < len(recorded)


def test_a_sketched_world_is_not_refreshed_and_says_nothing_of_how_sure_it_is(toy: Checkpoint) -> None:
    dynamics = copy.copy(toy.dynamics)
    dynamics.config = dataclasses.replace(toy.dynamics.config, refresh=1)
    calibrated = dataclasses.replace(toy, dynamics=dynamics, uncertainty=lambda *_: 1 / 0)
    world = LearnedWorld(calibrated, stepper=Sketch)
    envs = HMAVectorEnv(N, checkpoint=world, obs_type="pixels_agent_pos")
    first, _ = envs.reset(seed=0)
    seen, _, _, _, info = envs.step(envs.action_space.sample())
    assert "uncertainty" not in info and not (seen["pixels"] == first["pixels"]).all()
    rollout = envs._rows.rollout  # type: ignore[union-attr]
    drawn = toy.dynamics.adapter(0).body.drawn(rollout.agent_pos_BP, rollout.targets_BO)
    assert torch.equal(rollout.tokens, drawn)
    with pytest.raises(InvalidArgument, match="max_uncertainty needs a calibrated checkpoint"):
        HMAVectorEnv(N, checkpoint=world, max_uncertainty=0.5)


def test_a_world_runs_the_stepper_that_it_is_given(toy: Checkpoint) -> None:
    class Counting(InOrder):
        calls = 0

        def step(self, state: RolloutState, action_BA: torch.Tensor) -> tuple[RolloutState, StepOutput]:
            Counting.calls += 1
            return super().step(state, action_BA)

    envs, plain = (HMAVectorEnv(N, checkpoint=LearnedWorld(toy, stepper=kind)) for kind in (Counting, None))
    for each in (envs, plain):
        each.reset(seed=0)
        each.action_space.seed(0)
    for _ in range(3):
        assert (envs.step(envs.action_space.sample())[0] == plain.step(plain.action_space.sample())[0]).all()
    assert Counting.calls == 3
