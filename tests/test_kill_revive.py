"""Kill and Revive: decisions as plain functions, then training runs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import adapter, batches, lora, make_split
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.callback import KillReviveCallback
from dlora.kill_revive.config import PAPER, KillReviveConfig, Policy, from_options
from dlora.kill_revive.costs import Costs, Rows, Unit, trained_modules
from dlora.kill_revive.decide import (
    Decision,
    State,
    decide,
    is_due,
    needs_outputs,
    needs_probe,
    schedule,
)
from dlora.kill_revive.fill import rotated
from dlora.kill_revive.scores import Measured, score
from dlora.kill_revive.units import costs_of, units_of
from dlora.training.plan_settings import PlanSettings
from dlora.training.planner import planned_model
from dlora.training.run import train
from dlora.training.settings import TrainSettings

UNITS = [Unit(f"u{i}", (f"u{i}.q", f"u{i}.v"), i) for i in range(8)]
COSTS = Costs(tuple((10, {f"u{i}.q": 5, f"u{i}.v": 5}) for i in range(8)))
ALL = frozenset(unit.name for unit in UNITS)


def choose(config: KillReviveConfig, **changes: Any) -> Any:
    """A decision at step 40 of 100, with all units active and u7 best, the budget spent so far."""
    values: dict[str, Any] = {
        "step": 40,
        "total_steps": 100,
        "active": ALL,
        "since": dict.fromkeys(ALL, 0),
        "scores": {f"u{i}": float(i) for i in range(8)},
        "probes": {},
    } | changes
    return decide(
        config, UNITS, COSTS, State(**({"spent": config.budget * values["step"]} | values))
    )


def config(**options: Any) -> KillReviveConfig:
    """Half of the cost, no averaging."""
    return KillReviveConfig(
        **({"budget": 0.5, "average": False, "revive": "none", "hysteresis": 0.0} | options)
    )


# ----------------------------------------------------------------- decisions


def test_share_counts_sites_and_the_lowest() -> None:
    """A set costs what it exchanges: x once a site, no gradient at the lowest; all of it costs
    1.
    """
    assert COSTS.share([m for unit in UNITS for m in unit.modules]) == 1.0
    whole = 8 * (20 + 20) - 10
    assert COSTS.share(["u3.q"]) == pytest.approx((10 + 10) / whole)
    assert COSTS.share(["u3.q", "u3.v"]) == pytest.approx((10 + 20) / whole)
    assert COSTS.share(["u3.q", "u5.q"]) == pytest.approx((10 + 10 + 20 + 10) / whole)
    assert COSTS.share([]) == 0.0
    by_number = Costs(COSTS.sites, kind="modules")
    assert by_number.share(["u3.q", "u5.q"]) == 2 / 16
    assert Costs(COSTS.sites, ends=whole).share([]) == 0.5


def test_the_best_are_kept_within_the_budget() -> None:
    """Units with the highest scores stay, as many as the budget pays for; each gets a log line
    with rank and reason.
    """
    found = choose(config())
    assert found.active == {"u7", "u6", "u5", "u4"}
    by_name = {line.unit: line for line in found.lines}
    assert by_name["u7"].rank == 0 and by_name["u7"].reason == "kept" and by_name["u7"].score == 7.0
    assert (
        by_name["u0"].reason == "killed" and not by_name["u0"].active and by_name["u0"].step == 40
    )


def test_at_least_one_unit_is_active() -> None:
    """A budget that pays for nothing still leaves the best unit."""
    assert choose(config(budget=0.01)).active == {"u7"}


def test_hysteresis_favours_the_standing() -> None:
    """A unit that just came must be clearly better than one that stood, to take its place."""
    since = dict.fromkeys(ALL, 0) | {"u4": 30}
    scores = dict.fromkeys(ALL, 1.0) | {"u4": 1.05}
    assert "u4" in choose(config(budget=0.15), scores=scores, since=since).active
    assert (
        "u4" not in choose(config(budget=0.15, hysteresis=0.1), scores=scores, since=since).active
    )


def test_score_per_cost_prefers_what_costs_little() -> None:
    """By score per cost a module of an open site, or a small one, goes before a slightly better one
    that costs more.
    """
    modules = [Unit(name, (name,), i) for i in range(8) for name in (f"u{i}.q", f"u{i}.v")]
    scores = {unit.name: 1.0 for unit in modules} | {"u3.q": 3.0, "u5.q": 1.2}
    state = {"scores": scores, "active": set(scores), "since": dict.fromkeys(scores, 0)}

    def chosen(prefer: Any) -> frozenset[str]:
        values: dict[str, Any] = {
            "step": 40,
            "total_steps": 100,
            "probes": {},
            "spent": 40 * 0.17,
        } | state
        return decide(config(budget=0.17, prefer=prefer), modules, COSTS, State(**values)).active

    assert chosen("score") == {"u3.q", "u5.q"}
    assert chosen("score_per_cost") == {"u3.q", "u3.v"}


def test_cover_keeps_one_unit_for_each_band() -> None:
    """With `cover` every band has one unit, the weakest is replaced by the best of its band, and
    the budget holds.
    """
    cover = config(cover=True, revive="scored", revive_share=0.25)
    active, probes = {"u0", "u2", "u4", "u6"}, {"u1": 9.0, "u3": 1.0, "u5": 1.0, "u7": 8.0}
    found = choose(
        cover, active=active, scores={"u0": 5.0, "u2": 4.0, "u4": 1.0, "u6": 3.0}, probes=probes
    )
    assert found.active == {"u0", "u2", "u5", "u6"}
    reasons = {line.unit: line.reason for line in found.lines}
    assert (
        reasons["u4"] == "killed" and reasons["u5"] == "revived, scored" and reasons["u0"] == "kept"
    )
    assert (
        COSTS.share({m for unit in UNITS if unit.name in found.active for m in unit.modules}) <= 0.5
    )
    assert choose(config(cover=True)).active == {
        "u1",
        "u3",
        "u5",
        "u7",
    }  # after a warm-up: the best of each band


def test_revival_uses_its_share() -> None:
    """Idle units get a part of the budget: at random, repeatably, or largest gradients first."""
    active = ["u4", "u5", "u6", "u7"]
    state = {"active": active, "since": dict.fromkeys(active, 0)}
    scored = choose(
        config(revive="scored", revive_share=0.5), probes={"u0": 1.0, "u2": 3.0, "u1": 2.0}, **state
    )
    assert scored.active == {"u7", "u6", "u2", "u1"}
    assert {line.unit: line.reason for line in scored.lines}["u2"] == "revived, scored"
    assert {line.unit: line.reason for line in scored.lines}["u5"] == "killed"
    drawn = {
        choose(config(revive="random", revive_share=0.5, seed=seed), **state).active
        for seed in range(8)
    }
    assert len(drawn) > 1
    assert choose(config(revive="random", revive_share=0.5), **state) == choose(
        config(revive="random", revive_share=0.5), **state
    )


def test_average_budget_pays_for_the_warmup() -> None:
    """What the warm-up spent is missing later, so that the whole run costs the budget."""
    average = config(budget=0.25, average=True)
    assert schedule(average, 20, 100, spent=20.0) == pytest.approx(5 / 80)
    assert schedule(config(budget=0.25, warmup=20), 20, 100, spent=20.0) == 0.25
    assert schedule(average, 20, 100, spent=30.0) == 0.0


def test_cubic_budget_falls_from_one() -> None:
    """The cubic budget falls by the cube to its end, and with `average` the run still costs the
    budget.
    """
    cubic = config(budget=0.4, average=True, schedule="cubic", warmup=10, settle=0.5)
    spent, levels = 10.0, []
    for step in range(10, 100):
        levels.append(schedule(cubic, step, 100, spent))
        spent += levels[-1]
    assert levels[0] == pytest.approx(1.0, abs=0.01)
    assert all(a >= b - 1e-6 for a, b in pairwise(levels))
    assert spent == pytest.approx(40.0, rel=0.03)


def test_decisions_are_due_after_warmup_and_until_the_final_phase() -> None:
    """Decisions come at the end of the warm-up and every interval, and stop in the last phase."""
    kr = KillReviveConfig(warmup=0.1, interval=20, final=0.25, revive="scored")
    assert [step for step in range(100) if is_due(kr, step, 100)] == [10, 30, 50, 70]
    assert [step for step in range(100) if needs_probe(kr, step, 100)] == [29, 49, 69]
    once = KillReviveConfig(policy="gradient", warmup=0.1, interval=20)
    assert [step for step in range(100) if is_due(once, step, 100)] == [10]
    assert is_due(KillReviveConfig(policy="random", warmup=0), 0, 100)
    assert not is_due(KillReviveConfig(policy="gradient", warmup=0), 0, 100), (
        "there is nothing to choose by yet"
    )


@pytest.mark.parametrize("policy", get_args(Policy))
def test_baselines_keep_to_the_same_budget(policy: Any) -> None:
    """Every policy trains at most the budget, but for FT, and says which policy it was."""
    found = choose(config(policy=policy))
    if policy == "all":
        assert found.active == ALL
        return
    assert (
        COSTS.share([m for unit in UNITS if unit.name in found.active for m in unit.modules]) <= 0.5
    )
    expected = {
        "last": {"u4", "u5", "u6", "u7"},
        "spread": {"u1", "u3", "u5", "u7"},
        "rotate": {"u1", "u3", "u5", "u7"},
        "gradient": {"u4", "u5", "u6", "u7"},
    }
    assert found.active == expected.get(policy, found.active)
    later = choose(config(policy=policy), step=60)
    assert (later.active == found.active) == (policy not in ("redraw", "rotate"))


def test_rotation_trains_every_unit_in_turn() -> None:
    """Each interval the set is spread as before and one unit further, so that all are trained; a
    turn that costs too much leaves units out.
    """
    sets = [
        choose(config(policy="rotate", budget=0.25), step=step).active for step in range(0, 80, 20)
    ]
    assert sets == [{"u2", "u6"}, {"u3", "u7"}, {"u4", "u0"}, {"u5", "u1"}]

    dear = Costs((*COSTS.sites[:7], (100, {"u7.q": 50, "u7.v": 50})))
    turns = [[unit.name for unit in rotated(UNITS, dear, 0.25, turn)] for turn in range(2)]
    assert turns == [["u1", "u4", "u6"], ["u2", "u5"]]


def test_deltas_are_measured_until_they_are_decided_by() -> None:
    """Only policy "output" measures deltas, and only in the warm-up that its decision ends."""
    output = KillReviveConfig(policy="output", warmup=0.1)
    assert [step for step in range(100) if needs_outputs(output, step, 100)] == list(range(10))
    assert not any(needs_outputs(KillReviveConfig(warmup=0.1), step, 100) for step in range(100))


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("sensitivity", 9.0),
        ("gradient", 3.0),
        ("output", 5.0),
        ("magnitude", 10.0),  # two products of size 6 and 8
        ("relative", (3.0**2 + 2.0**2) ** 0.5),  # 6 over 2, 8 over 4: B was zero before
        ("norm_delta", (6.0**2 + 8.0**2) ** 0.5),
        ("delta_norm", (1 + 6.0**2 + 1 + 8.0**2) ** 0.5 - 2**0.5),
        ("random", (1 + 6.0**2 + 1 + 8.0**2) ** 0.5 - 2**0.5),
    ],
)
def test_scores_by_hand(kind: str, want: float) -> None:
    """Every score of a unit of two modules is what its definition gives by hand."""
    a_RI = torch.tensor([[0.6, 0.8]])
    new = [(a_RI, torch.tensor([[0.0], [size], [0.0]])) for size in (6.0, 8.0)]
    old = [(a_RI, torch.zeros_like(b_OR)) for _, b_OR in new]
    unit = Measured(gradients=9.0, outputs=5.0, old=old, new=new, weight_norms=[2.0, 4.0])
    assert score(kind, unit) == pytest.approx(want)


def test_scores_know_their_kinds() -> None:
    """A kind that is neither a signal nor a policy is refused."""
    with pytest.raises(ValueError, match="got kind 'size'"):
        score("size", Measured(gradients=0.0, outputs=0.0, old=[], new=[], weight_norms=[]))


def test_options_are_checked() -> None:
    """Unknown names and values out of range are refused; the paper's setting is a preset."""
    assert from_options("paper", {}) == PAPER
    assert from_options("on", {"budget": 0.2}).budget == 0.2
    with pytest.raises(UsageError, match="kr_options: speed is not known"):
        from_options("on", {"speed": 1})
    for bad in ({"budget": 0.0}, {"budget": 1.5}, {"interval": 0}, {"warmup": -1}, {"final": 2}):
        with pytest.raises(
            UsageError, match=f"kr {next(iter(bad))}: got {next(iter(bad.values()))}, want"
        ):
            KillReviveConfig(**bad)
    common = {"server": "x", "data": "x", "output": Path("nowhere")}
    with pytest.raises(UsageError, match="agree with --upload_consent true"):
        TrainSettings(**common, kr="on", kr_options={"idle": "cloud"})
    with pytest.raises(UsageError, match="kr_options need kr"):
        TrainSettings(**common, kr_options={"budget": 0.1})


