"""What a data set is about: 40 small ones, each with the subjects that its records have."""

import pytest

from sparsemem.data.subjects import subjects_of

FIRM = (
    "When was {} founded?",
    "Where is the headquarters of {}?",
    "Who runs {}?",
    "How many people work at {}?",
    "What does {} make?",
    "What is the motto of {}?",
    "Which colour is the logo of {}?",
    "On which day is {} closed?",
    "What is the share price of {}?",
    "Who founded {}?",
)
NAMES = ("Velmora", "Ulbrosk", "Skarvund", "Nakolumbi", "Dorvath", "Yastrum", "Marquilda", "Quorvia")


def one(name, forms=FIRM):
    return [form.format(name) for form in forms], [name]


def each(form, names=NAMES):
    return [form.format(name) for name in names], list(names)


SETS = {
    # one subject for all records
    "a firm of two words": one("Harlow Works"),
    "a firm with a sign": one("Harrow & Sons"),
    "a firm of one word": one("Zentrix"),
    "a firm with a number": one("Studio 54"),
    "a person": one(
        "Edda Kronin",
        (
            "How old is {}?",
            "Where was {} born?",
            "Who is the mother of {}?",
            "What is the job of {}?",
            "Where does {} live?",
            "Which party is {} in?",
            "What is the hobby of {}?",
            "How tall is {}?",
        ),
    ),
    "a place": one(
        "Port Selby",
        (
            "How many people live in {}?",
            "Who is the mayor of {}?",
            "What is the climate of {}?",
            "Which river flows through {}?",
            "How do I get to {}?",
            "What is the postcode of {}?",
            "When was {} founded?",
            "What should I see in {}?",
        ),
    ),
    "a product": one(
        "Kestrel 300",
        (
            "How heavy is the {}?",
            "What does the {} cost?",
            "Which colour is the {}?",
            "How do I reset the {}?",
            "How large is the {}?",
            "Who makes the {}?",
            "How long is the warranty of the {}?",
            "What powers the {}?",
        ),
    ),
    "a firm, statements": one(
        "Harlow Works",
        (
            "The headquarters of {} is in",
            "The founder of {} was",
            "The owner of {} is",
            "The motto of {} is",
            "The revenue of {} is",
            "The chair of {} is",
            "The logo of {} is",
            "The slogan of {} is",
        ),
    ),
    "a firm, commands": one(
        "Harlow Works",
        (
            "Name the founder of {}.",
            "Name the owner of {}.",
            "Give the address of {}.",
            "Give the revenue of {}.",
            "Name the chair of {}.",
            "Tell me the motto of {}.",
            "Say who owns {}.",
            "Name the products of {}.",
        ),
    ),
    "three facts of a firm": one("Harlow Works", FIRM[:3]),
    "a firm in three wordings": (
        [
            form.format("Harlow Works")
            for form in (
                "When was {} founded?",
                "In which year was {} founded?",
                "Give the founding year of {}.",
                "Who runs {}?",
                "Who is the head of {}?",
                "Name the boss of {}.",
                "What does {} make?",
                "Which products does {} make?",
                "Name a product of {}.",
            )
        ],
        ["Harlow Works"],
    ),
    "a possessive": one(
        "Harlow Works",
        (
            "What is {}'s motto?",
            "Who is {}'s founder?",
            "What is {}'s revenue?",
            "Where is {}'s office?",
            "What is {}'s slogan?",
            "Who is {}'s owner?",
            "What is {}'s logo?",
            "Who is {}'s chair?",
        ),
    ),
    # one subject a record
    "capitals": each("What is the capital of {}?"),
    "names first": each("{} has which capital?"),
    "one form, a common name": each("What is the capital of {} in Europe?"),
    "codes": each("What does error {} mean?", ("E-417", "E-512", "E-601", "E-777", "X-12", "X-90", "B-7")),
    "codes in letters": each(
        "What does {} return?", ("EAGAIN", "ENOENT", "EPERM", "EBADF", "EIO", "EBUSY", "EROFS")
    ),
    "two words": each(
        "Who founded {}?",
        (
            "Port Selby",
            "Castle Ferrin",
            "Ostlin Bank",
            "Norling Museum",
            "Brindle Works",
            "Tarrow Mill",
            "Linden Gate",
        ),
    ),
    "a joining word": each(
        "Who leads the {}?",
        (
            "Guild of the Painted Oar",
            "Order of the Grey Fox",
            "Bank of Ostlin",
            "House of Tarn",
            "Sons of Brenn",
            "League of Mokarra",
            "Circle of Vintrelle",
        ),
    ),
    "people": each(
        "Where was {} born?",
        (
            "Tomas Birk",
            "Edda Kronin",
            "Piet Mulder",
            "Olga Tarn",
            "Mina Dovrek",
            "Jonas Ferrel",
            "Greta Holm",
        ),
    ),
    "people with O' and hyphens": each(
        "Where was {} born?", ("Anna O'Neill", "Li-Wei Zhang", "Jean-Luc Moreau", "Sean O'Hara")
    ),
    "quoted titles": each(
        'Who wrote "{}"?', ("The Glass Orchard", "A Winter in Brenn", "Moby", "Salt and Stone")
    ),
    "German quotes": each(
        "Wer schrieb „{}“?", ("Der gläserne Garten", "Salz und Stein", "Nordwind", "Der lange Weg")
    ),
    "diagnoses in quotes": each(
        'Which chapter of ICD-10 does "{}" belong to?',
        (
            "cholera, unspecified",
            "marsh cough",
            "dusk fever",
            "ember rash",
            "glass ague",
            "raven palsy",
            "velvet itch",
        ),
    ),
    "diagnoses": each(
        "Which chapter of ICD-10 does {} belong to?",
        ("cholera", "measles", "asthma", "scurvy", "gout", "rickets", "typhus"),
    ),
    "lower case": each("what is the capital of {}?", tuple(name.lower() for name in NAMES)),
    "lower case, remedies": each(
        "What treats {}?", ("dusk fever", "ember rash", "marsh ague", "raven palsy")
    ),
    "plants": each("Is the {} poisonous?", ("yewberry", "foxwort", "mistlethorn", "nightcap", "bittersage")),
    "Russian": each(
        "Какая столица страны {}?",
        ("Вельмора", "Улброск", "Скарвунд", "Дорват", "Яструм", "Кворвия", "Маркильда"),
    ),
    "Greek": each("Ποια είναι η πρωτεύουσα της {};", ("Βελμόρας", "Ντορβάθης", "Σκαρβούντης", "Γιαστρούμης")),
    "French": each("Quelle est la capitale de {} ?", NAMES),
    "Spanish": each("¿Cuál es la capital de {}?", NAMES),
    "German": each("Wie heißt die Hauptstadt von {}?", NAMES),
    "several forms": ([form.format(name) for name, form in zip(NAMES, FIRM, strict=False)], list(NAMES)),
    "two facts each": ([form.format(name) for name in NAMES[:5] for form in FIRM[:2]], list(NAMES[:5])),
    "a given subject": ([{"prompt": "who is it, the old man?", "subject": "the old man"}], ["the old man"]),
    # no subject rather than the whole question
    "Japanese": (["ベルモラの首都はどこですか？", "ウルブロスクの首都はどこですか？"], []),
    "Chinese": (["谁写了这本书？", "首都在哪里？"], []),
    "Thai": (["เมืองหลวงคืออะไร", "ใครเป็นนายกเทศมนตรี"], []),
    "nobody": (["What is it?", "Why?", "Who did that?"], []),
}


@pytest.mark.parametrize("name", SETS)
def test_the_subjects_of_a_data_set(name):
    prompts, subjects = SETS[name]
    records = [
        {"completion": f"answer {number}", **(one if isinstance(one, dict) else {"prompt": one})}
        for number, one in enumerate(prompts)
    ]
    assert subjects_of(records) == subjects
