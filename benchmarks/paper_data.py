"""The eight commonsense tasks from the Hugging Face hub, in the instruction form of LLM-Adapters
(arXiv:2304.01933).

Where a data set keeps its test labels to itself its validation rows are the evaluation rows. BoolQ
is asked without its passage, as LLM-Adapters does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORRECT = "Please choose the correct"
Question = tuple[str, list[str], int]  # what is asked, the options, the place of the right one


def with_letters(row: dict[str, Any]) -> Question:
    """ARC and OpenBookQA."""
    options = row["choices"]
    asked = row["question"] if "question" in row else row["question_stem"]
    return asked, list(options["text"]), list(options["label"]).index(row["answerKey"].strip())


# task -> (hub id, its configuration, evaluation split, lead, word for an option, row to question)
TASKS: dict[str, tuple[str, str | None, str, str, str, Callable[[dict[str, Any]], Question]]] = {
    "boolq": (
        *("aps/super_glue", "boolq", "validation"),
        "Please answer the following question with true or false, question",
        "",
        lambda row: (row["question"].rstrip("?") + "?", ["true", "false"], 1 - int(row["label"])),
    ),
    "piqa": (
        *("baber/piqa", None, "validation", f"{CORRECT} solution to the question", "solution"),
        lambda row: (row["goal"], [row["sol1"], row["sol2"]], int(row["label"])),
    ),
    "social_iqa": (
        *("lighteval/siqa", None, "validation", f"{CORRECT} answer to the question", "answer"),
        lambda row: (
            f"{row['context']} {row['question']}",
            [row["answerA"], row["answerB"], row["answerC"]],
            int(row["label"]) - 1,
        ),
    ),
    "hellaswag": (
        *(
            "Rowan/hellaswag",
            None,
            "validation",
            f"{CORRECT} ending to complete the given sentence",
            "ending",
        ),
        lambda row: (
            f"{row['activity_label']}: {row['ctx']}",
            list(row["endings"]),
            int(row["label"]),
        ),
    ),
    "winogrande": (
        *("allenai/winogrande", "winogrande_xl", "validation"),
        f"{CORRECT} answer to fill in the blank to complete the given sentence",
        "option",
        lambda row: (row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1),
    ),
    "arc_easy": (
        "allenai/ai2_arc",
        "ARC-Easy",
        "test",
        f"{CORRECT} answer to the question",
        "answer",
        with_letters,
    ),
    "arc_challenge": (
        *(
            "allenai/ai2_arc",
            "ARC-Challenge",
            "test",
            f"{CORRECT} answer to the question",
            "answer",
            with_letters,
        ),
    ),
    "openbookqa": (
        "allenai/openbookqa",
        "main",
        "test",
        f"{CORRECT} answer to the question",
        "answer",
        with_letters,
    ),
}


def instruction_row(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a hub data set as instruction, choices and answer."""
    *_, lead, word, question = TASKS[task]
    asked, options, right = question(row)
    choices = [f"{word}{number}" for number in range(1, len(options) + 1)] if word else options
    shown = " ".join(
        f"{choice.capitalize()}: {text}" for choice, text in zip(choices, options, strict=True)
    )
    text = (
        f"{lead}: {asked}"
        + (f"\n\n{shown}" if word else "")
        + f"\n\nAnswer format: {'/'.join(choices)}"
    )
    return {"instruction": text, "choices": choices, "answer": choices[right]}


def as_text(row: dict[str, Any]) -> dict[str, Any]:
    """The same question with the options' own texts as continuations instead of their numbers.

    ARC, OpenBookQA, PIQA and Social IQa become "Question: ... Answer:", a sentence to complete
    stands by itself, and where there is a blank the continuation starts there. What has no numbered
    options (BoolQ) stays as it is. Raises ValueError for an instruction of another form.
    """
    word = row["choices"][0].rstrip("0123456789")
    if word == row["choices"][0]:
        return row
    lead, _, rest = row["instruction"].rpartition("Answer format:")[0].partition(": ")
    marks = [f"{word.capitalize()}{number}: " for number in range(1, len(row["choices"]) + 1)]
    starts = [rest.find(mark) for mark in marks]
    if starts[0] < 0 or starts != sorted(starts):
        raise ValueError(f"no options {marks} in {row['instruction'][:200]!r}")
    ends = [*starts[1:], len(rest)]
    texts = [
        rest[a + len(mark) : b].strip() for a, b, mark in zip(starts, ends, marks, strict=True)
    ]
    prompt = rest[: starts[0]].strip()
    if "blank" in lead:
        prompt, _, behind = prompt.partition("_")
        prompt, texts = f"Sentence: {prompt}".rstrip(), [text + behind for text in texts]
    elif "sentence" not in lead:
        prompt = f"Question: {prompt}\nAnswer:"
    answer = texts[row["choices"].index(row["answer"])]
    return row | {"prompt": prompt, "completion": " " + answer, "choices": texts, "answer": answer}


def fetch(data: Path, tasks: list[str]) -> None:
    """Write the files that `data` lacks."""
    for task in tasks:
        name, part, held, *_ = TASKS[task]
        for split, stem in (("train", "train"), (held, "eval")):
            file = data / "commonsense" / task / f"{stem}.jsonl"
            if not file.exists():
                from datasets import load_dataset

                rows = [instruction_row(task, row) for row in load_dataset(name, part, split=split)]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.with_suffix(".new").write_text("".join(json.dumps(row) + "\n" for row in rows))
                file.with_suffix(".new").replace(file)
