"""What a cloud's frame may hold, looked at before it is parsed."""

from __future__ import annotations

from typing import Final

from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.message_parts import MODULE, TENSOR, Most, Rules, check_message

__all__ = ["parse_frame"]

_MOST: Final = 4096
"""Modules, tensors or numbers of one frame: a site has fewer modules, and a decoder too."""
_TENSORS: Final = Most(_MOST, inside=TENSOR.inside)
_MODULES: Final = {2: Most(_MOST, inside=MODULE)}

# By the kind of the frame: the fields that may be there more than once, or that hold such.
_RULES: Final[Rules] = {
    1: Most(1, inside={2: TENSOR}),
    2: Most(1, inside={1: TENSOR}),
    3: Most(1, inside={2: _TENSORS, 3: _TENSORS}),
    4: Most(1, inside={3: Most(_MOST, _MOST), 4: TENSOR, 5: Most(_MOST, inside=_MODULES)}),
    6: Most(1, inside=_MODULES),
}


def parse_frame(data: bytes) -> pb.CloudFrame:
    """A cloud's frame. Raises WireError for bytes that are none, and for too many parts."""
    check_message(data, _RULES, "the cloud's frame")
    try:
        return pb.CloudFrame.FromString(data)
    except Exception as error:  # protobuf's own kinds differ by implementation
        raise WireError("the cloud sent bytes that are no frame") from error
