"""TLS, identities, tenants and their quotas, against a real server."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from conftest import NO_DRAIN, adapter, batches, lora, make_base, make_split
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file

import dlora
from dlora.cli.main import main
from dlora.cloud.model import CloudModel
from dlora.edge.grpc_link import Access
from dlora.embedded import InProcessLink
from dlora.errors import AdapterMissing, PeerError, PeerLost, UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.proto import dlora_pb2_grpc as rpc
from dlora.protocol.channel import PROTOCOL_VERSION
from dlora.protocol.wire import encode
from dlora.server import keys
from dlora.server.identities import Credential, Identities, TenantLimits
from dlora.server.metrics import read_status, serve_metrics
from dlora.server.server import Server, ServerOptions, TlsFiles
from dlora.server.settings import ServeSettings
from dlora.server.tenants import Busy, Tenancy
from dlora.training.settings import TrainSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An authority, a server certificate, and no tenants."""
    keys.make_authority(tmp_path / "keys", ["localhost", "127.0.0.1"], 2)
    return tmp_path / "keys"


def tls(folder: Path, *, mutual: bool = False) -> TlsFiles:
    """The server's files in a folder of keys."""
    return TlsFiles(
        certificate=folder / "server.pem",
        key=folder / "server.key",
        client_ca=folder / "ca.pem" if mutual else None,
    )


def access(folder: Path, token: str | None = None) -> Access:
    """An edge that trusts the folder's authority."""
    return Access(ca=folder / "ca.pem", token=token)


@pytest.fixture
def secured(folder: Path, cloud_models: Callable[[str], CloudModel]) -> Iterator[Server]:
    """A server with TLS, identities and an access log, for the folder of this test."""
    with Server(
        cloud_models("llama"),
        tls=tls(folder),
        identities=Identities(folder / "identities.json"),
        access_log=folder / "access.jsonl",
        options=NO_DRAIN,
    ) as server:
        yield server


def calls(stub: Any, metadata: Any) -> Iterator[Callable[[], Any]]:
    """Every call of the service."""
    yield lambda: stub.Describe(
        pb.DescribeRequest(protocol_version=PROTOCOL_VERSION), metadata=metadata, timeout=5
    )
    yield lambda: list(
        stub.FetchEdgeFiles(pb.FetchEdgeFilesRequest(), metadata=metadata, timeout=5)
    )
    yield lambda: stub.PutAdapter(pb.PutAdapterRequest(), metadata=metadata, timeout=5)
    yield lambda: list(stub.Step(iter([pb.EdgeFrame()]), metadata=metadata, timeout=5))


# ----------------------------------------------------------------- who may call


def test_nothing_but_health_answers_strangers(secured: Server, folder: Path) -> None:
    """Without a valid token every call ends with the same refusal; health answers."""
    expired = {"tenant": "old", "sha256": "0" * 64, "expires": "2020-01-01T00:00:00+00:00"}
    content = json.loads((folder / "identities.json").read_text())
    token = keys.add_token(folder, "old", 1)[1]
    content = json.loads((folder / "identities.json").read_text())
    for entry in content["tokens"].values():
        entry["expires"] = expired["expires"]
    keys.write_private(folder / "identities.json", json.dumps(content).encode())
    time.sleep(1.5)
    options = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    with grpc.secure_channel(secured.address, options) as channel:
        stub = rpc.DLoRAStub(channel)
        for metadata in (
            None,
            (("authorization", "Bearer wrong"),),
            (("authorization", token),),
            (("authorization", f"Bearer {token}"),),  # expired
        ):
            for call in calls(stub, metadata):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
                assert caught.value.details() == "no valid token or client certificate"
        found = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=5
        )
        assert found.status == health_pb2.HealthCheckResponse.SERVING


