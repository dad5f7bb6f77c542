"""Generation with a KV cache in the cloud against local peft's `generate`."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, NO_DRAIN, batches, lora, make_base, make_local, make_split
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, TextStreamer

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.embedded import InProcessLink
from dlora.errors import PeerError, PeerLost, UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.wire import encode
from dlora.server.server import Server, ServerOptions

Links = Callable[[str], Any]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def prompts(rows: int = 3, seed: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch of prompts of unequal lengths."""
    batch = batches(rows=rows, seed=seed)[0]
    ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["attention_mask"])
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids[row, -length:] = batch["input_ids"][row, :length]
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def one_prompt(ids: list[int]) -> dict[str, torch.Tensor]:
    """A batch of one prompt."""
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
    }


ECHO = one_prompt([5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6])


def both(links: Links, family: str) -> tuple[Any, Any]:
    """Local and split model with the same adapter, ready to generate."""
    return make_local(family, lora(family)).eval(), make_split(links(family), lora(family)).eval()


def generated(
    model: Any, batch: dict[str, torch.Tensor], seed: int = 3, **options: Any
) -> torch.Tensor:
    """Tokens of `generate` at a fixed seed."""
    torch.manual_seed(seed)
    return model.generate(**batch, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_local(links: Links, family: str) -> None:
    """Greedy tokens of a padded batch are local peft's, with one pass a token after the first."""
    local, split = both(links, family)
    got = generated(split, prompts(), **GREEDY)
    assert torch.equal(got, generated(local, prompts(), **GREEDY))
    new = got.shape[1] - prompts()["input_ids"].shape[1]
    assert split.meter.passes == new
    assert split.meter.round_trips == new * (len(split.sites) + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_tokens_equal_local(links: Links, family: str) -> None:
    """Sampling happens on the edge: at the same seed, with processors, tokens are local peft's."""
    local, split = both(links, family)
    options = {
        "max_new_tokens": 8,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
    }
    assert torch.equal(
        generated(split, prompts(), **options), generated(local, prompts(), **options)
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_beam_search_equals_local(links: Links, family: str) -> None:
    """Beam search reorders the rows of the cloud's cache as it would the local one's."""
    local, split = both(links, family)
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(
        generated(split, prompts(), **options), generated(local, prompts(), **options)
    )


@pytest.fixture(scope="module")
def sliding() -> Iterator[tuple[Any, InProcessLink]]:
    """A model whose attention slides over 8 tokens in two of three layers."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES["gemma3"][0])
    config.sliding_window = 8
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    link = dlora.in_process(copy.deepcopy(model), model_id="example-org/sliding")
    yield model, link
    link.close()


def test_drafts_change_nothing_but_the_number_of_passes(links: Links) -> None:
    """Prompt look-up gives greedy's tokens in fewer passes where the text repeats itself."""
    local, split = both(links, "llama")
    want = generated(local, ECHO, max_new_tokens=40, do_sample=False)
    before = split.meter.passes
    assert torch.equal(
        generated(split, ECHO, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=5), want
    )
    assert split.meter.passes - before < want.shape[1] - ECHO["input_ids"].shape[1]
    assert split.meter.retries == 0


def test_drafts_roll_back_a_sliding_window(sliding: tuple[Any, InProcessLink]) -> None:
    """A cache is rolled back in place also where its window is full."""
    import peft

    torch.manual_seed(1)
    local = peft.get_peft_model(copy.deepcopy(sliding[0]), lora("gemma3")).eval()
    split = make_split(sliding[1], lora("gemma3")).eval()
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        got = generated(split, ECHO, max_new_tokens=20, do_sample=False, **options)
        assert torch.equal(got, generated(local, ECHO, max_new_tokens=20, do_sample=False))


def test_turns_go_back_behind_a_sliding_window(sliding: tuple[Any, InProcessLink]) -> None:
    """A kept cache is taken back by any number of tokens, also where its window is full: a fresh
    one's answers.
    """
    import peft

    from dlora.inference.answer import Continuing

    torch.manual_seed(1)
    local = peft.get_peft_model(copy.deepcopy(sliding[0]), lora("gemma3")).eval()
    split = make_split(sliding[1], lora("gemma3")).eval()
    turns, options = (
        Continuing(split),
        {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0},
    )
    start = [*ECHO["input_ids"][0].tolist(), 11, 12, 13]
    first = local.generate(input_ids=torch.tensor([start]), **options)[0].tolist()
    for ids in (
        start,
        start,
        [*first[:-5], 20],
        [*first[:-9], 21, 22],
        start[:5],
        [*first, 9],
        start,
    ):
        want = local.generate(input_ids=torch.tensor([ids]), **options)
        assert torch.equal(turns.generate(torch.tensor([ids]), **options), want)
    assert split.meter.retries == 0
    turns.close()


def test_assistant_model_drafts(links: Links) -> None:
    """A small model on the edge may draft: the tokens stay those of greedy search."""
    local, split = both(links, "llama")
    assistant = make_base("llama", seed=5)
    got = generated(split, ECHO, assistant_model=assistant, **GREEDY)
    assert torch.equal(got, generated(local, ECHO, **GREEDY))


def test_stop_strings_and_streaming(links: Links, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop strings end the answer where local peft's would end, and a streamer sees every token of
    it.
    """

    class Pieces(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    local, split = both(links, "llama")
    unreadable = [
        number for number in range(300) if not tokenizer.decode([number]).strip().isalnum()
    ]
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": unreadable}
    want = generated(local, ECHO, **options)
    words = tokenizer.decode(want[0, ECHO["input_ids"].shape[1] :])
    pieces = Pieces(tokenizer, skip_prompt=True)
    options |= {"stop_strings": [words[2:5]], "tokenizer": tokenizer}
    got = generated(split, ECHO, streamer=pieces, **options)
    assert torch.equal(got, generated(local, ECHO, **options))
    assert got.shape[1] < want.shape[1]
    assert pieces.text == tokenizer.decode(got[0, ECHO["input_ids"].shape[1] :])


def test_cache_is_kept_for_the_next_turn(links: Links) -> None:
    """With a cache of one's own the next turn sends only new tokens, and says what a fresh one
    says.
    """
    local, split = both(links, "llama")
    cache = dlora.CloudCache()
    first = generated(split, ECHO, past_key_values=cache, **GREEDY)
    longer = one_prompt([*first[0].tolist(), 17, 18, 19])
    tokens = split.meter.tokens
    second = generated(split, longer, past_key_values=cache, **GREEDY)
    assert torch.equal(second, generated(local, longer, **GREEDY))
    new = second.shape[1] - longer["input_ids"].shape[1]
    assert (
        split.meter.tokens - tokens == 1 + 3 + new - 1
    )  # the last token of the answer had not been read yet
    # The next turn goes another way from the middle: the newest tokens are taken back.
    kept = first.shape[1] - 3
    cache.crop(-(cache.get_seq_length() - kept))
    other = one_prompt([*first[0, :kept].tolist(), 23, 24])
    assert torch.equal(
        generated(split, other, past_key_values=cache, **GREEDY), generated(local, other, **GREEDY)
    )
    assert split.meter.retries == 0
    cache.close()


def test_one_prefix_many_continuations(links: Links) -> None:
    """Rows of a cache can be repeated: a prompt is read once for all its continuations."""
    local, split = both(links, "llama")
    cache = dlora.CloudCache()
    tails = torch.tensor([[11, 12], [13, 14], [15, 16]])
    with torch.no_grad():
        split(**ECHO, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(3)
        got = split(input_ids=tails, past_key_values=cache, use_cache=True).logits
        whole = torch.cat([ECHO["input_ids"].expand(3, -1), tails], dim=1)
        want = local(input_ids=whole).logits[:, -2:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    cache.close()


def test_a_cache_that_outgrows_its_room_is_made_again(links: Links) -> None:
    """More tokens than expected cost a second prefill and change nothing."""
    local, split = both(links, "llama")
    cache = dlora.CloudCache(expected_length=14)
    got = generated(split, ECHO, past_key_values=cache, **GREEDY)
    assert torch.equal(got, generated(local, ECHO, **GREEDY))
    assert split.meter.tokens > ECHO["input_ids"].shape[1] + 7
    cache.close()


def test_long_sequences_are_read_in_slices(tmp_path: Path) -> None:
    """Prompts, and sequences that are read again after a loss, may be longer than one micro-batch
    may be.
    """
    cloud = CloudModel(
        make_base("llama"), model_id="example-org/llama", limits=Limits(max_tokens=10)
    )
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        local, split = make_local("llama", lora()).eval(), make_split(link, lora()).eval()
        batch = prompts(3)
        cache = dlora.CloudCache()
        first = generated(split, batch, past_key_values=cache, **GREEDY)
        assert torch.equal(first, generated(local, batch, **GREEDY))
        cache._responder.stream.call.cancel()
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 8, dtype=torch.int64)], dim=1)
        longer = {"input_ids": first, "attention_mask": mask[:, : first.shape[1]]}
        assert torch.equal(
            generated(split, longer, past_key_values=cache, **GREEDY),
            generated(local, longer, **GREEDY),
        )
        assert split.meter.retries == 1
        cache.close()
        whole = dlora.CloudCache()  # hidden states of several slices come back in order
        ids = torch.arange(5, 41).view(3, 12)
        with torch.no_grad():
            got, want = (
                split(input_ids=ids, past_key_values=whole, use_cache=True).logits,
                local(input_ids=ids).logits,
            )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        whole.close()
        link.close()


def test_idle_cache_is_made_again(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """A cloud that gave up on a silent edge gets the sequence again at the edge's next word."""
    with Server(
        cloud_models("llama"), options=ServerOptions(edge_timeout_s=0.3, drain_s=0.0)
    ) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        split = make_split(link, lora()).eval()
        cache = dlora.CloudCache()
        first = generated(split, ECHO, past_key_values=cache, **GREEDY)
        deadline = time.monotonic() + 20
        while (
            server._service.pipes or server._service.tenancy.inflight_bytes
        ) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server._service.pipes
        assert server._service.tenancy.inflight_bytes == 0
        longer = one_prompt([*first[0].tolist(), 17])
        got = generated(split, longer, past_key_values=cache, **GREEDY)
        assert split.meter.retries == 1
        assert torch.equal(got, generated(make_local("llama", lora()).eval(), longer, **GREEDY))
        cache.close()
        link.close()


def test_answer_frees_the_cloud(
    links: Links, cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """After `generate` the cloud holds no stream and no bytes, whether it ended or was
    interrupted.
    """

    class Stop(TextStreamer):
        def __init__(self) -> None:
            self.left = 3

        def put(self, value: torch.Tensor) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with Server(cloud_models("llama"), options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        split = make_split(link, lora()).eval()
        generated(split, ECHO, **GREEDY)
        with pytest.raises(KeyboardInterrupt):
            generated(split, ECHO, streamer=Stop(), **GREEDY)
        deadline = time.monotonic() + 20
        while (
            server._service.pipes or server._service.tenancy.inflight_bytes
        ) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not server._service.pipes and server._service.tenancy.inflight_bytes == 0
        link.close()


def test_cache_is_charged_before_it_is_made(tmp_path: Path) -> None:
    """The whole room of a KV cache is reserved at the start, and what cannot fit is refused or put
    off.
    """
    cloud = CloudModel(
        make_base("llama"), model_id="example-org/llama", limits=Limits(max_inflight_bytes=400_000)
    )
    assert (
        cloud.memory.cache_bytes_per_token == 2 * 2 * 16 * 4 * 3
    )  # keys and values, heads, width, fp32, layers
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        split = make_split(link, lora()).eval()
        with pytest.raises(PeerError, match="over this server's limits"):
            generated(split, prompts(3), max_new_tokens=230, do_sample=False)
        cache = dlora.CloudCache(expected_length=250)
        with torch.no_grad():
            split(**ECHO, past_key_values=cache, use_cache=True)
        deadline = time.monotonic() + 20  # while the edge thinks, the cache alone is reserved
        while (
            server._service.tenancy.inflight_bytes != 250 * cloud.memory.cache_bytes_per_token
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        assert server._service.tenancy.inflight_bytes == 250 * cloud.memory.cache_bytes_per_token
        split.set_options(retry=dlora.RetryPolicy(give_up_after_s=0.1))
        other = dlora.CloudCache(expected_length=250)
        with (
            torch.no_grad(),
            pytest.raises(PeerLost, match="busy: no room now for .* MiB of activations"),
        ):
            split(**ECHO, past_key_values=other, use_cache=True)
        cache.close()
        link.close()


def test_model_without_cache_still_generates(
    links: Links, cloud_models: Callable[[str], CloudModel]
) -> None:
    """Where the cloud found that a cache changes results, edges compute every token anew."""
    cloud = copy.copy(cloud_models("llama"))
    cloud.memory = dataclasses.replace(cloud.memory, cache_bytes_per_token=0)
    cloud.requests = dataclasses.replace(cloud.requests, memory=cloud.memory)
    link = InProcessLink(cloud)
    split = make_split(link, lora()).eval()
    want = generated(make_local("llama", lora()).eval(), prompts(), **GREEDY)
    for asked in ({}, {"use_cache": True}):  # as lm-eval asks for it
        assert torch.equal(generated(split, prompts(), **GREEDY, **asked), want)
    assert split.meter.passes == 0
    with torch.no_grad(), pytest.raises(PeerError, match="served without KV cache"):
        split(**ECHO, past_key_values=dlora.CloudCache())
    link.close()


def test_cache_is_refused_where_it_changes_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at load notices a cache that forgets."""
    import dlora.cloud.caches

    class Forgetful(DynamicCache):
        def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(keys * 1.01, values, *args, **kwargs)

    monkeypatch.setattr(dlora.cloud.caches, "DynamicCache", Forgetful)
    assert CloudModel(make_base("llama"), model_id="x/y").memory.cache_bytes_per_token == 0


def test_flops_of_cached_passes_equal_torchs_count(tmp_path: Path) -> None:
    """The cloud's FLOPs of prefill and of later passes are exactly those that torch counts."""
    base = make_base("llama")
    base.set_attn_implementation("eager")
    link = dlora.in_process(base, model_id="x/y")
    split = make_split(link, lora()).eval()
    requests = []
    make = link.cloud._pass
    link.cloud._pass = lambda request, *args: requests.append(request) or make(request, *args)
    generated(split, prompts(), **GREEDY)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = DynamicCache(config=base.config)
        for request in requests:
            embeddings = torch.zeros(request.batch, request.length, 64)
            link.cloud.parts.decoder(
                inputs_embeds=embeddings, attention_mask=request.mask_BT, past_key_values=cache
            )
    assert len(requests) == split.meter.passes
    assert split.meter.cloud_forward_flops == counter.get_total_flops()
    link.close()


# ----------------------------------------------------------------- refusals


def test_foreign_caches_are_refused_by_name(links: Links) -> None:
    """Caches whose keys and values would have to be on the edge are refused, and so are
    gradients.
    """
    split = make_split(links("llama"), lora()).eval()
    with pytest.raises(UsageError, match="got a DynamicCache, want a dlora.CloudCache"):
        split.generate(**ECHO, past_key_values=DynamicCache(), **GREEDY)
    with pytest.raises(UsageError, match="cache_implementation='static'"):
        split.generate(**ECHO, cache_implementation="static", **GREEDY)
    cache = dlora.CloudCache()
    with pytest.raises(UsageError, match=r"keeps no gradients"):
        split(**ECHO, past_key_values=cache)
    generated(split, ECHO, past_key_values=cache, **GREEDY)
    with pytest.raises(UsageError, match="cannot continue a KV cache"):
        generated(split, ECHO, past_key_values=cache, prompt_lookup_num_tokens=2, **GREEDY)
    cache.close()


def test_changed_past_is_refused(links: Links) -> None:
    """A cache is not continued with another mask or other adapters than it was filled with."""
    split = make_split(links("llama"), lora()).eval()
    cache = dlora.CloudCache()
    token = torch.tensor([[5]])
    with torch.no_grad():
        split(**ECHO, past_key_values=cache, use_cache=True)
        mask = torch.ones(1, 13, dtype=torch.int64)
        mask[0, 0] = 0
        with pytest.raises(UsageError, match="other tokens than before are masked"):
            split(input_ids=token, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UsageError, match=r"want \[1, 13\]"):
            split(input_ids=token, attention_mask=mask[:, :5], past_key_values=cache)
        with split.disable_adapter(), pytest.raises(UsageError, match="filled with other adapters"):
            split(input_ids=token, past_key_values=cache)
        other = make_split(links("llama"), lora(), seed=9).eval()
        with pytest.raises(UsageError, match="filled with other adapters"):
            other(input_ids=token, past_key_values=cache)
        with pytest.raises(UsageError, match="minus the number of tokens"):
            cache.crop(3)
        with pytest.raises(UsageError, match="at most 12"):
            cache.crop(-13)
    cache.close()


def begin(link: Any, **fields: Any) -> pb.Begin:
    """A prefill of one row of four tokens without active sites."""
    values = {
        "protocol_version": PROTOCOL_VERSION,
        "fingerprint": link.description.fingerprint,
        "wire_dtype": pb.FP32,
        "batch": 1,
        "length": 4,
        "cache_length": 10,
        "rollback": True,
        "keep": [3],
        "embeddings": encode(torch.zeros(4, 64), pb.FP32),
    }
    return pb.Begin(**(values | fields))


def extend(**fields: Any) -> pb.Extend:
    """Two more tokens."""
    return pb.Extend(
        **({"length": 2, "keep": [1], "embeddings": encode(torch.zeros(2, 64), pb.FP32)} | fields)
    )


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"training": True}, None, "not for training"),
        ({"cache_length": 10_000}, None, "KV cache of 10000 tokens is over"),
        ({"cache_length": 3}, None, "4 tokens do not fit a KV cache of 3"),
        ({}, {"length": 0}, "empty micro-batch"),
        ({}, {"length": 7}, "11 tokens do not fit a KV cache of 10"),
        ({}, {"length": 2**31}, "over this server's limit"),
        ({}, {"drop": 5}, "drop: got 5 tokens, the KV cache holds 4"),
        ({"rollback": False}, {"drop": 1}, "was not asked to roll back"),
        ({}, {"order": [1]}, "want rows under 1"),
        ({}, {"order": [0, 0]}, r"got shape \[2, 64\], want \[4, 64\]"),
        ({}, {"order": [0] * 20_000}, "over this server's limits"),
        ({}, {"keep": [0] * 20_000}, "got a frame of .* for 2 tokens"),
        ({}, {"keep": [2]}, "ascending positions under 2"),
        ({}, {"attention_mask": b"\1"}, "got 1 bytes, want 1 x 2"),
        ({}, {"position_ids": [1]}, "position_ids: want 2 values"),
        ({}, {"position_ids": [1, 4000]}, "position_ids: want 2 values under 256"),
    ],
)
def test_hostile_frames_are_refused(links: Links, first: Any, then: Any, message: str) -> None:
    """Frames around the cache that do not fit end the stream with a status that says why."""
    link = links("llama")
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link, **first)))
    with pytest.raises(PeerError, match=message):
        stream.receive()
        stream.send(pb.EdgeFrame(extend=extend(**then)))
        stream.receive()
    stream.close()


