"""Convert checkpoints: `python -m t5x_lite.convert --from=SOURCE --to=TARGET`.

    SOURCE   hf:DIR     a folder of Hugging Face transformers, or ORG/NAME of the hub
             t5x:DIR    a native T5X checkpoint
             peft:DIR   a LoRA adapter of Hugging Face's PEFT (to a WORKDIR)
             mtf:DIR    a Mesh TensorFlow T5 checkpoint (folder, or prefix model.ckpt-N)
             WORKDIR    a workdir of t5x_lite, its checkpoints folder or one step
    TARGET   hf:DIR     a folder that transformers loads
             peft:DIR   an adapter that PEFT loads, of a WORKDIR that was tuned with LoRA
             WORKDIR    a checkpoint to start from (--config.init_from), evaluate or export

Each a local folder or gs://BUCKET/PATH. What goes into a bucket is made in a temporary folder first
(TMPDIR), and hf: and peft: of a bucket are read from a copy in the cache.

Tensors stream one at a time into hf:DIR; a workdir is written from memory, which init_from does
without: it reads hf:DIR and t5x:DIR itself, each process the parts that its devices hold.

A WORKDIR of parameter-efficient tuning counts as the whole model, merged, but for peft:DIR.
An adapter's base model is what its adapter_config.json names, or --config.init_from.
Numbers keep their format unless --dtype says otherwise, so that a round trip is bit-exact.
`--config=configs/…` gives a workdir the rest of its config (task, vocabulary), and a T5X or
Mesh TensorFlow checkpoint the model that it does not describe itself. Tokenizer files go
along between hf:DIR and WORKDIR/hf.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import dataclasses
import functools
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
import numpy as np
from absl import flags

from t5x_lite import files, init_from, log, tree
from t5x_lite.checkpoints import format as checkpoint_format, manager
from t5x_lite.checkpoints.best import BEST
from t5x_lite.checkpoints.manager import CheckpointConfig, Checkpointer
from t5x_lite.config import RunConfig, saved, to_json
from t5x_lite.data import tasks
from t5x_lite.errors import UserError, nearest
from t5x_lite.formats import hf, hf_card, hf_lora, hub, mesh_tf, safetensors, t5x
from t5x_lite.formats.mapping import ForeignModel, Tensors, num_bytes
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.language_model import Model
from t5x_lite.models.peft import Tuning
from t5x_lite.training import objectives
from t5x_lite.training.objectives import ObjectiveConfig

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags besides --from and --to."""

    config: RunConfig | None = None
    family: str | None = None
    dtype: str | None = None
    step: str = "last"
    vocab_size: int = 0
    max_file_gb: float = 5.0
    push: str = ""
    ema: bool = True   # the moving average of a workdir's parameters, where its run kept one


def run(source: str, target: str, options: Options = Options()) -> None:
    """Converts one checkpoint.

    Raises:
        UserError: a source that is not there or does not fit, a target that exists or cannot
            hold the model.
    """
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UserError(f"--dtype={options.dtype}: must be one of {', '.join(DTYPES)}."
                        f"{nearest(options.dtype, DTYPES)}")
    place = re.sub("^(hf|peft):", "", target)
    if re.match(r"\w+:", place) and not files.is_url(place):
        raise UserError(f"--to={target}: a target is hf:DIR, peft:DIR or the folder of a workdir.")
    if options.push and (not target.startswith(("hf:", "peft:")) or files.is_url(place)):
        raise UserError(f"--push={options.push}: uploads what --to=hf:DIR or peft:DIR wrote, not "
                        f"{target}.")
    folder = files.path(place).expanduser()
    if folder.exists() and not _is_free(folder):
        raise UserError(f"--to={target}: {folder} exists and is not empty; name another folder.")
    if target.startswith("peft:"):
        write = functools.partial(_write_peft, source=source, options=options)
    elif source.startswith("peft:"):
        if target.startswith("hf:"):
            raise UserError(f"--from={source}: make a workdir of it first, and --to={target} of "
                            "that.")
        write = functools.partial(_write_tuned_workdir, source=source, options=options)
    else:
        write = _writer(source, target, options)
    _write_whole(folder, write)
    log.say(f"wrote {folder}")
    if options.push:
        hub.push(folder, options.push)