# ----------------------------------------------------------------- runs


def loop(split: Any, config: KillReviveConfig, steps: int = 16) -> KillAndRevive:
    """A plain training loop."""
    optimizer = torch.optim.AdamW(list(adapter(split).values()), lr=1e-2, weight_decay=0.0)
    reviver = KillAndRevive(split, config, steps)
    for step, batch in enumerate(batches(steps)):
        reviver.before_step(step)
        split(**batch).loss.backward()
        reviver.before_update(optimizer)
        optimizer.step()
        reviver.after_update()
        optimizer.zero_grad()
    return reviver


FAST: dict[str, Any] = {
    "warmup": 2,
    "interval": 3,
    "final": 0.0,
    "budget": 0.5,
    "drop_steps": 2,
    "rewarm_steps": 2,
}
FAST |= {"revive": "scored"}


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("unit", ["site", "module"])
def test_every_policy_trains_and_measures(link: InProcessLink, policy: Any, unit: Any) -> None:
    """A plain loop runs with every policy and unit; only active modules have moved in the last
    step.
    """
    split = make_split(link, lora(target_modules="all-linear"))
    reviver = loop(split, KillReviveConfig(policy=policy, unit=unit, idle="cloud", **FAST))
    active = set(trained_modules(reviver.units, reviver.active, reviver.partial))
    assert set(split.active_modules) == active
    assert (
        len(active) == len(split.adapted_modules)
        if policy == "all"
        else len(active) < len(split.adapted_modules)
    )
    assert all(
        torch.isfinite(parameter).all() for parameter in split.parameters() if parameter.numel()
    )


