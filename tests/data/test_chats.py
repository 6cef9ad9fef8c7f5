"""Conversations: which tokens bear a loss, in rows of each kind, and what is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_lite import infer, inspect_task, interactive
from t5x_lite.data import chat_template, chats, tasks as data_tasks, vocabularies
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.chat_prompts import ChatPrompts, is_chats
from t5x_lite.data.config import DataConfig
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.errors import UserError
from t5x_lite.models.peft import PeftConfig
from tests.training.test_preferences import run_of

TURNS = [("system", "S"), ("user", "a?"), ("assistant", "Ä1"), ("user", "b?"), ("assistant", "2!"),
         ("user", "bye")]


def chat(turns=TURNS, **more) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def rows_of(path, folder, kind="lm", rows=1, **fields):
    config = DataConfig(**{"train": path, "vocabulary": "byt5", "inputs_length": 40, "targets_length": 96,
                           "num_shards": 1, "shuffle_buffer": 1, "cache_dir": str(folder)} | fields)
    made = ShardedRows(config, objective=kind, global_batch_size=rows, seed=0, shards=[0])
    return {name: np.asarray(x) for name, x in next(made)[0].items()}


def text(ids) -> str:
    """Bytes as text, with | for the end token."""
    return "".join("|" if i == 1 else chr(i - 3) for i in ids if i).encode("latin1").decode()


PLAIN = "System:\nS\n\nUser:\na?\n\nAssistant:\nÄ1|\n\nUser:\nb?\n\nAssistant:\n2!|"


def test_every_answer_is_learned_by_lm_and_the_last_one_by_others(tmp_path):
    path = write(tmp_path / "c.jsonl", chat())
    row = {n: x[0] for n, x in rows_of(path, tmp_path).items()}
    targets, weights = row["decoder_target_tokens"], row["decoder_loss_weights"]
    assert text(targets) == PLAIN
    assert text(targets[weights > 0]) == "Ä1|2!|" and set(weights) == {0, 1}
    row = {n: x[0] for n, x in rows_of(path, tmp_path, "seq2seq", targets_length=8).items()}
    assert text(row["encoder_input_tokens"]) == PLAIN.encode()[:-3][-39:].decode() + "|"
    assert text(row["decoder_target_tokens"]) == "2!|" and row["decoder_loss_weights"].sum() == 3
    row = {n: x[0] for n, x in rows_of(path, tmp_path, "prefix_lm", inputs_length=70).items()}
    assert text(row["decoder_target_tokens"]) == PLAIN[:-3] + "|2!|"   # inputs end, as all of its kind
    assert text(row["decoder_target_tokens"][row["decoder_loss_weights"] > 0]) == "2!|"
    assert row["decoder_prefix"].sum() == len(PLAIN[:-3].encode()) + 2
    assert rows_of(path, tmp_path, loss_on_inputs=True)["decoder_loss_weights"].sum() == (
        len(PLAIN.encode()))


def test_a_row_that_is_too_short_keeps_the_first_answers(tmp_path):
    row = rows_of(write(tmp_path / "c.jsonl", chat()), tmp_path, targets_length=44)
    assert text(row["decoder_target_tokens"][0]) == PLAIN.encode()[:44].decode()
    assert text(row["decoder_target_tokens"][row["decoder_loss_weights"] > 0]) == "Ä1|"


def test_packed_conversations_stand_in_segments_of_their_own(tmp_path):
    path = write(tmp_path / "c.jsonl", chat(TURNS[1:3]), chat(TURNS[3:5]))
    row = {n: x[0] for n, x in rows_of(path, tmp_path, packing=True).items()}
    seen = []
    for segment in range(1, row["decoder_segment_ids"].max() + 1):
        inside = row["decoder_segment_ids"] == segment
        seen.append((text(row["decoder_target_tokens"][inside]),
                     text(row["decoder_target_tokens"][inside & (row["decoder_loss_weights"] > 0)])))
        places = row["decoder_positions"][inside]
        assert places.tolist() == list(range(len(places)))
        assert row["decoder_input_tokens"][inside][0] == 0   # nothing of the one before
    assert len(seen) == 3 and set(seen) == {
        ("User:\na?\n\nAssistant:\nÄ1|", "Ä1|"), ("User:\nb?\n\nAssistant:\n2!|", "2!|")}


def test_places_resume(tmp_path):
    path = write(tmp_path / "c.jsonl", *(chat([("user", f"{i}?"), ("assistant", str(i))]) for i in range(9)))
    config = DataConfig(train=path, vocabulary="byt5", targets_length=64, num_shards=1, shuffle_buffer=4,
                        cache_dir=str(tmp_path))
    made, again = (ShardedRows(config, objective="lm", global_batch_size=4, seed=0, shards=[0])
                   for _ in range(2))
    next(made)
    again.restore(made.state([0]))
    jax.tree.map(np.testing.assert_array_equal, next(again)[0], next(made)[0])


def test_a_slice_and_a_mixture_with_plain_pairs(tmp_path):
    path = write(tmp_path / "c.jsonl", *(chat([("user", "?"), ("assistant", str(i))]) for i in range(4)))
    pairs = write(tmp_path / "p.jsonl", {"inputs": "x", "targets": "y"})
    rows = rows_of(f"{path}[50%:]=1,{pairs}=1", tmp_path, rows=16)
    learned = {text(t[w > 0]) for t, w in zip(
        rows["decoder_target_tokens"], rows["decoder_loss_weights"], strict=True)}
    assert learned == {"2|", "3|", "y|"}


def test_a_changed_template_makes_other_rows(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made = __import__("tokenizers").Tokenizer.from_str(json.dumps(_peers()["tokenizer"]))
    made.save(str(folder / "tokenizer.json"))
    path = write(tmp_path / "c.jsonl", chat())
    found = []
    for sign in "<>":
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "eos_token": "</s>", "chat_template": "{% for m in messages %}{{ '" + sign + "' + m.content + "
            "eos_token }}{% endfor %}{% if add_generation_prompt %}" + sign + "{% endif %}"}))
        chats._template_of.cache_clear()   # as in another process
        name = str(folder / "tokenizer.json")
        row = rows_of(path, tmp_path, vocabulary=name)
        ids = row["decoder_target_tokens"][0][row["decoder_target_tokens"][0] > 0]
        decode = vocabularies.load(name).tokenizer.decode
        found.append(decode(ids, skip_special_tokens=False))
        learned = row["decoder_target_tokens"][0][row["decoder_loss_weights"][0] > 0]   # not the sign just before
        assert decode(learned, skip_special_tokens=False) == "Ä1</s>2!</s>"
    assert found == [f"{s}S</s>{s}a?</s>{s}Ä1</s>{s}b?</s>{s}2!</s>" for s in "<>"]


def _peers() -> dict:
    from tests.parity.test_peer_vectors import CHAT
    return CHAT


@pytest.mark.parametrize("record, message", [
    (chat([("user", "a"), ("asistant", "b")]),
     "line 2, message 2: role='asistant': must be one of .*did you mean 'assistant'"),
    (chat([("human", "a"), ("assistant", "b")]), "message 1: role='human'.*did you mean 'user'"),
    (chat([("user", "a")]), "line 2 has no message with role 'assistant'"),
    (chat([("user", "a"), ("assistant", " ")]), "line 2, message 2 is an empty answer"),
    (chat([]), "line 2 has no messages"),
    ({"messages": "hello"}, "line 2 has no 'messages' that is a list"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "line 2, message 1 has no 'content' that is a string"),
    ({"messages": ["hello"]}, "line 2, message 1 is not an object but a str"),
    ({"conversations": [{"from": "human", "value": "a"}]},
     "line 2 is spelt as ShareGPT does.*role user for human, assistant for gpt"),
    ({"inputs": "a"}, "line 2 has no 'messages'")])
def test_malformed_lines_are_named(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        rows_of(write(tmp_path / "bad.jsonl", chat(), record), tmp_path)


@pytest.mark.parametrize("source, message", [
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}",
     "line 1, message 3: the answer 'ä1' is not found .*put {% generation %}"),
    ("{% for m in messages %}{{ m.content[::-1] }}{% endfor %}", "message 3: the answer 'ä1' is not found"),
    ("{{ messages[0].content.__class__ }}", "line 1: the template does what a template must not"),
    ("{% for m in %}", "the template is no template of Jinja"),
    ("{{ strftime_now('%d') }}", "line 1: the template is no template of Jinja .'strftime_now' is und"),
    ("{{ raise_exception('no') }}", "line 1: the template refuses it: no"),
    ("{% generation %}{% endgeneration %}", "line 1: the template marks nothing of it")])
def test_templates_that_fail_are_named(source, message):
    turns = chat([("user", "ab"), ("user", "cd"), ("assistant", "ä1")])
    with pytest.raises(UserError, match=message):
        chat_template.ChatTemplate(source, where="the template").rendered(turns, "line 1")


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
@pytest.mark.parametrize("left_out, message", [
    ('m.role != "system"', "line 1, message 1: the template leaves out what the system says, 'Be brief.'"),
    ("not loop.first or loop.last", "line 1, message 1: the template leaves out what the system says"),
])
def test_a_template_that_leaves_a_message_out_is_named(marks, left_out, message):
    source = ("{% for m in messages %}{% if " + left_out + " %}{{ m.role }}: " + marks[0] + "{{ m.content }}"
              + marks[1] + "; {% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    template = chat_template.ChatTemplate(source, where="the template")
    turns = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Yo"}]}
    with pytest.raises(UserError, match=message):
        template.rendered(turns, "line 1")
    with pytest.raises(UserError, match=message):
        template.prompt({"messages": turns["messages"][:2]}, "line 1")


def test_what_a_message_says_beside_tool_calls_may_be_left_out():
    source = ("{% for m in messages %}{% if m.tool_calls %}{% generation %}call{% endgeneration %}{% else %}"
              "{{ m.content }}{% endif %}{% endfor %}")
    turns = {"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "I look.", "tool_calls": [{}]}]}
    assert chat_template.ChatTemplate(source).rendered(turns, "").text == "Hicall"


def test_what_stands_before_an_answer_by_itself_is_learned():
    """As Qwen 3's empty thoughts, which only the last answer of a conversation has."""
    source = ("{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}(){% endif %}"
              "{{ m.content }}.{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    text_, answers = chat_template.ChatTemplate(source).rendered(chat(), "")
    assert [text_[a:b] for a, b in answers] == ["Ä1.", "2!."]
    text_, answers = chat_template.ChatTemplate(source).rendered(chat(TURNS[:-1]), "")
    assert [text_[a:b] for a, b in answers] == ["Ä1.", "()2!."]


@pytest.mark.parametrize("answer", ["d", "m", "end", "|", "<", ">", "<|im_end|>", "ok"])
def test_an_answer_may_stand_in_the_end_token_of_its_turn(answer):
    source = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    template = chat_template.ChatTemplate(source)
    turns = chat([("user", "q"), ("assistant", answer), ("user", "m"), ("assistant", f"{answer} ")])
    text_, answers = template.rendered(turns, "")
    assert [text_[a:b] for a, b in answers] == [f"{answer}<|im_end|>", f"{answer} <|im_end|>"]
    assert template.turn_end() == "<|im_end|>"


def test_an_answer_without_a_token_is_named(tmp_path):
    from tests.parity.test_peer_vectors import vocabulary_of
    vocabulary = vocabulary_of(tmp_path, "chatml", True, in_config=True)
    with pytest.raises(UserError, match=r"line 1: the answer '' has no token in data.vocabulary=.*leave it out"):
        chats.tokens(vocabulary, "a b", [(5, 6)], "line 1")


def test_tools_reach_the_template_and_marks_the_answers():
    source = ("{{ tools | tojson }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
              "{% if m.role == 'assistant' %}A{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
              "{{ m.content }}{% endif %}{% endfor %}")
    turns = chat([("user", "q<>"), ("tool", "t"), ("assistant", "é")], tools=[{"name": "é'"}])
    assert chat_template.ChatTemplate(source).rendered(turns, "") == ('[{"name": "é\'"}]q<>Aé', ((20, 21),))


def test_a_template_of_several_is_the_default_one(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"},
        "chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}))
    found = chat_template.beside(str(tmp_path / "tokenizer.json"))
    assert (found.source, found.special) == ("d", (("eos_token", "</s>"),))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "rag"}]}')
    with pytest.raises(UserError, match='has a "chat_template" that is neither.*named "default"'):
        chat_template.beside(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    assert chat_template.beside(str(tmp_path / "tokenizer.json")) is None


def test_inspect_task_shows_which_turns_are_learned(tmp_path):
    path = write(tmp_path / "c.jsonl", chat())
    config = DataConfig(vocabulary="byt5", inputs_length=40, targets_length=61, cache_dir=str(tmp_path))
    shown = inspect_task.describe(config, path, "train", "lm", 1, 9)
    assert "loss on 6 of 61 targets, the first at 32: 32-35, 59-60" in shown
    assert "1 of 1 longer than what inputs leave of targets_length=61 and cut" in shown


def test_demonstrations_of_conversations_are_refused(tmp_path):
    path = write(tmp_path / "c.jsonl", chat())
    config = DataConfig(validation=path, vocabulary="byt5", shots=1, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="demonstrations are made of tasks with the texts"):
        data_tasks.eval_examples(config, path, objective="lm")


# --- prompts --------------------------------------------------------------------------------------

def test_infer_reads_conversations(tmp_path):
    path = write(tmp_path / "c.jsonl", chat(TURNS[:2]), chat(TURNS[:3]))
    assert is_chats(path) and not is_chats(str(tmp_path / "none.jsonl"))
    prompts = ChatPrompts(DataConfig(train=path, vocabulary="byt5"))
    items = list(infer.read_lines(open(path, "rb"), "chats", on_error="refuse", needs_targets=False,
                                  chats=prompts))
    prompt = "System:\nS\n\nUser:\na?\n\nAssistant:\n"
    assert [(item.text, text(item.inputs), item.targets) for item in items] == [
        (prompt, prompt, ()), (prompt, prompt, ("Ä1",))]
    assert prompts.ending(DecodeConfig()) == DecodeConfig()   # the vocabulary's own end
    with pytest.raises(UserError, match="line 1 has no targets to score"):
        next(infer.read_lines(open(path, "rb"), "chats", on_error="refuse", needs_targets=True,
                              chats=prompts))


def test_an_answer_ends_with_its_turn(tmp_path):
    from tests.parity.test_peer_vectors import vocabulary_of
    vocabulary = vocabulary_of(tmp_path, "gemma", False, in_config=True)
    prompts = ChatPrompts(DataConfig(vocabulary=vocabulary.path))
    end = vocabulary.tokenizer.token_to_id("<end_of_turn>")
    assert prompts.ending(DecodeConfig(stop_ids=(7,))).stop_ids == (7, end)


@pytest.mark.slow
def test_a_session_answers_as_it_was_taught(tmp_path):
    path = tmp_path / "c.jsonl"
    write(path, *(chat([("user", word), ("assistant", word.upper())]) for word in ("up", "down") * 8))
    run = run_of("dpo", path, tuning=PeftConfig())
    run = dataclasses.replace(run, objective=dataclasses.replace(run.objective, name="lm", reference="none"),
                              data=dataclasses.replace(run.data, inputs_length=32, targets_length=48),
                              train=dataclasses.replace(run.train, accumulation=1))
    session = interactive.start(run)
    rows = ShardedRows(run.data, objective="lm", global_batch_size=8, seed=0, shards=[0])
    with session.program.activate():
        step = session.program.jit_train_step()
        for _ in range(150):
            session.state, _ = step(session.state, jax.device_put(
                next(rows)[0], session.program.batch_sharding))
    turns = [[{"role": "user", "content": word}] for word in ("up", "down")]
    assert session.chat(turns, max_length=6) == ["UP", "DOWN"]
