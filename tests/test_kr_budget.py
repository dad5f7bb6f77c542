"""The budget of Kill and Revive is what a run spends: by hand, foreseen, and in measured bytes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from conftest import FAMILIES, adapter, batches, lora, make_split
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from dlora.cloud.model import CloudModel
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.config import KillReviveConfig
from dlora.kill_revive.costs import Costs, Rows, Unit, trained_modules
from dlora.kill_revive.decide import State, decide, last_ranks, one_more
from dlora.kill_revive.fill import farthest
from dlora.kill_revive.foresee import foresee
from dlora.training.plan_settings import PlanSettings
from dlora.training.planned_set import planned_sites

# SmolLM2's q, k and v on the plain wire, in 2 bytes a value.
UNITS = [Unit(f"u{i}", tuple(f"u{i}.{name}" for name in "qkv"), i) for i in range(30)]
COSTS = Costs(
    tuple((1152, {f"u{i}.q": 1152, f"u{i}.k": 384, f"u{i}.v": 384}) for i in range(30)), ends=2000
)
EVERYTHING = [module for unit in UNITS for module in unit.modules]


def state(**values: Any) -> State:
    """The beginning of a run of 150 steps."""
    known: dict[str, Any] = {
        "step": 0,
        "total_steps": 150,
        "active": [unit.name for unit in UNITS],
        "since": {},
        "scores": {},
        "probes": {},
        "spent": 0.0,
    }
    return State(**(known | values))


# ----------------------------------------------------------------- by hand


@pytest.mark.parametrize("policy", ["kr", "spread", "random", "last"])
def test_the_rest_of_a_budget_buys_single_modules(policy: Any) -> None:
    """What whole sites leave over goes to modules of one site more, which the log names, and no
    other of them would fit.
    """
    found = decide(KillReviveConfig(policy=policy), UNITS, COSTS, state())
    ((name, part),) = found.partial.items()
    assert len(found.active) == 4 and part == (f"{name}.k", f"{name}.v")
    modules = trained_modules(UNITS, found.active, found.partial)
    assert 0.95 * 0.125 < COSTS.share(modules) <= 0.125 < COSTS.share([*modules, f"{name}.q"])
    (line,) = [line for line in found.lines if line.unit == name]
    assert line.active and line.reason.endswith(", only k, v")


def test_a_part_of_a_unit_is_better_than_too_much() -> None:
    """Where the budget pays for no unit it pays for a part of one, if it can."""
    least = COSTS.share(["u15.q", "u15.k"])
    found = decide(KillReviveConfig(budget=least), UNITS, COSTS, state())
    assert found.partial == {"u15": ("u15.q", "u15.k")}
    found = decide(KillReviveConfig(budget=0.01), UNITS, COSTS, state())
    assert found.active == {"u15"} and not found.partial


def test_farthest_units_are_between_the_others() -> None:
    """Each is as far as can be from all before it, of equals the highest."""
    chosen = [UNITS[5], UNITS[15], UNITS[25]]
    assert [unit.layer for unit in farthest(UNITS, chosen)[:4]] == [20, 10, 0, 29]
    assert len(farthest(UNITS, chosen)) == 27


def test_a_static_set_grows_once_where_it_leaves_over() -> None:
    """A set that cannot spend its budget has a module more as soon as that is paid for until the
    end, and the run then ends within 1 % of the budget, from below.
    """
    config = KillReviveConfig(policy="spread", budget=0.11)
    found, spent, changes = decide(config, UNITS, COSTS, state()), 0.0, []
    for step in range(150):
        known = state(step=step, active=found.active, partial=found.partial, spent=spent)
        if step and (more := one_more(config, UNITS, COSTS, known, last_ranks(found.lines))):
            found = more
            changes.append(step)
        spent += COSTS.share(trained_modules(UNITS, found.active, found.partial))
    assert len(changes) == 1 and changes[0] > 75
    assert 0.99 * 0.11 < spent / 150 <= 0.11


@pytest.mark.parametrize(
    ("options", "costs", "said"),
    [
        ({"budget": 0.125}, replace(COSTS, ends=30_000), "which always travel, take 14.1%"),
        ({"budget": 0.015}, COSTS, "one unit at least is trained, which takes 3.8%"),
        (
            {"policy": "magnitude", "warmup": 20},
            COSTS,
            "20 steps of warm-up and 4 more, in which killed modules fade,",
        ),
        ({"idle": "edge"}, COSTS, "idle=edge exchanges all modules at every step"),
        ({"schedule": "cubic"}, COSTS, "a cubic budget falls at decisions alone"),
    ],
)
def test_what_no_run_can_keep_is_said(options: Any, costs: Costs, said: str) -> None:
    """Where a run will take more than its budget, it says how much and why; elsewhere nothing."""
    config = KillReviveConfig(**options)
    found = foresee(config, UNITS, costs, 150)
    assert found.whole > 1.02 * config.budget and said in found.warning
    assert f"got {config.budget:.1%}" in found.warning and f"{found.whole:.1%}" in found.warning
    if config.idle != "edge":
        assert foresee(replace(config, budget=0.6), UNITS, costs, 150).warning == ""


def test_fading_comes_out_of_the_budget() -> None:
    """A choice after a warm-up leaves what its killed modules take until they have faded, or what
    it takes to upload them.
    """
    known = state(step=8, spent=8.0, going=EVERYTHING)
    for idle, costs in (
        ("drop", COSTS),
        ("cloud", replace(COSTS, uploads=dict.fromkeys(EVERYTHING, 5000.0))),
    ):
        config = KillReviveConfig(policy="last", warmup=8, idle=idle)
        found = decide(config, UNITS, costs, known)
        modules = trained_modules(UNITS, found.active, found.partial)
        share, killed = costs.share(modules), set(EVERYTHING) - set(modules)
        more = 4 * (1 - share) if idle == "drop" else costs.upload(killed, modules)
        took = 8 + 142 * share + more
        assert more > 1 and 0.9 * 0.125 < took / 150 <= 0.125


# ----------------------------------------------------------------- whole runs

STEPS = 16


@pytest.fixture(scope="module")
def six() -> Iterator[InProcessLink]:
    """Six layers: 18 modules of q, k and v, so that one of them is a small part of a budget."""
    config = copy.deepcopy(FAMILIES["llama"][0])
    config.num_hidden_layers = 6
    link = InProcessLink(CloudModel(AutoModelForCausalLM.from_config(config), model_id="six"))
    yield link
    link.close()


def split_over(link: InProcessLink, wire: str) -> Any:
    """A fresh adapter, of a rank that makes hosted modules dear beside the ends."""
    model = make_split(
        *(link, lora(r=16, init_lora_weights=True)), wire=wire, upload_consent=wire == "hosted"
    )
    model.set_options(head_positions="supervised")
    return model


def made_rows() -> tuple[list[dict[str, Any]], Rows]:
    """Micro-batches of about as many tokens, and what the average one holds."""
    made = batches(STEPS, rows=16, length=8)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in made)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in made)
    return made, Rows(tokens / STEPS, labels / tokens)


def measured(model: Any, config: KillReviveConfig | None) -> tuple[int, Any]:
    """(bytes of a whole run, what decided in it); without settings all modules are trained."""
    made, rows = made_rows()
    optimizer = AdamW(list(adapter(model).values()), lr=1e-2)
    reviver = None if config is None else KillAndRevive(model, config, STEPS, rows)
    for step, batch in enumerate(made):
        if reviver is not None:
            reviver.before_step(step)
        model(**batch).loss.backward()
        if reviver is not None:
            reviver.before_update(optimizer)
        optimizer.step()
        if reviver is not None:
            reviver.after_update()
        optimizer.zero_grad()
    return model.meter.sent_bytes + model.meter.received_bytes, reviver


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
def test_a_run_takes_its_budget(
    six: InProcessLink, wire: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The measured bytes of whole runs are the budget's share of FT's, to 2 % of it, on every wire:
    of a set that stays, of one that is killed and revived and uploaded, and of one that is chosen
    after a warm-up while the others fade. What is counted is what is measured.
    """
    whole, _ = measured(split_over(six, wire), None)
    for options in (
        {"policy": "spread"},
        {"cover": True, "revive": "scored", "interval": 4, "idle": "cloud"},
        {"policy": "magnitude", "warmup": 1, "drop_steps": 2},
    ):
        config = KillReviveConfig(budget=0.4, **options)  # type: ignore[arg-type]
        with caplog.at_level(logging.WARNING, logger="dlora"):
            took, reviver = measured(split_over(six, wire), config)
        assert took / whole == pytest.approx(0.4, rel=0.02), options
        assert reviver.spent / STEPS == pytest.approx(took / whole, rel=0.02), options
        assert not caplog.records


