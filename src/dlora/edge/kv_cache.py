"""Generation on the edge: a handle on a KV cache that lives in the cloud, in one stream.

transformers' `generate` takes it as `past_key_values`. Keys and values never come here; what
is kept here is what could make them again: the embeddings, masks and positions that were
sent. A stream that is lost is opened again and prefilled in one pass.

Shapes: B batch, P cached tokens, T new tokens, D width, K kept positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from dlora.edge.link import RetryPolicy
from dlora.edge.responder import Responder, begin
from dlora.errors import AdapterMissing, PeerLost, UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import encode, pack_mask

__all__ = ["CloudCache", "Pass"]

log = logging.getLogger(__name__)

# Room for so many tokens more than are there, where nobody said how many will come.
_HEADROOM: Final = 256
# What was sent is kept pass by pass, and joined now and then: neither long lists nor a copy a
# token.
_JOIN_AT: Final = 64


class Pass:
    """The new tokens of one forward pass, as they go to the cloud: B x T of them, of which N rows
    travel.

    They are token embeddings or, where the edge holds layers, hidden states.
    """

    def __init__(
        self,
        embeddings_BTD: Tensor,
        mask_BT: Tensor | None,
        position_ids_BT: Tensor | None,
        keep_BT: Tensor,
    ) -> None:
        self.embeddings_BTD, self.mask_BT = embeddings_BTD, mask_BT
        self.position_ids_BT, self.keep_BT = position_ids_BT, keep_BT

    @cached_property
    def attended_BT(self) -> Tensor:
        """True for tokens, false for padding."""
        return torch.ones_like(self.keep_BT) if self.mask_BT is None else self.mask_BT.bool()

    @cached_property
    def dense(self) -> bool:
        """Everything travels: a kept position that is padding needs what the model makes of
        padding.
        """
        return bool((self.keep_BT & ~self.attended_BT).any())

    @cached_property
    def entry_ND(self) -> Tensor:
        """The rows that travel. Made on first use: what is only kept to be sent again needs
        none.
        """
        rows_BT = torch.ones_like(self.attended_BT) if self.dense else self.attended_BT
        return self.embeddings_BTD[rows_BT.to(self.embeddings_BTD.device)]

    def fields(self, wire_dtype: pb.DType) -> dict[str, Any]:
        """The fields that `Begin` and `Extend` share."""
        return {
            "length": self.keep_BT.shape[1],
            "attention_mask": pack_mask(self.mask_BT),
            "position_ids": []
            if self.position_ids_BT is None
            else self.position_ids_BT.reshape(-1).tolist(),
            "dense": self.dense,
            "keep": self.keep_BT.reshape(-1).nonzero()[:, 0].tolist(),
            "embeddings": encode(self.entry_ND, wire_dtype),
        }


class CloudCache(Cache):
    """The edge's handle on a KV cache in the cloud; empty at first, and bound by its first use.

    Greedy search, sampling and beam search only let it grow and reorder its rows; prompt
    look-up and assisted decoding also roll it back. `expected_length` reserves room in the
    cloud for so many tokens a sequence; when more come, the cache is made again, larger.
    """

    def __init__(self, expected_length: int = 0) -> None:
        super().__init__(layers=[])
        self.expected_length = expected_length
        self._local: DynamicCache | None = None  # of the layers that the edge holds
        self._responder: Responder | None = None
        self._site_key: tuple[object, ...] = ()
        self._past: list[Pass] = []
        self._recording = False
        self._reserved = 0  # tokens a sequence for which the cloud holds room
        self._last_length = 0  # tokens of the cloud's last pass
        # What the cloud has still to do to its cache before the next tokens.
        self._drop = 0
        self._order: Tensor | None = None

    # -------------------------------------- what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P: tokens of each sequence in the cache."""
        return sum(one.keep_BT.shape[1] for one in self._past)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def activate_past_recording(self) -> None:
        """Ask for a cache that can be rolled back in place, also where attention slides over a
        window.
        """
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
        if not self._recording:
            self.close()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue row `beam_idx[i]`: beam search, or several continuations of one
        prompt.
        """
        if self._local is not None:
            self._local.reorder_cache(beam_idx)
        self._past = [_cut(one, beam_idx, slice(None)) for one in self._past]
        self._order = beam_idx if self._order is None else self._order[beam_idx]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let every row be continued `repeats` times."""
        if self._past:
            rows = torch.arange(self._past[0].keep_BT.shape[0])
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

    # ----------------------------------------------------------------- layers that the edge holds

    def local_cache(self, config: PreTrainedConfig) -> DynamicCache:
        """Keys and values of the layers that run here; the others keep their places in it."""
        if self._local is None:
            self._local = DynamicCache(config=config)
            self._local.activate_past_recording()
        return self._local

    def restore(self, length: int) -> None:
        """After a pass that failed in the middle: back to so many tokens, on both halves."""
        if (extra := self.get_seq_length() - length) > 0:  # the cloud was through already
            self._forget(extra)
            self.close()
        self._cut_local(length)

    def _cut_local(self, length: int) -> None:
        """Keep so many tokens, and unlike transformers' crop what is behind a window: a deeper cut
        may follow.
        """
        for layer in [] if self._local is None else self._local.layers:
            if (extra := layer.get_seq_length() - length) > 0:
                layer.keys, layer.values = layer.keys[:, :, :-extra], layer.values[:, :, :-extra]
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length -= extra

    def _forget(self, left: int) -> None:
        """Take so many of the newest tokens from what could make the cloud's cache again."""
        while left:
            last = self._past.pop()
            stay = max(0, last.keep_BT.shape[1] - left)
            left -= last.keep_BT.shape[1] - stay
            if stay:
                self._past.append(_cut(last, slice(None), slice(stay)))

    # ----------------------------------------------------------------- a forward pass

    def bind(self, responder: Responder, here: Iterable[LoraLayer] = ()) -> None:
        """Use this conversation; another one than before only if nothing else changed.

        `here`: LoRA layers in use inside layers that the edge holds. Raises UsageError if other
        adapters are active than those that filled the cache.
        """
        key: tuple[object, ...] = tuple(
            (
                site.index,
                *site.modules,
                *((id(layer), *layer.active_adapters) for layer in site.layers),
            )
            for site in responder.sites.values()
        )
        key += (responder.wire_dtype, *(frozen.hash for frozen in responder.frozen))
        key += (responder.edge_layers, *((id(layer), *layer.active_adapters) for layer in here))
        if self._responder is None or not self._past:
            self.close()
            self._responder, self._site_key = responder, key
        elif key != self._site_key or self._responder.link is not responder.link:
            raise UsageError(
                "this KV cache was filled with other adapters or another server: start a new one"
            )

    def known_mask(self, batch: int) -> Tensor | None:
        """The mask [B, P] of what is cached; None if no mask was ever given."""
        if all(one.mask_BT is None for one in self._past):
            return None
        return torch.cat(
            [torch.ones_like(o.keep_BT) if o.mask_BT is None else o.mask_BT for o in self._past],
            dim=1,
        )

    def forward(self, new: Pass, retry: RetryPolicy) -> Tensor:
        """Run the new tokens through the cloud; return kept last hidden states, float32 [K,
        hidden_width].

        If the cloud is lost, or closed the stream of an edge that was silent for long, the whole
        sequence is sent again on a new stream.
        """
        responder = self._responder
        if responder is None:
            raise AssertionError("bind() comes first")
        for wait in retry.attempts():
            try:
                try:
                    hidden = self._attempt(responder, new)
                except AdapterMissing as missing:
                    responder.put_frozen(missing)
                    hidden = self._attempt(responder, new)
                break
            except PeerLost as error:
                self.close()
                responder.meter.retries += 1
                log.info("the KV cache is made again: %s", error)
                wait(error)
            except BaseException:
                self.close()
                raise
        return hidden

    def _attempt(self, responder: Responder, new: Pass) -> Tensor:
        """Send the new tokens, or everything on a new stream, in slices that the server takes."""
        length = self.get_seq_length() + new.keep_BT.shape[1]
        limits = responder.link.description.limits
        too_deep = self._drop > self._last_length and not limits.deep_rollback
        if responder.stream is not None and (length > self._reserved or too_deep):
            self.close()
        begins = responder.stream is None
        whole = _joined([*self._past, new]) if begins and self._past else new
        if begins:
            room = length if length <= self.expected_length else 2 * length + _HEADROOM
            self._reserved = max(
                length, min(max(room, self.expected_length), int(limits.max_length))
            )
            responder.stream = responder.link.open()
        hidden, positions = [], []
        step = _slice_length(responder, whole.keep_BT.shape[0])
        for start in range(0, whole.keep_BT.shape[1], step):
            part = _cut(whole, slice(None), slice(start, start + step))
            fields = part.fields(responder.wire_dtype)
            if begins and not start:
                frame = pb.EdgeFrame(begin=self._begin(responder, part, fields))
            else:
                order = [] if self._order is None or start else self._order.tolist()
                frame = pb.EdgeFrame(
                    extend=pb.Extend(drop=0 if start else self._drop, order=order, **fields)
                )
            rows = fields["embeddings"].shape[0]
            kept, flops = responder.ask(frame, rows, len(fields["keep"]), training=False)
            hidden.append(kept)
            positions += [(row, start + column) for row, column in part.keep_BT.nonzero().tolist()]
            responder.meter.cloud_forward_flops += flops
            responder.meter.passes += 1
        # From here on the cloud has these tokens.
        self._past.append(
            Pass(
                new.embeddings_BTD.detach(),
                new.mask_BT,
                new.position_ids_BT,
                torch.zeros_like(new.keep_BT),
            )
        )
        self._last_length = (whole.keep_BT.shape[1] - 1) % step + 1
        if len(self._past) >= _JOIN_AT:
            self._past = [_joined(self._past)]
        self._drop, self._order = 0, None
        if len(hidden) == 1:
            return hidden[0]
        return torch.cat(hidden)[sorted(range(len(positions)), key=positions.__getitem__)]

    def _begin(self, responder: Responder, part: Pass, fields: dict[str, Any]) -> pb.Begin:
        return begin(
            responder.link,
            list(responder.sites.values()),
            responder.frozen,
            responder.edge_layers,
            responder.wire_dtype,
            batch=part.keep_BT.shape[0],
            cache_length=self._reserved,
            rollback=self._recording,
            **fields,
        )


