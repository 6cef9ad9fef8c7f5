"""Errors that a user can act on.

A UserError says which value is wrong, what is allowed and how to mend it; the mains print
it without a traceback and exit with status 2. Anything else that escapes is our bug and
keeps its traceback.
"""

import difflib


class UserError(ValueError):
    """Bad input: the message names the value, what is allowed and the fix."""


def nearest(name: object, names) -> str:
    """' did you mean X?' for the closest of `names`, or '' where none is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.6)
    return f" did you mean {close[0]!r}?" if close else ""
