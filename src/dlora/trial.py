"""A trial before a model is served: an edge in this process trains on it and generates.

The edge's own code runs, on what it would get, and what it finds is compared with the whole model:
the loss of labels, gradients at every site, padding on each side, answers with a cache. What
differs is mended where that is possible (padding that travels, all hidden states for the head, no
cache) and refused otherwise. So what is served is right. What the whole model says is asked once.

Shapes: B batch, T tokens, D input and O output width of a linear module, R rank.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any, Final, Protocol

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dlora.cloud.describe import Findings
from dlora.cloud.model import CloudModel
from dlora.cloud.reasons import why_not
from dlora.cloud.zero_edge import sample_ids
from dlora.edge.adapter_config import targetable
from dlora.edge.labels import IGNORE
from dlora.edge.link import Link
from dlora.edge.load import get_peft_model
from dlora.edge.model import SplitModel
from dlora.errors import INSTEAD, ModelError
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
_NEW_TOKENS: Final = 2
"""Of an answer: one of the prompt's pass, and one of a pass behind the cache."""
_GREEDY: Final[dict[str, Any]] = {
    "max_new_tokens": _NEW_TOKENS,
    "min_new_tokens": _NEW_TOKENS,
    "do_sample": False,
    "num_beams": 1,
    "pad_token_id": 0,
    "output_logits": True,
    "return_dict_in_generate": True,
}
"""Arguments of `generate` for the best tokens, with their logits."""
_NOTE: Final = "dlora_tried"
"""The attribute of a model that says for what it was tried, and with which findings."""


class ClosableLink(Link, Protocol):
    """A link of this process."""

    def close(self) -> None:
        """Remove its files."""