@pytest.mark.parametrize("signal", ["delta_norm", "norm_delta", "relative", "gradient"])
def test_signals_score_what_changed(link: InProcessLink, signal: Any) -> None:
    """Every signal is 0 for a unit that did not change, and larger for one that changed more."""
    split = make_split(link, lora(init_lora_weights=True))
    reviver = KillAndRevive(split, KillReviveConfig(signal=signal, unit="module", **FAST), 10)
    first, second, third = split.adapted_modules[:3]
    with torch.no_grad():
        for name, size in ((second, 0.01), (third, 0.1)):
            reviver.layers[name].lora_B["default"].weight += size
    for name, size in ((first, 0.0), (second, 0.1), (third, 1.0)):
        for parameter in reviver._parameters(name):
            parameter.grad = torch.full_like(parameter, size)
    reviver.before_update(None)
    scores = reviver._scores()
    assert scores[first] == pytest.approx(0.0, abs=1e-6)
    assert scores[third] > scores[second] > 1e-6


def test_relative_change_is_that_of_the_product(link: InProcessLink) -> None:
    """The relative signal is the norm of the change of s B A over that of the frozen weight, by its
    definition.
    """
    split = make_split(link, lora())
    reviver = KillAndRevive(split, KillReviveConfig(unit="module", **FAST), 10)
    name = split.adapted_modules[1]
    layer = reviver.layers[name]
    old = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(1.1)
    new = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = link.cloud.model.get_submodule(name).weight
    assert reviver._scores()[name] == pytest.approx(
        ((new - old).norm() / weight.norm()).item(), rel=1e-4
    )