def _writer(source: str, target: str, options: Options) -> Callable[[pathlib.Path], None]:
    """What writes a whole model into a folder."""
    model = _open(source, options)
    model = _trimmed(model, options.vocab_size)
    log.say(f"{model.where}: {sum(i.size for i in model.table.values()):,} parameters, "
               f"{log.si(num_bytes(model.tensors.shapes, model.tensors.dtypes), 'B')}")
    for name in model.unused:
        log.say(f"  skipped {name}")
    dtypes = {path: np.dtype(jax.numpy.dtype(options.dtype)) if options.dtype
              else model.dtype(path) for path in model.table}
    write = _write_hf if target.startswith("hf:") else _write_workdir
    return lambda folder: write(folder, source, model, dtypes, options)


def _is_free(folder: files.Path) -> bool:
    """Whether a folder holds nothing, or what a conversion into a bucket that was killed left."""
    return folder.is_dir() and (_UNFINISHED in files.names(folder) or not files.names(folder))


_UNFINISHED = "UNFINISHED"   # in a folder of a bucket until all of it is there


def _write_whole(folder: files.Path, write: Callable[[pathlib.Path], None]) -> None:
    """What is there is whole: written beside and renamed, or for a bucket into a temporary folder
    and copied, with an object that says so until the last copy."""
    if files.is_url(folder):
        with tempfile.TemporaryDirectory(prefix="t5x_lite-") as made:
            write(pathlib.Path(made))
            files.upload_folder(pathlib.Path(made), folder, _UNFINISHED)
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)


# --- sources --------------------------------------------------------------------------------------

def _open(source: str, options: Options) -> ForeignModel:
    given = options.config.model if options.config else None
    kind, _, rest = source.partition(":")
    if kind == "t5x":
        return t5x.read_model(rest, config=given)
    if kind == "mtf":
        tensors, step = _mesh_tensorflow(rest)
        return t5x.model_of(source, mesh_tf.by_t5x_names(tensors), step, config=given)
    if kind == "hf":
        return hf.read_model(rest, like=given)
    step = _step(options)
    init_from.check_workdir(source)
    return init_from.read_workdir(source, given, step, averaged=options.ema)


def _step(options: Options) -> int | str:
    if options.step in ("last", BEST):
        return options.step
    if not options.step.isdigit():
        raise UserError(f"--step={options.step}: must be last, best or the number of a step.")
    return int(options.step)


def _mesh_tensorflow(path: str) -> tuple[Tensors, int]:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError("mtf: checkpoints are read with TensorFlow: pip install tensorflow."
                        ) from error
    try:
        reader = tf.train.load_checkpoint(path)
    except (ValueError, OSError, tf.errors.OpError) as error:
        raise UserError(f"mtf:{path} holds no TensorFlow checkpoint (a folder with a file named "
                        "checkpoint, or the prefix …/model.ckpt-N): "
                        f"{str(error).splitlines()[0]}") from error
    shapes = {n: tuple(s) for n, s in reader.get_variable_to_shape_map().items()}
    dtypes = {n: np.dtype(d.as_numpy_dtype)
              for n, d in reader.get_variable_to_dtype_map().items()}
    step = int(reader.get_tensor("global_step")) if "global_step" in shapes else 0
    return Tensors(shapes, dtypes, reader.get_tensor), step


