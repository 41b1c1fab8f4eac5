"""How a model says that its parameters are to be trained: rows of :class:`ParameterGroup`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Kind = Literal["matrix", "other"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters trained alike.

    Attributes:
        name: unique among the model's groups; shows in errors.
        parameters: the tensors.
        lr_multiplier: factor on the learning rate, with either optimiser.
        weight_decay_multiplier: factor on the weight decay; 0 for norms, biases and embeddings.
        kind: ``"matrix"`` for the 2-D weights between hidden layers, which Muon may train; ``"other"`` for embeddings,
            output heads, biases, norms and convolutions, which AdamW always trains.
        width_ratio: fan-in over the base model's fan-in, for muP (Yang et al. 2022, arXiv 2203.03466, Table 8): AdamW's
            rate is divided by it. Muon's is not: an orthogonalised update has the same spectral norm at every width.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    lr_multiplier: float = 1.0
    weight_decay_multiplier: float = 1.0
    kind: Kind = "other"
    width_ratio: float = 1.0


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The weight of a linear layer, as the parameter that it is."""
    assert isinstance(layer, nn.Linear) and isinstance(layer.weight, nn.Parameter)
    return layer.weight


def misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names, sorted, of the tensors that are missing in, foreign to, or of another shape than a module's state."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))


def load_fitting(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Load tensors, cast to the module's types, if all fit; returns :func:`misfits`, with which nothing is loaded."""
    wrong = misfits(module, tensors)
    if not wrong:
        own = module.state_dict()
        module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})
    return wrong


def default_parameter_groups(model: nn.Module, *, not_matrices: Iterable[nn.Parameter] = ()) -> list[ParameterGroup]:
    """Weights of ``nn.Linear`` as matrices, other tensors of 2 or more dims with decay, the rest without.

    ``not_matrices`` names linear weights that Muon should leave alone: input stems and output heads. Embeddings are not
    decayed. Frozen parameters are left out.
    """
    excluded = {id(p) for p in not_matrices}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    embedding = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rows: dict[str, list[nn.Parameter]] = {"matrix": [], "decayed": [], "plain": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embedding or parameter.ndim < 2:
            rows["plain"].append(parameter)
        elif id(parameter) in linear and id(parameter) not in excluded:
            rows["matrix"].append(parameter)
        else:
            rows["decayed"].append(parameter)
    groups = [
        ParameterGroup("matrix", rows["matrix"], kind="matrix"),
        ParameterGroup("decayed", rows["decayed"]),
        ParameterGroup("plain", rows["plain"], weight_decay_multiplier=0.0),
    ]
    return [group for group in groups if group.parameters]


def silence(layer: nn.Module) -> None:
    """Let a linear layer begin as zero."""
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
