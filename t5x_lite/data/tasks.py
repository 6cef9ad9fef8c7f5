"""What is read: DataConfig, and the tasks, mixtures and vocabularies that it names.

Imports TensorFlow and seqio inside functions only, so that a config can be made, checked and
planned with on a machine without them.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from t5x_lite import packages, quiet
from t5x_lite.data import paths, rows as data_rows, views, vocabulary as data_vocabulary
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError, nearest

if TYPE_CHECKING:
    import seqio

    from t5x_lite.data import pipeline as data_pipeline


# --- TensorFlow, late and quiet -------------------------------------------------------------

@functools.cache
def tensorflow_side():
    """data_pipeline, which needs TensorFlow: about 4 s on first use."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    packages.keep_lazy_imports_apart()
    # What others than TensorFlow's C++ say meanwhile is of other threads, and is shown.
    with quiet.holding(lambda line: bool(_TENSORFLOWS.match(line)),
                       whole_if_failed=True), packages.lean("sklearn", "matplotlib", "torch"):
        import seqio
        import tensorflow as tf
        import tensorflow_datasets as tfds

        from t5x_lite.data import pipeline as data_pipeline
        # The accelerators belong to JAX; TensorFlow would take their memory.
        tf.config.set_visible_devices([], "GPU")
        with contextlib.suppress(ValueError):   # this TensorFlow knows no TPU
            tf.config.set_visible_devices([], "TPU")
        # TFDS keeps small data sets in memory, and thus in every saved iterator.
        seqio.set_tfds_read_config_override(tfds.ReadConfig(try_autocache=False))
    return data_pipeline


# Lines of TensorFlow's C++, such as "I0000 00:00:1795960912.532685    9553 port.cc:153] …".
_TENSORFLOWS = re.compile(rb"[IWEF]\d{4} [\d:. ]+[\w.]+:\d+\]|WARNING: All log messages before absl")


# --- which tasks ----------------------------------------------------------------------------

ZOO = "tasks"   # the shipped tasks, loaded by name as a user's own modules are


def _registered(config: DataConfig) -> dict[str, "seqio.Task | seqio.Mixture"]:
    """All registered tasks and mixtures by name, those of data.task_modules included."""
    tensorflow_side()
    import seqio

    from t5x_lite.data import document_cache
    document_cache.set_root(config.cache_dir)
    packages.join(ZOO).register_all()
    for name in filter(None, config.task_modules.split(",")):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
            raise UserError(f"data.task_modules={config.task_modules!r}: no module named "
                            f"{error.name!r} on PYTHONPATH") from error
        # Importing a module registers its tasks; a package of many says how in register_all.
        getattr(module, "register_all", lambda: None)()
    registries = (seqio.MixtureRegistry, seqio.TaskRegistry)
    return {name: registry.get(name) for registry in registries for name in registry.names()}


def task_names(config: DataConfig) -> list[str]:
    """The names of all registered tasks and mixtures, those of data.task_modules included."""
    return sorted(_registered(config))


def find(name: str, field: str, config: DataConfig):
    registered = _registered(config)
    if name not in registered:
        from t5x_lite.data import example_files  # a file of examples is a task by its path
        if example_files.is_path(name):
            return example_files.task(name, field)
    if name not in registered:
        hint = nearest(name, registered)   # all the names fill a screen
        known = "" if hint else (
            f". {len(registered)} are known, such as {', '.join(sorted(registered)[::97][:5])}; "
            "python -m t5x_lite.inspect_task --list prints them")
        raise UserError(f"{field}: no task or mixture is called {name!r};{hint} P3's are found with "
                        "data.task_modules=tasks.p3, your own when it names the module that "
                        f"registers them{known}")
    return registered[name]


def source_records(task: "seqio.Task", split: str, shard: tuple[int, int] | None = None) -> Iterator:
    """The records of a task's source as numpy, before any preprocessing; shard: (number, of so many)."""
    import seqio
    info = seqio.ShardInfo(*shard) if shard else None
    dataset = task.source.get_dataset(split, shuffle=False, shard_info=info)
    return iter(dataset.as_numpy_iterator())


