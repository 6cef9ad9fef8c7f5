"""What the mains share: flags, quiet third parties, processes, and errors on one screen."""

import errno
import gc
import logging
import os
import pathlib
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence

from t5x_lite import first  # noqa: F401

# isort: split

from t5x_lite import buckets, files, gin_spelling, manual, packages, quiet as quiet_lib

buckets.prepare()   # before etils is first asked for a path

import jax
from absl import app, flags, logging as absl_logging
from ml_collections import config_flags

from t5x_lite.checkpoints import format as checkpoint_format, manager
from t5x_lite.config import RunConfig, from_mapping, load, override, read, saved
from t5x_lite.errors import TryAgain, UserError, nearest
from t5x_lite.parallel import processes
from t5x_lite.running import ahead, compile_cache
from t5x_lite.running.clock import EXIT_STUCK

EXIT_USER_ERROR = 2
# What a system says of a path or a disk, wherever it is met: no bug of ours.
_NO_BUG = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
           errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO,
           errno.ESTALE, errno.EMFILE, errno.ENFILE)
EXIT_TRY_AGAIN = EXIT_STUCK   # a bucket is out of reach for the moment
EXIT_PEER = 76   # another process of the run has ended, or could not be reached

_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for more than one process.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the whole run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0.")
_COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache", "", "The folder of compiled programs, or none; default: programs/ in "
    "$T5X_LITE_CACHE or ~/.cache/t5x_lite.")


def define_config() -> flags.FlagHolder:
    """The --config flag: a file of configs/, its fields edited by --config.a.b=c; and what edits the
    config of a workdir as well, --override=a.b=c and T5X's spelling, --gin.NAME=c."""
    flags.DEFINE_multi_string("override", [], "field=value of the run's config.")
    flags.DEFINE_multi_string("gin", [], "NAME=value, as T5X binds it; see gin_spelling.py.")
    return config_flags.DEFINE_config_file(
        "config", None, "A config file and its argument, such as configs/t5_1_1.py:base.",
        lock_config=True)


def run_config(holder: flags.FlagHolder) -> RunConfig:
    """The edited config as dataclasses. Raises UserError naming what does not fit."""
    if holder.value is None:
        raise UserError("--config is missing; try --config=configs/quickstart.py.")
    return _edited(from_mapping(RunConfig, holder.value))


def _edited(run: RunConfig) -> RunConfig:
    """The run with what --gin and then --override say."""
    return override(gin_spelling.apply(run, flags.FLAGS["gin"].value), flags.FLAGS["override"].value)


def workdir(value: str | None) -> files.Path:
    """The --workdir flag as a path. Raises UserError where it is missing, or in a bucket that cannot
    be reached."""
    if not value:
        raise UserError("--workdir is missing: the folder of the run.")
    return files.path(value)


def saved_or_given(value: str | None, holder: flags.FlagHolder
                   ) -> tuple[RunConfig, files.Path | None]:
    """The config that --workdir holds, and the workdir; or --config, whose init_from names the
    parameters, and None. Raises UserError where neither is given, or both."""
    if holder.value is None or value:
        if holder.value is not None:
            raise UserError("--workdir holds its config: change fields of it with --override=a.b=c "
                            "instead of --config.")
        folder = workdir(value)
        return _edited(saved_config(folder)), folder
    config = run_config(holder)
    if not config.init_from:
        raise UserError("--config without --workdir takes its parameters from init_from: set "
                        "--config.init_from=hf:DIR, t5x:DIR or a workdir.")
    return config, None


def saved_config(folder: files.Path) -> RunConfig:
    """The config of a workdir: its config.json, or that of its newest checkpoint where the file
    is torn. Raises UserError as config.load does."""
    path = folder / "config.json"
    try:
        read(path)
    except ValueError as error:
        record = manager.read_record(folder)
        print(f"warning: {path} is damaged ({error}): using the config in the checkpoint of step "
              f"{record.step}", file=sys.stderr)
        return saved(record.config)
    except OSError:   # what load says of it
        pass
    return load(path)


def run(main: Callable[[], None], alone: bool | Callable[[], bool] = False) -> None:
    """Parses the flags and calls main; a UserError becomes a message and exit status 2, Ctrl-C a
    line and 130 (train saves first, see running/signals.py).

    alone: stay a process of its own on the CPU, whatever the environment says of others; or a function
        that says so once the flags are parsed.
    """
    quiet()
    checkpoint_format.quiet_orbax()
    app.run(lambda argv: _guarded(lambda: _start(main, argv, alone)), flags_parser=_parse)


def quiet() -> None:
    """Our own lines and third parties' errors; their chatter is dropped. For mains alone: it
    changes the whole process."""
    warnings.filterwarnings("ignore")
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)   # its tracebacks; what it raises is said
    show_own_lines()


