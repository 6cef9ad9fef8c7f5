"""What a text holds that a reader should know of: personal data, listed words, groups of people.

Patterns are told apart from look-alikes by their check digits where they have them: a card number
by Luhn's, an IBAN by its remainder of 97. Names are not looked for.
"""

import functools
import ipaddress
import pathlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence

from t5x_lite.corpus import ngrams
from t5x_lite.errors import UserError

LISTS = pathlib.Path(__file__).parent / "lists"
Groups = Mapping[str, frozenset[str]]   # "kind: group" -> its words and phrases


def _luhn(text: str) -> bool:
    digits = [int(c) for c in text if c.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = (sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address that names a host; None for other numbers between points or colons."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    named = sum(1 for group in re.split("[:.]", text) if group)
    return address if named > 2 else None   # "::" and "1::" stand in code and tables


def _public_address(text: str) -> bool:
    address = _address(text)
    return address is not None and address.is_global


def _private_address(text: str) -> bool:
    address = _address(text)
    return address is not None and not address.is_global


def _phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15


_ADDRESS = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)"
                      r"|(?:[0-9A-Fa-f]{1,4}:|:){2,7}(?:[0-9A-Fa-f]{1,4}|:)?(?![\w:]))")

# kind -> (pattern, what a match must be besides)
PERSONAL: Mapping[str, tuple[re.Pattern, Callable[[str], bool]]] = {
    "e-mail address": (re.compile(
        r"\b[\w.+-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}\b"), lambda text: True),
    "telephone number": (re.compile(
        r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,14}(?:[ .-]\d{2,8}){0,4}"   # +49 (0)30 123456
        r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"                                # 1-800-555-1234
        r"|(?<!\d )0\d{2,4}[ /-](?:\d{3,4}[ -]\d{3,4}|\d{5,8})(?! \d))(?![\w-])"), _phone),      # 020 7946 0958
    "IP address": (_ADDRESS, _public_address),
    "IP address of a private or reserved net": (_ADDRESS, _private_address),
    "card number": (re.compile(r"(?<![\w.-])\d(?:[ .-]?\d){12,18}(?![\w-])"), _luhn),
    "IBAN": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    "US social security number": (re.compile(
        r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
        lambda text: True),
}


def personal_data(text: str) -> dict[str, int]:
    """{kind: how many} of the kinds in PERSONAL that the text holds."""
    counts = {}
    for kind, (pattern, check) in PERSONAL.items():
        number = sum(check(match[0]) for match in pattern.finditer(text))
        if number:
            counts[kind] = number
    return counts


def mentions(words: Sequence[str], listed: frozenset[str]) -> bool:
    """Whether a text holds one of the listed words or phrases, whole.

    words: of the text, as ngrams.words_of gives them.
    """
    singles, phrases = _by_length(listed)
    if not singles.isdisjoint(words):
        return True
    if not phrases:
        return False
    text = f" {' '.join(words)} "
    return any(phrase in text for phrase in phrases)


@functools.lru_cache(maxsize=256)
def _by_length(listed: frozenset[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """(single words, phrases between spaces), each as the words that a text is taken apart into."""
    parts = [ngrams.words_of(entry) for entry in listed]
    return (frozenset(part[0] for part in parts if len(part) == 1),
            tuple(f" {' '.join(part)} " for part in parts if len(part) > 1))


def block_list(path: str | None) -> frozenset[str]:
    """The words and phrases of a file, one a line, # for comments; without a path the shipped ones.

    Raises:
        UserError: the file cannot be read or holds none.
    """
    file = pathlib.Path(path) if path else LISTS / "block.txt"
    words = frozenset(_lines(file, "--block_list"))
    if not words:
        raise UserError(f"--block_list={path}: the file holds no word.")
    return words


def _lines(file: pathlib.Path, flag: str) -> Iterable[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}={file}: cannot be read as UTF-8 text ({error}).") from error
    for line in text.splitlines():
        word = line.partition("#")[0].strip().lower()
        if word:
            yield word


def groups(path: str | None) -> Groups:
    """Groups of people and the words that name them, from a TOML file of [kind] group = [word, …].

    Raises:
        UserError: the file cannot be read or has another form.
    """
    file = pathlib.Path(path) if path else LISTS / "groups.toml"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        return {f"{kind}: {group}": frozenset(word.lower() for word in words)
                for kind, entries in content.items() for group, words in entries.items()}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, AttributeError,
            TypeError) as error:
        raise UserError(f"--groups={file}: must be TOML of the form [kind], group = [\"word\", …] "
                        f"({error}).") from error
