"""Prompted tasks: k-shot demonstrations, P3's templates, FLAN's mixtures.

    few_shot("trec_5shot", task="trec", shots=5, seed=0)
    register_templates("p3_nq", "p3_nq_open.yaml", {"train": ["nq.jsonl"]}, read)   a task each
    flan_mixture("my_flan", {"task": number of examples, …})

Demonstrations are drawn once, from the training split, so that what is evaluated stays held
out, and by a fixed seed, so that every run and step sees the same prompt (Brown et al. 2020,
arXiv:2005.14165). Templates are Jinja: Python runs them ahead of tf.data, over records that a
reader gives (tasks/records.py).
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from t5x_lite.errors import UserError
from tasks import metrics, records, text_to_text
from tasks.text_to_text import each

FLAN_CAP = 3_000        # rate maximum of Wei et al. 2021 (arXiv:2109.01652, §2.1) …
FLAN_EXAMPLES = 30_000  # … and the examples a data set is cut to
P3_CAP = 500_000        # Sanh et al. 2021 (arXiv:2110.08207, §5): over the number of templates


# --- k-shot ----------------------------------------------------------------------------------

def demonstrations(task: seqio.Task, shots: int, seed: int, split: str = "train",
                   pool: int = 1000) -> list[tuple[str, str]]:
    """(inputs, targets) of `shots` examples among the first `pool` of a split, by the seed."""
    dataset = task.source.get_dataset(split=split, shuffle=False)
    dataset = task.preprocessors[0](dataset).take(pool)
    found = [(e["inputs"].decode(), e["targets"].decode()) for e in dataset.as_numpy_iterator()]
    if len(found) < shots:
        raise UserError(f"{task.name!r} has {len(found)} examples in {split!r}, too few for "
                        f"{shots} demonstrations")
    return random.Random(seed).sample(found, shots)


def few_shot(name: str, task: str, shots: int, seed: int = 0, between: str = "\n\n",
             before_answer: str = "\n") -> seqio.Task:
    """Registers a task whose inputs begin with `shots` solved examples of the training split.

    Only the other splits are evaluated: the demonstrations are held out from them. 0 shots leave
    the inputs as they are. The training data are read on first use.
    """
    base = seqio.TaskRegistry.get(task)

    def with_prompt(dataset: tf.data.Dataset) -> tf.data.Dataset:
        solved = demonstrations(base, shots, seed) if shots else []
        prompt = "".join(f"{i}{before_answer}{t}{between}" for i, t in solved)
        ending = before_answer if shots else ""
        return each(lambda e: {**e, "inputs": tf.strings.join([prompt, e["inputs"], ending])})(
            base.preprocessors[0](dataset))

    class HeldOut(seqio.DataSource):
        """The splits of the source that hold no demonstrations."""

        def __init__(self):
            super().__init__(splits=tuple(s for s in base.splits if s != "train"))

        @property
        def supports_arbitrary_sharding(self) -> bool:
            return base.source.supports_arbitrary_sharding

        def list_shards(self, split):
            return base.source.list_shards(split)

        def num_input_examples(self, split):
            return base.source.num_input_examples(split)

        def get_dataset(self, split="validation", shuffle=True, seed=None, shard_info=None, **_):
            return base.source.get_dataset(split=split, shuffle=shuffle, seed=seed,
                                           shard_info=shard_info)

    return seqio.TaskRegistry.add(
        name, source=HeldOut(), preprocessors=[with_prompt, *base.preprocessors[1:]],
        output_features=base.output_features, metric_fns=list(base.metric_fns),
        postprocess_fn=base.postprocessor)


# --- promptsource templates ------------------------------------------------------------------

class Template(NamedTuple):
    """One prompt of promptsource."""
    name: str
    jinja: str                   # input ||| target
    answer_choices: str | None   # Jinja too: choice ||| choice
    original_task: bool          # false: the data set's task turned around


def read_templates(path: str) -> list[Template]:
    """The templates of a promptsource YAML file, in its order."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML whose !Template tags are plain mappings."""

    Loader.add_multi_constructor("!", lambda loader, _, node: loader.construct_mapping(node, True))
    with open(path, encoding="utf-8") as file:
        content = yaml.load(file, Loader)
    return [Template(t["name"], t["jinja"], t["answer_choices"],
                     bool(t["metadata"]["original_task"]))
            for t in content["templates"].values()]


def render(template: Template, record: Mapping[str, Any], seed: int = 0
           ) -> tuple[str, list[str]] | None:
    """(input, [target, …]) of a record; None where the template gives no target for it.

    The filter `choice` draws by the seed, which makes it a function of the record's place.
    """
    import jinja2
    drawn = random.Random(seed)
    environment = jinja2.Environment(autoescape=False)
    environment.filters["choice"] = lambda items: drawn.choice(list(items))
    environment.filters["most_frequent"] = lambda items: [
        i for i in dict.fromkeys(items) if list(items).count(i) == max(
            list(items).count(j) for j in items)]
    values = dict(record)
    if template.answer_choices:
        text = environment.from_string(template.answer_choices).render(**values)
        values["answer_choices"] = [c.strip() for c in text.split("|||")]
    parts = [p.strip() for p in environment.from_string(template.jinja).render(**values).split(
        "|||")]
    if len(parts) < 2 or not parts[1] or not parts[0]:
        return None
    return parts[0], [parts[1], *(p for p in parts[2:] if p)]


def register_templates(prefix: str, templates: str, files: Mapping[str, Sequence[str]],
                       read: Callable[[str], Iterable[Mapping]], original_only: bool = False
                       ) -> list[str]:
    """Registers one task a template, PREFIX_NAME, and their mixture PREFIX; returns the names.

    templates: a promptsource YAML file. files: {split: paths}; read: a path -> records as the
    templates name their fields. The mixture samples each template alike.
    """
    names = []
    for template in read_templates(templates):
        if original_only and not template.original_task:
            continue
        name = f"{prefix}_{''.join(c if c.isalnum() else '_' for c in template.name)}"

        def rendered(path: str, template=template) -> Iterator[tuple[str, list[str]]]:
            for number, record in enumerate(read(path)):
                made = render(template, record, seed=number)
                if made:
                    yield made

        source = records.RecordSource(name, files, rendered, version=repr(template))
        text_to_text.register(
            name, source, records.with_answers,
            metric_fns=[metrics.exact_match, metrics.squad], postprocess_fn=text_to_text.answers)
        names.append(name)
    seqio.MixtureRegistry.add(prefix, names, default_rate=1.0)
    return names


# --- mixtures of many tasks ------------------------------------------------------------------

def capped_rates(sizes: Mapping[str, float], cap: float) -> list[tuple[str, float]]:
    """(task, rate) pairs: examples-proportional mixing with a cap (Raffel et al. 2020, §3.5.2)."""
    return [(task, float(min(size, cap))) for task, size in sizes.items()]


def flan_mixture(name: str, sizes: Mapping[str, int]) -> seqio.Mixture:
    """FLAN's mixture of your tasks: at most 30,000 examples of each count, at most 3,000 weigh."""
    return seqio.MixtureRegistry.add(name, capped_rates(
        {task: min(size, FLAN_EXAMPLES) for task, size in sizes.items()}, FLAN_CAP))


def p3_rates(sizes: Mapping[str, int], num_templates: Mapping[str, int]) -> dict[str, float]:
    """T0's rate of each data set: its examples, or 500,000 / templates where it has more than
    500,000; every template of it then weighs rate / templates."""
    return {name: P3_CAP / num_templates[name] if size > P3_CAP else float(size)
            for name, size in sizes.items()}
