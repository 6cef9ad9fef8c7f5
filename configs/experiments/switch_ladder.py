"""Switch over compute: the arm that stands against muon_vs_adamw.py's dense AdamW by `compare`.

Paper: Fedus et al. 2021 (arXiv:2101.03961), section 3.1. The models, budgets, rates and seeds of
muon_vs_adamw.py, AdamW, with 8 experts in the second of the two layers: equal FLOPs a token but for the
router and spare capacity. What switch_vs_dense.py could not tell at one size.
Expected: not run yet.
Command: python -m t5x_lite.experiment --config=configs/experiments/switch_ladder.py \\
    --workdir=runs/switch_ladder
and then: python -m t5x_lite.scaling compare --arms=runs/muon_vs_adamw/adamw,runs/switch_ladder/switch
"""

import dataclasses

from configs import switch
from configs.experiments import muon_vs_adamw
from t5x_lite import config as configs
from t5x_lite.config import RunConfig
from t5x_lite.experiment import Run
from t5x_lite.layers.config import MoEConfig

EXPERTS = 8


def get_runs() -> tuple[Run, ...]:
    """The dense arm's runs, sparse."""
    return tuple(dataclasses.replace(run, arm="switch", config=_sparse(run.config))
                 for run in muon_vs_adamw.get_runs() if run.arm == "adamw")


def _sparse(config: RunConfig) -> RunConfig:
    stack = switch.sparsify(config.model.decoder, MoEConfig(
        num_experts=EXPERTS, router="switch", jitter=0.01), 2)
    return dataclasses.replace(configs.replace(config, "model.decoder", stack),
                               name=config.name.replace("adamw", "switch"))
