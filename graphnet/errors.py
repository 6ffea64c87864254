"""The typed errors. Each says what is wrong, in which layer, at which place, and how to mend it."""

from __future__ import annotations

import re
from typing import Any

LARGEST = 3.4028234663852886e38  # of fp32, which the device computes in


class Stopped(BaseException):
    """A signal ends what runs. It is no error, so whoever handles errors lets it pass.

    number  of the signal
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


class GraphnetError(Exception):
    """Base of everything that graphnet raises on purpose.

    message  what is wrong, with both values and the arithmetic
    layer    display name of the layer, e.g. "conv1"
    path     its attribute path in the net, e.g. "features.0"
    where    place in the user's code, e.g. "lenet.py:12"
    help     one thing to do about it
    """

    def __init__(
        self,
        message: str,
        *,
        layer: str | None = None,
        where: str | None = None,
        help: str | None = None,
    ) -> None:
        self.message, self.layer, self.where, self.help = message, layer, where, help
        self.path: str | None = None
        super().__init__(message)

    def __str__(self) -> str:
        head = ""
        if self.layer:
            head = f"layer {self.layer!r}" + (f", net.{self.path}" if self.path else "")
        if self.where:
            head = f"{head} ({self.where})" if head else self.where
        text = f"{head}: {self.message}" if head else self.message
        return f"{text}\n  help: {self.help}" if self.help else text


class ShapeError(GraphnetError):
    """Shapes do not fit together."""


class DTypeError(GraphnetError):
    """An element type that the place does not take."""


class GraphError(GraphnetError):
    """A graph breaks a rule of the IR: the verifier, a pass or a builder says so."""


class ParseError(GraphnetError):
    """Text that is no graph."""


class UnsupportedOpError(GraphnetError):
    """An op, or a form of one, that is not implemented."""


class ConfigError(GraphnetError):
    """An argument, option or flag outside its range."""


class MissingError(ConfigError, AttributeError):
    """A name that graphnet, a net or a symbolic value does not have."""


class DataError(GraphnetError):
    """A data set, file or batch that is damaged or does not fit."""


class StateDictError(GraphnetError):
    """Keys or shapes of a state_dict that do not fit the net."""


class CheckpointError(GraphnetError):
    """A checkpoint that is damaged or belongs to something else."""


class DiskError(CheckpointError):
    """The disk is full or fails; what was asked for was sound."""


class BackendUnavailableError(GraphnetError):
    """The target needs hardware or software that is not here."""


class NumericsError(GraphnetError):
    """NaN, infinity, or a result that differs from its reference."""


class OutOfMemoryPlanError(GraphnetError):
    """The planned peak exceeds the memory of the device."""


class CompileError(GraphnetError):
    """A generated kernel does not compile or load."""


class RankError(GraphnetError):
    """Another process of a group is gone, has failed, or does not answer in time."""


class RunExistsError(GraphnetError):
    """A run folder stands where a new one was asked for."""


# Escape sequences of ECMA-48 (CSI, the string commands, two characters), then every other control
# character, and what turns the direction of the text that follows.
_OBEYED = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]"
    r"|[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def printable(text: str) -> str:
    """The text without what a terminal would obey instead of show: names in files of others."""
    return _OBEYED.sub("", text)


def number(of: str, name: str, value: Any, low: float = 0.0, *, above: bool = False) -> float:
    """A number that fp32 can hold, of at least `low` (`above`: more); ConfigError names whose
    argument it is."""
    try:
        given = None if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        given = None
    if given is None:
        raise ConfigError(f"{of}: {name} is a number, not {' '.join(repr(value).split())}")
    if LARGEST < abs(given) < float("inf"):
        raise ConfigError(f"{of}: {name}={value!r} is beyond what fp32 holds")
    if not abs(given) <= LARGEST or given < low or above and given == low:
        limit = "" if low < -LARGEST else f" {'above' if above else 'of at least'} {low:g}"
        raise ConfigError(f"{of}: {name}={value!r} is not a finite number{limit}")
    return given