def _subtasks(provider) -> dict["seqio.Task", float]:
    """The tasks of a task or mixture with their shares, which sum to one."""
    import seqio
    if isinstance(provider, seqio.Task):
        return {provider: 1.0}
    rates = {task: provider.get_rate(task) for task in provider.tasks}
    return {task: rate / sum(rates.values()) for task, rate in rates.items()}


def file_sizes(config: DataConfig) -> dict[str, int]:
    """{path: bytes} of the files that a config names."""
    return paths.sizes(config.train, config.train_files, config.unlabelled, config.validation,
                       config.validation_files, config.vocabulary)


def mixing_rates(sizes: Sequence[float], temperature: float, cap: float) -> list[float]:
    """Shares proportional to min(n_i, cap)^(1/temperature), summing to one; cap 0 is none.

    Temperature 1 mixes in proportion to size, infinity equally (Raffel et al. 2020, §3.5.2).
    """
    capped = [min(n, cap) if cap else n for n in sizes]
    if max(map(math.log2, filter(None, capped)), default=0.0) > 1000 * temperature:
        capped = [n / max(capped) for n in capped]   # no float holds the powers as they are
    scaled = [n ** (1 / temperature) for n in capped]
    return [s / sum(scaled) for s in scaled]


def train_mixture(config: DataConfig, objective: str) -> tuple["data_pipeline.Weighted", ...]:
    """What data.train or data.train_files means: tasks and their shares, summing to one."""
    pipeline = tensorflow_side()
    own = _names_files(config.train, "train")
    if config.train_files and not own:
        return (pipeline.Weighted(_text_task(config, "train", objective), 1.0),)
    if own and not config.train_files:
        raise UserError(f"data.train={config.train!r} mixes in train_files, and data.train_files is empty")
    if not config.train:
        raise UserError("nothing to train on: set data.train to a task or mixture, or "
                        "data.train_files to text files")

    def find_one(name: str, field: str, config: DataConfig):
        return _text_task(config, "train", objective) if name == "train_files" else \
            find(name, field, config)
    weights = _weights(_shares(config, _entries(config), "data.train", find_one))
    mixture = tuple(pipeline.Weighted(
        task if task.name == "train_files" else _adapted(task, config, objective, "data.train"), weight)
        for task, weight in weights.items() if weight)
    _check_mixture(mixture, data_rows.of(objective).features)
    return mixture


def _names_files(text: str, split: str) -> bool:
    """Whether data.train or data.validation lists the split's text files among its tasks."""
    return f"{split}_files" in (paths.share(entry)[0] for entry in paths.split(text))


def _weights(shares: Iterable[tuple["seqio.Task | seqio.Mixture", float]]
             ) -> dict["seqio.Task", float]:
    """Each task's share, with those of mixtures taken apart."""
    weights: dict = {}
    for provider, share in shares:
        for task, part in _subtasks(provider).items():
            weights[task] = weights.get(task, 0.0) + share * part
    return weights


def _shares(config: DataConfig, entries: Sequence[tuple[str, str, str]], field: str,
           find: Callable[[str, str, DataConfig], "seqio.Task | seqio.Mixture"]
           ) -> list[tuple["seqio.Task | seqio.Mixture", float]]:
    """The tasks and mixtures that a field lists, each with its share of the rows.

    entries: (name, "=", share) or (name, "", ""). find: (name, field, config) -> what it names.
    """
    providers = [find(name, field, config) for name, _, _ in entries]
    if config.temperature <= 0 or config.rate_cap < 0:
        raise UserError(f"data.temperature={config.temperature} must be positive and "
                        f"data.rate_cap={config.rate_cap} not negative")
    if len(entries) > 1:
        sizes = [_size(entry, provider, field)
                 for entry, provider in zip(entries, providers, strict=True)]
        rates = mixing_rates(sizes, config.temperature, config.rate_cap)
        return list(zip(providers, rates, strict=True))
    if config.temperature != 1 or config.rate_cap:
        raise UserError(f"data.temperature={config.temperature} and data.rate_cap="
                        f"{config.rate_cap} mix the entries of data.train, which has only "
                        f"{config.train!r}; list the tasks, or leave them at 1.0 and 0.0")
    return [(providers[0], 1.0)]


