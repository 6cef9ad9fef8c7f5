"""Programs that show runs as they train: `track.to=wandb`, `track.to=trackio`, both, none.

They receive the lines of metrics.jsonl, which stays the record. Each is an extra of its own ([wandb],
[trackio]), imported where a run names it; process 0 alone talks to it. A run that is started again goes on
under its id, which stands in WORKDIR/track.txt; steps that it repeats after a kill replace or repeat
those of before, as the tracker has it.

Offline: WANDB_MODE=offline keeps a run in WORKDIR/wandb for `wandb sync`; trackio is local unless its
TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names a place.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from t5x_lite import files, log
from t5x_lite.errors import UserError, one_of


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Who is shown the metrics besides metrics.jsonl and TensorBoard."""

    to: tuple[str, ...] = ()     # names of trackers.TRACKERS: wandb, trackio
    project: str = "t5x_lite"
    name: str = ""               # of the run; "": that of its folder

    def __post_init__(self):
        for name in self.to:
            one_of("track.to", name, TRACKERS)


@dataclasses.dataclass(frozen=True)
class About:
    """What a tracker is told of a run at its start."""

    project: str
    name: str
    id: str                      # letters and digits, the same in all lives of the run
    workdir: files.Path
    config: Mapping[str, Any]    # as JSON values


class TrackedRun(Protocol):
    """What both packages give."""

    def log(self, data: dict[str, Any], step: int) -> None:
        """Shows values at a step."""

    def finish(self) -> None:
        """Ends the run."""


def _wandb(about: About) -> TrackedRun:
    import wandb
    folder = None if files.is_url(str(about.workdir)) else str(about.workdir)
    return wandb.init(project=about.project, name=about.name, id=about.id, resume="allow",
                      dir=folder, config=dict(about.config))


def _trackio(about: About) -> TrackedRun:
    import trackio
    # A run is known by its name, which other folders may share.
    return trackio.init(project=about.project, name=f"{about.name}-{about.id}", resume="allow",
                        config=dict(about.config))


# What begins or goes on with a run. Add a row to add a tracker; its package is an extra of its name.
TRACKERS: dict[str, Callable[[About], TrackedRun]] = {"wandb": _wandb, "trackio": _trackio}


class Trackers:
    """The trackers that a run names; in processes other than 0, none.

    Raises:
        UserError: one that is not installed, or does not let the run begin.
    """

    def __init__(self, config: TrackConfig, workdir: files.Path, run: Mapping[str, Any]):
        """run: the run's config as JSON values."""
        self._runs: dict[str, TrackedRun] = {}
        if not config.to or not log.is_main():
            return
        about = About(config.project, config.name or workdir.name or "run", _id(workdir), workdir, run)
        for name in config.to:
            self._runs[name] = _begun(name, about)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows them; a tracker that fails is named once and left out from then on."""
        shown = {name: value for name, value in values.items() if name != "step"}   # each has its own
        for name in list(self._runs):
            self._guarded(name, lambda run: run.log(dict(shown), step=step))

    def close(self) -> None:
        """Ends the runs."""
        for name in list(self._runs):
            self._guarded(name, lambda run: run.finish())
        self._runs.clear()

    def _guarded(self, name: str, use: Callable[[TrackedRun], None]) -> None:
        try:
            use(self._runs[name])
        except Exception as error:   # whatever a service or its package does, training goes on
            log.say(f"warning: {name} fails ({type(error).__name__}: {error}); the run goes on without")
            del self._runs[name]


def _begun(name: str, about: About) -> TrackedRun:
    try:
        return TRACKERS[name](about)
    except ImportError as error:
        raise UserError(f"track.to={name} cannot be imported ({error}): pip install {name}.") from error
    except Exception as error:   # of whatever class: no account, no network, no such project
        raise UserError(f"track.to={name}: {type(error).__name__}: {error}. Log in, work offline "
                        "(WANDB_MODE=offline), or leave it out with track.to=.") from error


def _id(workdir: files.Path) -> str:
    path = workdir / "track.txt"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, secrets.token_hex(4) + "\n")
    return files.read_text(path).strip()
