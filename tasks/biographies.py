"""Biographies of persons who never lived, a line each, and questions about half of them.

Made to see what goes wrong with text that nobody prepared (configs/experiments/closed_book_any_text.py):
the first sentence has the whole name, those behind it a pronoun or the surname alone; a sentence tells
several things at once, so that a birthplace can be filled in without reading whose it is. The same
seed gives the same text on every machine. Registers nothing; imports nothing but Python.

    Lena Maria Varga (born 3 May 1871 in Odense; died 12 June 1940 in Rome) was a Danish botanist. She …
    {"question": "where was Lena Maria Varga born", "answer": ["Odense"]}
"""

import json
import random
from collections.abc import Sequence

_SHE = """Ada Agnes Alma Anna Astrid Beata Berta Carla Clara Cora Dora Edith Elena Elsa Emma Erika Esther Eva
Flora Frida Greta Hanna Hedda Helena Hilda Ida Ines Irma Jana Johanna Julia Karin Klara Laura Lena Lotte Lucia
Magda Maria Marta Mina Nadia Nora Olga Paula Petra Rita Rosa Ruth Sara Sofia Stella Tessa Ursula Vera Wanda""".split()
_HE = """Adam Albert Alfred Anton August Axel Bernard Boris Bruno Carl Conrad Daniel David Edgar Emil Erik Ernst
Felix Frank Fritz Georg Gustav Hans Henrik Hugo Igor Ivan Jakob Jan Johan Josef Karl Kurt Leo Leon Louis Ludwig
Magnus Martin Max Nils Olaf Oscar Otto Paul Peter Ralf Robert Rolf Samuel Simon Stefan Theodor Tomas Viktor
Walter""".split()
_FRONT = "Al Bar Bel Bor Cor Dal Den Dor Fal Fer Gar Gol Hal Har Kal Kor Lan Lor Mal Mar Nor Ol Pal Per Ras Ros " \
    "Sal San Sel Sor Tal Tor Val Var Vel Wal Wen Zel".split()
_MIDDLE = "a e i o u an en in or el".split()
_BACK = "berg bach dahl din ga gren holm ka ke lund man nik quist ra rup sen ska son ström tti vik witz".split()
_CITIES = """Aarhus Alicante Antwerp Augsburg Basel Bergen Bilbao Bologna Bordeaux Bremen Bristol Brno Bruges
Budapest Cardiff Cologne Cork Cracow Debrecen Delft Dijon Dresden Dublin Dundee Erfurt Esbjerg Florence Freiburg
Galway Gdansk Geneva Genoa Ghent Glasgow Graz Groningen Haarlem Hamburg Hanover Helsinki Innsbruck Jena Kassel
Kaunas Kiel Kosice Lausanne Leeds Leiden Leipzig Liege Lille Limerick Linz Lisbon Ljubljana Lodz Lucerne Lund
Lyon Madrid Malaga Mainz Malmo Mannheim Maribor Marseille Milan Munich Munster Nantes Naples Nice Odense Olomouc
Oporto Orleans Oslo Ostrava Padua Palermo Parma Pecs Perth Pisa Plovdiv Poznan Prague Ravenna Reims Rennes Riga
Rostock Rotterdam Rouen Salamanca Salzburg Seville Siena Sofia Stavanger Stettin Strasbourg Stuttgart Szeged
Tallinn Tampere Tartu Toledo Toulouse Trento Trieste Trondheim Turin Turku Ulm Uppsala Utrecht Valencia Varna
Venice Verona Vienna Vilnius Warsaw Weimar Wroclaw York Zagreb Zurich""".split()
_TRADES = """architect astronomer botanist chemist composer dramatist economist engineer geologist historian
journalist jurist linguist mathematician novelist painter philosopher photographer physician physicist pianist poet
sculptor surgeon translator violinist zoologist""".split()
_NATIONS = "Austrian Belgian Czech Danish Dutch Finnish French German Hungarian Irish Italian Norwegian Polish " \
    "Portuguese Scottish Spanish Swedish Swiss".split()
_THINGS = "Academy Society Prize Museum Institute Review Library Theatre Observatory Hospital".split()
_MONTHS = "January February March April May June July August September October November December".split()

Facts = dict[str, str]

