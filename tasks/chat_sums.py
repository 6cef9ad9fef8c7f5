"""Conversations about sums, made on the spot: an answer needs the one before it.

    chat_sums    1,000 conversations of three questions, 900 to learn from and every tenth held out:
                 "3 + 4?" "7" "Add 5." "12" "Twice that?" "24", with numbers from 0 to 9

For configs/chat.py. In files, conversations are tasks by their path (t5x_lite/data/chats.py).
"""

import json
from collections.abc import Iterator

from t5x_lite.data import chats


def conversations(path: str) -> Iterator[tuple[str, str]]:
    """All of them, in one order that mixes their numbers; `path`, this file, stands for their version."""
    for place in range(1000):
        number = place * 387 % 1000   # every number once: 387 has no factor in common with 1,000
        a, b, c = number // 100, number // 10 % 10, number % 10
        turns = [("user", f"{a} + {b}?"), ("assistant", f"{a + b}"), ("user", f"Add {c}."),
                 ("assistant", f"{a + b + c}"), ("user", "Twice that?"), ("assistant", f"{2 * (a + b + c)}")]
        messages = [{"role": role, "content": text} for role, text in turns]
        yield json.dumps({"messages": messages}), f"conversation {place}"


def _every_tenth(split: str, place: int) -> bool:
    return (place % 10 == 0) == (split == "validation")


chats.register("chat_sums", {"train": [__file__], "validation": [__file__]}, conversations, _every_tenth)
