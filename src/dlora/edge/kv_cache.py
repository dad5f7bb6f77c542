"""Generation on the edge: a handle on a KV cache that lives in the cloud, in one stream.

transformers' `generate` takes it as `past_key_values`. Keys and values never come here. What is
kept here could make them again: the embeddings, masks and positions that were sent. A stream that
is lost is opened again, and everything is sent once more. Where layers run on the edge, their keys
and values are in a second cache, here.

Shapes: B batch, P cached tokens, T new tokens, K kept positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from dlora.edge.conditions import Conditions
from dlora.edge.link import RetryPolicy
from dlora.edge.passes import PassInput, joined
from dlora.edge.responder import Responder, begin
from dlora.edge.room import pass_tokens
from dlora.errors import AdapterMissing, PeerLost, UsageError
from dlora.proto import dlora_pb2 as pb

__all__ = ["CloudCache", "cache_for"]

# Room for this many tokens more than are there, where nobody said how many will come.
_HEADROOM: Final = 256
# What was sent is kept pass by pass, and joined at this number: neither long lists nor a copy for
# each token.
_JOIN_AT: Final = 64


class CloudCache(Cache):
    """The edge's handle on a KV cache in the cloud; empty at first, and bound by its first use.

    Greedy search, sampling and beam search only let it grow and reorder its rows; prompt look-up
    and assisted decoding also roll it back. `expected_length` reserves room in the cloud for this
    many tokens of each sequence; when more come, the cache is made again, larger.
    """

    def __init__(self, expected_length: int = 0) -> None:
        super().__init__(layers=[])
        self.expected_length = expected_length
        self._local: DynamicCache | None = None  # of the edge layers
        self._responder: Responder | None = None
        self._site_key: tuple[object, ...] = ()
        self._past: list[PassInput] = []
        self._recording = False
        self._reserved = 0  # tokens of each sequence for which the cloud has room
        self._last_length = 0  # tokens of the cloud's last pass

        # What the cloud has still to do to its cache before the next tokens.
        self._drop = 0
        self._order: Tensor | None = None

    # -------------------------------------- what transformers asks of a cache

    def __bool__(self) -> bool:
        """True, as that of other caches, which hold layers from the start on."""
        return True

    @property
    def is_initialized(self) -> bool:
        """Whether anything is cached."""
        return bool(self._past)

    def has_previous_state(self, *layer: Any, **state: Any) -> bool:
        """The same, as recurrent architectures ask it."""
        return bool(self._past)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P: tokens of each sequence in the cache."""
        return sum(part.length for part in self._past)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def activate_past_recording(self) -> None:
        """Ask for a cache that can be rolled back in place, also where attention slides."""
        if not self._recording and self._past:
            self.close()
        self._recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: `-n` of them, as transformers has it."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.get_seq_length():
            raise UsageError(
                f"crop: got {tokens_to_remove}, want minus the number of tokens to forget, at most "
                f"{self.get_seq_length()}"
            )
        if tokens_to_remove == 0:
            return
        self._drop -= tokens_to_remove
        self._forget(-tokens_to_remove)
        self._cut_local(self.get_seq_length())
        if not self._rolls_back():
            self.close()

    def _rolls_back(self) -> bool:
        """Whether the cloud's cache gives tokens back; one that does not is made again."""
        responder = self._responder
        keeps = responder is not None and responder.link.description.limits.no_rollback
        return self._recording and not keeps

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue row `beam_idx[i]`: beams, or several continuations of one prompt."""
        if self._local is not None:
            self._local.reorder_cache(beam_idx)
        self._past = [part.rows(beam_idx) for part in self._past]
        self._order = beam_idx if self._order is None else self._order[beam_idx]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let every row be continued `repeats` times."""
        if self._past:
            rows = torch.arange(self._past[0].batch)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self._past, self._local = [], None
        self.close()

    def close(self) -> None:
        """Free the cloud's cache. The next use makes it again from what is known here."""
        if self._responder is not None:
            self._responder.close()
        self._drop, self._order = 0, None

    # -------------------------------------- layers that run on the edge

    def local_cache(self, config: PreTrainedConfig) -> DynamicCache:
        """Keys and values of the layers that run here; the others keep their places in it."""
        if self._local is None:
            self._local = DynamicCache(config=config)
            self._local.activate_past_recording()
        return self._local

    def restore(self, length: int) -> None:
        """After a pass that failed in the middle: back to this many tokens, on both halves."""
        if (extra := self.get_seq_length() - length) > 0:  # the cloud was through already
            self._forget(extra)
            self.close()
        self._cut_local(length)

    def _cut_local(self, length: int) -> None:
        """Keep this many tokens; unlike transformers' crop also those that a window has left.

        A deeper cut may follow.
        """
        for layer in [] if self._local is None else self._local.layers:
            if (extra := layer.get_seq_length() - length) > 0:
                layer.keys, layer.values = layer.keys[:, :, :-extra], layer.values[:, :, :-extra]
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length -= extra

    def _forget(self, left: int) -> None:
        """Take this many of the newest tokens from what could make the cloud's cache again."""
        while left:
            last = self._past.pop()
            stay = max(0, last.length - left)
            left -= last.length - stay
            if stay:
                self._past.append(last.columns(slice(stay)))

    # -------------------------------------- masks

    def known_mask(self) -> Tensor | None:
        """The mask [B, P] of what is cached; None if no mask was ever given."""
        if all(part.mask_BT is None for part in self._past):
            return None
        return torch.cat([part.attended_BT for part in self._past], dim=1)

    def new_columns(self, mask_BT: Tensor | None, batch: int, length: int) -> Tensor | None:
        """Of the mask [B, P + T] of all tokens that of the new ones, [B, T], on the CPU.

        Raises UsageError for other shapes, and where the mask of the cached tokens has changed.
        """
        if mask_BT is None:
            return None
        past = self.get_seq_length()
        if mask_BT.shape != (batch, past + length):
            raise UsageError(
                f"attention_mask: got shape {list(mask_BT.shape)}, want {[batch, past + length]}: "
                "cached and new tokens"
            )

        known_BT, before_BT = self.known_mask(), mask_BT[:, :past].bool().cpu()
        if known_BT is None:
            known_BT = torch.ones_like(before_BT)
        if not torch.equal(before_BT, known_BT.cpu()):
            raise UsageError(
                "attention_mask: other tokens than before are masked in the cached part: start a "
                "new cache"
            )
        return mask_BT[:, past:].cpu()

    # -------------------------------------- a forward pass

    def bind(self, responder: Responder, here: Iterable[LoraLayer] = ()) -> None:
        """Use this responder; another than before only if nothing else changed.

        `here`: LoRA layers in use inside edge layers. Raises UsageError if other adapters are
        active than those that filled the cache.
        """
        sites = (
            (
                site.index,
                *site.modules,
                *((id(layer), *layer.active_adapters) for layer in site.layers),
            )
            for site in responder.sites.values()
        )
        key: tuple[object, ...] = (
            *sites,
            responder.codecs,
            *(frozen.hash for frozen in responder.frozen),
            responder.edge_layers,
            *((id(layer), *layer.active_adapters) for layer in here),
            # A hosted adapter went into the cloud as it was then.
            None if responder.hosted is None else responder.hosted.version,
        )

        if self._responder is None or not self._past:
            self.close()
            self._responder, self._site_key = responder, key
        elif key != self._site_key or self._responder.link is not responder.link:
            raise UsageError(
                "this KV cache was filled with other adapters or another server: start a new one"
            )

    def forward(self, new: PassInput, retry: RetryPolicy) -> Tensor:
        """Run the new tokens through the cloud; return kept last hidden states.

        They are float32 [K, hidden_width]. If the cloud is lost, or closed the stream of an edge
        that was silent for long, the whole sequence is sent again on a new stream.
        """
        responder = self._responder
        if responder is None:
            raise AssertionError("bind() comes first")
        now = Conditions(responder.device)
        for wait in retry.attempts():
            try:
                try:
                    hidden_KD = self._attempt(responder, new)
                except AdapterMissing as missing:
                    if responder.hosted is not None:
                        responder.hosted.versions.kept = False  # so it goes whole
                    responder.put_frozen(missing)
                    hidden_KD = self._attempt(responder, new)
                break
            except PeerLost as error:
                self.close()
                responder.note_lost(error)
                now.restore_rng()
                wait(error)
            except BaseException:
                self.close()
                raise
        return hidden_KD

    def _attempt(self, responder: Responder, new: PassInput) -> Tensor:
        """Send the new tokens, or everything on a new stream, in slices that the server takes."""
        length = self.get_seq_length() + new.length
        limits = responder.link.description.limits
        too_deep = self._drop > self._last_length and not limits.deep_rollback
        in_one_pass = limits.whole_prompts and new.length > 1
        if responder.stream is not None and (length > self._reserved or too_deep or in_one_pass):
            self.close()

        whole = new
        if responder.stream is None:
            whole = joined([*self._past, new]) if self._past else new
            room = length if length <= self.expected_length else 2 * length + _HEADROOM
            room = max(room, self.expected_length)
            self._reserved = max(length, min(room, int(limits.max_length)))
        step = _slice_length(responder, whole.batch, whole.length)
        hidden_KD = self._send_slices(responder, whole, step)

        # From here on the cloud has these tokens.
        self._past.append(new.sent())
        self._last_length = (whole.length - 1) % step + 1
        if len(self._past) >= _JOIN_AT:
            self._past = [joined(self._past)]
        self._drop, self._order = 0, None
        return hidden_KD

    def _send_slices(self, responder: Responder, whole: PassInput, step: int) -> Tensor:
        """Send `step` tokens of each sequence at a time; return all kept hidden states, [K, D]."""
        begins = responder.stream is None
        if begins:
            responder.stream = responder.link.open()
        hidden, positions = [], []
        for start in range(0, whole.length, step):
            part = whole.columns(slice(start, start + step))
            fields = part.fields(responder.codecs.ends)
            if begins and not start:
                frame = pb.EdgeFrame(begin=self._begin(responder, part, fields))
            else:
                order = [] if self._order is None or start else self._order.tolist()
                drop = 0 if start else self._drop
                frame = pb.EdgeFrame(extend=pb.Extend(drop=drop, order=order, **fields))

            rows = fields["embeddings"].shape[0]
            kept_KD, flops = responder.ask(frame, rows, len(fields["keep"]), training=False)
            responder.meter.cloud_forward_flops += flops
            responder.meter.passes += 1
            hidden.append(kept_KD)
            positions += [(row, start + column) for row, column in part.keep_BT.nonzero().tolist()]

        if len(hidden) == 1:
            return hidden[0]
        # Slices come one after the other; kept rows go by sequence, then by token.
        return torch.cat(hidden)[sorted(range(len(positions)), key=positions.__getitem__)]

    def _begin(self, responder: Responder, part: PassInput, fields: dict[str, Any]) -> pb.Begin:
        return begin(
            responder.link,
            list(responder.sites.values()),
            responder.frozen,
            responder.edge_layers,
            responder.codecs,
            batch=part.batch,
            cache_length=self._reserved,
            rollback=self._rolls_back(),
            **(responder.hosted.fields(training=False) if responder.hosted else {}),
            **fields,
        )


