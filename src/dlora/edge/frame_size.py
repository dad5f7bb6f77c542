"""What a cloud's message may hold, looked at before it is parsed.

Two bytes on the wire can become fifty in memory: a message of a few MiB that is made of empty parts
would take all of it. So parts are counted first, as they lie in the bytes.
Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb

__all__ = ["parse_frame"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_PARTS: Final = 4096
"""Fields of one message: a site has fewer modules, and a tensor fewer dimensions."""
_MAX_TENSOR_PARTS: Final = 64
_MAX_SHAPE_BYTES: Final = 64
_PROBE: Final = (4, 3)  # Done.probe: a list of numbers, and no tensor
_MODULE_GRADS: Final = (4, 5)  # Done.module_grads: up to four tensors each
_PACKED_SHAPE: Final = 2  # the field of Tensor that is a list of numbers


def parse_frame(data: bytes) -> pb.CloudFrame:
    """A cloud's frame. Raises WireError for bytes that are none, and for too many parts."""
    # CloudFrame { kind { tensors { shape } } }, one deeper for the gradients of hosted modules.
    for number, kind in _parts(data, 0, len(data)):
        if not isinstance(kind, range):
            continue
        for inner, tensor in _parts(data, kind.start, kind.stop):
            if not isinstance(tensor, range) or (number, inner) == _PROBE:
                continue
            if (number, inner) != _MODULE_GRADS:
                _check_tensor(data, tensor)
                continue
            for _, grad in _parts(data, tensor.start, tensor.stop, _MAX_TENSOR_PARTS):
                if isinstance(grad, range):
                    _check_tensor(data, grad)
    try:
        return pb.CloudFrame.FromString(data)
    except Exception as error:  # protobuf's own kinds differ by implementation
        raise WireError("the cloud sent bytes that are no frame") from error


def _check_tensor(data: bytes, place: range) -> None:
    """Raises WireError for a shape that is too long to be one."""
    for number, part in _parts(data, place.start, place.stop, _MAX_TENSOR_PARTS):
        if number == _PACKED_SHAPE and isinstance(part, range) and len(part) > _MAX_SHAPE_BYTES:
            raise WireError(f"the cloud sent a tensor whose shape takes {len(part)} bytes")


def _parts(
    data: bytes, start: int, end: int, most: int = _MAX_PARTS
) -> Iterator[tuple[int, range | None]]:
    """(field number, where its bytes are; None for a number) of every field of a message."""
    count = 0
    while start < end:
        count += 1
        if count > most:
            raise WireError(f"the cloud sent a frame of more than {most} parts")
        tag, start = _varint(data, start, end)
        kind, length = tag & 7, 0
        if kind == _VARINT:
            _, start = _varint(data, start, end)
        elif kind == _BYTES:
            length, start = _varint(data, start, end)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise WireError("the cloud sent bytes that are no frame")
        if length > end - start:
            raise WireError("the cloud sent a frame that is cut off")
        yield tag >> 3, range(start, start + length) if kind == _BYTES else None
        start += length


def _varint(data: bytes, start: int, end: int) -> tuple[int, int]:
    """A number of at most ten bytes, and where the next field begins."""
    value = 0
    for place in range(start, min(end, start + 10)):
        value |= (data[place] & 0x7F) << (7 * (place - start))
        if data[place] < 0x80:
            return value, place + 1
    raise WireError("the cloud sent a frame that is cut off")
