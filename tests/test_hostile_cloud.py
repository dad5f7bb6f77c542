"""A malicious cloud: what it can do to an edge is one line of error, in bounded time and memory."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from conftest import batches, lora, make_base, make_split
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import dlora
from dlora.cli.main import main
from dlora.edge.frame_size import parse_frame
from dlora.edge.grpc_errors import call_error
from dlora.edge.grpc_link import Access, GrpcLink
from dlora.edge.load import load_base
from dlora.edge.server_address import check_address, check_replica, proxy_of
from dlora.edge.stall import without_stalls
from dlora.edge.wall import wall
from dlora.errors import DLoRAError, ModelError, PeerError, PeerLost, UsageError, WireError
from dlora.files import ScratchFolder
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.protocol.files import describe_files, write_edge_files
from dlora.protocol.text import clean_text, without_controls
from dlora.protocol.wire import encode


class Evil(rpc.DLoRAServicer):
    """A cloud whose description, files and frames the test writes."""

    def __init__(self, description: pb.Description, folder: Path) -> None:
        self.description, self.folder = description, folder
        self.after_hidden = 0
        """Frames that nobody asked for, after the first pass."""
        self.sent = 0
        self.refusal: tuple[str, str] | None = None
        """Details and hint with which every stream ends."""

    def Describe(self, request: Any, context: Any) -> pb.Description:
        return self.description

    def FetchEdgeFiles(self, request: Any, context: Any) -> Iterator[pb.FileChunk]:
        for info in self.description.edge_files:
            yield pb.FileChunk(name=info.name, data=(self.folder / info.name).read_bytes())

    def Step(self, requests: Any, context: Any) -> Iterator[pb.CloudFrame]:
        begin = next(requests).begin
        if self.refusal is not None:
            context.set_trailing_metadata((("retry-after-ms", self.refusal[1]),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self.refusal[0])
        hidden = torch.zeros(len(begin.keep), self.description.hidden_width)
        yield pb.CloudFrame(hidden=pb.Hidden(hidden=encode(hidden, pb.FP32)))
        junk = pb.CloudFrame(hidden=pb.Hidden(hidden=pb.Tensor(data=bytes(2**20))))
        for _ in range(self.after_hidden):
            self.sent += 1
            yield junk
        next(requests, None)

    def announce(self) -> None:
        """Offer the files of the folder as they are now."""
        del self.description.edge_files[:]
        self.description.edge_files.extend(describe_files(self.folder))


@pytest.fixture
def evil(
    links: Callable[[str], GrpcLink], tokenizer: Any, tmp_path: Path
) -> Iterator[tuple[Evil, Callable[[], GrpcLink]]]:
    """A cloud that still tells the truth, and a way to connect to it with an empty cache."""
    description = pb.Description()
    description.CopyFrom(links("llama").description)
    folder = tmp_path / "offered"
    folder.mkdir()
    write_edge_files(make_base("llama"), tokenizer, folder)
    servicer = Evil(description, folder)
    servicer.announce()

    running = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_DLoRAServicer_to_server(servicer, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    opened: list[GrpcLink] = []

    def connect() -> GrpcLink:
        opened.append(dlora.connect(f"127.0.0.1:{port}", cache=tmp_path / "cache"))
        return opened[-1]

    servicer.address = f"127.0.0.1:{port}"  # type: ignore[attr-defined]
    yield servicer, connect
    for link in opened:
        link.close()
    running.stop(None)


def one_line(error: BaseException) -> bool:
    """Whether a message is a line that a terminal can show."""
    text = str(error)
    return len(text) < 1000 and text == clean_text(text, 1000)


# ----------------------------------------------------------------- frames


def test_frames_to_an_idle_chat_end_the_stream(evil: Any) -> None:
    """A cloud that sends between passes, while nobody reads, fills no memory and is named."""
    servicer, connect = evil
    servicer.after_hidden = 200
    split = load_base(connect(), wire_dtype="fp32")
    cache = dlora.CloudCache()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        split(input_ids=ids, past_key_values=cache, use_cache=True)
        deadline = time.monotonic() + 10
        while cache._responder.stream.flooded is None and time.monotonic() < deadline:
            time.sleep(0.01)
        stream = cache._responder.stream
        with pytest.raises(PeerError, match="more than 4 frames that nobody asked for") as caught:
            split(input_ids=ids, past_key_values=cache, use_cache=True)
    assert one_line(caught.value)
    assert stream.inbox.qsize() <= 4
    assert servicer.sent < 200


def test_frames_of_empty_parts_are_refused_before_they_are_parsed() -> None:
    """A frame of a few MiB cannot become gigabytes of empty submessages or numbers."""
    grads = pb.DeltaGrads(site=1, grads=[pb.Tensor()] * 5000)
    with pytest.raises(WireError, match="more than 4096 of field 2"):
        parse_frame(pb.CloudFrame(delta_grads=grads).SerializeToString())
    long = pb.Tensor(shape=[1] * 10_000)
    with pytest.raises(WireError, match="got 10000 bytes of numbers in field 2"):
        parse_frame(pb.CloudFrame(input=pb.SiteInput(site=1, x=long)).SerializeToString())
    for bad in (b"\xff" * 20, b"\x0a\xff\xff\xff\xff\x0f", b"\x0b"):
        with pytest.raises(WireError):
            parse_frame(bad)
    honest = pb.CloudFrame(
        done=pb.Done(probe=[1.0] * 4096, input_grad=encode(torch.ones(3, 4), pb.FP32))
    )
    assert parse_frame(honest.SerializeToString()) == honest


class _Refused:
    """A failed call, as gRPC shows it."""

    def __init__(self, details: str, hint: Any) -> None:
        self._details, self._hint = details, hint

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return (("retry-after-ms", self._hint),)


@pytest.mark.parametrize(
    ("hint", "pause"),
    [("1500", 1.5), ("9" * 5000, 300.0), ("999999999", 300.0), ("²", None), ("-1", None)],
)
def test_retry_hints_are_bounded(hint: str, pause: float | None) -> None:
    """A hint of thousands of digits, or of days, is minutes at most; what is none is none."""
    error = call_error(_Refused("full", hint), "cloud:1")
    assert getattr(error, "retry_after_s", None) == pause


def test_a_long_hint_reaches_the_one_who_waits(evil: Any) -> None:
    """The reader of a stream outlives whatever a refusal says: who waits is told."""
    servicer, connect = evil
    servicer.refusal = ("full \x1b[2J", "9" * 5000)
    retry = dlora.RetryPolicy(give_up_after_s=1.0)
    split = dlora.get_peft_model(connect(), lora(), wire_dtype="fp32", retry=retry)
    with pytest.raises(PeerLost, match=r"full \[2J \(gave up after 0 s") as caught:
        split(**batches()[0])
    assert one_line(caught.value)


# ----------------------------------------------------------------- text


def test_texts_of_a_peer_are_one_clean_line() -> None:
    """No escape sequence, line break or direction mark of a peer reaches a terminal."""
    assert clean_text("a\x1b]0;evil\x07\n\nb\u202e\u2028c\ud800") == "a ]0;evil b c"
    assert len(clean_text("x" * 10**6)) == 300
    assert without_controls("two\nlines\t\x1b[31mred\x9b") == "two\nlines\t[31mred"


def test_names_of_a_description_are_cleaned_once(evil: Any) -> None:
    """What a cloud calls itself is harmless wherever it is shown or saved."""
    servicer, connect = evil
    servicer.description.model_id = "nice\x1b[2J\nmodel" + "x" * 10**4
    servicer.description.software_version = "\x07"
    description = connect().description
    assert description.model_id.startswith("nice [2J model") and len(description.model_id) <= 200
    assert description.software_version == ""


# ----------------------------------------------------------------- descriptions


def _many_sites(d: pb.Description) -> None:
    d.sites.extend([d.sites[0]] * 100)


def _huge(d: pb.Description) -> None:
    d.config_json = " " * (5 * 2**20)


def _set(path: str, value: Any) -> Callable[[pb.Description], None]:
    def change(d: pb.Description) -> None:
        *parts, last = path.split(".")
        target: Any = d
        for part in parts:
            target = target[int(part)] if part.isdigit() else getattr(target, part)
        setattr(target, last, value)

    return change


DESCRIPTIONS: dict[str, tuple[Callable[[pb.Description], None], str]] = {
    "too many sites": (_many_sites, "sites: got '112', want 48"),
    "too many bytes": (_huge, "describes itself in .* bytes, over"),
    "too many layers": (_set("layers.count", 10_000_000), "layers: got '10000000', want 1 to 1000"),
    "no layers": (_set("layers.count", 0), "layers: got '0'"),
    "no width": (_set("hidden_width", 0), "hidden width: got '0'"),
    "a width of 4 billion": (_set("embedding_width", 2**32 - 1), "embedding width"),
    "a wide site": (_set("sites.0.in_features", 2**31), "width of a site"),
    "a wide module": (_set("sites.0.modules.0.out_features", 2**31), "width of a module"),
    "an evil name": (_set("sites.0.modules.0.name", "q\x1b[2J"), "name of a module: got 'q"),
    "no memory": (_set("limits.bytes_per_token", float("nan")), "bytes_per_token: got 'nan'"),
    "no end of memory": (_set("limits.bytes_per_token", float("inf")), "bytes_per_token"),
    "no message": (_set("limits.max_message_bytes", 0), "max_message_bytes: got '0'"),
    "no tokens": (_set("limits.max_tokens", 0), "max_tokens: got '0'"),
    "a digest with lines": (_set("edge_files.0.sha256", "0\nx"), "SHA-256 of"),
    "fingerprint": (_set("fingerprint", "\x1b" * 9), "fingerprint"),
    "norm": (_set("sites.0.modules.0.weight_norm", float("inf")), "norm of a weight"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_are_bounded_before_use(evil: Any, name: str) -> None:
    """Sizes that no decoder has, and names that are none, are refused when they are read."""
    servicer, connect = evil
    change, message = DESCRIPTIONS[name]
    change(servicer.description)
    with pytest.raises(PeerError, match=message) as caught:
        connect()
    assert one_line(caught.value)


def _config(**changes: Any) -> Callable[[pb.Description], None]:
    def change(d: pb.Description) -> None:
        d.config_json = json.dumps(json.loads(d.config_json) | changes)

    return change


CONFIGS: dict[str, tuple[Callable[[pb.Description], None], str]] = {
    "no JSON": (_set("config_json", "{"), "the model from .* cannot be used: JSONDecodeError"),
    "a list": (_set("config_json", "[]"), "no table of names and values"),
    "nested": (_set("config_json", "[" * 100_000), "the model from .* RecursionError"),
    "no type": (_config(model_type=None), "does not know model type"),
    "a list as type": (_config(model_type=["llama"]), "does not know model type"),
    "no decoder": (_config(model_type="vit"), "does not know model type 'vit'"),
    "layers": (_config(num_hidden_layers=10_000_000), "layers: got 10000000, want 1 to 1000"),
    "other layers": (_config(num_hidden_layers=4), "has 4 layers, its description 3"),
    "layers of text": (_config(num_hidden_layers="3"), "the model from|layers"),
    "vocabulary": (_config(vocab_size=2**30), "vocabulary: got"),
    "width": (_config(hidden_size=2**40), "has the number"),
    "NaN": (_config(rms_norm_eps=float("nan")), "has the number nan"),
    "no heads": (_config(num_attention_heads=0), "the model from .* cannot be used"),
    "wrong kind": (_config(rope_parameters=7), "the model from .* cannot be used"),
    "activation": (_config(hidden_act="os.system"), "the model from .* cannot be used"),
    "dtype": (_config(dtype="os"), "has dtype 'os', want one of"),
    "a place": (_config(hidden_act="evil/repo"), "names a place: 'evil/repo'"),
    "memory": (_config(intermediate_size=2**31 - 1), "the model from .* cannot be used"),
    "other width": (_set("hidden_width", 63), "hidden width: described as 63"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_fit_no_model_are_one_line(evil: Any, name: str) -> None:
    """Whatever transformers makes of a configuration, the edge ends with one error of DLoRA's."""
    servicer, connect = evil
    change, message = CONFIGS[name]
    change(servicer.description)
    with pytest.raises((PeerError, ModelError), match=message) as caught:
        make_split(connect(), lora())
    assert one_line(caught.value)