def try_model(cloud: CloudModel, connect: Callable[[CloudModel], ClosableLink]) -> None:
    """Raises ModelError, with architecture and reason, for a model that edges would get wrong.

    `connect` makes a link to the cloud within this process. The cloud is told what edges have to
    do otherwise for this model. Random state is as before. A model is tried once: what was found
    is noted on it, for whoever serves it again with the same weights and modules.
    """
    allowed = (module.name for site in cloud.sites for module in site.modules if module.allowed)
    names = targetable(allowed, cloud.model)
    if not names or cloud.limits.max_length < 2:
        return
    tried = (cloud.fingerprint, cloud.limits.max_length, *names)
    noted = vars(cloud.model).get(_NOTE, {})
    if tried in noted:
        cloud.serve_as(noted[tried])
        return

    try:
        with torch.random.fork_rng(devices=[]):
            _Trial(cloud, connect, names).run()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(cloud.model).__name__} cannot be served: an edge that tried it failed: "
            f"{why_not(cloud.model, error)}"
        ) from error
    vars(cloud.model)[_NOTE] = {**noted, tried: cloud.findings}


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
        self.factors = self._factors()
        # What each kind of module does in a pass with a cache is tried at its first and last one.
        kinds = {re.sub(r"\d+", "", name): name for name in names}
        self.few = {
            *kinds.values(),
            *{re.sub(r"\d+", "", one): one for one in names[::-1]}.values(),
        }

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A [R, D] and B [O, R] of each module, float32, where the module is."""
        generator, factors = torch.Generator().manual_seed(0), {}
        wanted = set(self.names)
        for site in self.cloud.sites:
            for module in site.modules:
                if module.name not in wanted:
                    continue
                device = self.whole.get_submodule(module.name).weight.device
                a_RD = torch.randn(_RANK, site.in_features, generator=generator)
                b_OR = _SCALE * torch.randn(module.out_features, _RANK, generator=generator)
                factors[module.name] = (
                    (a_RD / site.in_features**0.5).to(device).requires_grad_(),
                    b_OR.to(device).requires_grad_(),
                )
        return factors

    def run(self) -> None:
        """All comparisons. Where one differs it is mended, and tried again. Raises ModelError."""
        with ExitStack() as stack:
            split = stack.enter_context(self._split())
            mends = [Findings(all_rows=True), Findings(full_head=True)]
            mends.append(Findings(all_rows=True, full_head=True))
            split = self._compare(
                "loss, logits or gradients", self._step_differs, mends, split, stack
            )

            if self.ids_BT.shape[1] + _NEW_TOKENS <= self.cloud.limits.max_length:
                mends = [dataclasses.replace(self.cloud.findings, no_cache=True)]
                self._compare("answers", self._answers_differ, mends, split, stack)

    def _compare(
        self,
        what: str,
        differs: Callable[[SplitModel], str],
        mends: Sequence[Findings],
        split: SplitModel,
        stack: ExitStack,
    ) -> SplitModel:
        """Compare. Where that differs try one mend after the other; the edge that was right."""
        gap = first = differs(split)
        for mend in mends:
            if not gap:
                break
            stack.close()
            self.cloud.serve_as(mend)
            split = stack.enter_context(self._split())
            gap = differs(split)
        name = type(self.whole).__name__
        if gap:
            raise ModelError(
                f"{name} cannot be served: {what} of the split differ from the whole model's: "
                f"{gap}. {self._reason(split, what)}{INSTEAD}"
            )
        if first:
            log.info("%s: %s; edges do otherwise", name, first)
        return split

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
    def _adapted(self, names: Iterable[str]) -> Iterator[None]:
        """The whole model with the same adapter on these modules."""
        with ExitStack() as hooks:
            for name in names:
                a_RD, b_OR = self.factors[name]

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

    def _batch(self, padded: str) -> dict[str, Tensor]:
        """Two rows of tokens, with padding in the last, on "each" side in both, or in "none"."""
        half = self.ids_BT.shape[1] // 2
        mask_BT = torch.ones_like(self.ids_BT)
        if padded != "none":
            mask_BT[-1, :half] = 0
        if padded == "each":
            mask_BT[0, -(half // 2 or 1) :] = 0
        labels = self.ids_BT.masked_fill(mask_BT == 0, IGNORE)
        labels[0, : half // 2] = IGNORE
        # Some models look at which ids are padding, and not at the mask alone.
        ids_BT = self.ids_BT.masked_fill(mask_BT == 0, self._pad_id())
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels}

    def _pad_id(self) -> int:
        """The token that tokenizers of this model pad with."""
        pad_id = getattr(self.whole.config.get_text_config(), "pad_token_id", None)
        if isinstance(pad_id, int) and 0 <= pad_id < self.cloud.parts.lookups.num_rows:
            return pad_id
        return 0

    # ----------------------------------------------------------------- a training step

    @cached_property
    def _step(self) -> tuple[dict[str, Tensor], Any, list[Tensor | None]]:
        """A batch, what the whole model says to it, and the gradients of all factors."""
        batch = self._batch("each")
        leaves = [leaf for pair in self.factors.values() for leaf in pair]
        # Some models change a cache in place, which autograd would notice.
        takes = inspect.signature(type(self.whole).forward).parameters
        quiet = {"use_cache": False} if "use_cache" in takes else {}
        with self._adapted(self.factors):
            output = self.whole(**batch, **quiet)
        grads = torch.autograd.grad(output.loss, leaves, allow_unused=True)
        return batch, output, list(grads)

    def _step_differs(self, split: SplitModel) -> str:
        """A training step with padding on the right in one row and on the left in another.

        Afterwards the logits of all tokens, as an evaluation wants them.
        """
        batch, want, grads = self._step
        _train_without_dropout(split)
        got = split(**_here(batch)).loss
        got.backward()
        if gap := self._gap("loss", got, want.loss):
            return gap

        layers = dict(split.get_base_model().named_modules())
        found = [
            part["default"].weight.grad
            for name in self.factors
            for part in (layers[name].lora_A, layers[name].lora_B)
        ]
        scale = max((grad.norm().item() for grad in grads if grad is not None), default=0.0)
        names, offs, norms = list(self.factors), [], []
        for index, (mine, whole) in enumerate(zip(found, grads, strict=True)):
            one = torch.zeros(()) if whole is None else whole.detach().cpu()
            other = torch.zeros_like(one) if mine is None else mine
            offs.append((other - one).norm().item())
            norms.append(one.norm().item())
            if not offs[-1] <= self.module_tolerance * max(norms[-1], 0.01 * scale):
                return (
                    f"gradient of {names[index // 2]} is off by {offs[-1]:.2g}, its norm is "
                    f"{norms[-1]:.2g}"
                )
        off, norm = math.hypot(*offs), math.hypot(*norms)
        if not off <= self.tolerance * norm:
            return f"gradients are off by {off / norm:.2g}"

        inputs = _here({name: batch[name] for name in ("input_ids", "attention_mask")})
        with torch.no_grad():
            logits = split.eval()(**inputs).logits
        seen = inputs["attention_mask"].bool()
        return self._gap("logits", logits[seen], want.logits.cpu()[seen])

    def _reason(self, split: SplitModel, what: str) -> str:
        """A sentence that says why they differ, where that is known."""
        with torch.no_grad(), suppress(Exception):  # what was found is said in any case
            if what == "answers":
                batch, options = self._prompts[0], {**_GREEDY, "use_cache": False}
                with self._adapted(self.few):
                    logits = self.whole.generate(**batch, **options).logits
                if self._wanted_alone and self._answers_gap(logits, self._wanted_alone):
                    return "Its own answers with a cache are not those without one. "
                return ""
            batch = self._batch("none")
            with self._adapted(self.factors):
                want = self.whole(**batch).loss
            if not self._gap("loss", split.train()(**_here(batch)).loss, want):
                return "Without padding they do not: it sees by token ids what is padding. "
        return ""

    # ----------------------------------------------------------------- answers

    @cached_property
    def _prompts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One prompt alone, and with a shorter one, padded on the left as generation wants it."""
        padded = self._batch("left")
        del padded["labels"]
        alone = {"input_ids": self.ids_BT[:1], "attention_mask": torch.ones_like(self.ids_BT[:1])}
        return alone, padded

    @cached_property
    def _wanted(self) -> Sequence[Tensor] | None:
        """Logits of new tokens that the whole model answers the two prompts with."""
        return self._answers(self._prompts[1])

    @cached_property
    def _wanted_alone(self) -> Sequence[Tensor] | None:
        """Those of the one prompt."""
        return self._answers(self._prompts[0])

    def _answers(self, batch: dict[str, Tensor]) -> Sequence[Tensor] | None:
        """The whole model's logits [B, vocabulary] of new tokens; None where it cannot generate."""
        try:
            with torch.no_grad(), self._adapted(self.few):
                answers = self.whole.generate(**batch, **_GREEDY)
        except Exception as error:  # there is nothing to compare with, and nothing to miss
            log.warning(
                "transformers itself cannot generate with %s: %s",
                *(type(self.whole).__name__, clean_text(error)),
            )
            return None
        return list(answers.logits)

    @torch.no_grad()
    def _answers_differ(self, split: SplitModel) -> str:
        """Logits of a few new tokens, greedily; for one prompt, and for two of unequal length."""
        split.eval().set_active(self.few)
        alone, padded = self._prompts
        got = split.generate(**_here(alone), **_GREEDY).logits

        # Where rows do not depend on each other, a prompt alone is what it is beside another.
        beside = None if self._wanted is None else [one[:1] for one in self._wanted]
        if beside is None or self._answers_gap(got, beside):
            if self._wanted_alone is None:
                return ""
            if gap := self._answers_gap(got, self._wanted_alone):
                return gap
        if self._wanted is None:
            return ""
        got = split.generate(**_here(padded), **_GREEDY).logits
        return self._answers_gap(got, self._wanted)

    def _answers_gap(self, got: Sequence[Tensor], want: Sequence[Tensor]) -> str:
        """How far logits of new tokens are apart, as long as the texts are the same."""
        for one, other in zip(got, want, strict=True):
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
