"""BIG-bench's JSON tasks: choices to rank where they have target_scores, else answers to write.

    bigbench_NAME           BIG-Bench Hard's NAME.json, one of HARD: answers (Suzgun et al. 2022)
    bigbench_NAME_ranked    BIG-bench's own NAME/task.json, one of RANKED: choices (Srivastava et
                            al. 2022, arXiv:2206.04615), and bigbench_NAME_ranked_choices
    register("mine", {"validation": ["mine/task.json"]})    your own; the file says which
    data.validation=mine/task.json                          … or without a name

A task.json of choices is prompted as BIG-bench's json_task.py does: task_prefix,
example_input_prefix ("\\nQ: "), the input, each choice behind choice_prefix ("\\n  choice: ")
unless append_choices_to_input is false, and example_output_prefix ("\\nA:"). Choices keep the
file's order; those of the highest score are right. Tasks of answers are prompted by task_prefix
and the input.
"""



from t5x_lite.data import choice_files, choices, records, text_to_text
from t5x_lite.data.example_files import ANSWERS, read_answers, read_choices

HARD = ("date_understanding", "boolean_expressions", "causal_judgement", "disambiguation_qa",
        "formal_fallacies", "geometric_shapes", "hyperbaton", "movie_recommendation",
        "navigate", "object_counting", "penguins_in_a_table", "ruin_names", "snarks",
        "sports_understanding", "temporal_sequences", "web_of_lies", "word_sorting")
RANKED = ("causal_judgment", "date_understanding", "disambiguation_qa",
          "formal_fallacies_syllogisms_negation", "geometric_shapes", "hyperbaton",
          "logical_deduction", "movie_recommendation", "navigate", "penguins_in_a_table",
          "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection",
          "snarks", "sports_understanding", "temporal_sequences", "tracking_shuffled_objects")
_HARD_ORIGIN = "https://github.com/suzgunmirac/BIG-Bench-Hard/tree/main/bbh"
_ORIGIN = "https://github.com/google/BIG-bench/tree/main/bigbench/benchmark_tasks"


def _register() -> None:
    for name in HARD:
        files = choice_files.Published({"validation": f"{name}.json"}, read_answers, _HARD_ORIGIN)
        text_to_text.register(
            f"bigbench_{name}", records.RecordSource(
                f"bigbench_{name}", files.files, read_answers, splits=("validation",)),
            ANSWERS.format_fn, metric_fns=ANSWERS.metric_fns,
            postprocess_fn=ANSWERS.postprocess_fn)
    for name in RANKED:
        files = choice_files.Published({"validation": f"{name}/**/task.json"}, read_choices,
                                       _ORIGIN)
        choices.register_files(f"bigbench_{name}_ranked", files.files, read_choices,
                                           files.globs)


_register()