def test_a_configuration_names_no_code(evil: Any) -> None:
    """Attention kernels of a hub, remote code and unknown fields are not even read."""
    servicer, connect = evil
    _config(
        attn_implementation="evil/kernel@main",
        _attn_implementation="evil/kernel@main",
        _attn_implementation_internal="evil/kernel@main",
        experts_implementation="evil/kernel",
        auto_map={"AutoModelForCausalLM": "evil/repo--modeling.Evil"},
        quantization_config={"quant_method": "evil"},
        no_such_field=1,
    )(servicer.description)
    config = make_split(connect(), lora()).get_base_model().config
    assert config._attn_implementation in ("sdpa", "eager")
    for name in ("auto_map", "quantization_config", "no_such_field"):
        assert not hasattr(config, name), name
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_every_kind_of_exception_is_one_error() -> None:
    """What Rust, Python or the system raises inside the wall comes out as a PeerError."""

    class Panic(BaseException):  # as pyo3's: no Exception
        pass

    for kind in (Panic, MemoryError, RecursionError, OverflowError, KeyError, SystemExit, OSError):
        message = f"the model from c cannot be used: {kind.__name__}"
        with pytest.raises(PeerError, match=message), wall("the model", "c"):
            raise kind("\x1b")
    for mine in (UsageError, ModelError, KeyboardInterrupt):
        with pytest.raises(mine), wall("the model", "c"):
            raise mine("as it is")


