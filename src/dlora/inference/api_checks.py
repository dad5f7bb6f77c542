"""What a request to the API may hold: whole characters, numbers in OpenAI's ranges, messages that
the model's chat template shows.

All checks raise HTTPException with a reason, before an answer begins.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from fastapi import HTTPException
from transformers import PreTrainedTokenizerBase

__all__ = ["check_messages", "check_numbers", "check_places", "check_texts"]

# Name -> (least, most) of a number, as the API has them.
_NUMBERS: Final = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
_WHOLE: Final = {
    "max_tokens": (1, math.inf),
    "max_completion_tokens": (1, math.inf),
    "seed": (-(2**63), 2**63 - 1),
}
_SHOWN: Final = ("tool_calls", "name")
"""Fields of a message that mean something only where the chat template shows them."""


def check_texts(body: dict[str, Any]) -> None:
    """Half of a character, which JSON can hold, is taken by no tokenizer and by no answer."""
    for name, value in body.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise HTTPException(
                400, f"{ascii(name)[1:-1]}: it has half of a character ({half} alone): take it out"
            ) from None


def check_numbers(body: dict[str, Any]) -> None:
    """Numbers in their ranges; a text, or true, is none."""
    for name, (least, most) in (_NUMBERS | _WHOLE).items():
        value = body.get(name)
        if value is None:
            continue
        kinds = (int,) if name in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            what = "a whole number" if name in _WHOLE else "a value"
            ends = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise HTTPException(400, f"{name}: got {value!r}, want {what} {ends}")
    if not isinstance(body.get("stream"), bool | None):
        raise HTTPException(400, f"stream: got {body['stream']!r}, want true or false")


# ----------------------------------------------------------------- messages


def check_messages(messages: Any) -> None:
    """Want a list of messages with a role and text, or with calls of tools.

    Fields without a value, which clients send back as they got them, are taken away.
    """
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) for message in messages)
        or not all(isinstance(message.get("role"), str) for message in messages)
    ):
        raise HTTPException(400, "messages: want a list of {role, content}")

    for message in messages:
        for name in ("tool_calls", "function_call", "tool_call_id", "name"):
            if not message.get(name):
                message.pop(name, None)
        if "function_call" in message:
            raise HTTPException(400, "messages: function_call is not supported: use tool_calls")
        if "tool_calls" in message:
            _check_calls(message["tool_calls"])
        _check_content(message)


def _check_content(message: dict[str, Any]) -> None:
    parts = message.get("content")
    if parts in (None, []) and "tool_calls" not in message:
        raise HTTPException(400, f"messages: one of role {message['role']} has no content")
    parts = [] if parts is None or isinstance(parts, str) else parts
    if not isinstance(parts, list) or any(
        not isinstance(part, dict) or part.get("type") != "text" for part in parts
    ):
        raise HTTPException(400, "messages: only text is read here")
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise HTTPException(400, "messages: a part of type text wants a text")


def _check_calls(calls: Any) -> None:
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        given = function.get("arguments") if isinstance(function, dict) else None
        try:
            arguments = json.loads(given) if isinstance(given, str) else given
        except ValueError:
            arguments = None
        is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not isinstance(arguments, dict) or not is_named:
            raise HTTPException(
                400,
                "messages: tool_calls: want a list of {function: {name, arguments}}, with an "
                "object as arguments",
            )


def check_places(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> None:
    """Fields of messages, as the chat template gets them, that it does not show are refused."""
    for name in _SHOWN:
        if not any(name in message for message in messages):
            continue
        without = [
            {key: value for key, value in message.items() if key != name} for message in messages
        ]
        if _rendered(tokenizer, messages) == _rendered(tokenizer, without):
            raise HTTPException(
                400, f"messages: this model's chat template has no place for {name}"
            )


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str | None:
    """The text that the model would read; None if the template refuses these messages."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # templates have errors of their own
        return None
    return text
