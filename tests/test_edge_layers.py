"""Decoder layers on the edge: the same losses, gradients and tokens as with all of them in the
cloud.
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import (
    BY_FAMILY,
    FAMILIES,
    NO_DRAIN,
    adapter,
    batches,
    lora,
    make_base,
    make_local,
    make_split,
)
from helpers import FlopCount
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.responder import Responder
from dlora.edge.skeleton import drop_stand_ins
from dlora.embedded import InProcessLink
from dlora.errors import ModelError, PeerError, UsageError
from dlora.inference.answer import Continuing
from dlora.protocol.layer_files import files_for, is_layer_file
from dlora.protocol.layers import EdgeLayers
from dlora.server.server import Server

SPLITS = [(1, 0), (0, 1), (1, 1), (2, 0)]


@pytest.fixture(scope="module")
def held() -> Iterator[Callable[..., Any]]:
    """Split models whose edge holds layers; each cloud allows just those."""
    made: dict[tuple[str, tuple[int, int]], InProcessLink] = {}

    def get(family: str, split: tuple[int, int], config: LoraConfig | None = None) -> Any:
        if (family, split) not in made:
            limits = Limits(edge_first=split[0], edge_last=split[1])
            made[family, split] = InProcessLink(
                CloudModel(make_base(family), model_id=family, limits=limits)
            )
        return make_split(made[family, split], config or lora(family), edge_layers=split)

    yield get
    for link in made.values():
        link.close()


def grads_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and every adapter gradient of a step."""
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in adapter(model).items()}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_gradients_equal_local_peft(held: Any, family: str, split: tuple[int, int]) -> None:
    """Were a held layer run with other masks, positions or weights, loss or gradients would not be
    local peft's.
    """
    model = held(family, split)
    local = make_local(family, lora(family))
    for batch in batches(2):
        loss, grads = grads_of(model, batch)
        want_loss, want = grads_of(local, batch)
        assert loss == pytest.approx(want_loss, rel=1e-5)
        assert grads.keys() == want.keys()
        for name, grad in want.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "targets", ["only the first layer", "only the last layer", "none in the cloud"]
)
def test_adapters_on_held_layers_alone(held: Any, targets: str) -> None:
    """With nothing to exchange in the cloud, gradients still pass through it, and only where
    something below asks.
    """
    layers = {"only the first layer": [0], "only the last layer": [2], "none in the cloud": [0, 2]}[
        targets
    ]
    config = lora(layers_to_transform=layers)
    model, local = held("llama", (1, 1), config), make_local("llama", config)
    (batch,) = batches()
    (loss, grads), (want_loss, want) = grads_of(model, batch), grads_of(local, batch)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for name, grad in want.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    assert model.sites == ()
    assert (model.meter.cloud_backward_flops > 0) == (0 in layers)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_greedy_tokens_equal_local_peft(held: Any, family: str, split: tuple[int, int]) -> None:
    """Were the two halves' KV caches of different lengths, or left padding lost, other tokens would
    come out.
    """
    model = held(family, split).eval()
    local = make_local(family, lora(family)).eval()
    ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": mask,
        "pad_token_id": 0,
    }
    got, want = model.generate(ids, **options), local.generate(ids, **options)
    assert got.tolist() == want.tolist()
    assert model.meter.passes == got.shape[1] - ids.shape[1]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_beams_and_drafts_move_both_caches(held: Any, options: dict[str, Any]) -> None:
    """Were only the cloud's cache reordered or rolled back, beams and drafts would change the
    tokens.
    """
    model = held("llama", (1, 1)).eval()
    local = make_local("llama", lora()).eval()
    ids = torch.randint(5, 30, (1, 9), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0} | options
    assert model.generate(ids, **options).tolist() == local.generate(ids, **options).tolist()


