"""A tokenizer's chat template: from a conversation to its text, and which of it the assistant says.

    template = beside("models/zephyr/tokenizer.json")
    template.rendered({"messages": [{"role": "user", "content": "2 + 2?"},
                                    {"role": "assistant", "content": "4"}]}, "line 1")

A template is Jinja of Hugging Face's: chat_template.jinja beside the tokenizer, else "chat_template" of
its tokenizer_config.json. It is rendered as transformers' apply_chat_template does, though within
the bounds of templates.py and without a clock (`strftime_now`), so that a text is the same tomorrow.

What bears a loss is what the assistant writes: an answer with the end of its turn. A template may mark
it, with {% generation %} … {% endgeneration %}. In others an answer begins where the prompt of the turns
before it ends (add_generation_prompt=True) and goes on to the end that the template gives to a last
turn, without white space behind it.

Imports no TensorFlow.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jinja2.ext
from jinja2 import nodes

from t5x_lite import files
from t5x_lite.data import readers, templates
from t5x_lite.errors import UserError, one_of

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT = "assistant"
# Halves of surrogate pairs: no text of a file holds one.
_BEGIN, _END = "\ud800", "\udfff"
_SAID = "\ud801"   # an answer that stands nowhere else in a text
_TURN = "\ud802"   # around a message's number, in its text's place

# Of tokenizers that have none. An answer ends in the vocabulary's end token (chats.py).
PLAIN = """{% for message in messages %}
{{ message.role | capitalize ~ ':\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}
{% else %}
{{ message.content }}
{%- endif %}
{{ '\n\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"""

Chat = Mapping[str, Any]   # {"messages": [{"role", "content", …}, …]}, and "tools" where it has some


class Rendered(NamedTuple):
    """A conversation's text, and where in it the answers stand: [start, end) in characters."""
    text: str
    answers: tuple[tuple[int, int], ...]


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which leaves marks around what it holds."""

    tags = {"generation"}

    def parse(self, parser):
        """jinja2's protocol: the nodes of the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller) -> str:
        """The text of the tag's body between marks."""
        return f"{_BEGIN}{caller()}{_END}"


def _refuse(message: str) -> None:
    raise templates.Refusal(message)


def _json(value: Any, indent: int | None = None, **options) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


@functools.lru_cache(maxsize=8)
def _compiled(source: str, where: str) -> templates.Template:
    sandbox = templates.Sandbox(trim_blocks=True, lstrip_blocks=True,
                                extensions=[_Generation, jinja2.ext.loopcontrols])
    sandbox.globals["raise_exception"] = _refuse
    sandbox.filters["tojson"] = _json
    return templates.Template(source, where, sandbox)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may name."""

    source: str
    special: tuple[tuple[str, str], ...] = ()   # ("eos_token", "</s>"), …
    where: str = "the plain chat template"      # what errors call it

    def prompt(self, chat: Chat, where: str) -> str:
        """The text up to where the assistant is to go on.

        Raises:
            UserError: `where` in front; a template that fails, or refuses or leaves out a message.
        """
        self._check_turns(chat, where, prompt=True)
        return _without_marks(self._text(chat, where, prompt=True))

    def rendered(self, chat: Chat, where: str) -> Rendered:
        """The conversation's text and its answers.

        Raises:
            UserError: `where` in front; a template that fails or refuses the conversation, leaves a
                message out, or in whose text an answer cannot be told from the rest.
        """
        text = self._text(chat, where)
        found = Rendered(text, tuple(self._answers(chat, text, where)))
        if _BEGIN in text:
            found = _marked(text)
        if not found.answers:
            raise UserError(f"{where}: {self.where} marks nothing of it as the assistant's")
        self._check_turns(chat, where)
        return found

    def turn_end(self) -> str:
        """What stands behind an answer that counts as part of it, such as "<|im_end|>"."""
        turns = [{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": _SAID}]
        text, answers = self.rendered({"messages": turns}, self.where)
        start, end = answers[-1]
        return text[text.index(_SAID, start) + 1:end]

    def _text(self, chat: Chat, where: str, prompt: bool = False) -> str:
        values = {"tools": None, "documents": None, **dict(self.special), **chat,
                  "add_generation_prompt": prompt}
        return _compiled(self.source, self.where).render(values, f"{where}: {self.where}")

    def _check_turns(self, chat: Chat, where: str, prompt: bool = False) -> None:
        """Raises UserError for a message whose text the template leaves out, seen by putting another in its
        place. What a tool says need not be written; of a message with tool calls these may be all that is."""
        turns = chat["messages"]
        numbered = [{**turn, "content": f"{_TURN}{number}{_TURN}"} if turn["content"].strip() else turn
                    for number, turn in enumerate(turns, 1)]
        text = self._text({**chat, "messages": numbered}, where, prompt)
        for number, turn in enumerate(numbered, 1):
            free = turn["role"] == "tool" or turn.get("tool_calls")
            if not free and turn["content"].startswith(_TURN) and turn["content"] not in text:
                raise UserError(
                    f"{where}, message {number}: {self.where} leaves out what the {turn['role']} says, "
                    f"{turns[number - 1]['content'][:40]!r}; leave the message out, put it where the template "
                    "reads one, or mend the template")

    def _answers(self, chat: Chat, text: str, where: str) -> Iterator[tuple[int, int]]:
        """Where each answer begins and ends in a text without marks."""
        if _BEGIN in text:
            return
        turns = chat["messages"]
        for number, turn in enumerate(turns):
            if turn["role"] != ASSISTANT:
                continue
            before = self._text({**chat, "messages": turns[:number]}, where, prompt=True)
            # Of another answer in its place: this one's letters may stand in the turn's end token, too.
            last = self._text({**chat, "messages": [*turns[:number], {**turn, "content": _SAID}]}, where)
            end = _end_of(turn["content"], last.rpartition(_SAID)[2], text, len(before))
            said = turn["content"].strip()
            if end is None or _SAID not in last or not text.startswith(before):
                raise UserError(
                    f"{where}, message {number + 1}: the answer {said[:40]!r} is not found in what "
                    f"{self.where} makes of it, behind the prompt of the messages before it; put "
                    "{% generation %} and {% endgeneration %} around answers in the template")
            yield len(before), end


def _end_of(answer: str, ending: str, text: str, begin: int) -> int | None:
    """Where an answer ends in a text whose template puts `ending` behind it, searched from `begin` on.

    The template may have left white space around the answer or taken it away; at the end there is none.
    """
    said = answer.strip()
    behind = answer[len(answer.rstrip()):]
    for closed in (said + (behind + ending).rstrip(), said + ending.rstrip()):
        if (start := text.find(closed, begin)) >= 0:
            return start + len(closed)
    return None


def _without_marks(text: str) -> str:
    return text.replace(_BEGIN, "").replace(_END, "")


def _marked(text: str) -> Rendered:
    """A text with marks as one without, and where they stood."""
    parts, answers, size = [], [], 0
    for place, part in enumerate(text.split(_BEGIN)):
        inside, _, behind = part.partition(_END) if place else ("", "", part)
        if inside:
            answers.append((size, size + len(inside)))
        parts += [inside, behind]
        size += len(inside) + len(behind)
    return Rendered("".join(parts), tuple(answers))


# --- where it is --------------------------------------------------------------------------------

def beside(path: str) -> ChatTemplate | None:
    """The chat template of the tokenizer in a file, None where it has none.

    Raises:
        UserError: a tokenizer_config.json whose chat_template is none.
    """
    folder = os.path.dirname(path)
    config_path = os.path.join(folder, "tokenizer_config.json")
    config = {}
    if files.is_file(config_path):
        config = readers.json_object(readers.whole(config_path), config_path)
    own = os.path.join(folder, "chat_template.jinja")
    if files.is_file(own):
        return ChatTemplate(readers.whole(own), _special(config), own)
    source = config.get("chat_template")
    if source is None:
        return None
    if isinstance(source, list):   # several by name, as transformers keeps them
        named = {str(held.get("name")): held.get("template") for held in source
                 if isinstance(held, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise UserError(f'{config_path} has a "chat_template" that is neither a text nor a list with '
                        'one named "default"')
    return ChatTemplate(source, _special(config), f"chat_template of {config_path}")


def _special(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The tokens of tokenizer_config.json that a template may name, such as bos_token."""
    found = []
    for name, token in sorted(config.items()):
        token = token.get("content") if isinstance(token, Mapping) else token
        if name.endswith("_token") and isinstance(token, str):
            found.append((name, token))
    return tuple(found)


# --- conversations of files ---------------------------------------------------------------------

def chat_of(record: Mapping[str, Any], where: str, needs_answer: bool = True) -> dict[str, Any]:
    """{"messages"} and, where there are some, {"tools"} of a line's object.

    Raises:
        UserError: `where` in front; ShareGPT's spelling, an unknown role, a message without text, or,
            where one is needed, no message of the assistant.
    """
    if "conversations" in record and "messages" not in record:
        raise UserError(
            f'{where} is spelt as ShareGPT does ("conversations" of "from" and "value"); write '
            '{"messages": [{"role": …, "content": …}]} with role user for human, assistant for gpt '
            "and system for system")
    turns = readers.field(record, "messages", where, list)
    for number, turn in enumerate(turns, 1):
        _check_turn(turn, f"{where}, message {number}")
    if not turns:
        raise UserError(f"{where} has no messages; leave the line out")
    if needs_answer and all(turn["role"] != ASSISTANT for turn in turns):
        raise UserError(f"{where} has no message with role {ASSISTANT!r}: nothing can be learned from "
                        "it; leave the line out")
    return {"messages": turns} | {n: record[n] for n in ("tools",) if record.get(n)}


def _check_turn(turn: Any, where: str) -> None:
    role, content = (readers.field(turn, name, where) for name in ("role", "content"))
    one_of(f"{where}: role", role, ROLES, {"human": "user", "gpt": ASSISTANT, "model": ASSISTANT,
                                           "bot": ASSISTANT, "developer": "system"})
    if role == ASSISTANT and not content.strip():
        raise UserError(f"{where} is an empty answer; leave it out")
    readers.check_text([content], where)
