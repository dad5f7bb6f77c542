"""What `dlora train` shows: what begins, how far it is, and what came of it.

On a terminal a bar that fits it; elsewhere a line now and then, as a log has it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dlora.cli.console import bar_columns, is_terminal
from dlora.cli.lines import served_at, shell, show
from dlora.edge.meter import Meter
from dlora.edge.model import SplitModel
from dlora.kill_revive.foresee import Foreseen
from dlora.training.advice import SEEN
from dlora.training.planned_set import sites_with
from dlora.training.readable import clock, counted, readable_bytes, readable_time
from dlora.training.settings import TrainSettings
from dlora.training.split_trainer import SplitTrainer
from dlora.training.task_traffic import step_traffic_of
from dlora.training.tasks import best_metric, said

__all__ = ["TrainScreen", "beginning", "ending", "shown"]

log = logging.getLogger(__name__)

_LINE_EVERY_S: Final = 30.0
"""Where there is no bar: seconds between lines."""
_BAR: Final = "step {n_fmt} of {total_fmt} |{bar}| {remaining} left{postfix}"
_EVALUATING: Final = "evaluating |{bar}| {n_fmt} of {total_fmt}"


class TrainScreen(TrainerCallback):
    """The beginning of a run, and its bar with the last log entry behind it."""

    def __init__(self, settings: TrainSettings, trainer: SplitTrainer) -> None:
        self.settings, self.trainer = settings, trainer
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self.current_step = 0
        shows = log.isEnabledFor(logging.INFO) and not trainer.args.disable_tqdm
        self._has_bar = shows and is_terminal(sys.stderr)
        self._start = self._last_line = time.monotonic()
        self._first_step = 0

    def close(self) -> None:
        """End the bars, however the run ended."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say what begins, with all that is decided by now."""
        if log.isEnabledFor(logging.INFO):
            show(beginning(self.settings, self.trainer, state.max_steps))
        self._start, self._first_step = time.monotonic(), state.global_step
        self._last_line = -_LINE_EVERY_S  # the first is shown at once
        self.current_step = state.global_step
        if self._has_bar:
            self.training_bar = _bar(_BAR, state.max_steps, initial=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            self.training_bar.ncols = bar_columns()
            self.training_bar.update(state.global_step - self.current_step)
        self.current_step = state.global_step

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Move the bar of an evaluation."""
        if not self._has_bar or eval_dataloader is None:
            return
        if self.prediction_bar is None:
            self.prediction_bar = _bar(_EVALUATING, len(eval_dataloader), leave=False)
        self.prediction_bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar of the evaluation away."""
        if self.prediction_bar is not None:
            self.prediction_bar.close()
        self.prediction_bar = None

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show loss, speed and traffic; losses of evaluations stay as lines above the bar."""
        logs = logs or {}
        if "eval_loss" in logs:
            best, name = state.best_metric, best_metric(self.settings.task)
            sign = 1 if name.endswith("loss") else -1
            is_best = best is None or sign * float(logs[name]) <= sign * best
            mark = "".join(f", {text}" for text in said(logs, "eval_"))
            mark += ", the best so far" if is_best else ""
            log.info("step %d: eval loss %.4f%s", state.global_step, logs["eval_loss"], mark)
        elif "loss" not in logs:
            return
        elif self.training_bar is not None:
            self.training_bar.set_postfix_str(_behind_the_bar(logs, state), refresh=False)
        elif state.global_step == state.max_steps or self._is_due():
            left = readable_time(self._left_s(state))
            behind = _behind_the_bar(logs, state)
            log.info("step %d of %d: %s, %s left", state.global_step, state.max_steps, behind, left)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last state of the bar stays."""
        if self.training_bar is not None:
            self.training_bar.refresh()
        self.close()

    def _is_due(self) -> bool:
        """Whether the last line is long ago."""
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY_S:
            return False
        self._last_line = now
        return True

    def _left_s(self, state: TrainerState) -> float:
        """Seconds that the steps to come take, at the speed of those since the start."""
        done = max(1, state.global_step - self._first_step)
        return (time.monotonic() - self._start) / done * (state.max_steps - state.global_step)


@contextmanager
def shown(settings: TrainSettings) -> Iterator[Callable[[SplitTrainer], TrainScreen]]:
    """What makes the screen of a run; its bars are gone afterwards, however the run ends."""
    made: list[TrainScreen] = []

    def make(trainer: SplitTrainer) -> TrainScreen:
        made.append(TrainScreen(settings, trainer))
        return made[0]

    try:
        yield make
    finally:
        with suppress(OSError):  # the terminal may be what is gone
            for screen in made:
                screen.close()


def _bar(text: str, total: int, **options: Any) -> Any:
    """A bar as wide as the terminal."""
    return tqdm(total=total, bar_format=text, ncols=bar_columns(), mininterval=0.2, **options)


def _behind_the_bar(logs: dict[str, Any], state: TrainerState) -> str:
    """A log entry in few words; costs are since the entry before."""
    steps = max(1, state.logging_steps or 1)
    crossed = (logs.get("sent_mb", 0.0) + logs.get("received_mb", 0.0)) * 1e6 / steps
    texts = [f"loss {float(logs['loss']):.3f}", *said(logs), f"{readable_bytes(crossed)}/step"]
    text = ", ".join(texts)
    if "cost_share" in logs:
        return f"{text}, {logs['cost_share']:.0%} of FT"
    return f"{text}, {logs.get('tokens_per_second', 0):.0f} tok/s"


# ----------------------------------------------------------------- the beginning


def beginning(
    settings: TrainSettings, trainer: SplitTrainer, steps: int
) -> Iterator[tuple[str, str]]:
    """(name, text) pairs: model and server, rows, adapter, how long it runs, what a step sends."""
    model = trainer.model
    served = model.link.description
    layers = counted(served.layers.count, "layer")
    yield "model", f"{served.model_id} ({layers}, {served.compute_dtype}) at {model.link.address}"

    rows = trainer.sizes["data"]
    yield "data", f"{settings.data}: {rows}"
    if "eval_data" in trainer.sizes:
        source = settings.eval_data or "held out of it"
        yield "", f"{source}: {trainer.sizes['eval_data']}"
    if settings.task != "sft":
        yield "task", _task(settings, trainer)
    yield "adapter", _adapter(settings, model)

    several = settings.gradient_accumulation_steps
    each = settings.batch_size * several
    epoch = -(-trainer.micro_batches // several)
    parts = f" ({several} micro-batches)" if several > 1 else ""
    unit = "answer" if settings.task == "grpo" else rows.noun
    yield (
        "run",
        f"{counted(steps, 'step')} of {counted(each, unit)}{parts}, {epoch} an epoch; "
        f"learning rate {settings.learning_rate:g}, {settings.lr_scheduler_type}",
    )
    yield from _costs(settings, trainer, steps)
    yield "output", f"{settings.output}; Ctrl-C finishes the step and saves"


def _task(settings: TrainSettings, trainer: SplitTrainer) -> str:
    """What is learned from, and what it is compared with."""
    arguments: Any = trainer.args
    reference = "the model without an adapter" if settings.adapter is None else "the first adapter"
    if settings.task != "grpo":
        return f"{settings.task} with beta {arguments.beta:g} against {reference}"
    names = ", ".join(one.rpartition(":")[2] for one in settings.reward)
    text = (
        f"grpo: {arguments.num_generations} answers to a prompt, of up to "
        f"{arguments.max_completion_length} tokens, rated by {names}"
    )
    return f"{text}; beta {arguments.beta:g} against {reference}" if arguments.beta else text


def _adapter(settings: TrainSettings, model: SplitModel) -> str:
    """Kind, parameters, modules and sites."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    names = [*model.active_set.adapted_modules, *(name for name, _ in model.edge_layer_adapters())]
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    config = model.peft_config["default"]
    kind = "LoRA" if settings.kind == "lora" else f"{settings.kind} bottleneck"
    begins = "; a spectral start costs a micro-batch more" if settings.spectral_start else ""
    return (
        f"{kind} of rank {config.r} on {kinds}: {counted(trained, 'parameter')}, "
        f"{counted(len(names), 'module')} at {counted(len(model.sites), 'site')}{begins}"
    )


def _costs(settings: TrainSettings, trainer: SplitTrainer, steps: int) -> Iterator[tuple[str, str]]:
    """What a step sends now, and all of them."""
    model = trainer.model
    one = step_traffic_of(settings, trainer.args, model, trainer.sizes["data"])
    whole, used = float(one.sent + one.received), "without evaluations"
    found = _foreseen(trainer)
    if found is not None:
        few = step_traffic_of(
            *(settings, trainer.args, model, trainer.sizes["data"]),
            sites_with(model.sites, found.modules),
        )
        whole = (few.sent + few.received) * found.whole / found.share
        used = f"{found.whole:.1%} of what training all modules takes"
    most = "up to " if settings.task == "grpo" else ""
    yield (
        "a step",
        f"{most}{readable_bytes(one.sent)} up, {readable_bytes(one.received)} down, "
        f"{one.round_trips} round trips ({settings.wire} wire, {settings.wire_dtype}"
        f"{'' if found is None else ', with all modules'})",
    )
    yield "in all", f"{most or 'about '}{readable_bytes(steps * whole)}, {used}"
    yield "is seen", f"by the cloud: {SEEN[settings.wire]}"


def _foreseen(trainer: SplitTrainer) -> Foreseen | None:
    """What Kill and Revive will take, where it is on."""
    if trainer.kill_revive is None or trainer.kill_revive.reviver is None:
        return None
    return trainer.kill_revive.reviver.foreseen


# ----------------------------------------------------------------- the end


def ending(run: dict[str, Any], settings: TrainSettings) -> Iterator[tuple[str, str]]:
    """(name, text) pairs: how it ended, what was best, what it cost, what to type next.

    `run` is what run.json holds.
    """
    cost = Meter.from_saved(run["cost"])
    loss = "no loss yet" if run["train_loss"] is None else f"loss {run['train_loss']:.4f}"
    took = readable_time(run["seconds"])
    yield run["status"], f"after {counted(run['steps'], 'step')} and {took}: {loss}"
    yield from _figures(run)
    yield from _best(run, settings)

    yield (
        "traffic",
        f"{readable_bytes(cost.sent_bytes)} up, {readable_bytes(cost.received_bytes)} down, "
        f"{counted(cost.round_trips, 'round trip')}, {counted(cost.retries, 'retry', 'retries')}",
    )
    waited = cost.wait_s - cost.cloud_s
    yield (
        "compute",
        f"edge {cost.edge_flops / 1e9:.1f} GFLOP, cloud {cost.cloud_flops / 1e9:.1f}; "
        f"{clock(waited)} of waiting for the link",
    )
    if kr := run.get("kill_revive"):
        yield (
            "active",
            f"{counted(len(kr['active']), 'unit')} at the end; on average {kr['cost_share']:.1%} "
            "of FT's cost",
        )
    yield "adapter", str(settings.output)

    if run["status"] == "interrupted":
        yield "continue", "the same command with --resume"
        return
    yield "next", "\n".join(map(shell, _next(settings)))


def _figures(run: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the task logs beside the loss, at the end."""
    figures = run.get("figures", {})
    if now := said(figures):
        held_out = said(figures, "eval_")
        yield "learned", ", ".join(now) + (f"; held out {', '.join(held_out)}" if held_out else "")


def _best(run: dict[str, Any], settings: TrainSettings) -> Iterator[tuple[str, str]]:
    """The best evaluation, and whether its adapter is the one that is kept."""
    if run["eval_loss"] is None:
        return
    metric = best_metric(settings.task)
    best, last_one = run[f"best_{metric}"], run["eval_loss"]
    if best is None or not settings.keep_best:
        yield "eval loss", f"{run['eval_loss']:.4f} at the end"
        return
    if metric != "eval_loss":
        last_one = run["figures"][metric]
    where = ""
    if run.get("best_checkpoint"):
        where = f" after step {run['best_checkpoint'].rpartition('-')[2]}: that adapter is kept"
    last = "" if last_one == best else f"; the last one has {last_one:.4f}"
    yield "best", f"{metric.replace('_', ' ')} {best:.4f}{where}{last}"


def _next(settings: TrainSettings) -> Iterator[list[str]]:
    """Commands that use what there is now."""
    server, adapter = served_at(settings), ["--adapter", str(settings.output)]
    yield ["dlora", "generate", *server, *adapter, "--prompt", "..."]
    if settings.task == "sft":
        yield ["dlora", "eval", *server, *adapter, "--data", settings.eval_data or "..."]
    yield ["dlora", "report", str(settings.output)]
    if settings.record:
        yield ["dlora", "audit", str(settings.output), *server]