def _check_mixture(mixture: Sequence["data_pipeline.Weighted"], features: Sequence[str]) -> None:
    """Raises UserError where a task lacks a feature, or two have another vocabulary."""
    pipeline = tensorflow_side()
    first = mixture[0].task
    for task, _ in mixture:
        pipeline.check_task(task, "train", features, "data.train")
        for name in features:
            if task.output_features[name].vocabulary != first.output_features[name].vocabulary:
                raise UserError(f"data.train mixes vocabularies: {task.name!r} and "
                                f"{first.name!r} differ; set data.vocabulary")


def published_mixture(config: DataConfig) -> tuple[str, dict[str, str]] | None:
    """("gpt3", {part: task}) of data.train=gpt3(part=task,…), None of another data.train."""
    match = re.fullmatch(r"(\w+)\((.*)\)", config.train.strip())
    if match is None:
        return None
    return match[1], dict(map(str.strip, part.partition("=")[::2]) for part in match[2].split(","))


def _entries(config: DataConfig) -> list[tuple[str, str, str]]:
    """(task, "=", share) of each entry of data.train; without a share ("", "")."""
    text = config.train
    if published := published_mixture(config):
        tensorflow_side()
        from t5x_lite.data import published_mixtures
        text = published_mixtures.weights(*published)
    return [paths.share(entry) for entry in paths.split(text)]


def _size(entry: tuple[str, str, str], provider, field: str) -> float:
    """The share written behind "=", else the number of training examples."""
    name, equals, text = entry
    if equals:
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 < share < math.inf:
            raise UserError(f"{field}: {name}={text} must be a positive share")
        return share
    examples = [task.num_input_examples("train") for task in _subtasks(provider)]
    if any(n is None or not 0 < n < math.inf for n in examples):
        raise UserError(f"{field}: {name!r} does not know its number of examples; give every "
                        f"entry a share, as in {name}=1")
    return sum(examples)


def _shots_of(config: DataConfig) -> str:
    return f"_{config.shots}shot" if config.shots else ""


def validation_tasks(config: DataConfig) -> tuple[str, ...]:
    """Names to hand to eval_batches, a mixture taken apart into its tasks: NAME, or NAME_4shot."""
    own = _names_files(config.validation, "validation")
    if config.validation_files and not own:
        return ("validation_files",)
    names: dict[str, None] = {"validation_files": None} if own else {}
    for part in paths.split(config.validation):
        if part == "validation_files":
            continue
        for task in _subtasks(find(part, "data.validation", config)):
            names[task.name + _shots_of(config)] = None
    return tuple(names)


def validation_task(config: DataConfig, name: str, objective: str,
                    field: str = "data.validation") -> "seqio.Task":
    """The task of a name that validation_tasks gives, or of any registered task, in the run's
    vocabulary. field: what named it. Raises UserError for one in another vocabulary."""
    if config.shots and (name == "validation_files" or config.cached_tasks):
        other = "data.cached_tasks" if config.cached_tasks else "data.validation_files"
        raise UserError(f"data.shots={config.shots} shows solved examples of the tasks in "
                        f"data.validation, as text: set it to 0, or leave {other} empty")
    if name == "validation_files":
        return _text_task(config, "validation", objective)
    if name not in _registered(config):
        name = name.removesuffix(_shots_of(config))
    provider = find(name, field, config)
    parts = [task.name for task in _subtasks(provider)]
    if parts != [provider.name]:
        raise UserError(f"{provider.name!r} is a mixture; name one of its tasks: "
                        f"{', '.join(parts)}")
    _check_same_vocabulary(provider, config, field)
    if config.shots:
        from t5x_lite.data import demonstrations
        provider = demonstrations.with_shots(
            provider, demonstrations.Shots(config.shots, config.shots_seed))
    return _adapted(provider, config, objective, field)


def eval_examples(config: DataConfig, task: str, *, objective: str, split: str = "validation",
                  field: str = "data.validation") -> tuple["seqio.Task", Iterator[dict]]:
    """The task, and its examples in order: {"inputs", "targets": tokens, and all else it keeps}.

    Pairs of texts are whole; what is made to fill a row has its lengths. The feature "inputs" may
    be missing.
    Raises UserError for an unknown task or split.
    """
    pipeline = tensorflow_side()
    seqio_task = validation_task(config, task, objective, field)
    lengths = data_rows.of(objective).task_lengths(
        seqio_task, config.inputs_length, config.targets_length)
    pipeline.check_task(seqio_task, split, [f for f in lengths if f != "row"], field)
    return seqio_task, pipeline.examples(seqio_task, split, lengths)


