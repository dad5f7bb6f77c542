"""What a caller may choose about a split model, given when it is built. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, TypedDict, Unpack, get_args

from dlora.edge.link import RetryPolicy
from dlora.edge.noise import Noise
from dlora.errors import UsageError
from dlora.protocol.codecs import Codecs, mix

__all__ = [
    "OPTION_NAMES",
    "InFlight",
    "InputGrad",
    "OptionArguments",
    "SplitOptions",
    "check_cache_prefix",
    "check_consent",
    "check_edge_layers",
    "check_experts",
    "check_in_flight",
    "check_input_grad",
]

Wire = Literal["plain", "factored", "hosted"]
HeadPositions = Literal["auto", "supervised", "all"]
InputGrad = Literal["exact", "drop"]
InFlight = int | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Choices about a split model: `model.options`; `SplitModel.set_options` replaces them."""

    wire: Wire = "plain"
    """How deltas travel in training: "plain", or as exact factors ("factored"), which takes several
    times fewer bytes and shows B to the cloud, which could solve for it anyway. Or not at all
    ("hosted"): active modules travel with each micro-batch, the cloud computes them and their
    gradients, and a micro-batch takes two round trips however many sites there are. The cloud then
    sees A and B of every active module: that needs `upload_consent`.
    """
    upload_consent: bool = False
    """Agree that the cloud sees the adapter itself, on the hosted wire."""
    in_flight: InFlight = 1
    """Parts of a micro-batch that travel at the same time, so that their waits overlap; each takes
    one of the streams that the server allows. "auto": 1, 2 or 4, picked at the first training
    micro-batch from the round trip time and two passes over its tokens.
    """
    wire_dtype: str | Codecs = "fp16"
    """fp32 (exact), fp16, bf16, int8 or int4. The last two are mixes of codecs; a `Codecs` is
    another.
    """
    input_grad: InputGrad = "exact"
    """What the adapters add to the gradient of their inputs: "exact", or left out ("drop"). That is
    an approximation: sites below learn without it. It halves a site's traffic, and backward no
    longer waits at every site. Not on the hosted wire, where the cloud computes it for nothing.
    """
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """How long a lost cloud is waited for."""
    noise: Noise = field(default_factory=Noise)
    """What is added to what leaves."""
    hide_lengths: bool = False
    """Let right padding travel as other tokens of the batch, and ask for every position's hidden
    state. Masks then reveal neither lengths nor which tokens have a label; zero gradients still do,
    without noise on the tail. Left padding and KV caches are as ever.
    """
    head_positions: HeadPositions = "auto"
    """Where logits are computed: "supervised" (only where a label asks for it; logits then have
    shape [batch, L + 1, vocab], L the most labels of a row), "all", or "auto": supervised while
    training, all otherwise. Without labels it is always all.
    """
    cache_prefix: bool = False
    """In training let the cloud keep what its layers below the lowest active site make of a
    sequence. When every sequence of a micro-batch has been there before, only their names travel in
    place of embeddings, and these layers are not computed again. Results are the same up to
    rounding. Not with noise on what enters, nor with `hide_lengths`: nothing would come again.
    """
    edge_layers: tuple[int, int] = (0, 0)
    """This many of the first and of the last decoder layers run here, where the server allows it:
    less of what leaves can be read. Fixed when the model is built.
    """

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work with any server."""
        if self.wire not in get_args(Wire):
            raise UsageError(f"wire: got {self.wire!r}, want plain, factored or hosted")
        check_consent(self.wire, self.upload_consent)
        _ = self.codecs  # checks the name
        check_input_grad(self.wire, self.input_grad)
        check_in_flight(self.in_flight, self.wire)
        if self.head_positions not in get_args(HeadPositions):
            raise UsageError(
                f"head_positions: got {self.head_positions!r}, want auto, supervised or all"
            )
        check_cache_prefix(self.cache_prefix, self.noise, fills_padding=self.hide_lengths)
        check_edge_layers(*self.edge_layers)

    @property
    def codecs(self) -> Codecs:
        """The codec of every kind of tensor."""
        return mix(self.wire_dtype, self.wire)

    def changed(self, **changes: Unpack[OptionArguments]) -> SplitOptions:
        """These options with some replaced; None leaves one as it is."""
        given: dict[str, Any] = {name: new for name, new in changes.items() if new is not None}
        return replace(self, **given)


class OptionArguments(TypedDict, total=False):
    """The fields of `SplitOptions` as keyword arguments; what is left out keeps its value."""

    wire: Wire
    upload_consent: bool
    in_flight: InFlight
    wire_dtype: str | Codecs
    input_grad: InputGrad
    retry: RetryPolicy | None
    noise: Noise
    hide_lengths: bool
    head_positions: HeadPositions
    cache_prefix: bool
    edge_layers: tuple[int, int]


OPTION_NAMES: Final = frozenset(option.name for option in fields(SplitOptions))


def check_consent(wire: str, upload_consent: bool) -> None:
    """Raises UsageError for the hosted wire without consent to what it shows."""
    if wire == "hosted" and not upload_consent:
        raise UsageError(
            "wire=hosted sends the active modules' A and B to the cloud, which computes with them "
            "and sees the adapter itself and its gradients: agree with upload_consent "
            "(--upload_consent true), or use wire=factored or plain"
        )


def check_experts(wire: str, names: Iterable[str]) -> None:
    """Raises UsageError for fused weights of experts on a wire where the edge computes."""
    for name in names if wire != "hosted" else ():
        raise UsageError(
            f"experts: {name} is a fused weight of experts, which see only their tokens, so that "
            f"wire={wire} cannot exchange its deltas: use wire=hosted with upload_consent (--wire "
            "hosted --upload_consent true), where the cloud computes them and sees the adapter"
        )


def check_input_grad(wire: str, input_grad: str) -> None:
    """Raises UsageError for what is none, or has no use on this wire."""
    if input_grad not in get_args(InputGrad):
        raise UsageError(f"input_grad: got {input_grad!r}, want exact or drop")
    if input_grad == "drop" and wire == "hosted":
        raise UsageError(
            "input_grad=drop: on the hosted wire the cloud computes these gradients, and "
            "nothing of them travels: use input_grad=exact"
        )


def check_in_flight(in_flight: int | str, wire: str) -> None:
    """Raises UsageError for a number of parts that cannot be, or that the wire has no use for."""
    if in_flight == "auto":
        return
    if isinstance(in_flight, str) or in_flight < 1:
        raise UsageError(f"in_flight: got {in_flight!r}, want 1 or more, or auto")
    if wire == "hosted" and in_flight > 1:
        raise UsageError(
            f"in_flight: got {in_flight} with wire=hosted, where a micro-batch waits twice and the "
            "adapter would travel with every part: use in_flight=1, or wire=factored or plain"
        )


def check_cache_prefix(
    cache_prefix: bool, noise: Noise, *, fills_padding: bool, record: bool = False
) -> None:
    """Raises UsageError where no sequence would enter the cloud twice as it was, or a record lack
    rows.
    """
    why = "noise_entry" if noise.entry else "pad_to (hide_lengths)" if fills_padding else ""
    if cache_prefix and why:
        raise UsageError(
            f"cache_prefix with {why}: what enters the cloud is drawn anew each time, and nothing "
            "kept would be found again: leave one of the two out"
        )
    if cache_prefix and record:
        raise UsageError(
            "record keeps all that crosses the wire: with cache_prefix rows would be missing that "
            "travel as names. Leave one of the two out"
        )


def check_edge_layers(first: int, last: int) -> None:
    """Raises UsageError for numbers of edge layers that no server can allow."""
    if first < 0 or last < 0:
        raise UsageError(f"edge layers: got the first {first} and the last {last}, want 0 or more")