# ----------------------------------------------------------------- files


def test_weights_that_do_not_fit_are_one_line(evil: Any) -> None:
    """Edge files with other names, shapes or bytes end with one error, whichever it is."""
    servicer, connect = evil
    file = servicer.folder / "edge.safetensors"
    for content in (b"", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "):
        file.write_bytes(content)
        servicer.announce()
        with pytest.raises((PeerError, ModelError)) as caught:
            make_split(connect(), lora())
        assert one_line(caught.value)
    save_file({"embedding.weight": torch.zeros(300, 63)}, file)
    servicer.announce()
    with pytest.raises(ModelError, match=r"got \[300, 63\], want \[300, 64\]"):
        make_split(connect(), lora())


def _growing() -> Tokenizer:
    """A tokenizer whose normalizer doubles its text forty times."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Replace("e", "ee")] * 40)
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    return made


def test_a_tokenizer_that_grows_without_end_is_refused(
    evil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules that double their text are met in a child process, which they cannot leave."""
    monkeypatch.setattr("dlora.edge.tokenizer_trial._BYTES", 2**28)
    servicer, connect = evil
    _growing().save(str(servicer.folder / "tokenizer.json"))
    servicer.announce()
    with pytest.raises(PeerError, match="tokenizer or chat template .* do not end") as caught:
        dlora.load_tokenizer(connect())
    assert one_line(caught.value)


def test_a_chat_template_that_grows_without_end_is_refused(
    evil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for templates, which are programs as well."""
    monkeypatch.setattr("dlora.edge.tokenizer_trial._BYTES", 2**28)
    servicer, connect = evil
    template = "{% set ns = namespace(t='x') %}{% for i in range(60) %}"
    template += "{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}"
    (servicer.folder / "chat_template.jinja").write_text(template)
    servicer.announce()
    with pytest.raises(PeerError, match="tokenizer or chat template .* do not end"):
        dlora.load_tokenizer(connect())


def test_an_honest_tokenizer_is_tried_once(evil: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The trial lets ordinary files pass, and does not run again for the same content."""
    _, connect = evil
    loaded = dlora.load_tokenizer(connect())
    assert loaded("the desk")["input_ids"] == tokenizer("the desk")["input_ids"]
    marks = list((tmp_path / "cache/edge").glob("*.tried"))
    assert len(marks) == 1
    before = marks[0].stat().st_mtime_ns
    dlora.load_tokenizer(connect())
    assert marks[0].stat().st_mtime_ns == before


def test_broken_tokenizers_are_one_line(evil: Any) -> None:
    """Files that are no tokenizer end with one error, whatever the library says."""
    servicer, connect = evil
    for name, content in (
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 7}}'),
        ("tokenizer_config.json", "[1]"),
    ):
        file = servicer.folder / name
        honest = file.read_text()
        file.write_text(content)
        servicer.announce()
        with pytest.raises(DLoRAError) as caught:
            dlora.load_tokenizer(connect())
        assert one_line(caught.value), content
        file.write_text(honest)


