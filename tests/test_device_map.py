"""A model whose parts live in different places: the same results, and plans for what is too large
to be here.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_split
from test_faults import FaultyLink
from transformers import AutoModelForCausalLM, LlamaConfig

import dlora
from dlora.cloud.device_map import read_device_map, read_max_memory
from dlora.cloud.limits import Limits
from dlora.cloud.load import load_cloud, load_model
from dlora.cloud.placement import plan
from dlora.edge.link import RetryPolicy
from dlora.embedded import InProcessLink
from dlora.errors import PeerLost, UsageError
from dlora.protocol.weights import is_offloaded
from dlora.server.server import Server, ServerOptions

PARTS = ["embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.2"]


def write_map(file: Path, **places: Any) -> str:
    """A map of the tiny Llama: everything on the CPU but for what `places` says."""
    names = {f"model.{part}": places.get(part.replace(".", "_"), "cpu") for part in PARTS}
    file.write_text(json.dumps(names | {"lm_head": places.get("lm_head", "cpu")}))
    return str(file)


@pytest.fixture(scope="module")
def clouds(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny Llama as a whole, and with two layers, the norm and the head on disk."""
    file = tmp_path_factory.mktemp("maps") / "map.json"
    on_disk = write_map(file, layers_1="disk", layers_2="disk", norm="disk", lm_head="disk")

    def load(device_map: str | None) -> Any:
        return load_cloud(
            str(model_folder), allow_modules=".", limits=Limits(), device_map=device_map
        )[0]

    return SimpleNamespace(whole=load(None), disk=load(on_disk), map=on_disk)


@pytest.fixture(scope="module")
def links(clouds: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """Both in this process."""
    made = [InProcessLink(cloud) for cloud in (clouds.whole, clouds.disk)]
    yield SimpleNamespace(whole=made[0], disk=made[1])
    for link in made:
        link.close()


def test_weights_stay_on_disk(clouds: SimpleNamespace) -> None:
    """Between passes nothing of an offloaded module is in memory, and it is the same model: its
    fingerprint, description and edge files are.
    """
    whole, disk = clouds.whole, clouds.disk
    offloaded = [name for name, one in disk.model.named_modules() if is_offloaded(one)]
    assert "model.layers.1.mlp.up_proj" in offloaded and "lm_head" in offloaded
    assert "model.layers.0.mlp.up_proj" not in offloaded
    for name in offloaded:
        assert disk.model.get_submodule(name).weight.device.type == "meta", name
    assert disk.fingerprint == whole.fingerprint
    norms = [
        [module.weight_norm for site in cloud.describe().sites for module in site.modules]
        for cloud in (whole, disk)
    ]
    assert norms[0] == norms[1] and all(norms[0])
    assert disk.limits.recompute and not whole.limits.recompute
    assert disk.memory.bytes_per_token == pytest.approx(whole.memory.bytes_per_token, rel=0.05)


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
def test_weights_on_disk_train_as_in_memory(links: SimpleNamespace, wire: str) -> None:
    """Two accumulated micro-batches give the same losses and gradients, with frozen modules in the
    cloud as well.
    """
    found = []
    for link in (links.whole, links.disk):
        split = make_split(link, lora(), wire=wire, upload_consent=wire == "hosted")
        split.set_active(split.adapted_modules[::2], "cloud")
        losses = []
        for batch in batches(2):
            losses.append(split(**batch).loss)
            losses[-1].backward()
        grads = {name: p.grad for name, p in adapter(split).items() if p.grad is not None}
        found.append(([loss.item() for loss in losses], grads))
    (want, grads), (got, same) = found
    assert got == want and same.keys() == grads.keys()
    for name, grad in grads.items():
        assert (same[name] - grad).abs().max() <= 1e-6 * grad.abs().max(), name


def test_weights_on_disk_generate_as_in_memory(links: SimpleNamespace) -> None:
    """Greedy tokens with a KV cache are those of the model in memory."""
    ids = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(3))
    answers = [
        make_split(link, lora())
        .eval()
        .generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
        for link in (links.whole, links.disk)
    ]
    assert answers[0].shape == (2, 12) and torch.equal(answers[0], answers[1])


