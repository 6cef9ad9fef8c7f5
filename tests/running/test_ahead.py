"""Work in a thread: its result, its error, and that the process knows of it."""

import contextvars
import threading

import jax
import pytest

from t5x_lite.running import ahead


def test_the_result_and_the_error_wait():
    gate = threading.Event()
    work = ahead.Ahead(lambda: gate.wait(10) and 3, "three")
    assert ahead.busy()
    gate.set()
    assert work.result() == 3 == work.result()
    with pytest.raises(ZeroDivisionError):
        ahead.Ahead(lambda: 1 / 0, "error").result()


def test_it_sees_the_callers_context():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    assert ahead.Ahead(variable.get, "context").result() == 5


def test_among_several_processes_it_is_done_at_once(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    here = threading.get_ident()
    assert ahead.Ahead(threading.get_ident, "here").result() == here
