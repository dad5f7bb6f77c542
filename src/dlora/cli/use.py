"""`dlora generate`, `chat`, `eval`, `api` and `info`: using an adapter, and looking at it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dlora.cli.eval_screen import task_lines
from dlora.edge.settings import EdgeSettings, InfoSettings
from dlora.errors import DataError, DLoRAError
from dlora.files import write_json
from dlora.inference.settings import ApiSettings, ChatSettings, EvalSettings, GenerateSettings
from dlora.protocol.address import is_loopback
from dlora.protocol.device import try_device
from dlora.protocol.text import without_controls

__all__ = ["api", "chat", "evaluate", "generate", "info"]


@contextmanager
def _loaded(settings: EdgeSettings, adapter: Path | None) -> Iterator[tuple[Any, Any]]:
    """Connect and load: (split model, tokenizer). Ends the connection afterwards."""
    from transformers.utils import logging as transformers_logging

    from dlora.edge.grpc_link import Access, connect
    from dlora.edge.load import load_tokenizer

    transformers_logging.set_verbosity_error()
    try_device(settings.device)
    link = connect(settings.server, access=Access(**settings.access))
    try:
        tokenizer = load_tokenizer(link)
        yield _model(settings, link, adapter), tokenizer
    finally:
        link.close()


def _model(settings: EdgeSettings, link: Any, adapter: Path | None) -> Any:
    """The served model with an adapter, or as it is."""
    from dlora.inference.answer import load_for_inference

    model = load_for_inference(
        link,
        adapter,
        wire=settings.wire,
        wire_dtype=settings.wire_dtype,
        upload_consent=settings.upload_consent,
        give_up_after_s=settings.give_up_after_s,
        device=settings.device,
        edge_layers=settings.edge_layers,
    )
    model.set_options(noise=settings.noise)
    return model


def _write(text: str) -> None:
    """Show words of a model, which is the cloud's: none of them steers the terminal."""
    print(_shown(text), end="", flush=True)


def _shown(text: str) -> str:
    """As it is where a file or a program reads it; without control characters at a terminal."""
    return without_controls(text) if sys.stdout.isatty() else text


# ----------------------------------------------------------------- generate


def generate(settings: GenerateSettings) -> int:
    """Edge: answer a prompt, standard input, or a file of prompts."""
    from transformers import set_seed

    from dlora.inference.answer import cost_line
    from dlora.inference.prompts import continued, load_prompts

    # What is asked is read before anything is loaded.
    prompts = None if settings.prompts is None else load_prompts(settings.prompts)
    prompt = settings.prompt
    if prompts is None and prompt is None:
        if sys.stdin.isatty():
            print("reading the prompt from standard input, up to Ctrl-D", file=sys.stderr)
        prompt = _standard_input()

    with _loaded(settings, settings.adapter) as (model, tokenizer):
        set_seed(settings.seed)
        before, started = model.meter.copy(), time.monotonic()
        if prompts is None:
            num_tokens = _generate_one(settings, model, tokenizer, prompt or "")
        else:
            start = continued(settings.output, prompts) if settings.output else 0
            num_tokens = _generate_file(settings, model, tokenizer, prompts[start:], start)

        cost = cost_line(model.meter - before, num_tokens, time.monotonic() - started)
        print(f"dlora: {cost}", file=sys.stderr)
    return 0