def show_own_lines() -> None:
    """Prints what this package logs, and changes nothing that belongs to others."""
    ours = logging.getLogger("t5x_lite")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False


def _start(main: Callable[[], None], argv: list[str], alone: bool | Callable[[], bool]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every option starts with --.")
    compile_cache.switch_on(_COMPILE_CACHE.value)
    given = [f for f in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID) if f.value is not None]
    if alone() if callable(alone) else alone:
        if given:
            raise UserError(f"--{given[0].name}: this command is one process; leave it out.")
        if not os.environ.get("JAX_PLATFORMS"):
            jax.config.update("jax_platforms", "cpu")
        main()
        return
    if given and len(given) < 3:
        raise UserError("--coordinator_address, --num_processes and --process_id go together.")
    if given:
        among = processes.Processes("flags", *(f.value for f in given))
    else:
        among = processes.find(os.environ, processes.has_tpu(os.environ))
    if among is not None:
        _run_among(among, main)
        return
    find_devices()
    main()


def find_devices() -> None:
    """Has JAX look for its devices, without what libraries say of those that are not there."""
    noise: tuple[bytes, ...] = ()
    quiet_lib.expect_no_cuda()
    if processes.has_tpu_library() and not processes.has_tpu(os.environ):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        noise = quiet_lib.NO_TPU   # libtpu is there for `plan` alone
    with quiet_lib.stderr(*noise):   # JAX's CUDA plugin says here, too, that there is no GPU
        jax.local_devices()


def _run_among(others: processes.Processes, main: Callable[[], None]) -> None:
    """Joins the other processes of the run and calls main; the death of one of them ends in a
    line of ours and EXIT_PEER."""
    with processes.last_words():
        try:
            others.initialize()
            find_devices()
            main()
        except processes.Unreachable as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            processes.said_last_words()
            sys.exit(EXIT_PEER)
        except Exception as error:
            if isinstance(error, UserError) or not processes.is_peers_fault(error):
                raise
            print(f"{checkpoint_format.brief(error)}\nerror: {processes.PEER_GONE}",
                  file=sys.stderr, flush=True)
            processes.said_last_words()
            os._exit(EXIT_PEER)


def _guarded(fn: Callable[[], None]) -> None:
    try:
        try:
            fn()
        except BaseException:
            quiet_lib.give_back()   # what is wrong is said where it is read
            raise
        gc.freeze()   # the process ends: no search for garbage among millions of objects
    except UserError as error:
        _exit(error)
    except buckets.failures() as error:
        raised = _of_the_system(error)
        if raised is None:
            raise
        _exit(raised)
    except KeyboardInterrupt:
        print("error: stopped by SIGINT", file=sys.stderr, flush=True)
        _leave(130)


def _of_the_system(error: BaseException) -> UserError | None:
    """What a disk or a bucket says, wherever it is met, as the user's; None where it is a bug."""
    if isinstance(error, OSError) and error.errno in _NO_BUG:
        return UserError(f"{error.strerror}: {error.filename or 'a file of this run'}. Mend that and "
                         "start the same command again.")
    if buckets.are_used() and buckets.is_passing(error):
        return TryAgain(f"a bucket is out of reach: {checkpoint_format.brief(error)}")
    return None


