"""Tasks of EleutherAI's lm-evaluation-harness on the split model: `dlora eval --tasks`.

names -> tasks, with their data -> the harness's own evaluation over a `SplitLM` -> plain figures.
Texts, labels and scores stay here; the cloud sees the passes of an ordinary split model.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from dlora.edge.adapter_results import weights_hash
from dlora.edge.model import SplitModel
from dlora.errors import DataError, DLoRAError, UsageError
from dlora.inference.lm_harness import KeptAnswers, SplitLM, is_of
from dlora.inference.settings import EvalSettings
from dlora.protocol.text import clean_text

__all__ = ["load_tasks", "measure_tasks"]

log = logging.getLogger(__name__)

_SEEDS: Final = (0, 1234, 1234, 1234)
"""Of Python, NumPy, torch and the choice of examples: the harness's own."""
_DRAWS: Final = 1000
"""For standard errors that have no closed form."""
_NO_METRICS: Final = ("name", "alias", "sample_len", "sample_count")


# ----------------------------------------------------------------- which tasks


def load_tasks(settings: EvalSettings) -> dict[str, Any]:
    """The tasks that are asked for, with their data, as the harness has them.

    Raises UsageError for names that it does not know, tasks that cannot be made or run here, and
    data that is not at hand.
    """
    with _quiet():
        manager = _manager(settings.tasks, settings.tasks_path)
        names = [name for asked in settings.tasks for name in _matching(asked, manager)]
        tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        try:
            loaded = manager.load(list(dict.fromkeys(names)))
        except Exception as error:  # of the hub, of data sets, of whatever a task's file says
            raise _not_made(error) from error
        for kind in tasks:
            tasks[kind] |= loaded.get(kind, {})
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"tasks: {name} runs what the model writes, as code: not offered here")
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"tasks: {name} asks about images or sounds: the model takes text")
    return tasks


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """The harness's list of tasks; that of the folder alone, which is quicker, if it has them."""
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    log.info("reading the list of the harness's tasks")
    return TaskManager(include_path=None if folder is None else str(folder))


def _matching(asked: str, manager: TaskManager) -> list[str]:
    """The names that are meant. Raises UsageError where there is none."""
    known = manager.all_tasks
    if found := fnmatch.filter(known, asked):
        return found
    if near := difflib.get_close_matches(asked, known, n=3):
        raise UsageError(f"tasks: unknown task {asked!r}; did you mean {', '.join(near)}?")
    raise UsageError(
        f"tasks: unknown task {asked!r}; `lm-eval ls tasks` lists those of the harness, and "
        "tasks_path adds a folder of your own"
    )


def _not_made(error: Exception) -> UsageError:
    """Why tasks could not be made, and what to do, in a line."""
    reason = clean_text(error) or type(error).__name__
    if isinstance(error, ConnectionError):
        return UsageError(
            f"tasks: their data is on the Hugging Face hub and not here: {reason}. Run the command "
            "once where the hub can be reached and bring its cache (HF_HOME), or give tasks_path "
            "with tasks whose data is here"
        )
    if isinstance(error, ModuleNotFoundError):
        return UsageError(f"tasks: a package is missing that they want: {reason}")
    return UsageError(f"tasks: lm-eval cannot make them: {type(error).__name__}: {reason}")


# ----------------------------------------------------------------- their figures


def measure_tasks(
    settings: EvalSettings,
    model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate the tasks of `load_tasks`; return plain numbers by task, with the cost.

    Answers are kept as they come, beside the adapter or the output, and an evaluation that was
    interrupted goes on with them. Raises UsageError and DataError.
    """
    before = model.meter.copy()
    answers = _kept_answers(settings, model)
    if answers is not None and len(answers):
        log.info("going on with %d answers that were kept", len(answers))
    is_done = False
    try:
        with _quiet():
            lm = SplitLM(model, tokenizer, batch_size=settings.batch_size, answers=answers)
        found = _evaluate(settings, lm, tasks)
        is_done = True
    except BaseException as error:
        if answers is not None and len(answers):
            error.add_note(f"{len(answers)} answers are kept: the same command goes on with them")
        raise
    finally:
        if answers is not None:
            answers.close(remove=is_done or not len(answers))

    if settings.predictions is not None:
        _write_samples(settings.predictions, found["samples"])
    return {
        "model_id": model.link.description.model_id,
        "tasks": {name: _figures(name, found) for name in found["results"]},
        "groups": sorted(found.get("groups", {})),
        "cost": asdict(model.meter - before),
    }


def _evaluate(settings: EvalSettings, lm: SplitLM, tasks: dict[str, Any]) -> dict[str, Any]:
    """The harness's own evaluation, with its own seeds."""
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])  # what tasks may draw from
    torch.manual_seed(_SEEDS[2])
    for task in tasks["tasks"].values():
        told = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and told != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif told is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEEDS[3])

    # It prints, and would start a process for each core while streams are open.
    with contextlib.redirect_stdout(sys.stderr), _one_process():
        try:
            found: dict[str, Any] = harness_evaluate(
                lm=lm,
                task_dict=tasks,
                limit=settings.limit,
                bootstrap_iters=_DRAWS,
                log_samples=settings.predictions is not None,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat,
            )
        except (DLoRAError, OSError):
            raise
        except Exception as error:  # of what a task's file says, of its data, of its metrics
            raise DataError(
                f"lm-eval could not go on with these tasks: {type(error).__name__}: "
                f"{clean_text(error)}"
            ) from error
    return found


def _figures(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a task or a group, with what they are of."""
    results, metrics = found["results"][name], []
    better = found["higher_is_better"].get(name, {})
    for key, value in results.items():
        metric, _, kept = key.partition(",")
        if key in _NO_METRICS or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        error = results.get(f"{metric}_stderr,{kept}")
        metrics.append(
            {
                "metric": metric,
                "filter": kept or "none",
                "value": float(value),
                "stderr": float(error) if isinstance(error, Real) else None,
                "higher_is_better": better.get(metric),
            }
        )
    rows = found["n-samples"].get(name, {})
    return {
        "metrics": metrics,
        "rows": rows.get("effective", results.get("sample_len")),
        "of_rows": rows.get("original"),
        "num_fewshot": found["n-shot"].get(name),
        "version": found["versions"].get(name),
        "harness": f"lm-eval {version('lm_eval')}",
        "subtasks": found["group_subtasks"].get(name, []),
    }


def _write_samples(file: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A JSON line for every row of every task."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for name, rows in samples.items():
            for row in rows:
                line = {"task": name, **row}
                out.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


# ----------------------------------------------------------------- an evaluation that was stopped


def _kept_answers(settings: EvalSettings, model: SplitModel) -> KeptAnswers | None:
    """Where answers are kept; nowhere without an adapter's folder or an output."""
    adapter = settings.adapter
    base = settings.output if adapter is None else adapter / "evaluation"
    if base is None:
        return None
    asked = ("wire_dtype", "edge_first", "edge_last", "noise_entry", "noise_clip", "chat")
    of = {
        "model": model.link.description.fingerprint,
        "adapter": "" if adapter is None else weights_hash(adapter),
        "max_length": int(model.link.description.limits.max_length),
        "harness": version("lm_eval"),
        **{name: getattr(settings, name) for name in asked},
    }
    for other in base.parent.glob(f"{base.name}-*.part"):
        if not is_of(other, adapter=of["adapter"]):  # weights that are no longer here
            other.unlink(missing_ok=True)
    return KeptAnswers(base, of)


# ----------------------------------------------------------------- the harness's own words


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness says of models and tasks that it is handed ready-made."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Standard errors are drawn here."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
