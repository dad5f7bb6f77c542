"""A trial before a model is served: an edge in this process trains on it and generates.

The edge's own code runs, on what it would get, and what it finds is compared with the whole model:
the loss of labels, gradients at every site, padding on each side, answers with a cache. What
differs is mended where that is possible (all hidden states for the head, padding that travels, no
cache) and refused otherwise. So what is served is right.

Shapes: B batch, T tokens, D input and O output width of a linear module, R rank.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Protocol

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dlora.cloud.model import CloudModel
from dlora.cloud.zero_edge import sample_ids
from dlora.edge.adapter_config import targetable
from dlora.edge.labels import IGNORE
from dlora.edge.link import Link
from dlora.edge.load import get_peft_model
from dlora.edge.model import SplitModel
from dlora.errors import ModelError
from dlora.protocol.text import clean_text

__all__ = ["try_model"]

log = logging.getLogger(__name__)

# Largest differences to the whole model, as a share of the largest value or of a gradient's norm:
# in fp32, and where the model computes in 16 bits, so that kernels may round by shape. There single
# gradients, which may be small, are off by more than all of them together are (in bf16 one of
# SmolLM2's by 17 %, all by 4 %). What is wrong, and not rounded, is off by half and more.
_TOLERANCE: Final = 1e-3
_COARSE_TOLERANCE: Final = 0.1
_COARSE_MODULE_TOLERANCE: Final = 0.5
_RANK: Final = 1
_SCALE: Final = 0.02
"""Of B: enough to show in every gradient."""
_NEW_TOKENS: Final = 3


class ClosableLink(Link, Protocol):
    """A link of this process."""

    def close(self) -> None:
        """Remove its files."""


def try_model(cloud: CloudModel, connect: Callable[[CloudModel], ClosableLink]) -> None:
    """Raises ModelError, with architecture and reason, for a model that edges would get wrong.

    `connect` makes a link to the cloud within this process. The cloud is told what edges have to
    do otherwise for this model. Random state is as before.
    """
    allowed = (module.name for site in cloud.sites for module in site.modules if module.allowed)
    names = targetable(allowed, cloud.model)
    if not names or cloud.limits.max_length < 2:
        return
    name = type(cloud.model).__name__
    try:
        with torch.random.fork_rng(devices=[]):
            _Trial(cloud, connect, names).run()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} cannot be served: the trial of an edge failed: {type(error).__name__}: "
            f"{clean_text(error)}"
        ) from error


class _Trial:
    """The whole model on one side, an edge's half of it on the other."""

    def __init__(
        self, cloud: CloudModel, connect: Callable[[CloudModel], ClosableLink], names: list[str]
    ) -> None:
        self.cloud, self.connect, self.names = cloud, connect, names
        self.whole = cloud.model
        coarse = cloud.embedding.get_parameter("weight").dtype != torch.float32
        self.tolerance = _COARSE_TOLERANCE if coarse else _TOLERANCE
        self.module_tolerance = _COARSE_MODULE_TOLERANCE if coarse else _TOLERANCE
        self.ids_BT = sample_ids(self.whole, 2, min(8, cloud.limits.max_length))
        generator = torch.Generator().manual_seed(0)
        self.factors = {name: self._factors(name, generator) for name in names}

    def _factors(self, name: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A [R, D] and B [O, R] of a module, float32, where the module is."""
        site, module = next(
            (site, module)
            for site in self.cloud.sites
            for module in site.modules
            if module.name == name
        )
        device = self.whole.get_submodule(name).weight.device
        a_RD = torch.randn(_RANK, site.in_features, generator=generator) / site.in_features**0.5
        b_OR = _SCALE * torch.randn(module.out_features, _RANK, generator=generator)
        return a_RD.to(device).requires_grad_(), b_OR.to(device).requires_grad_()

    def run(self) -> None:
        """All comparisons. Where one differs it is mended, and tried again. Raises ModelError."""
        comparisons = [
            ("loss or gradients of a training step", self._training_differs, self._want_all_hidden),
            (
                "logits or loss, padded on the left,",
                self._padding_differs,
                self._let_padding_travel,
            ),
        ]
        if self.ids_BT.shape[1] + _NEW_TOKENS <= self.cloud.limits.max_length:
            comparisons.append(("answers", self._answers_differ, self.cloud.serve_without_cache))

        with ExitStack() as stack:
            split = stack.enter_context(self._split())
            for what, differs, mend in comparisons:
                if gap := differs(split):
                    log.info("%s: %s; edges do otherwise", type(self.whole).__name__, gap)
                    mend()
                    stack.close()
                    split = stack.enter_context(self._split())
                    gap = differs(split)
                if gap:
                    raise ModelError(
                        f"{type(self.whole).__name__} cannot be served: {what} of the split differ "
                        f"from the whole model's: {gap}"
                    )

    def _want_all_hidden(self) -> None:
        self.cloud.full_head = True

    def _let_padding_travel(self) -> None:
        self.cloud.all_rows = True

    # ----------------------------------------------------------------- the two sides

    @contextmanager
    def _split(self) -> Iterator[SplitModel]:
        """An edge's half with an adapter at every site, on what the cloud serves now."""
        link = self.connect(self.cloud.without_limits())
        try:
            config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=self.names)
            split = get_peft_model(link, config, wire_dtype="fp32")
            layers = dict(split.get_base_model().named_modules())
            with torch.no_grad():
                for name, (a_RD, b_OR) in self.factors.items():
                    layers[name].lora_A["default"].weight.copy_(a_RD)
                    layers[name].lora_B["default"].weight.copy_(b_OR)
            yield split
        finally:
            link.close()

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """The whole model with the same adapter."""
        with ExitStack() as hooks:
            for name, (a_RD, b_OR) in self.factors.items():

                def add(
                    module: nn.Module,
                    args: tuple[Tensor, ...],
                    output: Tensor,
                    a_RD: Tensor = a_RD,
                    b_OR: Tensor = b_OR,
                ) -> Tensor:
                    return (output + (args[0].float() @ a_RD.T) @ b_OR.T).to(output.dtype)

                module = self.whole.get_submodule(name)
                hooks.enter_context(module.register_forward_hook(add))
            yield

    def _batch(self, side: str) -> dict[str, Tensor]:
        """Tokens of which half of one row is padding on this side."""
        half = self.ids_BT.shape[1] // 2
        mask_BT = torch.ones_like(self.ids_BT)
        if side == "right":
            mask_BT[-1, half:] = 0
        else:
            mask_BT[-1, :half] = 0
        labels = self.ids_BT.masked_fill(mask_BT == 0, IGNORE)
        labels[0, :half] = IGNORE
        # Some models look at which ids are padding, and not at the mask alone.
        ids_BT = self.ids_BT.masked_fill(mask_BT == 0, self._pad_id())
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels}

    def _pad_id(self) -> int:
        """The token that tokenizers of this model pad with."""
        pad_id = getattr(self.whole.config.get_text_config(), "pad_token_id", None)
        if isinstance(pad_id, int) and 0 <= pad_id < self.cloud.parts.lookups.num_rows:
            return pad_id
        return 0

    # ----------------------------------------------------------------- comparisons

    def _training_differs(self, split: SplitModel) -> str:
        """A training step with padding on the right."""
        batch = self._batch("right")
        leaves = [leaf for pair in self.factors.values() for leaf in pair]
        # Some models change a cache in place, which autograd would notice.
        takes = inspect.signature(type(self.whole).forward).parameters
        quiet = {"use_cache": False} if "use_cache" in takes else {}
        with self._adapted():
            want = self.whole(**batch, **quiet).loss
        grads = torch.autograd.grad(want, leaves, allow_unused=True)

        _train_without_dropout(split)
        got = split(**_here(batch)).loss
        got.backward()
        if gap := self._gap("loss", got, want):
            return gap

        layers = dict(split.get_base_model().named_modules())
        found = [
            part["default"].weight.grad
            for name in self.factors
            for part in (layers[name].lora_A, layers[name].lora_B)
        ]
        scale = max((grad.norm().item() for grad in grads if grad is not None), default=0.0)
        offs, norms = [], []
        for index, (mine, whole) in enumerate(zip(found, grads, strict=True)):
            what = f"gradient of {self.names[index // 2]}"
            one = torch.zeros(()) if whole is None else whole.detach().cpu()
            other = torch.zeros_like(one) if mine is None else mine
            offs.append((other - one).norm().item())
            norms.append(one.norm().item())
            if not offs[-1] <= self.module_tolerance * max(norms[-1], 0.01 * scale):
                return f"{what} is off by {offs[-1]:.2g}, its norm is {norms[-1]:.2g}"
        off, norm = math.hypot(*offs), math.hypot(*norms)
        return "" if off <= self.tolerance * norm else f"gradients are off by {off / norm:.2g}"

    @torch.no_grad()
    def _padding_differs(self, split: SplitModel) -> str:
        """Loss, and logits of all tokens, with padding on the left."""
        batch = self._batch("left")
        with self._adapted():
            want = self.whole(**batch)
        _train_without_dropout(split)
        if gap := self._gap("loss", split(**_here(batch)).loss, want.loss):
            return gap
        del batch["labels"]
        got = split.eval()(**_here(batch)).logits
        seen = batch["attention_mask"].bool().cpu()
        return self._gap("logits", got[seen], want.logits.cpu()[seen])

    @torch.no_grad()
    def _answers_differ(self, split: SplitModel) -> str:
        """Logits of a few new tokens, greedily; for one prompt, and for two of unequal length."""
        options: dict[str, Any] = {
            "max_new_tokens": _NEW_TOKENS,
            "min_new_tokens": _NEW_TOKENS,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": 0,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        padded = self._batch("left")
        del padded["labels"]
        alone = {"input_ids": self.ids_BT[:1], "attention_mask": torch.ones_like(self.ids_BT[:1])}
        split.eval()
        for batch in (alone, padded):
            try:
                with self._adapted():
                    want = self.whole.generate(**batch, **options)
            except Exception as error:  # there is nothing to compare with, and nothing to miss
                log.warning(
                    "transformers itself cannot generate with %s: %s",
                    *(type(self.whole).__name__, clean_text(error)),
                )
                return ""
            got = split.generate(**_here(batch), **options)
            for one, other in zip(got.logits, want.logits, strict=True):
                if gap := self._gap("logits of a new token", one, other):
                    return gap
                if not torch.equal(one.argmax(-1), other.argmax(-1).cpu()):
                    break  # two tokens are as good as each other; from here on texts differ
        return ""

    def _gap(self, what: str, got: Tensor, want: Tensor) -> str:
        """How far results are apart; empty where they are near enough."""
        got, want = got.detach().float().cpu(), want.detach().float().cpu()
        if got.shape != want.shape:
            return f"{what}: shape {list(got.shape)}, not {list(want.shape)}"
        finite = torch.isfinite(want)  # heads may rule tokens out
        if not torch.equal(finite, torch.isfinite(got)):
            return f"{what}: other values are not finite"
        largest = (got - want)[finite].abs().max().item() if finite.any() else 0.0
        scale = max(want[finite].abs().max().item(), 1e-6) if finite.any() else 1.0
        return "" if largest <= self.tolerance * scale else f"{what} off by {largest / scale:.2g}"


def _train_without_dropout(split: SplitModel) -> None:
    """Training mode, in which the head sees labelled positions alone; the whole drops nothing."""
    split.train()
    for module in split.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def _here(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, where the edge's half is."""
    return {name: value.cpu() for name, value in batch.items()}
