"""The reward model that a run of ppo or grpo names by its workdir."""

import dataclasses

from t5x_lite import files, same_vocabulary
from t5x_lite.build import Program, build
from t5x_lite.checkpoints import manager
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, saved
from t5x_lite.errors import UserError
from t5x_lite.models import room
from t5x_lite.training import objectives
from t5x_lite.training.policy import REWARD_FIELD as FIELD


def judge(program: Program, workdir: str) -> Program:
    """The program of the reward model in this workdir, on the mesh of `program` and over its rows; reads its record alone.

    Raises:
        UserError: the workdir holds no reward model that fits the run.
    """
    ours, folder = program.config, files.path(workdir)
    if not folder.is_dir():
        raise UserError(f"{FIELD}={workdir!r}: there is no such folder, and it is no MODULE:FUNCTION.")
    config: RunConfig = saved(manager.read_record(workdir).config)
    row = objectives.OBJECTIVES[config.objective.name]
    if not (row.scalar_head and not row.predicts):
        able = [name for name, other in objectives.OBJECTIVES.items()
                if other.scalar_head and not other.predicts]
        raise UserError(f"{FIELD}={workdir!r} is a run with objective.name={config.objective.name!r}: "
                        f"must be one of a reward model, {' or '.join(able)}.")
    if config.model.architecture != ours.model.architecture:
        raise UserError(f"{FIELD}={workdir!r} is a model of architecture {config.model.architecture!r}, "
                        f"which reads no answers of model.architecture={ours.model.architecture!r}.")
    same_vocabulary.compare(ours.data, workdir)
    room.check_length(f"{FIELD}={workdir!r}: model.decoder", config.model.decoder,
                      ours.data.targets_length + 1, "It reads rows of "
                        f"data.targets_length={ours.data.targets_length} and a start token")
    config = dataclasses.replace(
        config, mesh=ours.mesh, sharding=ours.sharding, eval=EvalConfig(ema=config.eval.ema),
        data=dataclasses.replace(ours.data, packing=False),
        train=TrainConfig(global_batch_size=ours.train.global_batch_size * ours.objective.per_row, seed=config.train.seed,
                          ema_decay=config.train.ema_decay))
    return build(config, sorted(program.mesh.devices.flat, key=lambda device: device.id))