def _text_task(config: DataConfig, split: str, objective: str) -> "seqio.Task":
    """data.train_files or data.validation_files as a task with the objective's features."""
    kind = data_rows.of(objective)
    _registered(config)
    from t5x_lite.data import asked, denoising, rewriting, salient_spans, text_files, tokenized
    field = f"data.{split}_files"
    if not kind.takes:
        able = [name for name, other in data_rows.ROWS.items() if other.takes]
        raise UserError(f"{field}: plain text has nothing for objective.name={objective!r} to learn "
                        f"from; use {', '.join(able)}, or a task made for it in data.{split}.")
    name = config.denoising or kind.denoiser
    files = text_files.find_files(getattr(config, f"{split}_files"), field)
    if name in salient_spans.KINDS and kind.pairs:
        return tokenized.ahead(salient_spans.task(
            f"{split}_files", files, split, config.text_document, vocabulary_of(config),
            salient_spans.settings_of(config, name), asked.learned if salient_spans.KINDS[name].asks else None))
    denoiser = denoising.find(name)
    denoising.check_objective(name, objective, "data.denoising")
    settings = {s: getattr(config, s) for s in ("noise_density", "mean_span_length", "salient_like")
                if getattr(config, s)}
    return tokenized.ahead(text_files.task(
        f"{split}_files", files, split, config.text_document, vocabulary_of(config),
        denoiser.features, denoising.steps(name, **settings), rewriting.of(config)))


# --- text without labels --------------------------------------------------------------------

def unlabelled(config: DataConfig, objective: str
               ) -> tuple[tuple["data_pipeline.Weighted", ...], data_rows.Rows, DataConfig]:
    """(tasks and their shares, the kind of rows, their lengths) of data.unlabelled.

    Raises UserError for tasks that are unknown or have another vocabulary, and classes that do not fit.
    """
    pipeline = tensorflow_side()
    kind = data_rows.of(objective)
    entries = [paths.share(entry) for entry in paths.split(config.unlabelled)]
    alone = dataclasses.replace(config, temperature=1.0, rate_cap=0.0)
    weights = _weights(_shares(alone, entries, "data.unlabelled", _find_texts))
    mixture = []
    for task, share in weights.items():
        _check_same_vocabulary(task, config, "data.unlabelled")
        task = _adapted(task, config, objective, "data.unlabelled")
        mixture.append(pipeline.Weighted(_with_views(task, config, kind), share))
    return tuple(mixture), views.rows_of(kind, config), views.row_config(config, kind)


def _find_texts(name: str, field: str, config: DataConfig):
    """The task or mixture of a name, or the task of a file's texts in the run's vocabulary."""
    from t5x_lite.data import unlabelled
    if not unlabelled.is_path(name):
        return find(name, field, config)
    filled = any(views.VIEWS[view].feature == "filled" for view in views.views_of(config))
    return unlabelled.of_files(name, field, config, vocabulary_of(config), filled)


def graded(config: DataConfig, task: "seqio.Task", objective: str
           ) -> tuple["seqio.Task", data_rows.Rows, DataConfig]:
    """(an adapted task, the kind of rows, their lengths): its texts as they are beside all of
    data.classes, with the number of the right one."""
    kind, plain = data_rows.of(objective), dataclasses.replace(config, views="plain")
    return (_with_views(task, plain, kind, graded=True), views.rows_of(kind, plain, graded=True),
            views.row_config(plain, kind))


def _with_views(task: "seqio.Task", config: DataConfig, kind: data_rows.Rows, *,
                graded: bool = False) -> "seqio.Task":
    from t5x_lite.data import unlabelled
    classes, vocabulary = views.classes_of(config), task.output_features["targets"].vocabulary
    views.check_room(config, kind, unlabelled.tokens_of(classes, vocabulary))
    return unlabelled.with_views(task, views.views_of(config), classes, graded, config.inputs_length)


_LOOKED_AT = 200   # labelled examples of a task whose labels must be classes