def _trimmed(model: ForeignModel, vocab_size: int) -> ForeignModel:
    """The model without the rows that pad its vocabulary beyond `vocab_size`; 0: all of it."""
    held = model.config.vocab_size
    if not vocab_size or vocab_size == held:
        return model
    if not 0 < vocab_size < held:
        raise UserError(f"--vocab_size={vocab_size}: the source has {held} rows; give fewer, or 0 "
                        "for all.")
    return _Trimmed(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
                    | {"config": dataclasses.replace(model.config, vocab_size=vocab_size),
                       "table": {p: dataclasses.replace(i, shape=tuple(
                           vocab_size if a == "vocab" else n
                           for a, n in zip(i.logical_axes, i.shape, strict=True)))
                           for p, i in model.table.items()}})


class _Trimmed(ForeignModel):
    """Reads what is left after _trimmed."""

    def read(self, path: str, dtype: Any = None, index: tuple[slice, ...] | None = None
             ) -> np.ndarray:
        value = super().read(path, dtype, index)
        return value[tuple(slice(n) for n in self.table[path].shape)]


# --- targets --------------------------------------------------------------------------------------

def _write_hf(folder: pathlib.Path, source: str, model: ForeignModel, dtypes: Mapping[str, Any],
              options: Options) -> None:
    base, others = None, _hf_files(source)
    if others is not None:
        hf.copy_other_files(others, folder)
        base = safetensors.read_json(others / "config.json")
        if options.family not in (None, base.get("model_type")):
            base = None
    done = iter(range(1, len(model.table) + 1))
    hf.write_model(folder, model.config, dtypes, model.read, model_type=options.family, base=base,
                   max_bytes=int(options.max_file_gb * 1e9),
                   progress=lambda path: _progress(next(done), model, path))
    if not source.startswith(("hf:", "t5x:", "mtf:")):
        record = manager.read_record(source, _step(options))
        hf_card.write(folder, record, source,
                      None if hf_card.has_tokenizer(folder) else _vocabulary(record))


def _vocabulary(record: checkpoint_format.Record) -> Any:
    """The vocabulary of the run that wrote a checkpoint; None, which is said, where there is none."""
    data = saved(record.config).data
    if not data.vocabulary and not data.train:
        return None
    try:
        return tasks.vocabulary_of(data)
    except (UserError, ImportError) as error:
        log.say(f"no tokenizer is written: {error}")
        return None


def _hf_files(source: str) -> files.Path | None:
    """The folder with the config.json and tokenizer that belong to a source."""
    if source.startswith("hf:"):
        folders = [hub.local_folder(source.removeprefix("hf:"))]
    else:
        path = files.path(source).expanduser() if ":" not in source or files.is_url(source) \
            else pathlib.Path(source)
        folders = [path / "hf", path.parent / "hf", path.parent.parent / "hf"]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    return None


def _write_workdir(folder: pathlib.Path, source: str, model: ForeignModel,
                   dtypes: Mapping[str, Any], options: Options) -> None:
    config = _run_config(model.config, source, options.config)
    params = {}
    for i, path in enumerate(model.table):
        params[path] = jax.numpy.asarray(model.read(path, dtypes[path]))
        _progress(i + 1, model, path)
    others = _hf_files(source)
    if others is not None:
        hf.copy_other_files(others, folder / "hf")
    with Checkpointer(folder, CheckpointConfig(async_save=False)) as checkpointer:
        checkpointer.save(model.step, {"params": tree.unflatten(params)}, {}, to_json(config))
    (folder / "config.json").write_text(to_json(config) + "\n")


def _write_peft(folder: pathlib.Path, source: str, options: Options) -> None:
    """The adapter that a workdir trained."""
    record = manager.read_record(source, _step(options))
    run = saved(record.config)
    table = Tuning(Model(run.model).table, run.peft).trainable
    wanted = {p: jax.ShapeDtypeStruct(i.shape, i.dtype) for p, i in table.items()}
    trained, _ = manager.restore_params(source, tree.unflatten(wanted), record.step,
                                        averaged=options.ema)
    hf_lora.write(folder, run.model, run.peft,
                  {p: np.asarray(x) for p, x in tree.flatten(trained).items()},
                  run.init_from.removeprefix("hf:"), options.family or _model_type(run.init_from))


