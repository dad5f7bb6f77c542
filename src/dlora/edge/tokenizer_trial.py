"""A cloud's tokenizer and chat template are programs: they are tried before they run here.

A rule that doubles a text thirty times takes all memory, and Rust then ends the process. So each
pair of files that was not seen before runs once, on a short conversation, in a child process with
limits of time and memory. That shows that it ends on this text, and not that it does on any other.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from dlora.errors import PeerError

__all__ = ["try_tokenizer"]

_SECONDS: Final = 10
_BYTES: Final = 2**30
_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# Without this package and without torch: a few tenths of a second. What a template or a tokenizer
# says of this text is nobody's concern here, errors least of all.
_CHILD: Final = """
import json, os, pathlib, resource, sys
seconds, limit, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
import jinja2.ext, jinja2.sandbox, tokenizers

resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
text = "The quick brown fox, 12 345.67!\\n\\tna\\u00efve \\u6f22\\u5b57 \\U0001f600 def f(x): " * 4
chat = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]

class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)

def templates():
    file = folder / "chat_template.jinja"
    if file.is_file():
        yield file.read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    text = file.read_text(encoding="utf-8") if file.is_file() else "{}"
    found = json.loads(text).get("chat_template")
    for entry in found if isinstance(found, list) else [found]:
        entry = entry.get("template") if isinstance(entry, dict) else entry
        if isinstance(entry, str):
            yield entry

def raise_exception(message):
    raise jinja2.TemplateError(message)

def render(template, messages):
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.globals.update(
        raise_exception=raise_exception, strftime_now=lambda form: form,
        namespace=jinja2.utils.Namespace, dict=dict,
    )
    return made.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token="", eos_token=""
    )

def attempt(run, *arguments):
    try:
        return run(*arguments)
    except MemoryError:
        os._exit(3)
    except Exception:
        return None

texts = [text]
for template in attempt(list, templates()) or []:
    for messages in (chat, chat[1:]):
        texts.append(attempt(render, template, messages) or "")
if any(len(one) > 100 * len(text) for one in texts):
    os._exit(4)
file = folder / "tokenizer.json"
made = attempt(tokenizers.Tokenizer.from_file, str(file)) if file.is_file() else None
for one in texts if made is not None else []:
    ids = attempt(lambda: made.encode(one).ids) or []
    if len(ids) > 100 * max(len(one), 1):
        os._exit(4)
    attempt(made.decode, ids)
"""


def try_tokenizer(folder: Path, address: str) -> None:
    """Let tokenizer and chat template of a folder run once, where nothing can happen.

    The folder's name stands for its content: a file beside it says that it was tried. Raises
    PeerError for what does not end within limits.
    """
    tried = folder.with_name(f"{folder.name}.tried")
    if tried.exists() or not any((folder / name).is_file() for name in _FILES):
        return
    command = [sys.executable, "-I", "-c", _CHILD, str(_SECONDS), str(_BYTES), str(folder)]
    try:
        done = subprocess.run(  # noqa: S603  # the program is this file's own
            command, capture_output=True, timeout=2 * _SECONDS, check=False
        )
        code: int | str = done.returncode
    except subprocess.TimeoutExpired:
        code = f"more than {2 * _SECONDS} s"
    if code != 0:
        raise PeerError(
            f"tokenizer or chat template from {address} do not end within {_SECONDS} s and "
            f"{_BYTES >> 20} MiB on a short text ({code}). Use another server."
        )
    tried.touch()