def test_frames_out_of_order_are_refused(links: Links) -> None:
    """An Extend needs a cache before it, and nothing else may follow a pass with a cache."""
    link = links("llama")
    for frames, message in (
        ([pb.EdgeFrame(extend=extend())], "want 'begin'"),
        ([pb.EdgeFrame(begin=begin(link)), pb.EdgeFrame(begin=begin(link))], "want 'extend'"),
    ):
        stream = link.open()
        for frame in frames:
            stream.send(frame)
        with pytest.raises(PeerError, match=message):
            for _ in range(3):
                stream.receive()
        stream.close()


def test_rolled_back_and_repeated_cache_answers_as_a_fresh_one(links: Links) -> None:
    """Drop and order, in one frame, leave exactly the tokens and rows that they name."""
    link = links("llama")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=generator)
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link, embeddings=encode(x[:4], pb.FP32))))
    stream.receive()
    both_rows = encode(torch.cat([x[4:], x[4:]]), pb.FP32)
    stream.send(
        pb.EdgeFrame(extend=extend(drop=2, order=[0, 0], keep=[1, 3], embeddings=both_rows))
    )
    got = stream.receive().hidden.hidden
    stream.close()
    stream = link.open()
    whole = torch.cat([x[:2], x[4:]])
    stream.send(pb.EdgeFrame(begin=begin(link, embeddings=encode(whole, pb.FP32))))
    want = torch.frombuffer(bytearray(stream.receive().hidden.hidden.data), dtype=torch.float32)
    stream.close()
    rows = torch.frombuffer(bytearray(got.data), dtype=torch.float32).view(2, 64)
    torch.testing.assert_close(rows, want.expand(2, 64), rtol=1e-5, atol=1e-5)
