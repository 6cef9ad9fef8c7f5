"""Reward functions for tests/training/test_rollouts.py."""

import math


def small_letters(prompt: str, answer: str, record: dict) -> float:
    """The share of the answer's characters that are small letters."""
    assert record == {"prompt": prompt, "ending": "é"}
    return sum(c.islower() for c in answer) / max(len(answer), 1)


def worth(prompt: str, answer: str, record: dict) -> float:
    """a 0, b 0.1, … f 0.5."""
    return 0.1 * max(0, "abcdef".find(answer)) if answer.strip() else 0.0


def none_for_q(prompt: str, answer: str, record: dict) -> float:
    return math.nan if prompt.startswith("q") else 0.0


def none_for_q2(prompt: str, answer: str, record: dict) -> float:
    """Refused for the two prompts that begin with exactly qq: on one of two processes, or both."""
    return math.nan if prompt.startswith("qq") and not prompt.startswith("qqq") else 0.0


def of_text(prompt: str, answer: str, record: dict) -> str:
    return "good"