def test_a_lost_stream_changes_no_answer(held: Any) -> None:
    """A cache that is made again in the cloud gets the hidden states that the edge kept."""
    model = held("llama", (1, 1)).eval()
    ids = torch.randint(5, 300, (1, 6), generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    cache = dlora.CloudCache()
    first = model.generate(ids, **options | {"max_new_tokens": 3}, past_key_values=cache)
    cache.close()
    rest = model.generate(first, **options | {"max_new_tokens": 3}, past_key_values=cache)
    assert rest.tolist() == want.tolist()


def test_base_dropout_is_off_on_the_edge_as_in_the_cloud() -> None:
    """OPT's own dropout in a held layer would make training there noisier than in the cloud's
    layers.
    """
    base = make_base("opt")
    base.config.dropout = 0.5
    with closing(
        InProcessLink(CloudModel(base, model_id="opt", limits=Limits(edge_first=1)))
    ) as link:
        model = make_split(link, lora("opt"), edge_layers=(1, 0))
        (batch,) = batches()
        model.train()
        assert model(**batch).loss.item() == model(**batch).loss.item()


def test_accounting_counts_held_layers(held: Any) -> None:
    """FLOPs of held layers are those that torch counts on the edge, forward and backward."""
    model = held("llama", (1, 1))
    (batch,) = batches()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model.set_attn_implementation("eager")
    model.train()
    before = model.meter.copy()
    with FlopCount() as count:
        model(**batch).loss.backward()
    cost = model.meter - before
    assert cost.edge_layer_flops > 0
    # torch also counts the small product that makes rotary angles.
    assert cost.edge_flops == pytest.approx(count.total, rel=2e-3)


def test_over_the_network_and_into_a_folder(tmp_path: Path) -> None:
    """A real server gives layer files once; the adapter trained beside them is a usual one that
    peft loads.
    """
    limits = Limits(edge_first=1, edge_last=1)
    cloud = CloudModel(make_base("llama"), model_id="example-org/llama", limits=limits)
    with Server(cloud, options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path / "cache")
        model = make_split(link, lora(), edge_layers=(1, 1))
        assert (
            link.layer_files(
                ["decoder.safetensors", "layer-0000.safetensors", "layer-0002.safetensors"]
            )
        ).is_dir()
        optimizer = torch.optim.AdamW(adapter(model).values(), lr=1e-2)
        for batch in batches(3):
            grads_of(model, batch)
            optimizer.step()
        model.save_pretrained(str(tmp_path / "adapter"))
        (batch,) = batches(seed=9)
        model.eval()
        with torch.no_grad():
            got = model(**batch).loss.item()
        link.close()
    local = PeftModel.from_pretrained(make_base("llama"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert local(**batch).loss.item() == pytest.approx(got, rel=1e-5)
    names = [name for name in local.state_dict() if "lora_" in name]
    assert len(names) == 2 * 3 * 3


def test_the_provider_decides(held: Any, links: Any) -> None:
    """A server that allows no edge layers gives none away, whatever an edge asks for."""
    with pytest.raises(UsageError, match="lets edges hold up to the first 0"):
        make_split(links("llama"), lora(), edge_layers=(1, 0))
    assert list(links("llama").description.layers.files) == []
    model = make_split(links("llama"), lora())
    model.edge_layers = held("llama", (1, 0)).edge_layers
    model.active_set.sites = ()  # so that nothing but the number of layers is wrong
    with pytest.raises(PeerError, match="lets edges hold the first 0"):
        model._through_cloud(_entry(model), None)
    with pytest.raises(UsageError, match="at least to stay in the cloud"):
        CloudModel(make_base("llama"), model_id="x", limits=Limits(edge_first=2, edge_last=1))


def _entry(model: Any) -> Any:
    from dlora.edge.passes import PassInput

    keep = torch.ones(1, 4, dtype=torch.bool)
    return PassInput(torch.zeros(1, 4, 64), None, None, keep)


def test_layers_that_share_more_are_refused() -> None:
    """A decoder whose layers see more than hidden states would give other results, so it is refused
    at load.
    """
    base = make_base("llama")
    layers = base.model.layers
    seen: list[torch.Tensor] = []
    layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    layers[2].register_forward_pre_hook(lambda module, args: (args[0] + seen[-1],))
    with pytest.raises(ModelError, match="share more than hidden states"):
        CloudModel(copy.deepcopy(base), model_id="x", limits=Limits(edge_first=1))


@pytest.mark.parametrize(
    ("limits", "half"), [((2, 0), "the first 1 and the last 0 .* cloud's"), ((0, 1), "edge's")]
)
def test_every_border_is_checked_on_both_halves(limits: tuple[int, int], half: str) -> None:
    """Where layer 2 needs layer 0's output, they may not be in different halves, at no border that
    is allowed.
    """
    base = make_base("llama")
    seen: list[torch.Tensor] = []
    base.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    base.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + seen[-1],))
    with pytest.raises(ModelError, match=half):
        CloudModel(base, model_id="x", limits=Limits(edge_first=limits[0], edge_last=limits[1]))


def test_a_cache_belongs_to_the_adapters_of_held_layers_too(held: Any) -> None:
    """Keys and values made with an adapter in a held layer are not continued without it, nor with
    another.
    """
    model = held("llama", (1, 0), lora(layers_to_transform=[0])).eval()
    ids = torch.randint(5, 300, (1, 6), generator=torch.Generator().manual_seed(5))
    cache = dlora.CloudCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        with pytest.raises(UsageError, match="filled with other adapters"), model.disable_adapter():
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 6
        model(
            input_ids=ids[:, :1], past_key_values=cache, use_cache=True
        )  # nothing was lost by what was refused


class _Lying:
    """A link whose description or files are not what the cloud has."""

    def __init__(self, link: InProcessLink, folder: Path | None = None, **layers: Any) -> None:
        self.link, self.folder = link, folder
        self.description = type(link.description)()
        self.description.CopyFrom(link.description)
        for name, value in layers.items():
            setattr(self.description.layers, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def layer_files(self, names: Any) -> Path:
        return self.folder or self.link.layer_files(names)


@pytest.fixture
def honest() -> Iterator[InProcessLink]:
    limits = Limits(edge_first=1, edge_last=1)
    with closing(
        InProcessLink(CloudModel(make_base("llama"), model_id="llama", limits=limits))
    ) as link:
        yield link


@pytest.mark.parametrize("file", ["layer-0000.safetensors", "decoder.safetensors"])
@pytest.mark.parametrize(
    "harm", ["lacks one", "other layer", "int64", "float16", "float64", "shape", "noise", "nothing"]
)
def test_layer_files_that_do_not_fit_are_refused(
    honest: InProcessLink, tmp_path: Path, file: str, harm: str
) -> None:
    """A cloud's word about its files is not trusted: one that is not whole is an error that names
    the file.
    """
    folder = tmp_path / "files"
    shutil.copytree(honest.layer_files([]), folder)
    weights = load_file(folder / file)
    name, value = next((n, v) for n, v in weights.items() if n.endswith("weight"))
    if harm == "lacks one":
        weights.pop(name)
    elif harm == "other layer":
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64)
    elif harm in ("int64", "float16", "float64"):
        weights[name] = value.to(getattr(torch, harm))
    elif harm == "shape":
        weights[name] = value[:1].clone()
    save_file(weights, folder / file)
    if harm in ("noise", "nothing"):
        (folder / file).write_bytes(b"\x07" * 40 if harm == "noise" else b"")
    with pytest.raises(ModelError, match=f"{file} from in process does not fit"):
        make_split(_Lying(honest, folder), lora(), edge_layers=(1, 1))


@pytest.mark.parametrize("split", [(1, 0), (0, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_a_cloud_that_misnames_outputs_is_found_out(family: str, split: tuple[int, int]) -> None:
    """A layer's output taken for a tuple, or the reverse, is DLoRA's own error and no wrong
    result.
    """
    limits = Limits(edge_first=split[0], edge_last=split[1])
    with closing(
        InProcessLink(CloudModel(make_base(family), model_id=family, limits=limits))
    ) as link:
        wrong = not link.description.layers.in_tuple
        model = make_split(_Lying(link, in_tuple=wrong), lora(family), edge_layers=split)
        with pytest.raises(ModelError, match="does not fit this architecture"):
            model(**batches()[0])


def test_gradients_of_held_layers_are_checked(
    honest: InProcessLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite but senseless values of a cloud must not become an update of an adapter that autograd
    reaches.
    """
    config = lora(layers_to_transform=[0])
    model = make_split(honest, config, edge_layers=(1, 0))
    model.add_adapter("second", config)
    decode = Responder.decode

    def huge(self: Any, message: Any, shape: Any, what: str) -> torch.Tensor:
        found = decode(self, message, shape, what)
        return torch.full_like(found, 3e38) if what == "gradient of the cloud's input" else found

    monkeypatch.setattr(Responder, "decode", huge)
    for adapter_name in ("default", "second"):
        model.set_adapter(adapter_name)
        with pytest.raises(PeerError, match=r"a gradient of .*layers\.0\..* is not finite"):
            model(**batches()[0]).loss.backward()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("decoder.safetensors", True),
        *((file, True) for file in files_for(EdgeLayers(1, 1, 1000))),
        ("layer-0000.bin", False),
        ("layer-000.safetensors", False),
        ("layer-00000.safetensors", False),
        ("layer-\u0660\u0660\u0660\u0660.safetensors", False),
        ("../layer-0000.safetensors", False),
        ("x/decoder.safetensors", False),
        ("layer-0000.safetensors\n", False),
    ],
)
def test_only_layer_files_are_fetched(name: str, known: bool) -> None:
    """Were a name of another form taken from a server, its file could land outside the cache."""
    assert is_layer_file(name) == known


def test_small_weights_are_no_stand_ins() -> None:
    """Dropping what has no memory must not drop a real weight of a few bytes."""
    module = torch.nn.Module()
    module.real = torch.nn.Parameter(torch.ones(2))
    module.stand_in = torch.nn.Parameter(torch.zeros(1).expand(3, 2), requires_grad=False)
    drop_stand_ins(module)  # type: ignore[arg-type]
    assert module.real.tolist() == [1, 1] and module.stand_in.numel() == 0


@pytest.fixture(scope="module")
def sliding() -> Iterator[tuple[Any, InProcessLink]]:
    """A Gemma with a window of 6 in its first and last layer, which the edge holds."""
    config = copy.deepcopy(FAMILIES["gemma3"][0])
    config.sliding_window = 6
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    cloud = CloudModel(
        copy.deepcopy(base), model_id="sliding", limits=Limits(edge_first=1, edge_last=1)
    )
    with closing(InProcessLink(cloud)) as link:
        yield base, link


def pair(sliding: tuple[Any, InProcessLink]) -> tuple[Any, Any]:
    """The split model and the local one."""
    torch.manual_seed(1)
    local = peft.get_peft_model(copy.deepcopy(sliding[0]), lora("gemma3")).eval()
    return make_split(sliding[1], lora("gemma3"), edge_layers=(1, 1)).eval(), local


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_held_windows_give_local_tokens(sliding: Any, options: dict[str, Any]) -> None:
    """A held layer with a sliding window, full by then, keeps, reorders and takes back what local
    peft's does.
    """
    split, local = pair(sliding)
    ids = torch.randint(5, 30, (1, 13), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0} | options
    assert split.generate(ids, **options).tolist() == local.generate(ids, **options).tolist()


def test_turns_go_back_behind_a_held_window(sliding: Any) -> None:
    """A kept cache is taken back farther than the window of a held layer, and answers as a fresh
    one does.
    """
    split, local = pair(sliding)
    responder, base = (
        Continuing(split),
        torch.randint(5, 300, (1, 20), generator=torch.Generator().manual_seed(6)),
    )
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for same in (20, 16, 9, 3, 20):
        ids = torch.cat([base[:, :same], torch.full((1, 2), 7 + same)], dim=1)
        got = responder.generate(ids, attention_mask=torch.ones_like(ids), **options)
        want = local.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert got.tolist() == want.tolist(), same
    responder.close()


def test_a_pass_that_fails_above_the_cloud_leaves_both_caches(
    sliding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a held layer fails after the cloud was through, the same tokens can be given again."""
    split, _ = pair(sliding)
    ids = torch.randint(5, 300, (1, 12), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        want = split(input_ids=ids, use_cache=True, past_key_values=dlora.CloudCache()).logits
        cache = dlora.CloudCache()
        cache.activate_past_recording()
        split(input_ids=ids[:, :9], use_cache=True, past_key_values=cache)
        norm = split.get_base_model().model.layers[2].post_feedforward_layernorm
        forward = norm.forward
        monkeypatch.setattr(norm, "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            split(input_ids=ids[:, 9:], use_cache=True, past_key_values=cache)
        assert cache.get_seq_length() == 9
        monkeypatch.setattr(norm, "forward", forward)
        got = split(input_ids=ids[:, 9:], use_cache=True, past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, 9:], rtol=1e-4, atol=1e-5)
