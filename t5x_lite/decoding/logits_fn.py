"""A function of your own that changes the next token's logits: decode.logits_fn="my_module:my_function".

    def my_function(logits_RV, tokens_RT, step):
        return logits_RV.at[:, 17].set(-1e9)   # never token 17

It is traced by JAX and must be pure: float32 logits of R rows and V ids in and out; tokens_RT, int32, what
each row holds so far, prompt and emitted tokens up against each other and -1 elsewhere; step, an int32
scalar, how many were emitted. Rows do not see one another: each device has some of them. It comes before
penalties, temperature and truncations, for greedy, sampling and beams alike.
"""

from collections.abc import Callable

from t5x_lite import packages

LogitsFn = Callable   # (logits_RV, tokens_RT, step) -> logits_RV


def load(name: str) -> LogitsFn | None:
    """The function that "module:function" names, None for "". Raises UserError where there is none."""
    return packages.function("decode.logits_fn", name) if name else None