def test_a_run_that_cannot_keep_its_budget_warns_once(
    six: InProcessLink, caplog: pytest.LogCaptureFixture
) -> None:
    """Over the hosted wire the ends alone are more than a small budget: that is said once, before
    the first step.
    """
    model = split_over(six, "hosted")
    reviver = KillAndRevive(model, KillReviveConfig(budget=0.05, interval=1), STEPS, made_rows()[1])
    with caplog.at_level(logging.WARNING, logger="dlora"):
        for step in range(3):
            reviver.before_step(step)
    (record,) = caplog.records
    assert "kr budget: got 5.0%" in record.getMessage()


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
def test_a_plan_is_made_with_the_set_that_is_trained(six: InProcessLink, wire: Any) -> None:
    """`dlora plan` plans the modules that training begins with, for rows of the same size."""
    model = split_over(six, wire)
    settings = PlanSettings(
        server="in-process",
        kr="on",
        kr_options={"budget": 0.5},
        batch_size=4,
        length=24,
        supervised=16,
        wire=wire,
        wire_dtype="fp32",
        upload_consent=wire == "hosted",
    )
    planned = [name for site in planned_sites(settings, model) for name in site.names]
    rows = Rows(4 * 24, 16 / 24)
    reviver = KillAndRevive(model, KillReviveConfig(budget=0.5), STEPS, rows)
    reviver.before_step(0)
    assert planned == model.active_modules
    assert 1 < len(planned) < 18