def test_passes_on_several_threads_share_what_is_read(
    clouds: SimpleNamespace, links: SimpleNamespace, tmp_path: Path
) -> None:
    """Four edges at once on two compute slots, one of which loses its stream again and again, get
    the gradients of an edge alone; afterwards nothing is left in memory.
    """
    retry = RetryPolicy(give_up_after_s=60.0, first_delay_s=0.01, longest_delay_s=0.05)

    def lose() -> None:
        raise PeerLost("the stream is gone")

    def train(split: Any, link: Any, seed: int) -> None:
        for number, batch in enumerate(batches(3, seed=seed)):
            if isinstance(link, FaultyLink):
                link.number = number
            split(**batch).loss.backward()

    def grads(split: Any) -> list[torch.Tensor]:
        return [p.grad for p in adapter(split).values()]

    alone = [make_split(links.whole, lora(), seed=seed) for seed in range(4)]
    for seed, split in enumerate(alone):
        train(split, links.whole, seed)
    options = ServerOptions(drain_s=0.0, compute_slots=2)
    with Server(clouds.disk, options=options) as server:
        made = [dlora.connect(server.address, cache=tmp_path) for _ in range(4)]
        plan = {0: ("receive", 2), 1: ("receive", 5), 2: ("receive", 6)}
        faulty = FaultyLink(made[0], plan, lose)
        # One after the other: what is drawn comes from the process's one generator.
        edges = [faulty, *made[1:]]
        splits = [make_split(edge, lora(), seed=n, retry=retry) for n, edge in enumerate(edges)]
        threads = [
            threading.Thread(target=train, args=(splits[seed], edges[seed], seed))
            for seed in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for link in made:
            link.close()

    assert not faulty.plan and splits[0].meter.retries == 3
    for one, other in zip(alone, splits, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(grads(one), grads(other), strict=True))
    for name, module in clouds.disk.model.named_modules():
        if is_offloaded(module):
            assert module.weight.device.type == "meta", name


def test_a_low_bit_base_is_spread_but_not_offloaded(model_folder: Path, tmp_path: Path) -> None:
    """`quantize` goes with one place for all, and is refused where weights would go to disk."""
    options: dict[str, Any] = {"quantize": "int4"}
    assert load_model(str(model_folder), device_map="auto", **options).model.device.type == "cpu"
    on_disk = write_map(tmp_path / "map.json", layers_1="disk")
    with pytest.raises(UsageError, match="low-bit weights are not offloaded"):
        load_model(str(model_folder), device_map=on_disk, **options)


def test_little_memory_sends_layers_to_disk(model_folder: Path) -> None:
    """With `auto`, what max_memory leaves no room for is on disk."""
    loaded = load_model(str(model_folder), device_map="auto", max_memory={"cpu": "400KiB"})
    places = set(loaded.model.hf_device_map.values())
    assert places == {"cpu", "disk"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "device beside": ({"device_map": "auto", "device": "meta"}, "give one of the two"),
    "memory alone": ({"max_memory": {"cpu": "1GiB"}}, "max_memory is of device_map"),
    "size": ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "want a size such as 20GiB"),
    "device": ({"device_map": "auto", "max_memory": {"Z!": "1GiB"}}, "want the number of a GPU"),
    "plan as device": ({"device": "auto"}, "device_map takes 'auto'"),
    "no file": ({"device_map": "nowhere.json"}, "auto, balanced, sequential or a JSON file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_placement_is_refused(model_folder: Path, case: str) -> None:
    """In one line, before anything is loaded."""
    options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        load_model(str(model_folder), **options)


def test_an_embedding_on_disk_and_edge_layers_are_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    """Rows of edges go in at the embedding's device, and edge layers are read from the model."""
    options: dict[str, Any] = {"allow_modules": "."}
    no_embedding = write_map(tmp_path / "one.json", embed_tokens="disk")
    with pytest.raises(UsageError, match="token embedding has to stay on a device"):
        load_cloud(str(model_folder), limits=Limits(), device_map=no_embedding, **options)
    on_disk = write_map(tmp_path / "two.json", layers_2="disk")
    with pytest.raises(UsageError, match="edge layers need weights that stay"):
        load_cloud(str(model_folder), limits=Limits(edge_last=1), device_map=on_disk, **options)


def test_a_map_that_is_no_map_is_refused(tmp_path: Path) -> None:
    """Files that are not JSON, or not names with devices, are refused by name."""
    file = tmp_path / "map.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "wants names of modules"),
        ('{"a": -1}', "a: got -1"),
        ('{"a": "GPU one"}', "got 'GPU one'"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_device_map(str(file))
    file.write_text('{"a": 0, "b": "1", "c": "cuda:2", "d": "disk"}')
    assert read_device_map(str(file)) == {"a": 0, "b": 1, "c": "cuda:2", "d": "disk"}
    assert read_max_memory({"0": "20GiB", "cpu": "1.5 TB"}) == {0: "20GiB", "cpu": "1.5 TB"}


@pytest.mark.parametrize("name", ["auto", "balanced"])
@pytest.mark.filterwarnings("ignore:Device .* is not available")
def test_a_plan_for_a_model_of_seventy_billion(name: str) -> None:
    """From shapes alone: every layer of a 70B Llama in bf16 is on one of two GPUs of 80 GB, none is
    cut in two and they follow each other; with 40 GB each the rest stays in memory and on disk.
    """
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(70.6e9, rel=0.01)

    roomy = plan(model, name, read_max_memory({"0": "80GB", "1": "80GB"}))
    order = [roomy[f"model.layers.{index}"] for index in range(80)]
    assert set(roomy.values()) == {0, 1} and order == sorted(order)
    assert 30 < order.count(0) < 50
    tight = plan(model, name, read_max_memory({"0": "40GB", "1": "40GB", "cpu": "30GB"}))
    assert set(tight.values()) == {0, 1, "cpu", "disk"}
    assert tight["model.embed_tokens"] == 0