def test_dropped_units_fade_and_revived_ones_start_anew(link: InProcessLink) -> None:
    """A killed unit fades in `drop_steps`; a revived one begins without optimizer state and with
    small updates.
    """
    split = make_split(link, lora())
    optimizer = torch.optim.AdamW(list(adapter(split).values()), lr=1e-2, weight_decay=0.0)
    reviver = KillAndRevive(
        split, KillReviveConfig(policy="random", idle="drop", **(FAST | {"budget": 0.4})), 100
    )
    data = iter(batches(12))

    def step() -> None:
        split(**next(data)).loss.backward()
        reviver.before_update(optimizer)
        optimizer.step()
        reviver.after_update()
        optimizer.zero_grad()

    step()
    reviver.before_step(2)
    killed = next(unit for unit in reviver.units if unit.name not in reviver.active)
    layer = reviver.layers[killed.modules[0]]
    sizes = []
    for _ in range(3):
        sizes.append(layer.lora_B["default"].weight.abs().max().item())
        step()
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=1e-5) and sizes[2] == 0.0
    assert killed.modules[0] not in split.active_modules
    parameter = layer.lora_A["default"].weight
    assert optimizer.state[parameter]["step"] == 1
    reviver._apply(Decision(reviver.active | {killed.name}))
    before = parameter.detach().clone()
    step()
    assert optimizer.state[layer.lora_B["default"].weight]["step"] == 1, "its memory was reset"
    step()
    moved = (layer.lora_B["default"].weight.detach()).abs().max().item()
    assert 0 < moved < 2 * 1e-2, "two steps of Adam at full size would move further"
    assert torch.equal(before, parameter) or (before - parameter).abs().max() < 2e-2


