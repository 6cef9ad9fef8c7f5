"""Malformed inputs as one table: what is run on each, its exit status, what it says and how long.

Each row is a command as a user types it (tests/faults/forks.py). It must end by itself, with a message
of a few lines that names the file or field and the value, and without a traceback. The table is printed
(`make test-faults` shows it) and stands in docs/checkpoints.md.
"""

import base64
import dataclasses
import gzip
import json
import pathlib
import struct

import pytest

from t5x_lite.formats import hf, hf_lora
from tests import tiny, tiny_config
from tests.faults.forks import Forks
from tests.formats import folders
from tests.formats.test_hf_lora import CASES as ADAPTERS, draw

pytestmark = pytest.mark.slow

MOST_LINES = 6   # of a refusal


@dataclasses.dataclass(frozen=True)
class Case:
    """A row. {root} in its texts is the folder of the inputs."""

    what: str                # the malformed input
    command: str             # module and flags
    says: tuple[str, ...]    # what the output must name
    status: int = 2
    most_lines: int = MOST_LINES


TRAIN = "train --config={root}/mini.py --workdir={root}/run "
INFER = "infer --config={root}/t5.py --config.init_from=hf:{root}/t5 --output={root}/out.jsonl "


def data(what: str, name: str, *says: str) -> list[Case]:
    """A file of examples as training reads it, and as infer does."""
    return [Case(f"{what}, trained on", f"{TRAIN}--config.data.train_files= "
                 f"--config.data.train={{root}}/{name}", (name, *says)),
            Case(f"{what}, validated on", f"{TRAIN}--config.data.validation_files= "
                 f"--config.data.validation={{root}}/{name}", (name, *says), most_lines=9),
            Case(f"{what}, predicted from", f"{INFER}--input={{root}}/{name}",
                 (name, *says), most_lines=12)]


def text(what: str, name: str, *says: str) -> Case:
    return Case(f"{what} as text", f"{TRAIN}--config.data.train_files={{root}}/{name}",
                (name, *says))


def field(value: str, *says: str) -> Case:
    path, _, number = value.partition("=")
    return Case(f"{path}={number[:24]}", f"{TRAIN}--config.{value}",
                says or (path.rpartition(".")[2], number[:20]))


def foreign(what: str, source: str, *says: str) -> Case:
    return Case(what, f"convert --from={source} --to={{root}}/converted", says)


GOOD = '{"inputs": "a b", "targets": "c"}\n'
FILES = {
    "cut.jsonl.gz": gzip.compress((GOOD * 3000).encode())[:-60],
    "plain.jsonl.gz": GOOD.encode(),
    "latin1.jsonl": GOOD.encode() + b'{"inputs": "caf\xe9", "targets": "x"}\n',
    "latin1.tsv": b"a\tb\ncaf\xe9\tx\n",
    "latin1.txt": b"a\ncaf\xe9\n",
    "utf16.jsonl": (GOOD * 2).encode("utf-16"),
    "utf16.txt": "a b\n".encode("utf-16"),
    "half.jsonl": GOOD.encode() + b'{"inputs": "\\ud83d", "targets": "x"}\n',
    "half_text.jsonl": b'{"text": "a"}\n{"text": "\\ud83d"}\n',
    "deep.jsonl": GOOD.encode() + b'{"inputs": ' + b"[" * 50_000 + b"}\n",
    "digits.jsonl": GOOD.encode() + b'{"inputs": "a", "targets": ' + b"9" * 6000 + b"}\n",
    "nul.jsonl": GOOD.encode() + b"\0" * 4096 + b"\n" + GOOD.encode(),
    "nul.txt": b"a b c\n" + b"\0" * 4096 + b"\nd\n",
    "notjson.jsonl": GOOD.encode() + b"inputs: a\n",
    "list.json": b'{"no": "list"}',
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\n",
    "a=b,c[1].jsonl": GOOD.encode() * 64,
    "bom.jsonl": b"\xef\xbb\xbf" + GOOD.encode() * 64,
    "cr.tsv": b"a\rb\tc\n" * 64,
    "wide.tsv": b"x" * 200_000 + b"\ty\n" + b"a\tb\n" * 63,
    "cut.model": None, "junk.model": b"\x0a\x08hello", "cut.json": b'{"version": "1.0", "model": {',
    "other.json": b'{"version": "1.0"}',
    "spell.jinja.txt": b"x\n",
}

