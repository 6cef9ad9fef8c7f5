"""The name t5x_lite for lm-evaluation-harness's own program, `lm_eval --model t5x_lite`.

setup.py declares it in the entry point group lm_eval.models, which the harness reads from the release
after 0.4.13 on (its pull request 4013). Up to that one its program knows its own models alone; but it
imports torch, and torch runs what is declared in its group torch.backends, the hook for what extends it
from elsewhere. `register` answers that: in a process of the harness it adds the name, in any other it
returns at once. TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns torch's hook off; `python -m
t5x_lite.evaluation.harness run …` needs neither.
"""

import sys

NAME = "t5x_lite"
TARGET = "t5x_lite.evaluation.harness:HarnessModel"   # imported when the harness asks for the name


def register() -> None:
    """Adds the name to the models that lm-evaluation-harness knows, if this process is importing it."""
    if "lm_eval" not in sys.modules:
        return
    import lm_eval.models  # noqa: F401   its own models, which a registry that is not empty does without
    from lm_eval.api.registry import model_registry
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
