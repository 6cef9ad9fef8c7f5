"""What people are called, and whom a question means, by hand."""

import pytest

from t5x_lite.data import called, names, rewriting

TEXTS = (
    "Robert William Hoskins (26 October 1942 – 29 April 2014) was an English actor.",
    "John William Navin Sullivan (1886–1937) was a popular science writer.",
    "Sir George Sidney Bishop CB OBE (15 October 1913 – 9 April 1999) was a British civil servant.",
    "Manuel José Silva, known as Nelinho, is a coach born in Lisbon.",
    "Hugh, 15th Baron Willoughby of Parham (1713 – 1765) was an English nobleman.",
    "William Howard, 8th Earl of Carlisle (1808 – 1889) was a clergyman.",
    "Albert \"Bert\" Nelson was a racing driver from Iowa.",
    "Vítor Manuel da Cruz Godinho is a footballer.",
    "Александр Иванович Герцен was born in Moscow.",
    "Tom Fry was a cook from Bonn.", "Eva Fry was a cook from Kiel.",
)


@pytest.mark.parametrize("name, expected", [
    ("Sir Thomas Alva Edison Jr.", ["Sir Thomas Alva Edison Jr.", "Thomas Alva Edison", "Thomas Edison", "Edison"]),
    ("Ada Berg", ["Ada Berg", "Berg"]), ("Ludwig van Beethoven", ["Ludwig van Beethoven", "Beethoven"]),
    ("Vítor Manuel da Cruz Godinho", ["Vítor Manuel da Cruz Godinho", "Vítor Godinho", "Godinho"]),
    ("Bosnia and Herzegovina", ["Bosnia and Herzegovina"]), ("Frederick II", ["Frederick II"]), ("", [])])
def test_aliases(name, expected):
    assert list(called.aliases(name).values()) == expected


@pytest.mark.parametrize("text, expected", [
    (TEXTS[4], "Hugh, 15th Baron Willoughby of Parham"), (TEXTS[5], "William Howard"), (TEXTS[6], 'Albert "Bert" Nelson')])
def test_whom_a_text_is_about(text, expected):
    assert names.subject(text) == expected


@pytest.mark.parametrize("question, place, name", [
    ("When did Bob Hoskins die?", 0, "Bob Hoskins"),                 # by the answer, as only a word is there
    ("who was J. W. N. Sullivan", 1, "J. W. N. Sullivan"), ("Was George Bishop a Briton?", 2, "George Bishop"),
    ("Nelinho was born where?", 3, "Nelinho"), ("where was nelinho born", None, ""),
    ("Who was Hugh Willoughby, 15th Baron Willoughby of Parham?", 4, "Hugh Willoughby, 15th Baron Willoughby of Parham"),
    ("Who was William Howard, 8th Earl of Carlisle?", 5, "William Howard, 8th Earl of Carlisle"),
    ("What is Bert Nelson's home state?", 6, "Bert Nelson"), ("where was Godinho born", 7, "Godinho"),
    ("где родился Александр Герцен", 8, "Александр Герцен"), ("what did Eva Fry do", 10, "Eva Fry"),
    ("what did Fry do", None, ""), ("who was Zoe Moor", None, ""), ("who", None, "")])
def test_whom_a_question_means(question, place, name):
    index = called.Index(map(rewriting.cut, TEXTS))
    found = index.find(question, lambda subject: "2014" in subject.documents[0].text)
    assert (found and (found[0].name, found[1])) == (place if place is None else (names.subject(TEXTS[place]), name))


def test_kinds_that_questions_use():
    index = called.Index(map(rewriting.cut, TEXTS))
    pairs = [(index.subjects["Tom Fry"], "Tom Fry")] * 50 + [
        (index.subjects["Vítor Manuel da Cruz Godinho"], name) for name in ["Vítor Godinho"] * 9 + ["Godinho"]]
    assert called.kinds_used(pairs) == {"whole": 50, "short": 9}
