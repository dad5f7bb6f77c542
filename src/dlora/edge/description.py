"""A cloud's description, bounded before anything is built from it.

The cloud may be anybody's. Numbers have to be sizes that a decoder can have, names have to be
names, and texts lose what is not fit for a terminal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Final

from dlora.errors import PeerError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.text import clean_text

__all__ = ["MAX_DESCRIPTION_BYTES", "MAX_LAYERS", "MAX_WIDTH", "has_cache", "read_description"]

MAX_DESCRIPTION_BYTES: Final = 4 * 2**20
"""Of one message: a thousand layers with long names take a quarter of it."""
MAX_LAYERS: Final = 1000
MAX_WIDTH: Final = 2**20
_MAX_CONFIG_BYTES: Final = 256 * 2**10
_MAX_SITES_A_LAYER: Final = 16
_MAX_MODULES_A_SITE: Final = 256
_MAX_EXPERTS: Final = 2**14
_MAX_EXPERT_VALUES: Final = 2**26
"""Values of A and B on a fused weight, for each rank: many times those of the largest mixtures."""
_MAX_FILES: Final = 32
_MAX_TEXT: Final = 200
_MAX_NUMBER: Final = 2**40  # of tokens and bytes: more than any machine has
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_DIGEST: Final = re.compile(r"[0-9a-f]{1,64}")
_FINGERPRINT: Final = re.compile(r"[A-Za-z0-9_-]{0,128}")


def read_description(data: bytes, address: str) -> pb.Description:
    """Parse and check what a cloud says of itself. Raises PeerError for what no decoder can be."""
    if len(data) > MAX_DESCRIPTION_BYTES:
        raise PeerError(
            f"{address} describes itself in {len(data)} bytes, over {MAX_DESCRIPTION_BYTES}"
        )
    try:
        description = pb.Description.FromString(data)
    except Exception as error:  # protobuf's own kinds differ by implementation
        raise PeerError(f"{address} does not describe itself as a DLoRA server does") from error

    if description.protocol_version != PROTOCOL_VERSION:
        raise PeerError(
            f"{address} speaks protocol {description.protocol_version}, this edge "
            f"{PROTOCOL_VERSION}: upgrade the older of the two"
        )

    check = _Check(address)
    check.model(description)
    check.sites(description)
    check.experts(description)
    check.limits(description.limits)
    check.files("edge files", description.edge_files, _MAX_FILES)
    check.files("layer files", description.layers.files, MAX_LAYERS + 1)

    for field in ("model_id", "software_version", "compute_dtype"):
        setattr(description, field, clean_text(getattr(description, field), _MAX_TEXT))
    return description


def has_cache(limits: pb.Limits) -> bool:
    """Whether the model is served with a KV cache."""
    return bool(limits.cache_bytes_per_token or limits.cache_bytes_per_sequence)


class _Check:
    """The parts of a description, each with what it may be."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _want(self, fits: bool, what: str, got: object, wanted: str) -> None:
        if not fits:
            raise PeerError(
                f"{self.address} describes itself wrongly: {what}: got {clean_text(got, 80)!r}, "
                f"want {wanted}. Use another server."
            )

    def _sizes(self, what: str, values: Iterable[int], most: int = MAX_WIDTH) -> None:
        for value in values:
            self._want(0 < value <= most, what, value, f"1 to {most}")

    def model(self, description: pb.Description) -> None:
        """Configuration, fingerprint, widths and layers."""
        size = len(description.config_json.encode())
        self._want(
            size <= _MAX_CONFIG_BYTES, "configuration", f"{size} bytes", f"{_MAX_CONFIG_BYTES}"
        )
        fingerprint = description.fingerprint
        self._want(
            _FINGERPRINT.fullmatch(fingerprint) is not None,
            *("fingerprint", fingerprint, "up to 128 letters and digits"),
        )

        self._want(len(description.tables) <= 8, "tables", len(description.tables), "at most 8")
        for name in description.tables:
            self._want(
                _NAME.fullmatch(name) is not None, "name of a table", name, "letters and dots"
            )

        layers = description.layers
        self._sizes("embedding width", [description.embedding_width])
        self._sizes("hidden width", [description.hidden_width])
        self._sizes("width of the head", [description.head_width or 1])
        if layers.count or layers.width:  # none: there is no one list of layers
            self._sizes("width between layers", [layers.width])
            self._sizes("layers", [layers.count], MAX_LAYERS)
        offered = max(layers.max_first, layers.max_last)
        self._want(offered <= layers.count, "layers for edges", offered, f"at most {layers.count}")

    def sites(self, description: pb.Description) -> None:
        """Numbers of sites and modules, their names and widths."""
        most = _MAX_SITES_A_LAYER * (description.layers.count or MAX_LAYERS)
        self._want(len(description.sites) <= most, "sites", len(description.sites), f"{most}")
        for site in description.sites:
            self._sizes("width of a site", [site.in_features])
            count = len(site.modules)
            self._sizes("modules of a site", [count], _MAX_MODULES_A_SITE)
            for module in site.modules:
                self._sizes("width of a module", [module.out_features])
                self._want(
                    _NAME.fullmatch(module.name) is not None,
                    *("name of a module", module.name, "letters, digits and dots"),
                )
                norm = module.weight_norm
                self._want(0 <= norm < math.inf, "norm of a weight", norm, "a number from 0")

    def experts(self, description: pb.Description) -> None:
        """Numbers of fused weights, and their names and sizes."""
        count, most = len(description.experts), _MAX_SITES_A_LAYER * MAX_LAYERS
        self._want(count <= most, "fused weights", count, f"{most}")
        for one in description.experts:
            self._want(
                _NAME.fullmatch(one.name) is not None,
                *("name of a fused weight", one.name, "letters, digits and dots"),
            )
            self._sizes("width of experts", [one.in_features, one.out_features])
            self._sizes("experts", [one.experts], _MAX_EXPERTS)
            values = one.experts * (one.in_features + one.out_features)
            self._sizes("values of experts", [values], _MAX_EXPERT_VALUES)
            fits = one.site < len(description.sites)
            self._want(fits, "site before experts", one.site, "one of the sites")
            self._want(
                0 <= one.rows <= _MAX_EXPERTS, "rows of a token", one.rows, "a number from 0"
            )

    def limits(self, limits: pb.Limits) -> None:
        """Numbers that the edge computes with."""
        for field in ("max_tokens", "max_length", "max_message_bytes", "max_inflight_bytes"):
            self._sizes(field, [getattr(limits, field)], _MAX_NUMBER)
        for field in (
            *("bytes_per_token", "bytes_per_token_squared", "cache_bytes_per_token"),
            "cache_bytes_per_sequence",
        ):
            value = getattr(limits, field)
            self._want(0 <= value < _MAX_NUMBER, field, value, "a number from 0")

    def files(self, what: str, infos: Sequence[pb.FileInfo], most: int) -> None:
        """Every name once, with a digest; which names they may be is asked where they are used."""
        self._want(len(infos) <= most, what, len(infos), f"at most {most}")
        names = [info.name for info in infos]
        self._want(len(set(names)) == len(names), what, names, "every name once")
        for info in infos:
            fits = _DIGEST.fullmatch(info.sha256) is not None
            self._want(fits, f"SHA-256 of {info.name}", info.sha256, "hexadecimal digits")
            self._want(info.size <= _MAX_NUMBER, f"size of {info.name}", info.size, "bytes")