def test_a_unit_in_part_is_in_the_state(six: InProcessLink) -> None:
    """A run that goes on trains the modules that were trained, also where that is a part of a unit,
    and decides as the first would.
    """
    config, states, models = KillReviveConfig(budget=0.5), [], []
    for going_on in (None, 1):
        models.append(split_over(six, "plain"))
        reviver = KillAndRevive(models[-1], config, STEPS)
        if going_on:
            reviver.load_state_dict(*states)
            continue
        reviver.before_step(0)
        assert reviver.partial
        states += [reviver.state_dict(), reviver.snapshot]
    assert models[0].active_modules == models[1].active_modules
    assert reviver.state_dict() == states[0]


def test_a_state_with_names_of_units_is_taken_up(six: InProcessLink) -> None:
    """Older versions let units fade and warm up, trained whole ones alone and had fewer options;
    one that they lacked and that is not as it was is named.
    """
    model = split_over(six, "plain")
    reviver = KillAndRevive(model, KillReviveConfig(), STEPS)
    reviver.before_step(0)
    first, second, *_ = (unit for unit in reviver.units if unit.name not in reviver.active)
    old = reviver.state_dict() | {"fading": {first.name: 3}, "warming": {second.name: 1}}
    del old["partial"]
    reviver.load_state_dict(old, reviver.snapshot)
    assert reviver.fading == dict.fromkeys(first.modules, 3)
    assert reviver.warming == dict.fromkeys(second.modules, 1)
    assert reviver.partial == {} and set(first.modules) < set(model.active_modules)

    del old["config"]["moments"]
    reviver.load_state_dict(old, reviver.snapshot)
    other = KillAndRevive(model, KillReviveConfig(moments="keep"), STEPS)
    with pytest.raises(UsageError, match=r"go on with other settings: moments"):
        other.load_state_dict(old, other.snapshot)