CASES = [
    *data("gzip that is cut off", "cut.jsonl.gz", "the gzip file is cut off"),
    *data("no gzip by that name", "plain.jsonl.gz", "is not a gzip file; rename"),
    *data("latin-1 in JSONL", "latin1.jsonl", "line 2", "not UTF-8", "0xe9"),
    *data("latin-1 in TSV", "latin1.tsv", "line 2", "not UTF-8"),
    text("latin-1", "latin1.txt", "line 2", "not UTF-8"),
    *data("UTF-16", "utf16.jsonl", "UTF-16", "iconv"),
    text("UTF-16", "utf16.txt", "UTF-16"),
    *data("half a surrogate pair", "half.jsonl", "line 2", "\\ud83d"),
    text("half a surrogate pair", "half_text.jsonl", "line 2", "\\ud83d"),
    *data("JSON nested 50,000 deep", "deep.jsonl", "line 2", "nested too deeply"),
    *data("a number of 6,000 digits", "digits.jsonl", "line 2", "too many digits"),
    *data("a hole of NULs", "nul.jsonl", "line 2", "NUL byte"),
    text("a hole of NULs", "nul.txt", "line 2", "NUL byte"),
    *data("no JSON", "notjson.jsonl", "line 2", "is not JSON"),
    *data("an object for a list", "list.json", "is not a list of objects"),
    *data("an empty file", "empty.jsonl", "is empty")[:2],
    Case("blank lines only", f"{TRAIN}--config.data.train_files= --config.data.train={{root}}/blank.jsonl",
         ("blank.jsonl",)),
    Case("no such file", f"{TRAIN}--config.data.train_files={{root}}/nul.tx", ("did you mean 'nul.txt'",)),
    Case("a folder", f"{INFER}--input={{root}}", ("is a folder",), most_lines=12),
    Case("a name of 300 letters", f"{INFER}--input={'x' * 300}", ("does not exist",), most_lines=12),
    text("a line of 400 MB", "long.txt", "line 2 is longer than 64 MiB"),
    Case("a line of 400 MB, skipped", f"{INFER}--input={{root}}/long.txt --on_error=skip",
         ("skipped: {root}/long.txt, line 2", "2 lines in"), 0, 20),
    Case("what can be read is", f"{INFER}--input={{root}}/a=b,c[1].jsonl --mode=score",
         ("64 lines in",), 0, 20),
    Case("a byte-order mark", f"{INFER}--input={{root}}/bom.jsonl --mode=score", ("64 lines in",), 0, 20),
    Case("a carriage return in a line", f"{INFER}--input={{root}}/cr.tsv --mode=score", ("64 lines in",),
         0, 20),
    Case("a field of 200,000 letters", f"{INFER}--input={{root}}/wide.tsv --mode=score",
         ("64 lines in", "inputs are longer than"), 0, 20),

    *(Case(what, f"{TRAIN}--config.data.vocabulary={{root}}/{name} --config.model.vocab_size=100000",
           (name, *says)) for what, name, *says in (
        ("a SentencePiece model that is cut off", "cut.model", "no whole SentencePiece model"),
        ("another file called .model", "junk.model", "no whole SentencePiece model"),
        ("a tokenizer.json that is cut off", "cut.json", "is not JSON"),
        ("a tokenizer.json without a model", "other.json", "no tokenizer.json"),
        ("a vocabulary that is not there", "cut.modle", "unknown: one of"),
        ("… or is spelt otherwise", "cuts.model", "no such file", "cut.model"))),

    field("model.embed_dim=-32"), field("model.vocab_size=0"), field("eval.batch_size=-8"),
    field(f"train.seed={2**70}"), field("train.num_steps=-1"), field("train.log_every=0"),
    field("train.accumulation=0"), field("checkpoint.every=0"), field("checkpoint.keep_last=0"),
    field("checkpoint.wait_for_workdir=-1.0"), field("train.watchdog.step=-1.0"),
    field("optimizer.schedule.base_learning_rate=nan"), field("train.max_bad_steps=0"),
    field("optimizer.schedule.base_learning_rate=-0.1"), field("train.spike_bound=-1.0"),
    field("optimizer.schedule.base_learning_rate=inf"), field("optimizer.clip_norm=nan"),
    field("data.num_shards=0"), field("data.targets_length=-3"), field("data.shuffle_buffer=-1"),
    field("eval.decode.beam_size=0"), field("eval.decode.temperature=-1.0"),
    field("objective.label_smoothing=1.5"), field("objective.z_loss=-1.0"),
    field("model.decoder_start_id=3", "decoder_start_id=3", "encoder_decoder"),
    field("train.bad_steps=skp", "bad_steps", "did you mean 'skip'"),
    field("precision=fp61", "fp61"), field("train.global_batch_size=1e4", "global_batch_size"),

    foreign("a .bin that is cut off", "hf:{root}/bin_cut", "pytorch_model.bin"),
    foreign("a pointer of git LFS", "hf:{root}/bin_lfs", "pytorch_model.bin", "LFS"),
    foreign("no folder", "hf:{root}/none/none", "none"),
    *(foreign(f"safetensors: {what}", f"hf:{{root}}/st_{name}", "model.safetensors", *says)
      for what, name, *says in (
        ("a negative offset", "negative"), ("overlapping offsets", "overlap"), ("a hole", "hole"),
        ("an offset between numbers", "unaligned"), ("a header of 2**60 bytes", "header"),
        ("cut off", "cut"), ("a shape of 2**62", "shape"))),
    foreign("an index that leaves the folder", "hf:{root}/index_out",
            "'../llama/model.safetensors', which is no name of a file in that folder"),
    foreign("layers without end", "hf:{root}/layers", "num_hidden_layers=1000000000"),
    foreign("more layers than tensors", "hf:{root}/more_layers", "num_hidden_layers"),
    foreign("quantised weights", "hf:{root}/quantised", "quantization_config", "awq"),
    foreign("a field that is not known", "hf:{root}/unknown", "new_gate=2.0"),
    foreign("a config.json that is cut off", "hf:{root}/torn", "config.json"),
    foreign("a head that is missing", "hf:{root}/headless", "missing   lm_head.weight"),
    foreign("a T5X placeholder that leaves the folder", "t5x:{root}/t5x_out", ".."),
    foreign("a T5X index that is no msgpack", "t5x:{root}/t5x_junk", "t5x_junk"),
    foreign("an adapter with alpha NaN", "peft:{root}/peft_nan", "lora_alpha=nan"),
    foreign("an adapter's regex without end", "peft:{root}/peft_regex", "takes longer than"),
    foreign("a workdir that is none", "{root}", "no checkpoint at"),
]


