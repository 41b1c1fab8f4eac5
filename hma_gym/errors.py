"""The exceptions of hma_gym: one class per kind of failure.

Each message names the argument, the rule, the value received and the remedy. All derive from
:class:`HMAError`, and from the built-in exception that a caller would expect (``ValueError``,
``ImportError`` ...), so that code which knows nothing of this package still catches them.
"""

from __future__ import annotations


class HMAError(Exception):
    """Base of every error that hma_gym raises on purpose."""


class InvalidArgument(HMAError, ValueError):
    """An argument breaks its rule (range, choice, combination)."""


class InvalidAction(InvalidArgument):
    """An action of the wrong shape or dtype, or with a value that is not finite."""


class InvalidImage(InvalidArgument):
    """An image of the wrong shape, dtype or size."""


class InvalidDomain(InvalidArgument):
    """A domain's numbers contradict each other or the data they are used with."""


class UnknownName(HMAError, LookupError):
    """A name (task, judge, recipe, checkpoint ...) that is not registered."""

    def __init__(self, kind: str, name: object, known: list[str], remedy: str = "") -> None:
        choices = ", ".join(sorted(known)) or "none registered"
        tail = f" {remedy}" if remedy else ""
        self._given = (kind, name, known, remedy)
        super().__init__(f"unknown {kind} {name!r}; choose one of: {choices}.{tail}")

    def __reduce__(self) -> tuple[type[UnknownName], tuple[str, object, list[str], str]]:
        """Errors travel from worker processes by pickle, which would call ``__init__`` with the message alone."""
        return type(self), self._given


class MissingExtra(HMAError, ImportError):
    """An optional package is needed and is not installed."""


class RenderingUnavailable(HMAError, RuntimeError):
    """MuJoCo cannot make an OpenGL context on this machine."""


class EnvironmentState(HMAError, RuntimeError):
    """An environment was used before ``reset`` or after ``close``, or given a foreign saved state."""


class DatasetError(HMAError, ValueError):
    """A dataset file is missing, truncated, foreign, or disagrees with what it is used for."""


class StorageError(HMAError, OSError):
    """A file cannot be written or read (permissions, full disk, vanished folder)."""


class CheckpointError(HMAError, ValueError):
    """A checkpoint is missing, truncated, tampered with, newer than this version, or of another kind."""


class ResumeError(HMAError, RuntimeError):
    """An interrupted run cannot be resumed as asked: its configuration or files do not match."""


class TrainingDiverged(HMAError, ArithmeticError):
    """Losses or gradients stayed non-finite; the run's last saved state is from before."""


class PolicyError(HMAError, RuntimeError):
    """A policy under evaluation raised, hung, ended its process, or returned something that is no action."""