def test_a_revived_unit_may_keep_its_moments(link: InProcessLink) -> None:
    """With `moments` keep, Adam goes on where it left a unit that was killed in between."""
    split = make_split(link, lora())
    optimizer = torch.optim.AdamW(list(adapter(split).values()), lr=1e-2)
    options = {"policy": "rotate", "idle": "cloud", "moments": "keep", "budget": 0.6}
    reviver = KillAndRevive(split, KillReviveConfig(**(FAST | options)), 100)
    updates = 0
    for number, batch in enumerate(batches(12)):
        reviver.before_step(number)
        updates += 2 * len(split.active_modules or reviver.layers)
        split(**batch).loss.backward()
        reviver.before_update(optimizer)
        optimizer.step()
        reviver.after_update()
        optimizer.zero_grad()
    assert sum(int(state["step"]) for state in optimizer.state.values()) == updates


def test_budget_holds_for_measured_bytes(link: InProcessLink) -> None:
    """The run's counted bytes are the budget's share of FT's, to within a step's grain."""
    shares = []
    for policy in ("all", "kr"):
        split = make_split(link, lora(target_modules="all-linear"), wire_dtype="fp32")
        split.set_options(head_positions="supervised")
        options = FAST | {"budget": 0.4, "warmup": 4, "revive": "random"}
        reviver = loop(split, KillReviveConfig(policy=policy, idle="cloud", **options), steps=40)
        shares.append(split.meter.sent_bytes + split.meter.received_bytes)
        if policy == "kr":
            assert reviver.spent / 40 == pytest.approx(0.4, abs=0.05)
    assert shares[1] / shares[0] == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