# --- what the rows need -----------------------------------------------------------------------------

def write_safetensors(folder: pathlib.Path, llama: pathlib.Path, change) -> None:
    """A copy of the model whose header went through change(header, data) -> (bytes, data)."""
    folder.mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    whole = (llama / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, body = change(json.loads(whole[8:8 + length]), whole[8 + length:])
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
        header = struct.pack("<Q", len(header)) + header
    (folder / "model.safetensors").write_bytes(header + body)


def moved(header: dict, which: int, begin: int, end: int) -> dict:
    """The offsets of a tensor moved."""
    name = sorted((n for n in header if n != "__metadata__"),
                  key=lambda n: header[n]["data_offsets"])[which]
    a, b = header[name]["data_offsets"]
    header[name]["data_offsets"] = [a + begin, b + end]
    return header


def shaped(header: dict) -> dict:
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"] = [2**31, 2**31]
    return header


def with_config(root: pathlib.Path, name: str, llama: pathlib.Path, **changes) -> None:
    folder = root / name
    folder.mkdir()
    given = json.loads((llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**given, **changes}))
    (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """The folder of all inputs."""
    from t5x_lite.data import vocabularies
    root = tmp_path_factory.mktemp("malformed")
    for name, content in FILES.items():
        (root / name).write_bytes(
            vocabularies.SHIPPED["scan"].read_bytes()[:3000] if content is None else content)
    with open(root / "long.txt", "wb") as file:
        file.write(b"a\n")
        for _ in range(100):
            file.write(b"x" * 4_000_000)
        file.write(b"\nb\n")
    words = tiny_config.write_text(root / "words.txt")
    for name, module in (("mini", "tests.faults.mini"), ("t5", "tests.tiny_config")):
        (root / f"{name}.py").write_text(
            f"from {module} import get_config as made\n\n\ndef get_config():\n"
            f"    return made({words!r})\n")
    write_models(root)
    return root


def write_models(root: pathlib.Path) -> None:
    """The models of others."""
    folders.write_hf(root / "t5", dataclasses.replace(tiny.seq2seq().model, vocab_size=384))
    fields = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2,
              "num_hidden_layers": 2, "intermediate_size": 12, "tie_word_embeddings": False}
    llama = root / "llama"
    folders.write_hf(llama, hf.model_config(fields))
    changes = {
        "negative": lambda h, d: (moved(h, 0, -4, -4), d), "overlap": lambda h, d: (moved(h, 1, -4, -4), d),
        "hole": lambda h, d: (moved(h, -1, 64, 64), d + bytes(64)),
        "unaligned": lambda h, d: (moved(h, 0, 1, 1), d), "cut": lambda h, d: (h, d[:-20]),
        "shape": lambda h, d: (shaped(h), d), "header": lambda h, d: (struct.pack("<Q", 2**60), d)}
    for name, change in changes.items():
        write_safetensors(root / f"st_{name}", llama, change)
    for name, content in (("bin_cut", base64.b64decode("UEsDBAAACAgAAAAA") * 20),
                          ("bin_lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
                                      b"size 5\n")):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes((llama / "config.json").read_bytes())
        (root / name / "pytorch_model.bin").write_bytes(content)
    with_config(root, "layers", llama, num_hidden_layers=10**9)
    with_config(root, "more_layers", llama, num_hidden_layers=9_000)
    with_config(root, "quantised", llama, quantization_config={"quant_method": "awq"})
    with_config(root, "unknown", llama, new_gate=2.0)
    with_config(root, "torn", llama)
    torn = root / "torn/config.json"
    torn.write_bytes(torn.read_bytes()[:40])
    index = root / "index_out"
    index.mkdir()
    (index / "config.json").write_bytes((llama / "config.json").read_bytes())
    (index / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"model.norm.weight": "../llama/model.safetensors"}}))
    write_safetensors(root / "headless", llama, without_head)
    folders.write_t5x(root / "t5x_out", folders.golden_arrays(), placeholders=True)
    out = root / "t5x_out/checkpoint"
    name = b"target.encoder.encoder_norm.scale"
    assert name in out.read_bytes()
    out.write_bytes(out.read_bytes().replace(name, b"../../" + name[6:]))
    (root / "t5x_junk").mkdir()
    (root / "t5x_junk/checkpoint").write_bytes(b"\xc1\xff junk")
    config, tuning = ADAPTERS["t5"]
    for kind, change in (("nan", {"lora_alpha": float("nan")}), (
            "regex", {"alpha_pattern": {r"(\w|\w\w|\W|..)*(?<!q|o|k|v|wi_0|wi_1)": 2}})):
        folder = root / f"peft_{kind}"
        folder.mkdir()
        hf_lora.write(folder, config, tuning, draw(config, tuning), str(root / "peft_base"))
        given = json.loads((folder / hf_lora.CONFIG).read_text())
        (folder / hf_lora.CONFIG).write_text(json.dumps({**given, **change}))
    folders.write_hf(root / "peft_base", config)