def check_labels(config: DataConfig, objective: str) -> None:
    """Raises UserError where one of the first 200 labels of a training task is none of data.classes."""
    pipeline = tensorflow_side()
    for task, _ in train_mixture(config, objective):
        with_classes, kind, _ = graded(config, task, objective)
        lengths = kind.task_lengths(with_classes, config.inputs_length, pipeline.UNCUT)
        found = pipeline.first_examples(with_classes, "train", lengths, _LOOKED_AT)
        for example in found.as_numpy_iterator():
            if example["right"][0] < 0:
                raise UserError(
                    f"data.train={task.name!r} has the label {example['label'].decode()!r}, which is "
                    f"none of data.classes={config.classes!r}: list every label as the task writes it.")


# --- vocabularies ---------------------------------------------------------------------------

def vocabulary_of(config: DataConfig) -> "seqio.Vocabulary":
    """The vocabulary of the run: data.vocabulary, else that of data.train's targets."""
    _registered(config)   # modules of tasks may register vocabularies
    from t5x_lite.data import vocabularies
    if config.vocabulary:
        return vocabularies.load(config.vocabulary)
    if not _first_of_train(config):
        raise UserError("which vocabulary? set data.vocabulary to python, byt5, t5 or the path of "
                        "a SentencePiece model (scripts/train_tokenizer.py makes one) or of a "
                        "tokenizer.json")
    return find(_first_of_train(config), "data.train", config).output_features[
        "targets"].vocabulary


def _first_of_train(config: DataConfig) -> str:
    """The first task that data.train names; "" where there is none."""
    named = (name.strip() for name, _, _ in _entries(config))
    return next((name for name in named if name != "train_files"), "")


def _adapted(task: "seqio.Task", config: DataConfig, objective: str, field: str) -> "seqio.Task":
    """The task with the run's vocabulary; UserError where it is made for another objective."""
    from t5x_lite.data import cached, demonstrations, denoising, tokenized
    name = denoising.of(task)
    if name:
        denoising.check_objective(name, objective, f"{field}={task.name!r}")
        if config.denoising not in ("", name) and not config.train_files:
            raise UserError(f"data.denoising={config.denoising!r} is for text files, and {field}="
                            f"{task.name!r} is a task of {name}; take a task made for it, such as "
                            f"{task.name.replace(name, config.denoising)}")
    if config.cached_tasks:
        task = cached.read_from(task, config.cached_tasks,
                                vocabulary_of(config) if config.vocabulary else None)
    features = dict(task.output_features)
    if config.vocabulary:
        vocabulary = vocabulary_of(config)
        features = {n: dataclasses.replace(f, vocabulary=vocabulary) for n, f in features.items()}
    kind = data_rows.of(objective)
    if not kind.ends and "inputs" in features:   # read on without a break, as in infer
        features["inputs"] = dataclasses.replace(features["inputs"], add_eos=False)
    task = task.replace(output_features=features)
    if isinstance(task.source, demonstrations.PromptedSource):
        lengths = kind.task_lengths(
            task, config.inputs_length, config.targets_length)
        task = demonstrations.fitted(task, lengths["inputs"])
    return tokenized.ahead(task)


def _check_same_vocabulary(task: "seqio.Task", config: DataConfig, field: str) -> None:
    """Raises UserError for a held-out task in other tokens than the run's."""
    name = _first_of_train(config)
    if config.vocabulary or not name:
        return
    from t5x_lite.data import vocabularies
    ours = find(name, "data.train", config).output_features
    for feature in sorted(ours.keys() & task.output_features.keys()):
        run, own = ours[feature].vocabulary, task.output_features[feature].vocabulary
        if run != own:
            raise UserError(
                f"{field}={task.name!r} has another vocabulary than data.train={name!r}, which the "
                f"model is for: {data_vocabulary.vocabulary_identity(own)}, there "
                f"{data_vocabulary.vocabulary_identity(run)}. To read both with the model's, set "
                f"data.vocabulary={vocabularies.name_of(run)}")


def uses_sentinels(config: DataConfig, objective: str, held_out: bool = False) -> bool:
    """Whether a training task, a view of unlabelled text, or a held-out task hides its text behind
    sentinels."""
    from t5x_lite.data import denoising
    if views.hide_text(config) and not held_out:
        return True
    tasks = [validation_task(config, name, objective) for name in validation_tasks(config)
             ] if held_out else [task for task, _ in train_mixture(config, objective)]
    names = {denoising.of(task) for task in tasks}
    return any(name and denoising.DENOISERS[name].sentinels for name in names)