def test_shares_are_those_of_measured_bytes(
    link: InProcessLink, wire: str, accumulated: int
) -> None:
    """What a set of modules is said to cost beside all is within 2 % of what crosses the wire, for
    these rows: a budget buys what it says on every wire, with short micro-batches and with long.
    """
    split = make_split(
        link, lora(r=8, target_modules="all-linear"), wire=wire, upload_consent=wire == "hosted"
    )
    split.set_options(head_positions="supervised")
    for length in (12, 48):
        made = batches(accumulated, rows=12, length=length)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in made)
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in made)
        costs = costs_of(split, rows=Rows(tokens / accumulated, labels / tokens, accumulated))

        few, sizes = split.adapted_modules[::3], []
        for modules in (few, split.adapted_modules):
            split.set_active(modules)
            for _ in range(2):  # from the second step on the cloud keeps a hosted adapter
                before = split.meter.copy()
                for batch in made:
                    split(**batch).loss.backward()
                cost = split.meter - before
                for parameter in adapter(split).values():
                    parameter.data.mul_(1.01)
            sizes.append(cost.sent_bytes + cost.received_bytes)
        assert costs.share(few) == pytest.approx(sizes[0] / sizes[1], rel=0.02)


class RandomRows(torch.utils.data.Dataset):
    """Rows for the plain Trainer."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in batches(rows=12)[0].items()}


def assert_counts_what_travels(callback: KillReviveCallback, split: Any, steps: int) -> None:
    """The callback counts micro-batches of as many tokens as the run had."""
    assert callback.reviver.rows.tokens == pytest.approx(split.meter.tokens / steps, rel=0.01)
    assert 0.3 < callback.reviver.rows.supervised < 1


def test_callback_in_trainer(link: InProcessLink, tmp_path: Path) -> None:
    """One callback makes transformers' Trainer kill and revive, with a log line for every decision
    and unit.
    """
    split = make_split(link, lora())
    callback = KillReviveCallback(KillReviveConfig(idle="cloud", **FAST), tmp_path / "kr.jsonl")
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(split, arguments, train_dataset=RandomRows(), callbacks=[callback]).train()
    assert_counts_what_travels(callback, split, 3 * 6)
    records = [json.loads(line) for line in (tmp_path / "kr.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records} == {2, 5, 8, 11, 14, 17}
    assert len(records) == 6 * 3
    assert {"step", "unit", "score", "rank", "active", "reason"} == records[0].keys()
    assert any(record["reason"].startswith("revived") for record in records)


def test_callback_in_sft_trainer(
    link: InProcessLink, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The same callback works in trl's SFTTrainer."""
    from datasets import Dataset

    split = make_split(link, lora())
    callback = KillReviveCallback(KillReviveConfig(idle="cloud", **FAST))
    rows = Dataset.from_list(
        [{"prompt": f"desk {i}:", "completion": " the message"} for i in range(8)]
    )
    arguments = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    SFTTrainer(
        split, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    ).train()
    assert_counts_what_travels(callback, split, 2 * 4)
    assert len(split.active_modules) < len(split.adapted_modules)


def test_callback_wants_a_split_model(tmp_path: Path) -> None:
    """On any other model the callback says what it wants."""
    callback = KillReviveCallback(KillReviveConfig())
    with pytest.raises(UsageError, match="wants a split model, got Linear"):
        callback.on_train_begin(None, None, None, model=torch.nn.Linear(1, 1))


def test_more_than_linear_modules_is_refused(link: InProcessLink, tmp_path: Path) -> None:
    """An adapter that trains the head or rows beside linear modules is refused by name, from a
    folder before anything is written and by the callback; a new classification head is not.
    """
    split = make_split(link, lora(modules_to_save=["lm_head"]))
    with pytest.raises(UsageError, match="an adapter with modules_to_save, want one without"):
        KillAndRevive(split, KillReviveConfig(), 10)
    with pytest.raises(UsageError, match="an adapter with modules_to_save, want one without"):
        KillReviveCallback(KillReviveConfig()).on_train_begin(None, None, None, model=split)
    KillAndRevive(make_split(link, lora(task_type="SEQ_CLS")), KillReviveConfig(), 10)

    rows = make_split(link, lora(trainable_token_indices=[5]))
    rows.save_pretrained(tmp_path / "adapter")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values: dict[str, Any] = {"server": "in-process", "data": str(tmp_path / "data.jsonl")}
    values |= {"adapter": tmp_path / "adapter", "output": tmp_path / "run", "lora_dropout": 0.0}
    with pytest.raises(UsageError, match="an adapter with trainable_token_indices"):
        train(TrainSettings(**values, kr="on"), link)
    assert not (tmp_path / "run/run.json").exists()
    with pytest.raises(UsageError, match="an adapter with trainable_token_indices"):
        planned_model(PlanSettings(server="x", adapter=tmp_path / "adapter", kr="on"), link)