def without_head(header: dict, body: bytes) -> tuple[dict, bytes]:
    """The last tensor of the file, which need not be the head, takes the head's place in it."""
    begin, end = header.pop("lm_head.weight")["data_offsets"]
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [x - (end - begin) for x in entry["data_offsets"]]
    return header, body[:begin] + body[end:]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    process = Forks(tmp_path_factory.mktemp("forks"))
    yield process
    process.close()


def attempt(case: Case, root: pathlib.Path, forks: Forks) -> tuple[str, str]:
    """(the row of the table, what is wrong with it)."""
    for path in root.glob("out.jsonl*"):
        path.unlink()
    module, *flags = case.command.format(root=root).split(" ")
    status, lines = forks.run(module, *[f for f in flags if f])
    said = "\n".join(lines)
    missing = [part for part in case.says if part.format(root=root) not in said]
    refused = not case.status or (lines and any(x.startswith("error: ") for x in lines))
    wrong = [why for why, yes in (
        (f"status {status}", status != case.status), (f"{len(lines)} lines", len(lines) > case.most_lines),
        ("traceback", "Traceback" in said), (f"does not name {missing}", missing),
        ("no error line", not refused)) if yes]
    shown = case.command.replace("{root}/", "").replace("--config=mini.py --workdir=run ", "… ")
    shown = shown.replace("--config=t5.py --config.init_from=hf:t5 --output=out.jsonl ", "… ")
    row = f"| {case.what} | `{shown[:70]}` | {status} | {len(lines)} | {'no' if missing else 'yes'} |"
    return row, f"{row}: {'; '.join(wrong)}\n{said[-1500:]}" if wrong else ""


def test_each_ends_with_a_message_that_names_it(root, forks):
    print("| input | command | status | lines | names it |\n|---|---|---|---|---|")
    failures = []
    for case in CASES:
        row, wrong = attempt(case, root, forks)
        print(row)
        failures += [wrong] if wrong else []
    print(f"malformed inputs: {len(CASES)} tried, {len(CASES) - len(failures)} survived")
    assert not failures, "\n\n".join(failures)