def _write_tuned_workdir(folder: pathlib.Path, source: str, options: Options) -> None:
    """A workdir whose checkpoint is an adapter of PEFT, over the base model in its own folder."""
    adapter = files.local_copy(source.removeprefix("peft:"))
    base = options.config.init_from if options.config else ""
    base = base or f"hf:{hf_lora.base_of(adapter)}"
    if not hub.local_folder(base.removeprefix("hf:")).is_dir():
        raise UserError(f"{source} adapts {base}, which is not here: give --config=configs/… with "
                        "--config.init_from=hf:DIR.")
    model = _open(base, options)
    tuning, trained = hf_lora.read(adapter, model.config, options.family or _model_type(base))
    config = dataclasses.replace(_run_config(model.config, base, options.config), peft=tuning,
                                 init_from=base)
    program = init_from.alone(config)
    state = program.start(init_from.parameters(program), tree.unflatten(trained))
    with Checkpointer(folder, CheckpointConfig(async_save=False)) as checkpointer:
        checkpointer.save(0, {name: state[name] for name in ("params", "frozen")}, {},
                          to_json(config))
    (folder / "config.json").write_text(to_json(config) + "\n")


def _model_type(source: str) -> str | None:
    """The Hugging Face family that a source came from, where a config.json says it."""
    others = _hf_files(source)
    return others and safetensors.read_json(others / "config.json").get("model_type")


def _run_config(model: ModelConfig, source: str, given: RunConfig | None) -> RunConfig:
    if given is not None:
        return dataclasses.replace(given, model=model, init_from="", init_map=())
    objective = objectives.of_architecture(model.architecture)[0]
    return RunConfig(name=pathlib.Path(source.partition(":")[2] or source).name, model=model,
                     objective=ObjectiveConfig(objective))


def _progress(number: int, model: ForeignModel, path: str) -> None:
    log.say(f"  [{number}/{len(model.table)}] {path} "
               f"{'x'.join(map(str, model.table[path].shape))}")


if __name__ == "__main__":
    _FROM = flags.DEFINE_string("from", None, "hf:DIR, t5x:DIR, mtf:DIR, peft:DIR or a workdir.")
    _TO = flags.DEFINE_string("to", None, "hf:DIR, peft:DIR or a workdir; must not exist.")
    _FAMILY = flags.DEFINE_enum("family", None, list(hf.FAMILIES),
                                "model_type to write; by default the first that fits.")
    _DTYPE = flags.DEFINE_string("dtype", None, f"Of the result: {', '.join(DTYPES)}.")
    _STEP = flags.DEFINE_string("step", "last", "The step of a workdir, last or best.")
    _VOCAB = flags.DEFINE_integer("vocab_size", 0, "Drop rows that pad the vocabulary beyond it.")
    _GB = flags.DEFINE_float("max_file_gb", 5.0, "Size of one safetensors file.")
    _PUSH = flags.DEFINE_string("push", "", "ORG/NAME of the hub to upload an hf: target to.")
    _EMA = flags.DEFINE_bool("ema", True, "Write the moving average of a workdir's parameters, where "
                             "train.ema_decay kept one; --noema: those of the step itself.")
    _CONFIG = cli.define_config()

    def main() -> None:
        if not _FROM.value or not _TO.value:
            raise UserError("give --from=hf:DIR|t5x:DIR|mtf:DIR|peft:DIR|WORKDIR and "
                            "--to=hf:DIR|peft:DIR|WORKDIR.")
        config = cli.run_config(_CONFIG) if _CONFIG.value is not None else None
        run(_FROM.value, _TO.value, Options(config, _FAMILY.value, _DTYPE.value, _STEP.value,
                                            _VOCAB.value, _GB.value, _PUSH.value, _EMA.value))

    cli.run(main)