def test_training_over_tls_with_a_token_is_the_same(
    secured: Server, folder: Path, links: Callable[[str], Any], tmp_path: Path
) -> None:
    """Loss and gradients over TLS equal those over plaintext; the access log says who and how much,
    and no more.
    """
    name, token = keys.add_token(folder, "alice", 1)
    time.sleep(1.5)
    link = dlora.connect(secured.address, access=access(folder, token), cache=tmp_path)
    found, want = make_split(link, lora()), make_split(links("llama"), lora())
    losses = [model(**batches()[0]).loss for model in (found, want)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for one, other in zip(adapter(found).values(), adapter(want).values(), strict=True):
        assert torch.equal(one.grad, other.grad)
    link.close()
    time.sleep(0.3)
    text = (folder / "access.jsonl").read_text()
    line = json.loads(text.splitlines()[-1])
    assert (line["tenant"], line["identity"], line["status"]) == ("alice", name, "OK")
    assert (
        line["tokens"] == int(batches()[0]["attention_mask"].sum())
        and line["received_bytes"] > 1000
    )
    assert token not in text and (folder / "access.jsonl").stat().st_mode & 0o077 == 0


def test_mutual_tls(
    folder: Path, cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """With client certificates asked for, one that is listed is let in; one of another authority,
    none, or one that was revoked is not."""
    name, file = keys.add_certificate(folder, "alice", 1)
    identities = Identities(folder / "identities.json")
    with Server(
        cloud_models("llama"), tls=tls(folder, mutual=True), identities=identities, options=NO_DRAIN
    ) as server:
        mine = Access(
            ca=folder / "ca.pem",
            certificate=file.with_name(file.name + ".pem"),
            key=file.with_name(file.name + ".key"),
        )
        dlora.connect(server.address, access=mine, cache=tmp_path).close()
        with pytest.raises(PeerLost, match="does not answer as a DLoRA server"):
            dlora.connect(server.address, access=access(folder), cache=tmp_path, timeout_s=1.0)
        keys.make_authority(other := tmp_path / "other", ["localhost"], 1)
        _, foreign = keys.add_certificate(other, "alice", 1)
        stranger = Access(
            ca=folder / "ca.pem",
            certificate=foreign.with_name(foreign.name + ".pem"),
            key=foreign.with_name(foreign.name + ".key"),
        )
        with pytest.raises(PeerLost):
            dlora.connect(server.address, access=stranger, cache=tmp_path, timeout_s=1.0)
        assert keys.revoke(folder, name) == 1
        time.sleep(1.5)
        with pytest.raises(PeerError, match="does not know this edge"):
            dlora.connect(server.address, access=mine, cache=tmp_path)


def test_revoked_token_is_refused_and_its_streams_are_cut(
    secured: Server, folder: Path, tmp_path: Path
) -> None:
    """Within five seconds of a revocation an open stream ends with a refusal that is final, and a
    new call is refused; another tenant's stream goes on."""
    (name, token), (_, other) = keys.add_token(folder, "alice", 1), keys.add_token(folder, "bob", 1)
    time.sleep(1.5)
    links = [
        dlora.connect(secured.address, access=access(folder, one), cache=tmp_path)
        for one in (token, other)
    ]
    streams = [link.open() for link in links]
    for link, stream in zip(links, streams, strict=True):
        stream.send(pb.EdgeFrame(begin=begin(link)))
        assert stream.receive().WhichOneof("kind") == "input"
    start = time.monotonic()
    keys.revoke(folder, name)
    with pytest.raises(PeerError, match="no longer valid"):
        streams[0].receive()
    assert time.monotonic() - start < 5
    with pytest.raises(PeerError, match="does not know this edge"):
        dlora.connect(secured.address, access=access(folder, token), cache=tmp_path)
    assert len(secured._service.pipes) == 1
    for stream in streams:
        stream.close()


def begin(link: Any) -> pb.Begin:
    """A training step of one row of two tokens at the first site."""
    return pb.Begin(
        protocol_version=PROTOCOL_VERSION,
        fingerprint=link.description.fingerprint,
        wire_dtype=pb.FP32,
        training=True,
        batch=1,
        length=2,
        keep=[1],
        sites=[pb.ActiveSite(site=0, modules=[0])],
        embeddings=encode(torch.zeros(2, link.description.embedding_width), pb.FP32),
    )


def test_certificates_rotate_without_restart(secured: Server, folder: Path, tmp_path: Path) -> None:
    """A new server certificate of a new authority is taken up by a running server; a bad one
    changes nothing.
    """
    token = keys.add_token(folder, "alice", 1)[1]
    time.sleep(1.5)
    dlora.connect(secured.address, access=access(folder, token), cache=tmp_path).close()
    keys.make_authority(fresh := tmp_path / "fresh", ["localhost", "127.0.0.1"], 1)
    for name in ("server.key", "server.pem"):
        shutil.copy2(fresh / name, folder / name)
    dlora.connect(
        secured.address, access=Access(ca=fresh / "ca.pem", token=token), cache=tmp_path
    ).close()
    with pytest.raises(PeerLost):
        dlora.connect(secured.address, access=access(folder, token), cache=tmp_path, timeout_s=1.0)
    (folder / "server.key").chmod(0o644)
    (folder / "server.key").write_text("no key")
    dlora.connect(
        secured.address, access=Access(ca=fresh / "ca.pem", token=token), cache=tmp_path
    ).close()


def test_secrets_are_kept_close(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No secret is stored in the clear or open to others, files that are open are refused, a token
    never goes over plaintext to another machine, and no repr shows it."""
    token = keys.add_token(folder, "alice", 1)[1]
    assert token not in (folder / "identities.json").read_text()
    for file in folder.rglob("*"):
        if file.suffix == ".key" or file.name == "identities.json":
            assert file.stat().st_mode & 0o077 == 0
    assert token not in repr(access(folder, token))
    with pytest.raises(UsageError, match="is not sent to 10.0.0.1:50051 without TLS"):
        dlora.connect("10.0.0.1:50051", access=Access(token=token), cache=tmp_path)
    (folder / "identities.json").chmod(0o640)
    with pytest.raises(UsageError, match="open to other users"):
        Identities(folder / "identities.json")
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o644)
    settings = TrainSettings(
        server="x:1", data="d", output=tmp_path / "run", token_file=tmp_path / "token"
    )
    with pytest.raises(UsageError, match="chmod 600"):
        _ = settings.access
    (tmp_path / "token").chmod(0o600)
    assert settings.access["token"] == token and token not in json.dumps(settings.as_dict())


def test_serving_beyond_loopback_needs_protection(folder: Path) -> None:
    """Plaintext or anonymous access beyond loopback takes an explicit word."""
    for options, message in (
        ({}, "could read and change"),
        ({"tls_cert": Path("c"), "tls_key": Path("k")}, "anybody could use"),
        ({"tls_cert": Path("c")}, "go together"),
        ({"client_ca": Path("c"), "insecure": True}, "needs TLS"),
        ({"client_ca": Path("c"), "tls_cert": Path("c"), "tls_key": Path("k")}, "needs identities"),
    ):
        with pytest.raises(UsageError, match=message):
            ServeSettings(model="m", host="0.0.0.0", **options)
    assert ServeSettings(model="m").drain_s == ServerOptions().drain_s == 30.0
    for fine in ({"insecure": True}, {"keys": folder}):
        ServeSettings(model="m", host="0.0.0.0", **fine)


def test_broken_identities_change_nothing(folder: Path) -> None:
    """A file that was broken by hand is refused at the start, and later leaves the last good one in
    force.
    """
    token = keys.add_token(folder, "alice", 1)[1]
    identities = Identities(folder / "identities.json")
    good = (folder / "identities.json").read_text()
    for bad in ("{", "[]", "{}", good.replace('"alice": {}', '"alice": {"max_stream": 3}')):
        keys.write_private(folder / "identities.json", bad.encode())
        identities.refresh()
        assert identities.authenticate(token, None) is not None
        with pytest.raises(UsageError):
            Identities(folder / "identities.json")
    keys.write_private(folder / "identities.json", good.encode())
    with pytest.raises(UsageError, match="want letters"):
        keys.add_token(folder, "../alice", 1)


def test_a_file_that_no_parser_expects_locks_nobody_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nesting without end, or a hash that is no ASCII, ends no look at the file and no call; what
    stays wrong is logged once.
    """
    token = keys.add_token(folder, "alice", 1)[1]
    content = json.loads((folder / "identities.json").read_text())
    content["tokens"] = {"odd": {**next(iter(content["tokens"].values())), "sha256": "\u00e9"}} | (
        content["tokens"]
    )
    keys.write_private(folder / "identities.json", json.dumps(content).encode())
    identities = Identities(folder / "identities.json")
    assert identities.authenticate(token, None) == Credential(
        "alice", next(name for name in content["tokens"] if name != "odd")
    )
    keys.write_private(folder / "identities.json", b"[" * 100_000)
    for _ in range(3):
        identities.refresh()
        assert identities.authenticate(token, None) is not None
    assert caplog.text.count("identities are as they were") == 1


def test_an_unforeseen_error_does_not_end_the_watch(
    secured: Server,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server whose look at the identities fails keeps the last good ones, logs each kind of error
    once, and takes up a revocation when looking works again.
    """
    name, token = keys.add_token(folder, "alice", 1)
    time.sleep(1.5)
    link = dlora.connect(secured.address, access=access(folder, token), cache=tmp_path)
    stream = link.open()
    stream.send(pb.EdgeFrame(begin=begin(link)))
    assert stream.receive().WhichOneof("kind") == "input"

    failed = []

    def fail() -> None:
        failed.append(None)
        raise ZeroDivisionError("nobody thought of this")

    with monkeypatch.context() as patch:
        patch.setattr("dlora.server.service._REFRESH_S", 0.05)
        patch.setattr(secured._service.identities, "refresh", fail)
        deadline = time.monotonic() + 10
        while len(failed) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(failed) >= 3 and caplog.text.count("were not looked at") == 1
        dlora.connect(secured.address, access=access(folder, token), cache=tmp_path).close()

    keys.revoke(folder, name)
    with pytest.raises(PeerError, match="no longer valid"):
        stream.receive()
    stream.close()
    link.close()


def test_a_full_disk_under_the_access_log_ends_no_stream(
    folder: Path,
    cloud_models: Callable[[str], CloudModel],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lines that cannot be written are lost, which the server's own log says once; edges go on."""
    with Server(cloud_models("llama"), access_log=Path("/dev/full"), options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        split = make_split(link, lora())
        for _ in range(2):
            split(**batches()[0]).loss.backward()
        link.close()
        assert split.meter.retries == 0
    assert caplog.text.count("No space left on device; its lines are lost") == 1


def test_keys_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole life of a tenant by command: authority, limits, token, certificate, listing,
    revocation.
    """
    where = ["--folder", str(tmp_path / "keys")]
    assert main(["keys", "init", *where, "--hosts", "example.org,192.0.2.1"]) == 0
    assert main(["keys", "init", *where]) == 2
    assert (
        main(["keys", "tenant", *where, "--tenant", "alice", "--limits", '{"max_streams": 2}']) == 0
    )
    assert (
        main(["keys", "tenant", *where, "--tenant", "alice", "--limits", '{"max_strems": 2}']) == 2
    )
    capsys.readouterr()
    assert main(["keys", "token", *where, "--tenant", "alice"]) == 0
    token = capsys.readouterr().out.strip()
    identities = Identities(tmp_path / "keys/identities.json")
    found = identities.authenticate(token, None)
    assert (
        found is not None
        and found.tenant == "alice"
        and identities.limits("alice").max_streams == 2
    )
    assert main(["keys", "certificate", *where, "--tenant", "alice"]) == 0
    assert main(["keys", "server", *where, "--hosts", "example.org"]) == 0
    capsys.readouterr()
    assert main(["keys", "list", *where]) == 0
    assert capsys.readouterr().out.count("alice") == 2
    assert main(["keys", "revoke", *where, "--tenant", "alice"]) == 0
    assert main(["keys", "revoke", *where, "--tenant", "alice"]) == 2
    assert main(["keys", "token", *where]) == 2
    identities.refresh()
    assert identities.authenticate(token, None) is None and not identities.is_valid(found)


# ----------------------------------------------------------------- tenants


def test_uploaded_modules_are_their_owners_alone(
    secured: Server, folder: Path, tmp_path: Path
) -> None:
    """A frozen module that one tenant has put is not found by another, by the right hash and under
    the same name.
    """
    tokens = [keys.add_token(folder, name, 1)[1] for name in ("alice", "bob")]
    time.sleep(1.5)
    alice, bob = (
        dlora.connect(secured.address, access=access(folder, t), cache=tmp_path) for t in tokens
    )
    site = alice.description.sites[0]
    module = pb.FrozenModule(
        a=encode(torch.randn(2, site.in_features), pb.FP32),
        b=encode(torch.randn(site.modules[1].out_features, 2), pb.FP32),
    )
    alice.put_adapter([module])
    from dlora.protocol.wire import content_hash

    def ask(link: Any) -> str | None:
        message = begin(link)
        message.idle.add(site=0, module=1, hash=content_hash(module))
        stream = link.open()
        stream.send(pb.EdgeFrame(begin=message))
        try:
            return stream.receive().WhichOneof("kind")
        finally:
            stream.close()

    assert ask(alice) == "input"
    with pytest.raises(AdapterMissing):
        ask(bob)
    bob.put_adapter([module])
    assert ask(bob) == "input"


def test_hosted_modules_are_their_owners_alone(
    secured: Server,
    cloud_models: Callable[[str], CloudModel],
    folder: Path,
    tmp_path: Path,
) -> None:
    """What one tenant let the cloud keep of its adapter is not found by another, by the right hash;
    it takes no more than the tenant's room.
    """
    from dlora.protocol.wire import content_hash

    tokens = [keys.add_token(folder, name, 1)[1] for name in ("alice", "bob")]
    time.sleep(1.5)
    alice, bob = (
        dlora.connect(secured.address, access=access(folder, t), cache=tmp_path) for t in tokens
    )
    site = alice.description.sites[0]
    tensors = pb.ModuleTensors(
        a=encode(torch.randn(2, site.in_features), pb.FP32),
        b=encode(torch.randn(2, site.modules[0].out_features), pb.FP32),
    )
    module = pb.HostedModule(rank=2, keep=True)

    def ask(link: Any, module: pb.HostedModule) -> str | None:
        message = begin(link)
        message.hosted, message.module_frames = True, 0 if module.hash else 1
        message.modules.append(module)
        stream = link.open()
        stream.send(pb.EdgeFrame(begin=message))
        if not module.hash:
            stream.send(pb.EdgeFrame(modules=pb.HostedTensors(modules=[tensors])))
        try:
            return stream.receive().WhichOneof("kind")
        finally:
            stream.close()

    reference = pb.HostedModule(rank=2, hash=content_hash(tensors))
    with pytest.raises(AdapterMissing):
        ask(alice, reference)
    assert ask(alice, module) == ask(alice, reference) == "hidden"
    with pytest.raises(AdapterMissing):
        ask(bob, reference)
    store = cloud_models("llama").frozen_store
    assert store.get(reference.hash, "alice") is None, "no frozen module, though it is kept"
    store.put_hosted(b"large", (torch.ones(1, 9), torch.ones(9, 1), None, None), "alice", 71)
    assert store.get_hosted(b"large", "alice") is None


def test_adapter_room_is_each_owners() -> None:
    """An owner over its share drops its own modules; when the whole is full, whoever holds most
    gives.
    """
    from dlora.cloud.frozen_store import MODULE_BYTES, FrozenStore

    def module(seed: int) -> pb.FrozenModule:
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(shape, generator=generator) for shape in ((1, 8), (8, 1)))
        return pb.FrozenModule(a=encode(a, pb.FP32), b=encode(b, pb.FP32))

    size = 64 + MODULE_BYTES
    store = FrozenStore(size * 5, torch.device("cpu"))
    bobs = [store.put(module(seed), "bob", size * 2) for seed in range(2)]
    alices = [store.put(module(seed), "alice", size * 4) for seed in range(4)]
    assert all(store.get(key, "bob") for key in bobs) and store.stored_bytes == size * 5
    assert [store.get(key, "alice") is not None for key in alices] == [False, True, True, True]
    third = store.put(module(9), "bob", size * 2)
    assert store.get(bobs[0], "bob") is None and store.get(third, "bob")
    store.keep_owners({"alice"})
    assert store.get(third, "bob") is None and store.stored_bytes == size * 3


def test_quotas_refuse_with_a_hint_and_tell_of_nobody_else() -> None:
    """Streams, memory and traffic are limited for each tenant; what is refused says when to come
    back, and no message names another tenant or what others use."""
    now = [0.0]
    limits = {"alice": TenantLimits(max_streams=2, max_inflight_mib=10, mib_per_hour=36.0)}
    tenancy = Tenancy(
        3, 25 << 20, lambda name: limits.get(name, TenantLimits()), clock=lambda: now[0]
    )
    alice, bob = tenancy.tenant("alice"), tenancy.tenant("bob")
    tenancy.open_stream(alice)
    tenancy.open_stream(alice)
    messages = []

    def refused(call: Callable[[], None], reason: str) -> float:
        with pytest.raises(Busy) as caught:
            call()
        assert caught.value.reason == reason and caught.value.retry_after_s
        messages.append(str(caught.value))
        return caught.value.retry_after_s

    refused(lambda: tenancy.open_stream(alice), "streams")
    tenancy.open_stream(bob)
    refused(lambda: tenancy.open_stream(bob), "server")
    tenancy.reserve(alice, 0, 8 << 20)
    refused(lambda: tenancy.reserve(alice, 0, 4 << 20), "memory")
    tenancy.reserve(bob, 0, 16 << 20)
    refused(lambda: tenancy.reserve(bob, 0, 4 << 20), "server")
    tenancy.reserve(bob, 16 << 20, 0)
    with pytest.raises(UsageError, match="your quota is 10 MiB"):
        tenancy.reserve(alice, 0, 11 << 20)
    tenancy.close_stream(alice, "OK")
    tenancy.count_traffic(alice, received=37 << 20)
    wait = refused(lambda: tenancy.open_stream(alice), "traffic")
    assert wait == pytest.approx(100.0)  # 1 MiB over, at 36 MiB an hour
    now[0] = 101.0
    tenancy.open_stream(alice)
    assert not any("alice" in text or "bob" in text or "tenant" in text for text in messages)
    assert alice.refused == {"streams": 1, "memory": 1, "traffic": 1} and tenancy.streams == 3


def test_metrics_and_status(
    secured: Server, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prometheus gets each tenant's streams, tokens, bytes and seconds, readiness follows the
    server, and `dlora status` shows the same to a person."""
    token = keys.add_token(folder, "alice", 1)[1]
    time.sleep(1.5)
    link = dlora.connect(secured.address, access=access(folder, token), cache=tmp_path)
    make_split(link, lora())(**batches()[0]).loss.backward()
    link.close()
    time.sleep(0.3)
    with serve_metrics(secured, 0) as port:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        rows = int(batches()[0]["attention_mask"].sum())
        assert f'dlora_tokens_total{{tenant="alice"}} {float(rows)}' in text
        # The edge's files, and the micro-batch.
        assert 'dlora_finished_streams_total{status="OK",tenant="alice"} 2.0' in text
        assert "dlora_queue_length 0.0" in text
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").status == 200
        assert main(["status", "--metrics-port", str(port)]) == 0
        shown = capsys.readouterr().out
        assert "ready" in shown and "alice" in shown and str(rows) in shown
        secured._service.draining = True
        assert read_status(port).state.startswith("draining")
    assert main(["status", "--metrics-port", str(port)]) == 1


# ----------------------------------------------------------------- several servers


def test_drain_lets_streams_finish_and_sends_new_ones_elsewhere(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """A server that is told to stop finishes the micro-batch in flight; the next runs on the other
    address, and the gradients are those of one server."""
    cloud = cloud_models("llama")
    first = Server(cloud, options=ServerOptions(drain_s=20.0))
    first.start()
    with Server(cloud, options=NO_DRAIN) as second:
        both = dlora.connect(f"{first.address},{second.address}", cache=tmp_path)
        split = make_split(both, lora())
        loss = split(**batches()[0]).loss  # a stream is open: it waits for backward
        stopping = threading.Thread(target=first.stop)
        stopping.start()
        time.sleep(0.3)
        assert stopping.is_alive()
        loss.backward()
        stopping.join(10)
        assert not stopping.is_alive() and split.meter.retries == 0
        split(**batches(seed=3)[0]).loss.backward()
        assert both.address == second.address and split.meter.retries >= 1
        alone = dlora.connect(second.address, cache=tmp_path)
        want = make_split(alone, lora())
        for seed in (2, 3):
            want(**batches(seed=seed)[0]).loss.backward()
        for one, other in zip(adapter(split).values(), adapter(want).values(), strict=True):
            assert torch.equal(one.grad, other.grad)
        both.close()
        third = dlora.connect(f"{first.address},{second.address}", cache=tmp_path, timeout_s=0.5)
        assert third.address == second.address


def test_another_model_behind_the_second_address_is_refused(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """An edge that moves to a server of another model stops with both fingerprints, instead of
    training on it.
    """
    first = Server(cloud_models("llama"), options=NO_DRAIN)
    first.start()
    with Server(cloud_models("opt"), options=NO_DRAIN) as second:
        both = dlora.connect(f"{first.address},{second.address}", cache=tmp_path)
        split = make_split(both, lora())
        first.stop()
        with pytest.raises(PeerError, match="expects the model"):
            split(**batches()[0])


def test_credential_of_another_tenant_is_not_valid(folder: Path) -> None:
    """An id that was given to another tenant in the meantime does not keep the old one's streams
    alive.
    """
    name, _ = keys.add_token(folder, "alice", 1)
    identities = Identities(folder / "identities.json")
    assert identities.is_valid(Credential("alice", name)) and not identities.is_valid(
        Credential("bob", name)
    )


# ----------------------------------------------------------------- what stays on each side


def test_token_ids_and_labels_stay_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all tokens have the same embedding, a first frame is the same for every text and every
    label: but for embeddings, lengths and supervised positions nothing of them travels.
    """
    cloud, begins = CloudModel(make_base("llama"), model_id="llama"), []
    check = cloud.check

    def noted(begin: pb.Begin, *args: Any) -> Any:
        begins.append(begin.SerializeToString(deterministic=True))
        return check(begin, *args)

    monkeypatch.setattr(cloud, "check", noted)
    link = InProcessLink(cloud)
    model = make_split(link, lora())
    (batch,) = batches()
    other_text = {**batch, "input_ids": 304 - batch["input_ids"]}
    other_labels = {**batch, "labels": (304 - batch["labels"]).where(batch["labels"] > 0, -100)}
    model(**batch)
    model(**other_text)
    assert begins[0] != begins[1], "the embeddings differ, and so does the frame"
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(0.5)
    for one in (batch, other_text, other_labels):
        model(**one)
    assert len(set(begins[2:])) == 1
    link.close()


def test_edges_get_no_weight_of_the_decoder(
    cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """Of all weights an edge may fetch the embedding, the head and what stands between: no weight
    of a layer is among its files.
    """
    with Server(cloud_models("llama"), options=NO_DRAIN) as server:
        link = dlora.connect(server.address, cache=tmp_path)
        tensors = load_file(link.edge_files() / "edge.safetensors")
        link.close()
    layers = cloud_models("llama").model.get_decoder().layers
    theirs = {(tuple(weight.shape), weight.sum().item()) for weight in layers.parameters()}
    for name, tensor in tensors.items():
        assert ".layers." not in name
        assert (tuple(tensor.shape), tensor.sum().item()) not in theirs, name