def test_resumed_run_equals_one_never_stopped(link: InProcessLink, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint, wherever it was, ends with the same bits, decisions and
    costs.
    """
    data = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"parcel {n * 37 % 91}:", "completion": f" {'north south'.split()[n % 2]}"}
        for n in range(24)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))

    def settings(output: str, **changes: Any) -> TrainSettings:
        values: dict[str, Any] = {
            "server": "in-process",
            "data": str(data),
            "output": tmp_path / output,
            "batch_size": 2,
            "max_steps": 12,
            "lora_dropout": 0.1,
            "learning_rate": 1e-2,
            "save_steps": 1,
            "save_total_limit": 20,
            "report_to": [],
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "kr": "on",
            "kr_options": FAST | {"drop_steps": 2, "interval": 2},
        }
        return TrainSettings(**(values | changes))

    whole = train(settings("whole"), link)
    assert whole["kill_revive"]["cost_share"] < 0.8
    import shutil

    from safetensors.torch import load_file

    for stop in (4, 7, 9):
        part = tmp_path / f"part-{stop}"
        shutil.copytree(tmp_path / "whole", part)
        for folder in (part / "checkpoints").glob("checkpoint-*"):
            if int(folder.name.rpartition("-")[2]) > stop:
                shutil.rmtree(folder)
        record = json.loads((part / "run.json").read_text())
        (part / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
        again = train(settings(part.name, resume=True), link)
        one, other = (
            load_file(tmp_path / name / "adapter_model.safetensors")
            for name in ("whole", part.name)
        )
        assert all(torch.equal(one[name], other[name]) for name in one), stop
        assert again["kill_revive"] == whole["kill_revive"]
        assert (part / "kr.jsonl").read_text() == (tmp_path / "whole/kr.jsonl").read_text()


def test_state_of_an_older_version_is_read(link: InProcessLink) -> None:
    """A checkpoint with the keys of older versions is taken up, and its sums that no decision wants
    any more are dropped.
    """
    config = KillReviveConfig(policy="output", warmup=2, budget=0.5)
    split = make_split(link, lora())
    reviver = KillAndRevive(split, config, 10)
    names = sorted(reviver.active)
    line = {"step": 2, "unit": names[0], "score": 1.5, "rank": 0, "active": True, "reason": "kept"}
    state = {
        "config": vars(config),
        "total_steps": 10,
        "spent": 2.5,
        "active": names[:1],
        "since": {names[0]: 0},
        "fading": {},
        "warming": {},
        "squares": {names[0]: 0.25},
        "probes": [],
        "outputs": [[0, 0, 4.0]],
        "records": [line],
    }
    reviver.load_state_dict(state, reviver.snapshot)
    assert reviver.state_dict() == state | {"partial": {}}
    assert [vars(entry) for entry in reviver.decision_log] == [line]
    reviver.before_step(4)
    assert split.output_squares is None


def test_units_and_costs_come_from_the_model(link: InProcessLink) -> None:
    """A site unit holds the modules that read the same tensor; the factored wire makes modules
    cheaper.
    """
    split = make_split(link, lora())
    sites, modules = units_of(split, "site"), units_of(split, "module")
    assert len(sites) == 3 and len(modules) == 9
    assert sites[1].layer == 1 and len(sites[1].modules) == 3
    plain = costs_of(split)
    split.set_options(wire="factored")
    factored = costs_of(split)
    one = [sites[2].modules[0]]
    assert plain.sites[2][1][one[0]] == 64 * 4 and factored.sites[2][1][one[0]] < 10 * 4