def _slice_length(responder: Responder, batch: int) -> int:
    """Tokens a sequence that fit one pass: by the server's tokens, and by half of its largest
    message.
    """
    description = responder.link.description
    widths = [description.embedding_width, responder.hidden_width]
    for site in responder.sites.values():
        widths += [site.in_features, sum(layer.out_features for layer in site.layers)]
    by_message = description.limits.max_message_bytes // (8 * max(widths))
    return max(1, min(int(description.limits.max_tokens), by_message) // batch)


def _cut(one: Pass, rows: Any, columns: slice) -> Pass:
    def cut(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows][:, columns]

    parts = (one.embeddings_BTD, one.mask_BT, one.position_ids_BT, one.keep_BT)
    return Pass(*(cut(part) for part in parts))  # type: ignore[arg-type]


def _joined(passes: list[Pass]) -> Pass:
    """Passes that followed each other, as one."""
    masked = any(one.mask_BT is not None for one in passes)
    positioned = all(one.position_ids_BT is not None for one in passes)
    masks = [torch.ones_like(o.keep_BT) if o.mask_BT is None else o.mask_BT for o in passes]
    positions = [one.position_ids_BT for one in passes if one.position_ids_BT is not None]
    return Pass(
        torch.cat([one.embeddings_BTD for one in passes], dim=1),
        torch.cat([mask.bool() for mask in masks], dim=1) if masked else None,
        torch.cat(positions, dim=1) if positioned else None,
        torch.cat([one.keep_BT for one in passes], dim=1),
    )
