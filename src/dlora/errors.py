"""Everything that DLoRA raises on purpose, and how a pass is let go of that ended by an error.

Below DLoRAError stand:

- UsageError (ValueError): settings, data or an adapter that cannot work; the user can mend it
  - DataError: a row of a data file; names file and line
- ModelError (ValueError): a model that cannot be split correctly
- WireError (ValueError): bytes or frames that cannot be what they claim to be
- PeerError (ConnectionError): the other half said no, and would say no again
- PeerLost (ConnectionError): the other half went away or is busy; trying again may work
  - AdapterMissing: the cloud does not hold a frozen module; put it there and try again
    - PrefixMissing: nor a sequence that was named; send the micro-batch whole
- DivergedError (ArithmeticError): training produced a value that is not finite
- RewardError (ValueError): a reward function of the user failed, or gave no numbers
"""

from __future__ import annotations

import traceback
from typing import Final

__all__ = [
    "INSTEAD",
    "AdapterMissing",
    "DLoRAError",
    "DataError",
    "DivergedError",
    "ModelError",
    "PeerError",
    "PeerLost",
    "PrefixMissing",
    "RewardError",
    "UsageError",
    "WireError",
    "clear_frames",
]


INSTEAD: Final = "Serve another model, or tune this one with local peft."
"""What to do about an architecture that cannot be split."""


class DLoRAError(Exception):
    """Base of all errors with a message meant for the user: what was got, wanted, and what to
    do.
    """


class UsageError(DLoRAError, ValueError):
    """Settings, data or an adapter that cannot work together."""


class DataError(UsageError):
    """A data file or one row of it; the message starts with file and line."""


class ModelError(DLoRAError, ValueError):
    """A model that cannot be split correctly; the message says why."""


class WireError(DLoRAError, ValueError):
    """Bytes or frames that cannot be what they claim to be."""


class PeerError(DLoRAError, ConnectionError):
    """The other half refused, and would refuse the same request again."""


class PeerLost(DLoRAError, ConnectionError):
    """The other half went away or is busy. `retry_after_s` is its own hint, if it gave one."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class AdapterMissing(PeerLost):
    """The cloud does not hold a frozen module that a step refers to: put it there and try again."""


class PrefixMissing(AdapterMissing):
    """The cloud does not hold what a step refers to by a sequence's name: send the step whole."""


class DivergedError(DLoRAError, ArithmeticError):
    """Training produced a value that is not finite; nothing was updated with it."""


class RewardError(DLoRAError, ValueError):
    """A reward function of the user failed or gave no numbers; nothing was updated with them."""


def clear_frames(error: BaseException) -> None:
    """Forget the local variables of what ended by an error; its traceback still has the lines.

    Frames of a pass hold tensors, whose hooks hold the stream, which holds its error: a circle
    that goes through C++, and that the garbage collector does not see.
    """
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
