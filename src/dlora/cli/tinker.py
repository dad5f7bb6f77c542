"""`dlora tinker`: training and sampling for programs that speak the Tinker SDK's interface."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from dlora.errors import UsageError
from dlora.protocol.address import LOOPBACK_ADDRESS
from dlora.tinker.settings import TinkerSettings

if TYPE_CHECKING:
    from dlora.edge.link import Link
    from dlora.privacy.recording import Recorder
    from dlora.tinker.service import Service

__all__ = ["build_service", "tinker"]


def tinker(settings: TinkerSettings) -> int:
    """Edge: the Tinker SDK's interface on loopback, to train and sample adapters."""
    from transformers.utils import logging as transformers_logging

    from dlora.edge.grpc_link import Access, connect
    from dlora.inference.api import ApiServer
    from dlora.protocol.device import try_device
    from dlora.tinker.app import build_app

    transformers_logging.set_verbosity_error()
    try_device(settings.device)
    link = connect(settings.server, access=Access(**settings.access))
    try:
        service = build_service(settings, link)
        app = build_app(service, api_key=settings.api_key or os.environ.get("DLORA_API_KEY"))

        # The server's own handlers hand on what they got, which would end the process here.
        server = ApiServer(app, LOOPBACK_ADDRESS, settings.port, path="")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        print(f"model      {service.name}")
        print(f"saves in   {settings.output}")
        print(f"ready      TINKER_BASE_URL={server.url}", flush=True)
        server.run()
    finally:
        link.close()
    return 0


def build_service(settings: TinkerSettings, link: Link) -> Service:
    """What stands behind the interface."""
    from dlora.edge.link import RetryPolicy
    from dlora.edge.load import load_tokenizer
    from dlora.tinker.checkpoints import Checkpoints
    from dlora.tinker.models import Models
    from dlora.tinker.service import Service

    recorder = _recorder(settings)

    options = {
        "wire": settings.wire,
        "wire_dtype": settings.wire_dtype,
        "upload_consent": settings.upload_consent,
        "retry": RetryPolicy(give_up_after_s=settings.give_up_after_s),
        "device": settings.device,
        "edge_layers": settings.edge_layers,
        "noise": settings.noise,
        "in_flight": settings.in_flight,
    }
    return Service(
        Models(recorder.link(link) if recorder else link, load_tokenizer(link), options),
        Checkpoints(settings.output),
        name=settings.name or link.description.model_id,
        lora_alpha=settings.lora_alpha,
        max_adapters=settings.max_adapters,
        batch_size=settings.batch_size,
        everywhere=settings.head_positions == "all",
        recorder=recorder,
    )


def _recorder(settings: TinkerSettings) -> Recorder | None:
    """What records the first micro-batches, if that is asked for.

    Raises UsageError for a folder in which there is a run already.
    """
    from dlora.privacy.recording import Recorder
    from dlora.runs import RunFolder

    if not settings.record:
        return None
    folder = RunFolder(settings.output)
    if folder.run_file.exists():
        raise UsageError(f"record: {settings.output} holds a run already: give another --output")
    return Recorder(folder.recording, settings.record)
