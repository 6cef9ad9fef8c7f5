"""Prompts of conversations, for infer and interactive: what the assistant is to go on with.

Imports TensorFlow inside functions only, as tasks.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from t5x_lite import files
from t5x_lite.data import chat_template, tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.data.rows import INPUTS_WEIGHTS
from t5x_lite.decoding.decode import DecodeConfig


def is_chats(path: str) -> bool:
    """Whether a path is a .jsonl file of conversations; of a pipe nobody can tell ahead."""
    if not files.is_file(path):
        return False
    data_tasks.tensorflow_side()
    from t5x_lite.data import chats
    return chats.is_chats(path)


def stops(config: DataConfig, objective: str) -> tuple[int, ...]:
    """Where answers to training's prompts end beside EOS: with their turn, where some are conversations.

    objective: the kind of rows that the data give, as train_mixture has it.
    """
    mixture = data_tasks.train_mixture(config, objective)
    if not any(INPUTS_WEIGHTS in task.output_features for task, _ in mixture):
        return ()
    return _turn_ends(data_tasks.vocabulary_of(config))


def _turn_ends(vocabulary) -> tuple[int, ...]:
    """The token that ends a turn, where it is another than EOS."""
    from t5x_lite.data import chats
    end = chats.turn_end(vocabulary)
    return () if end == vocabulary.eos_id else (end,)


class ChatPrompts:
    """Conversations as the chat template of a run's vocabulary writes them."""

    def __init__(self, config: DataConfig):
        self._vocabulary = data_tasks.vocabulary_of(config)

    def prompt(self, record: Mapping[str, Any], where: str) -> tuple[str, list[int], tuple[str, ...]]:
        """(text, its tokens, the answers that are known) of {"messages": [{"role", "content"}, …]}.

        The prompt ends where the assistant is to write; where the last message is the assistant's, it
        is the known answer and not part of the prompt.

        Raises:
            UserError: `where` in front; messages that are none, or that the template refuses.
        """
        from t5x_lite.data import chats
        chat = chat_template.chat_of(record, where, needs_answer=False)
        *before, last = chat["messages"]
        known = last["role"] == chat_template.ASSISTANT
        chat["messages"] = before if known else [*before, last]
        text, ids = chats.prompt(self._vocabulary, chat, where)
        return text, ids, (last["content"],) * known

    def ending(self, decode: DecodeConfig) -> DecodeConfig:
        """The same decoding, which also stops where a turn ends."""
        further = [end for end in _turn_ends(self._vocabulary) if end not in decode.stop_ids]
        return dataclasses.replace(decode, stop_ids=(*decode.stop_ids, *further))