def _slice_length(responder: Responder, batch: int, length: int) -> int:
    """Tokens of each sequence that fit one pass.

    Raises UsageError where that is less than `length`, and the cache takes no prompt in parts.
    """
    description = responder.link.description
    exchanged = () if responder.hosted else responder.sites.values()
    step = max(1, pass_tokens(description, exchanged) // batch)
    if description.limits.whole_prompts and length > step:
        raise UsageError(
            f"{batch} prompts of {length} tokens do not fit one pass of at most {step}, and this "
            "model's cache takes no prompt in parts: shorten it, or ask for fewer at a time"
        )
    return step


def cache_for(
    args: tuple[Any, ...], kwargs: dict[str, Any], config: GenerationConfig, ahead: int = 0
) -> CloudCache | None:
    """The cache that a call of `generate` with these arguments needs; None: it brings its own.

    `ahead` virtual tokens stand in front of the prompt. Raises UsageError for what needs keys and
    values here, and for several new tokens on top of virtual ones, of which peft takes the last.
    """
    implementation = kwargs.get("cache_implementation", config.cache_implementation)
    if implementation not in (None, "dynamic"):
        raise UsageError(
            f"cache_implementation={implementation!r} is not supported: keys and values stay "
            "in the cloud"
        )

    given = kwargs.get("past_key_values")
    drafts = kwargs.get("assistant_model") or kwargs.get(
        "prompt_lookup_num_tokens", config.prompt_lookup_num_tokens
    )
    if ahead and (drafts or (given is not None and given.get_seq_length())):
        raise UsageError(
            "behind virtual tokens an answer begins with an empty KV cache, and without drafts"
        )
    if drafts and given is not None and given.get_seq_length():
        raise UsageError(
            "transformers' drafting reads the whole prompt: it cannot continue a KV cache"
        )
    if given is not None or kwargs.get("use_cache", config.use_cache) is False:
        return None
    expected = _expected_length(args, kwargs, config)
    return CloudCache(expected + ahead if expected else 0)


def _expected_length(
    args: tuple[Any, ...], kwargs: dict[str, Any], config: GenerationConfig
) -> int:
    """Tokens that a call of `generate` may come to; 0 if it does not say."""
    given = (*args, kwargs.get("inputs"), kwargs.get("input_ids"))
    prompt = next((value for value in given if value is not None), None)
    length: int = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.dim() == 2 else 0
    new = kwargs.get("max_new_tokens", config.max_new_tokens)
    return length + new if new else kwargs.get("max_length", config.max_length) or 0