# Where the birthplace is told: with the whole name, or behind a pronoun; always beside other facts, which
# tell whose it is as well as the name does.
_OPENINGS = (
    ("{name} (born {birth} in {place}; died {death} in {grave}) was a {nation} {trade}.", ""),
    ("{name} ({birth} – {death}) was a {nation} {trade} born in {place}.", ""),
    ("{name}, born in {place} on {birth}, was a {nation} {trade} and a member of the {thing}.", ""),
    ("{name} ({birth} – {death}) was a {nation} {trade}.",
     "Born in {place} to {father} and {mother}, {he} grew up in {town}."),
    ("{name} was a {nation} {trade} and a member of the {thing}.",
     "{surname} was born in {place} on {birth}, the child of {father}."),
)
_REST = (
    ("{He} studied at {university} until {year}.", "{surname} went to {university} in {year}.",
     "From {year} on {he} attended {university}, as {his} uncle had."),
    ("In {later} {he} married {spouse}, and they moved to {town}.",
     "{surname} met {spouse} in {town} and married in {later}."),
    ("{surname} worked in {work} for most of {his} life.", "{He} settled in {work} after a journey to {town}.",
     "{His} workshop in {work} was well known."),
    ("{He} is buried in {grave}.", "{surname} was buried in {grave} on {burial}."),
)
_ASKED: dict[str, Sequence[str]] = {
    "place": ("where was {name} born",),
    "university": ("where did {name} study",),
    "work": ("in which city did {name} work",),
}


def _date(rng: random.Random, year: int) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {year}"


def _surname(rng: random.Random) -> str:
    return rng.choice(_FRONT) + rng.choice(_MIDDLE) + rng.choice(_BACK)


def _person(rng: random.Random, taken: set[str]) -> Facts:
    """The facts of one person, whose name nobody else has."""
    she = rng.random() < 0.5
    given = _SHE if she else _HE
    name = ""
    while not name or name in taken:
        surname = _surname(rng)
        name = " ".join([*rng.sample(given, rng.choice((1, 1, 2))), surname])
    taken.add(name)
    born = rng.randint(1780, 1920)
    town, place, work, grave, seat = (rng.choice(_CITIES) for _ in range(5))
    return {
        "name": name, "surname": surname, "he": "she" if she else "he", "his": "her" if she else "his",
        "He": "She" if she else "He", "His": "Her" if she else "His",
        "birth": _date(rng, born), "death": _date(rng, born + rng.randint(40, 90)), "year": str(born + 20),
        "later": str(born + 30), "burial": _date(rng, born + 91), "nation": rng.choice(_NATIONS),
        "trade": rng.choice(_TRADES), "thing": f"{rng.choice(_CITIES)} {rng.choice(_THINGS)}",
        "place": place, "town": town, "work": work, "grave": grave, "university": f"the University of {seat}",
        "father": f"{rng.choice(_HE)} {surname}", "mother": f"{rng.choice(_SHE)} {_surname(rng)}",
        "spouse": f"{rng.choice(_HE if she else _SHE)} {_surname(rng)}"}


def _text(rng: random.Random, facts: Facts) -> str:
    rest = [rng.choice(wordings).format(**facts) for wordings in _REST]
    told = [text.format(**facts) for text in rng.choice(_OPENINGS) if text]
    return " ".join([*told, *rng.sample(rest, len(rest))])


def make(persons: int = 300, asked: int = 300, seed: int = 0, relations: Sequence[str] = ("place",)
         ) -> tuple[list[str], list[tuple[str, str]]]:
    """(texts, a person each; (question, answer), a person and relation each).

    Args:
        asked: how many of the persons are asked about, drawn at random.
        relations: what is asked of each: place (of birth), university, work.
    """
    rng = random.Random(f"biographies {seed}")
    taken: set[str] = set()
    known = [_person(rng, taken) for _ in range(persons)]
    texts = [_text(rng, facts) for facts in known]
    questions = [(rng.choice(_ASKED[relation]).format(**facts), _plain(facts[relation]))
                 for facts in rng.sample(known, asked) for relation in relations]
    return texts, questions


def _plain(answer: str) -> str:
    return answer.removeprefix("the ")


def files(**sizes) -> list[tuple[str, str]]:
    """(name, content) of persons.txt and questions.jsonl; sizes: arguments of `make`."""
    texts, questions = make(**sizes)
    lines = [json.dumps({"question": question, "answer": [answer]}) for question, answer in questions]
    return [("persons.txt", "\n".join([*texts, ""])), ("questions.jsonl", "\n".join([*lines, ""]))]