def _standard_input() -> str:
    """All of standard input, as it is: UTF-8, whatever the locale. Raises DataError."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        return sys.stdin.read()
    try:
        text: str = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("standard input: not UTF-8 text") from None
    return text


def _generate_one(settings: GenerateSettings, model: Any, tokenizer: Any, prompt: str) -> int:
    """The answer to a prompt, piece by piece where that can be; return the number of tokens."""
    from dlora.inference.answer import Pieces, complete

    pieces = Pieces(tokenizer, _write)
    texts, num_tokens = complete(
        model, tokenizer, [prompt], chat=settings.chat, streamer=pieces, **settings.options
    )
    print("" if pieces.num_tokens else _shown(texts[0]))
    return num_tokens


def _generate_file(
    settings: GenerateSettings, model: Any, tokenizer: Any, prompts: list[Any], start: int
) -> int:
    """Answers to a file of prompts, each batch written at once; return the number of tokens."""
    from tqdm.auto import tqdm

    from dlora.inference.answer import complete_file

    total = 0
    batch_size = 1 if settings.prompt_lookup else settings.batch_size
    batches = complete_file(
        model, tokenizer, prompts, batch_size=batch_size, chat=settings.chat, **settings.options
    )

    with ExitStack() as stack:
        bar = tqdm(total=start + len(prompts), initial=start, desc="answers", unit="prompt")
        stack.enter_context(bar)
        out = sys.stdout
        if settings.output is not None:
            out = stack.enter_context(settings.output.open("a", encoding="utf-8"))

        for answers, num_tokens in batches:
            for prompt, text in answers:
                row = {"prompt": prompt, "completion": text}
                print(json.dumps(row, ensure_ascii=False), file=out)
            out.flush()
            bar.update(len(answers))
            total += num_tokens
    return total


# ----------------------------------------------------------------- chat


def chat(settings: ChatSettings) -> int:
    """Edge: talk with the model and a private adapter."""
    from transformers import set_seed

    from dlora.inference.chat import Chat

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()

    with _loaded(settings, settings.adapter) as (model, tokenizer):
        set_seed(settings.seed)
        talk = Chat(model, tokenizer, system=settings.system, **settings.options)
        print(f"{model.link.description.model_id} with {settings.adapter or 'no adapter'}.")
        print("Ctrl-C stops an answer, /new begins anew, /quit or Ctrl-D leaves.")

        while True:
            try:
                text = input("\n> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            except UnicodeDecodeError:
                print("dlora: that was not UTF-8 text", file=sys.stderr)
                continue
            if text.strip() == "/quit":
                return 0
            if text.strip() == "/new":
                talk.forget()
                print("a new chat")
            elif text.strip():
                _say(talk, model, text)


def _say(talk: Any, model: Any, text: str) -> None:
    """One answer, and what it cost. An error ends the answer, not the chat."""
    from dlora.inference.answer import cost_line

    before, started = model.meter.copy(), time.monotonic()
    try:
        talk.say(text, _write)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except DLoRAError as error:
        print(f"dlora: {error} (say it again, or /new begins anew)", file=sys.stderr)
        return

    cost = cost_line(model.meter - before, talk.num_tokens, time.monotonic() - started)
    print(f"dlora: {cost}", file=sys.stderr)


# ----------------------------------------------------------------- eval, api, info


def evaluate(settings: EvalSettings) -> int:
    """Edge: loss, exact match or choices on a data file, or tasks of lm-eval."""
    if settings.tasks:
        return _evaluate_tasks(settings)
    from dlora.inference.evaluate import evaluate

    with _loaded(settings, settings.adapter) as (model, tokenizer):
        figures = evaluate(settings, model, tokenizer)
    figures = _kept(settings, figures)

    # An interval stands on the line of its figure; the cost is in the file alone.
    for name, value in figures.items():
        if name == "cost" or name.endswith("_95"):
            continue
        shown = f"{value:.4f}" if isinstance(value, float) else value
        interval = figures.get(f"{name}_95")
        ends = f"  (95 %: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        print(f"{name:18} {shown}{ends}")
    if settings.predictions is not None:
        print(f"{'predictions':18} {settings.predictions}")
    return 0


def _kept(settings: EvalSettings, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with their adapter, written where they are asked for."""
    adapter = None if settings.adapter is None else str(settings.adapter)
    figures = {"adapter": adapter, **figures}
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings.output, figures)
    return figures


def _evaluate_tasks(settings: EvalSettings) -> int:
    """Tasks of lm-eval: a table, and the results in the adapter's folder."""
    from dlora.edge.adapter_results import RESULTS_FILE, note_results
    from dlora.inference.tasks import load_tasks, measure_tasks

    # Their data is at hand before a server is asked.
    tasks = load_tasks(settings)
    with _loaded(settings, settings.adapter) as (model, tokenizer):
        figures = measure_tasks(settings, model, tokenizer, tasks)
    figures = _kept(settings, figures)
    kept = None
    if settings.adapter is not None:
        note_results(settings.adapter, figures["tasks"])
        kept = settings.adapter / RESULTS_FILE

    for line in task_lines(figures, kept, settings.predictions):
        print(line)
    return 0


def api(settings: ApiSettings) -> int:
    """Edge: an OpenAI-compatible server on loopback, over private adapters."""
    from dlora.inference.answer import share_ends
    from dlora.inference.api import ApiServer, build_app

    first, *more = settings.adapters.items() or [(settings.name, settings.adapter)]
    name, adapter = first
    with _loaded(settings, adapter) as (model, tokenizer):
        name = name or (adapter.resolve().name if adapter else model.link.description.model_id)
        others = {}
        for other, folder in more:
            others[str(other)] = _model(settings, model.link, folder)
            share_ends(model, others[str(other)])

        local = is_loopback(settings.host)
        if not local:
            warning = f"{settings.host} is not loopback: others may use the adapter"
            print(f"warning: {warning}", file=sys.stderr)
        app = build_app(
            model,
            tokenizer,
            name=name,
            others=others,
            api_key=settings.api_key or os.environ.get("DLORA_API_KEY"),
            max_new_tokens=settings.max_new_tokens,
            prompt_lookup=settings.prompt_lookup,
            **({} if local else {"hosts": ("*",)}),
        )

        # The server's own handlers hand on what they got, which would end the process here.
        server = ApiServer(app, settings.host, settings.port)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        for one in (name, *others):
            print(f"model      {one}")
        print(f"ready      {server.url}", flush=True)
        server.run()
    return 0


def info(settings: InfoSettings) -> int:
    """What a server serves, and what an adapter folder holds."""
    from dlora.edge.describe import describe_adapter, describe_server
    from dlora.edge.grpc_link import Access, connect

    description = None
    if settings.server is not None:
        link = connect(settings.server, access=Access(**settings.access))
        description = link.description
        link.close()
        for name, value in describe_server(settings.server, description):
            print(f"{name:12} {value}")

    if settings.adapter is not None:
        for name, value in describe_adapter(settings.adapter, description):
            print(f"{name:12} {value}")
    return 0
