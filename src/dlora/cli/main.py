"""The command line: the only place that prints, sets up logging, or turns errors into exit
codes.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from dlora.cli.commands import COMMANDS
from dlora.cli.console import Console, settle
from dlora.cli.parser import LogLevel, parse
from dlora.errors import DLoRAError, UsageError

__all__ = ["main"]

# Libraries that tell of every request, file lock or data set. On processors with 16-bit AVX-512
# bitsandbytes also looks, whenever transformers loads it, for kernels that are not needed here.
_NOISY: Final = (*("httpx", "httpcore", "httpx2", "httpcore2", "filelock", "datasets", "lm_eval"),)
_NOISIER: Final = ("bitsandbytes.backends.cpu.ops",)
_NO_BARS: Final = (
    *("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"),
)
"""Variables that libraries read when they are loaded, which is later."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 fine, 1 failed, 2 wrong usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    _set_environment(argv)
    _set_up_logging()
    with _quiet(), _any_character(), _levels_kept():
        return _run(argv)


def _run(argv: list[str]) -> int:
    """Parse, run, and turn what is raised on purpose into one line and an exit code."""
    try:
        request = parse(argv, COMMANDS)
        if isinstance(request, str):
            print(request)
            return 0
        _set_level(request.log_level)
        request.check()
        try:
            return request.command.run(request.settings)
        finally:
            settle()

    except DLoRAError as error:
        _say(error, str(error))
        return 2 if isinstance(error, UsageError) else 1

    except KeyboardInterrupt as error:
        _say(error, "interrupted")
        return 130

    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        # torch's word for a write that failed, without the reason
        _say(error, "cannot write: is the disk full? What was saved before is fine.")
        return 1

    except OSError as error:
        if error.errno is None:
            raise
        where = f": {error.filename}" if error.filename else " while writing"
        _say(error, f"{error.strerror}{where}. What was saved before is fine.")
        return 1


def _say(error: BaseException, line: str) -> None:
    """One line for an error, and one for every note at it: the last says how to go on."""
    logging.getLogger("dlora").debug("where it was raised:", exc_info=error)
    for text in (line, *getattr(error, "__notes__", ())):
        print(f"dlora: {text}", file=sys.stderr)


def _set_environment(argv: list[str]) -> None:
    """Variables that libraries read when they are loaded, which is later."""
    # The halves take turns: threads that spin while the other half works would steal its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if argv[:1] == ["demo"]:  # both halves on one machine, see demo.SHARED_CORES
        os.environ.setdefault("OMP_PROC_BIND", "true")

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _set_up_logging() -> None:
    """Times and names; of other libraries warnings alone."""
    logging.basicConfig(level=logging.INFO, handlers=[Console()])
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _NOISIER:
        logging.getLogger(name).setLevel(logging.ERROR)


def _set_level(level: LogLevel) -> None:
    """How much is said. Libraries never say more than usual; quiet goes without bars."""
    number: int = getattr(logging, level.upper())
    logging.getLogger("dlora").setLevel(number)
    logging.getLogger().setLevel(max(number, logging.INFO))
    if number > logging.INFO:
        os.environ.update(dict.fromkeys(_NO_BARS, "1"))


@contextmanager
def _levels_kept() -> Iterator[None]:
    """What `_set_level` changes is put back afterwards."""
    loggers = [logging.getLogger(), logging.getLogger("dlora")]
    levels = [logger.level for logger in loggers]
    variables = {name: os.environ.get(name) for name in _NO_BARS}
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _any_character() -> Iterator[None]:
    """Answers have any characters: files and pipes get UTF-8, whatever the locale, and a terminal
    shows those that it lacks as escapes.
    """
    changed = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            changed.append((stream, stream.encoding, stream.errors))
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        yield
    finally:
        for stream, encoding, errors in changed:
            stream.reconfigure(encoding=encoding, errors=errors)


@contextmanager
def _quiet() -> Iterator[None]:
    """While a command runs: one line for an error in a thread, and no warnings of libraries to
    each other. Afterwards both are as they were.
    """
    before = threading.excepthook
    with warnings.catch_warnings():
        if not sys.warnoptions:  # peft and transformers talking to each other
            warnings.simplefilter("ignore", FutureWarning)

        # A log writer's thread that meets a full disk: the run itself decides what follows.
        threading.excepthook = lambda args: logging.getLogger("dlora").error(
            "%s: %s", args.exc_type.__name__, args.exc_value
        )
        try:
            yield
        finally:
            threading.excepthook = before


if __name__ == "__main__":
    raise SystemExit(main())
