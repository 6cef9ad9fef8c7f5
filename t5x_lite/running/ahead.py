"""Work that begins before its result is needed: compiling while data are read, and the reverse."""

import concurrent.futures
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import jax

_running: set["Ahead"] = set()


class Ahead:
    """Work in a thread of its own, which begins at once.

    In a job of several processes it is done on the spot instead: threads might start programs that
    the processes share in another order on each.
    """

    def __init__(self, work: Callable[[], Any], name: str):
        self._future: concurrent.futures.Future = concurrent.futures.Future()
        _running.add(self)
        if jax.process_count() > 1:
            self._run(work)
            return
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._run, work), name=name,
                         daemon=True).start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._future.set_result(work())
        except BaseException as error:
            self._future.set_exception(error)
        finally:
            _running.discard(self)

    def result(self) -> Any:
        """What the work returned, once it is done. Raises what it raised."""
        return self._future.result()


def busy() -> bool:
    """Whether such work is in progress: XLA's threads then outlive Python's, and a process that is to
    end must not wait for them or tear down what they use."""
    return bool(_running)
