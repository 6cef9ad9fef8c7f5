"""Prompted tasks: k-shot demonstrations, P3's templates, FLAN's mixtures.

    few_shot("trec_5shot", task="trec", shots=5, seed=0)        or data.shots=5
    register_templates("p3_nq", "p3_nq_open.yaml", {"train": ["nq.jsonl"]}, read)   a task each
    flan_mixture("my_flan", {"task": number of examples, …})

Templates are Jinja: Python runs them ahead of tf.data, over records that a
reader gives (records.py).
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import seqio

from t5x_lite.data import (
    demonstrations,
    example_files,
    readers,
    records,
    task_metrics,
    templates,
    text_to_text,
)
from t5x_lite.data.demonstrations import Shots
from t5x_lite.errors import UserError, nearest

FLAN_CAP = 3_000        # rate maximum of Wei et al. 2021 (arXiv:2109.01652, §2.1) …
FLAN_EXAMPLES = 30_000  # … and the examples a data set is cut to
P3_CAP = 500_000        # Sanh et al. 2021 (arXiv:2110.08207, §5): over the number of templates


# --- k-shot ----------------------------------------------------------------------------------

def few_shot(name: str, task: str, shots: int, seed: int = 0, split: str = "",
             between: str = "\n\n", before_answer: str = "\n") -> seqio.Task | seqio.Mixture:
    """Registers a task whose inputs begin with `shots` solved examples (demonstrations.py).

    task: a registered one, the path of a .jsonl, .json or .tsv file, or a mixture, whose tasks
    become NAME_TASK each and their mixture NAME. split: where the examples come from; "": "train",
    else what is read. 0 shots leave the inputs as they are. The data are read on first use.
    """
    settings = Shots(shots, seed, split, between, before_answer)
    if task in seqio.MixtureRegistry.names():
        mixture = seqio.MixtureRegistry.get(task)
        parts = [(few_shot(f"{name}_{part.name}", part.name, *settings).name,
                  lambda _, part=part: mixture.get_rate(part)) for part in mixture.tasks]
        return seqio.MixtureRegistry.add(name, parts)
    if task in seqio.TaskRegistry.names():
        base = seqio.TaskRegistry.get(task)
    elif example_files.is_path(task):
        base = example_files.task(task, "few_shot")
    else:
        known = seqio.TaskRegistry.names() | seqio.MixtureRegistry.names()
        raise UserError(f"few_shot: no task, mixture or file of examples is called {task!r};"
                        f"{nearest(task, known)}")
    made = demonstrations.with_shots(base, settings).replace(name=name)
    seqio.TaskRegistry.add_provider(name, made)
    return made


# --- promptsource templates ------------------------------------------------------------------

class Template(NamedTuple):
    """One prompt of promptsource."""
    name: str
    jinja: str                   # input ||| target
    answer_choices: str | None   # Jinja too: choice ||| choice
    original_task: bool          # false: the data set's task turned around


def read_templates(path: str) -> list[Template]:
    """The templates of a promptsource YAML file, in its order. Raises UserError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML whose !Template tags are plain mappings, without references, by which a file of a
        few lines can stand for billions."""

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it holds a reference (*name)")
            return super().compose_node(parent, index)

    Loader.add_multi_constructor("!", lambda loader, _, node: loader.construct_mapping(node, True))
    try:
        content = yaml.load(readers.whole(path), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no YAML of promptsource "
                        f"({str(error)[:200] or type(error).__name__})") from error
    held = readers.field(content, "templates", path, dict)
    return [_template(template, f"{path}, template {str(name)[:40]}")
            for name, template in held.items()]


def _template(held: Any, where: str) -> Template:
    metadata = readers.field(held, "metadata", where, dict)
    choices = held.get("answer_choices")
    if choices is not None and not isinstance(choices, str):
        raise UserError(f"{where} has answer_choices that are no string")
    return Template(readers.field(held, "name", where), readers.field(held, "jinja", where),
                    choices, bool(metadata.get("original_task")))


def render(template: Template, record: Mapping[str, Any], seed: int = 0
           ) -> tuple[str, list[str]] | None:
    """(input, [target, …]) of a record; None where the template gives no target for it.

    The filter `choice` draws by the seed, which makes it a function of the record's place.
    Raises UserError for a template that does more than a prompt needs (templates.py).
    """
    drawn = random.Random(seed)
    where = f"the template {template.name[:60]!r}"
    values = dict(record)
    if template.answer_choices:
        text = templates.render(template.answer_choices, values, drawn, where)
        values["answer_choices"] = [c.strip() for c in text.split("|||")]
    text = templates.render(template.jinja, values, drawn, where)
    parts = [part.strip() for part in text.split("|||")]
    if len(parts) < 2 or not parts[1] or not parts[0]:
        return None
    return parts[0], [parts[1], *(part for part in parts[2:] if part)]


def register_templates(prefix: str, path: str, files: Mapping[str, Sequence[str]],
                       read: Callable[[str], Iterable[Mapping]], original_only: bool = False
                       ) -> list[str]:
    """Registers one task a template, PREFIX_NAME, and their mixture PREFIX; returns the names.

    path: of a promptsource YAML file. files: {split: paths}; read: a path -> records as the
    templates name their fields. The mixture samples each template alike.
    """
    names = []
    for template in read_templates(path):
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
            metric_fns=[task_metrics.exact_match, task_metrics.squad], postprocess_fn=text_to_text.answers)
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