def _exit(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    if isinstance(error, TryAgain):   # orbax's threads would wait for the bucket for minutes
        sys.stdout.flush()
        processes.said_last_words()
        os._exit(EXIT_TRY_AGAIN)
    _leave(EXIT_USER_ERROR)


def _leave(status: int) -> None:
    # A process that leaves its peers waiting in a collective must not wait for them itself, nor one
    # that compiles ahead for the compiler.
    if ahead.busy() or (jax.distributed.is_initialized() and jax.process_count() > 1):
        sys.stdout.flush()
        processes.said_last_words()
        os._exit(status)
    sys.exit(status)


def process_start() -> float:
    """When this process began, as time.monotonic counts; now, where the system does not say."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return min(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") + time.monotonic()
                   - time.clock_gettime(time.CLOCK_BOOTTIME))
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic()


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with a one-line error for what a user mistyped."""
    try:
        argv = [_edit(_find_config(gin_spelling.rewritten(a))) for a in _joined(argv)]
        sys.argv = argv   # where ml_collections looks for --config.a.b=c
        return flags.FLAGS(argv)
    except UserError as error:
        _exit(error)
    except flags.UnrecognizedFlagError as error:
        given = any(a.startswith("--config=") for a in argv) or "workdir" not in flags.FLAGS
        _exit(UserError(f"unknown flag --{error.flagname}.{meant(error.flagname, list(flags.FLAGS), given)}"))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        if (ours := _user_error(error)) is not None:
            _exit(ours)
        # ml_collections reports a wrong field or type this way. A mistake inside a config
        # file looks alike, but its traceback passes through that file: show it whole.
        frames = traceback.extract_tb(error.__traceback__)
        if any(pathlib.Path(f.filename).parent.name in ("configs", "experiments")
               for f in frames):
            raise
        _exit(UserError(_describe(argv, error)))
    return []


# What other programs call flags of ours.
_FLAGS_ELSEWHERE = dict.fromkeys(("output_dir", "model_dir", "log_dir", "logdir", "save_dir"), "workdir")


def meant(flag: str, known: Sequence[str], given: bool) -> str:
    """" did you mean …?" for a flag that is not there: another flag, or a field of the config.

    known: the door's flags. given: whether --config names the config, else a workdir holds it.
    """
    elsewhere = _FLAGS_ELSEWHERE.get(flag.replace("-", "_"))
    if elsewhere in known:
        return f" did you mean {elsewhere!r}?"
    own = nearest(flag, [name for name in known if "." not in name])
    if own or not {"config", "override"} <= set(known):
        return own
    field = manual.suggestion(flag, "--config." if given else "--override=")
    return f" {field}" if field else " --help lists the flags."


def _edit(argument: str) -> str:
    """--config.a.b=c as --override=a.b=c where ml_collections cannot say it: None, a field that may be
    None, or an item of a list."""
    name, equals, value = argument.partition("=")
    path = name.removeprefix("--config.")
    if path == name or not equals:
        return argument
    plain = re.sub(r"\[\d+\]", "", path)
    is_loose = value == "None" or any(plain == field or plain.startswith(field + ".")
                                      for field in manual.loose_fields())
    return f"--override={path}={value}" if is_loose else argument


def _user_error(error: BaseException | None) -> UserError | None:
    """The config file's own UserError, which ml_collections and absl wrap with its traceback."""
    innermost = None
    while error is not None:
        innermost = error if isinstance(error, UserError) else innermost
        error = error.__cause__ or error.__context__
    return innermost


def words(argv: Sequence[str], taking: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words of a command line that are no flag's, its flags), both in order.

    taking: names of the flags that take a value, which may stand behind a space: "--output FILE".
    """
    found: list[str] = []
    flags_: list[str] = []
    waits = False   # for the value of the last flag
    for argument in argv:
        if waits:
            flags_[-1] += f"={argument}"
            waits = False
        elif argument.startswith("-"):
            flags_.append(argument)
            waits = argument.lstrip("-") in taking
        else:
            found.append(argument)
    return found, flags_


def _joined(argv: list[str]) -> list[str]:
    """argv with "--config", "X" as "--config=X"."""
    out: list[str] = []
    for argument in argv:
        if out and out[-1] in ("--config", "-config"):
            out[-1] += f"={argument}"
        else:
            out.append(argument)
    return out


def _describe(argv: list[str], error: Exception) -> str:
    overrides = [a for a in argv if a.startswith("--config.")]
    while error.args and isinstance(error.args[0], Exception):   # a KeyError around another
        error = error.args[0]
    message = " ".join(str(a) for a in error.args) or type(error).__name__
    if isinstance(error, (AttributeError, KeyError)):
        name, _, hint = message.partition("\n")
        hint = hint or manual.suggestion(name.strip("'"))
        message = f"the config has no field {name}. {hint}".rstrip()
    where = f" (among {' '.join(overrides)})" if overrides else ""
    return f"{message}{where}"


def _find_config(argument: str) -> str:
    """Lets --config=configs/… name a shipped config from any working directory, and --config=hf:X
    the config of a model of Hugging Face (configs/hf.py).

    Raises:
        UserError: there is no such file.
    """
    folders = packages.folders("configs")
    prefix, _, rest = argument.partition("=")
    if prefix not in ("--config", "-config") or not rest:
        return argument
    if rest.startswith("hf:"):   # a model of Hugging Face is its own config
        rest = f"configs/hf.py:{rest.removeprefix('hf:')}"
    path, colon, size = rest.partition(":")
    if pathlib.Path(path).exists() and path != "configs/hf.py":
        return argument
    if path.startswith("configs/"):
        for folder in folders:
            shipped = folder.parent / path
            if shipped.exists():
                return f"{prefix}={shipped}{colon}{size}"
    names = [str(file.relative_to(folder).with_suffix("")) for folder in folders
             for file in sorted(folder.glob("**/[!_]*.py"))]
    hint = nearest(path.removeprefix("configs/").removesuffix(".py"), names)
    raise UserError(f"--config={path} does not exist.{hint} configs/NAME.py is there for the names "
                    f"{', '.join(names)}.")
