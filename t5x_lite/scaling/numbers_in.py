"""Numbers in what flags hold: NAME=VALUE pairs and lists."""

from t5x_lite.errors import UserError
from t5x_lite.scaling.tables import pairs


def numbers(text: str, flag: str) -> dict[str, float]:
    """{"a": 1.0} of "a=1,…"."""
    return {name: _number(value, f"--{flag}={name}={value}")
            for name, value in pairs(text, flag).items()}


def numbers_list(text: str, flag: str) -> tuple[float, ...]:
    """(1.0, 2.0) of "1,2"."""
    return tuple(_number(part, f"--{flag}={text}") for part in filter(None, text.split(",")))


def _number(value: str, where: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"{where}: {value!r} must be a number.") from error