def test_announced_sizes_are_bounded(evil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the disk has room for, or than a tokenizer can be, is refused before the first
    byte.
    """
    servicer, connect = evil
    honest = pb.Description()
    honest.CopyFrom(servicer.description)
    for name, size, message in (
        ("edge.safetensors", 40 * 2**30, "bytes of edge files, over"),
        ("tokenizer.json", 2**30, "bytes of text, over"),
    ):
        servicer.description.CopyFrom(honest)
        next(f for f in servicer.description.edge_files if f.name == name).size = size
        with pytest.raises(WireError, match=message):
            connect().edge_files()

    servicer.description.CopyFrom(honest)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 300 * 2**20}))
    next(f for f in servicer.description.edge_files if f.name == "edge.safetensors").size = 2**30
    with pytest.raises(WireError, match="there is room for 44 MiB"):
        connect().edge_files()


def test_a_download_that_stalls_is_cut() -> None:
    """Chunks of nothing, or a byte now and then, are no progress."""
    cancelled = threading.Event()

    class Call:
        def __iter__(self) -> Iterator[pb.FileChunk]:
            while not cancelled.wait(0.005):
                yield pb.FileChunk(name="x", data=b".")
            raise RuntimeError("cancelled")

        def cancel(self) -> None:
            cancelled.set()

    with pytest.raises(PeerLost, match="sent less than 256 KiB of its files"):
        list(without_stalls(Call(), "cloud:1", window_s=0.1))


# ----------------------------------------------------------------- addresses and proxies


@pytest.mark.parametrize(
    "address",
    [
        "unix:/tmp/x:1",
        "unix-abstract:1",
        "vsock:1",
        "dns:8",
        "dns:///x:8",
        "ipv4:1.2.3.4:5",
        "x:0",
        "x:70000",
        "2852039166:80",
        "0xa9fea9fe:80",
        "169.254.1:80",
        "[fe80::1%eth0]:1",
        "host",
        "a b:1",
        "",
    ],
)
def test_addresses_are_names_and_ips(address: str) -> None:
    """No scheme of gRPC's resolvers and no odd spelling of an IP address passes as a host."""
    with pytest.raises(UsageError, match="want host:port"):
        check_address(address)
    with pytest.raises(PeerError, match="which is no address"):
        check_replica(address, "cloud.example.org:50051")


@pytest.mark.parametrize(
    ("address", "front", "message"),
    [
        ("169.254.169.254:80", "cloud.example.org:1", "link-local"),
        ("[fe80::1]:80", "cloud.example.org:1", "link-local"),
        ("[::ffff:169.254.169.254]:80", "cloud.example.org:1", "link-local"),
        ("169.254.169.254:80", "127.0.0.1:1", "link-local"),
        ("127.0.0.1:80", "cloud.example.org:1", "this machine"),
        ("127.9.9.9:80", "10.0.0.1:1", "this machine"),
        ("localhost:80", "10.0.0.1:1", "this machine"),
        ("0.0.0.0:80", "10.0.0.1:1", "this machine"),
        ("[::1]:80", "10.0.0.1:1", "this machine"),
        ("127.0.0.1:80", "127.0.0.1:1", None),
        ("169.254.3.4:80", "169.254.1.2:1", None),
        ("10.0.0.2:80", "10.0.0.1:1", None),
        ("[2001:db8::2]:80", "cloud.example.org:1", None),
        ("worker-1.example.org:80", "cloud.example.org:1", None),
    ],
)
def test_replicas_lead_to_no_place_of_this_machine(
    address: str, front: str, message: str | None
) -> None:
    """A front can send an edge to other machines, and not to its own or to its link's metadata."""
    check_address(address)
    if message is None:
        check_replica(address, front)
    else:
        with pytest.raises(PeerError, match=message):
            check_replica(address, front)


def test_no_proxy_sees_what_goes_to_this_machine(
    links: Callable[[str], GrpcLink], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Proxies of the environment are not used for loopback, nor without TLS; else they are
    named.
    """
    seen: list[bytes] = []
    proxy = _listening(seen)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    link = dlora.connect(links("llama").address, cache=tmp_path, access=Access(token="secret"))
    assert link.description.fingerprint == links("llama").description.fingerprint
    link.close()
    assert not seen

    assert proxy_of("127.0.0.1:1", encrypted=True) is None
    assert proxy_of("cloud.example.org:1", encrypted=False) is None
    assert proxy_of("cloud.example.org:1", encrypted=True) == "grpc_proxy"
    with pytest.raises(PeerLost, match=r"through the proxy of \$grpc_proxy"):
        dlora.connect("192.0.2.1:1", access=Access(tls=True), timeout_s=0.5, cache=tmp_path)
    proxy.close()
    assert seen


def _listening(seen: list[bytes]) -> Any:
    """A proxy on loopback that notes what comes, and answers nothing."""
    import socket

    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                seen.append(connection.recv(100))

    threading.Thread(target=accept, daemon=True).start()
    return server


# ----------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["layers", "no JSON", "memory"])
def test_the_command_ends_with_one_line_and_code_1(
    evil: Any,
    name: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For whoever sits at the terminal an evil cloud is a line, and exit code 1."""
    servicer, _ = evil
    CONFIGS[name][0](servicer.description)
    monkeypatch.setenv("DLORA_CACHE", str(tmp_path / "cache"))
    assert main(["generate", "--server", servicer.address, "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("dlora: ")]
    assert len(lines) == 1 and "Traceback" not in error and "\x1b[2J" not in error


# ----------------------------------------------------------------- what a killed process leaves


def test_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """A temporary folder that nobody holds is removed by the next one; one that is held stays."""
    import os

    held, left = ScratchFolder("mine-", tmp_path), tmp_path / "mine-left"
    left.mkdir()
    (left / "edge.safetensors").write_bytes(b"x")
    young = tmp_path / "mine-young"
    young.mkdir()
    for folder in (left, Path(held.name)):
        os.utime(folder, (0, 0))
    with ScratchFolder("mine-", tmp_path) as name:
        assert Path(name).is_dir()
        assert not left.exists()
        assert young.is_dir() and Path(held.name).is_dir()
    assert not Path(name).exists()
    held.cleanup()
    held.cleanup()
