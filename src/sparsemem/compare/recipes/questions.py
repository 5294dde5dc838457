"""The demo's questions: training data, evaluation questions and background.

Training: `handbook.jsonl`, 40 invented facts, each with three training wordings and one held-out wording.
Evaluation: the handbook in both kinds of wording, and general questions of the same forms (`general.jsonl`
and the capitals of every second real country). Settings were chosen on other questions
(`benchmarks/choosing`).
Background: questions of the same forms that are not used for evaluation. Many of them are known to a small
model, because the thresholds of the relevance gate come from the background. It may name a country whose
capital is asked for ("Which language is spoken in France?"), but never the capital.

The same arguments give the same records in the same order on every machine with the same versions of the data
packages.
"""

import importlib
import json
import random
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).parent

_MIN_POPULATION = 3_000_000
# Duplicate, outdated or disputed entries of countryinfo.
_LEFT_OUT = {"Burma", "Palestine", "Scotland", "Serbia and Montenegro"}
# Countries whose capital is disputed, shared or moved, and one that has the name of a US state.
_UNSETTLED = {"Bolivia", "Burundi", "Georgia", "Israel", "Kazakhstan", "South Africa", "Sri Lanka"}
_OTHER_SPELLINGS = {"Kyiv": "Kiev"}
# The questions in benchmarks/choosing ask for these, so the background does not.
_PROBED = {"language": {"Brazil", "Egypt"}, "currency": {"Japan", "India", "Russia"}}

# fmt: off
_LANGUAGES = {
    "am": "Amharic", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "da": "Danish",
    "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "fa": "Persian", "fr": "French",
    "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "km": "Khmer", "ko": "Korean", "lo": "Lao", "mn": "Mongolian", "my": "Burmese",
    "ne": "Nepali", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sk": "Slovak", "sq": "Albanian", "sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "vi": "Vietnamese", "zh": "Chinese",
}
_CURRENCIES = {
    "AUD": "Australian dollar", "BDT": "taka", "BRL": "real", "CAD": "Canadian dollar", "CNY": "yuan",
    "COP": "Colombian peso", "CZK": "koruna", "DKK": "krone", "DZD": "Algerian dinar",
    "EGP": "Egyptian pound", "ETB": "birr", "EUR": "euro", "GBP": "pound sterling", "GHS": "cedi",
    "HUF": "forint", "IDR": "rupiah", "IQD": "Iraqi dinar", "IRR": "rial", "KES": "shilling",
    "KRW": "won", "MAD": "dirham", "MXN": "peso", "MYR": "ringgit", "NGN": "naira", "NOK": "krone",
    "NPR": "Nepalese rupee", "NZD": "New Zealand dollar", "PEN": "sol", "PHP": "Philippine peso",
    "PKR": "Pakistani rupee", "PLN": "zloty", "RON": "leu", "SAR": "riyal", "SEK": "krona",
    "SGD": "Singapore dollar", "THB": "baht", "TRY": "lira", "UAH": "hryvnia", "USD": "US dollar",
    "VND": "dong", "XAF": "CFA franc", "XOF": "CFA franc", "ZAR": "rand",
}
# fmt: on
_FORMS = {
    "language": (
        "What language is spoken in {}?",
        "Which language is spoken in {}?",
        "Which language do the people of {} speak?",
        "Name the language spoken in {}.",
    ),
    "currency": (
        "What is the currency of {}?",
        "Which currency is used in {}?",
        "What money do people use in {}?",
        "Name the currency of {}.",
    ),
    "nationality": (
        "What is the nationality of a person from {}?",
        "Which nationality do the people of {} have?",
        "Name the nationality of someone born in {}.",
    ),
    "continent": (
        "On which continent is {}?",
        "Which continent is {} part of?",
        "What continent does one visit when going to {}?",
    ),
    "neighbour": ("Which country borders {}?", "Name a country that borders {}."),
    "domain": ("What is the internet domain of {}?", "Which top-level domain belongs to {}?"),
    "calling code": ("What is the calling code of {}?", "Which number do you dial first to call {}?"),
}
# More facts that a small model knows than facts that it does not know.
_NUM_FACTS = {
    "language": 44,
    "currency": 36,
    "nationality": 24,
    "continent": 32,
    "neighbour": 20,
    "domain": 10,
    "calling code": 10,
}
_NUM_CODES = 30


def handbook() -> list[dict[str, Any]]:
    """The 40 invented facts: `id`, `kind`, `subject`, `answer`, `train` (3 wordings), `heldout` (one)."""
    return _read("handbook.jsonl")


def training_records() -> list[dict[str, Any]]:
    """The handbook as 120 chats with one question and its answer, three chats for each fact."""
    return [_chat(item["question"], item["answer"]) for item in recall_items("train")]


def recall_items(split: str) -> list[dict[str, Any]]:
    """The handbook as `question` and `answer`: 120 items for `"train"`, 40 items for `"heldout"`.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is unknown; the handbook has the splits 'train' and 'heldout'")
    return [
        {"question": question, "answer": fact["answer"]}
        for fact in handbook()
        for question in (fact["train"] if split == "train" else [fact["heldout"]])
    ]


def general_items() -> list[dict[str, Any]]:
    """General questions in the handbook's forms: `question` and `answer` (one text or a list of texts).

    Raises:
        ValueError: countryinfo is not installed.
    """
    return [*_read("general.jsonl"), *capital_items()[1::2]]


def capital_items() -> list[dict[str, Any]]:
    """Questions about the capitals of real countries, sorted by country; the demo asks every second one.

    Raises:
        ValueError: countryinfo is not installed.
    """
    items = []
    for country in _countries():
        name, capital = country["name"], country["capital"]
        if name in _UNSETTLED or not re.fullmatch("[A-Za-z]+", capital) or capital in name:
            continue
        accepted = [capital, _OTHER_SPELLINGS[capital]] if capital in _OTHER_SPELLINGS else capital
        items.append({"question": f"What is the capital of {_with_article(name)}?", "answer": accepted})
    return items


def background_records(seed: int) -> list[dict[str, Any]]:
    """A few hundred chats with one question and its answer, not used for evaluation, shuffled by `seed`.

    They are facts about countries (not capitals), titles of ICD-10 codes, capitals of US states and general
    questions. The seed also chooses the countries, the codes and the wording.

    Raises:
        ValueError: countryinfo or simple_icd_10_cm is not installed.
    """
    rng = random.Random(seed)
    pairs = [(item["question"], item["answer"]) for item in _read("background.jsonl")]
    for field, facts in _country_facts().items():
        for name, answer in rng.sample(facts, _NUM_FACTS[field]):
            pairs.append((rng.choice(_FORMS[field]).format(_with_article(name)), answer))
    for code, title in rng.sample(_code_titles(), _NUM_CODES):
        by_code = (f"What is the diagnosis with ICD-10 code {code}?", title)
        by_title = (f'Which ICD-10 code stands for "{title}"?', code)
        pairs.append(rng.choice((by_code, by_title)))
    # A country's language may also be in background.jsonl.
    records = [_chat(question, answer) for question, answer in dict(pairs).items()]
    rng.shuffle(records)
    return records


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_HERE / name).read_text(encoding="utf-8").splitlines()]


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def require(module: str) -> ModuleType:
    """Import a package that the recipes' data needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # simple_icd_10_cm reads its tables with a function that is deprecated in Python 3.11 and 3.12
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f'the demo needs the package {module}, which is not installed: run pip install "sparsemem[demo]"'
        ) from error


def _countries() -> list[dict[str, Any]]:
    countries = require("countryinfo").CountryInfo.all().values()
    kept = [
        country
        for country in countries
        if (country.get("population") or 0) >= _MIN_POPULATION and country["name"] not in _LEFT_OUT
    ]
    return sorted(kept, key=lambda country: country["name"])


def _with_article(name: str) -> str:
    takes_article = ("Congo", "Emirates", "Kingdom", "Netherlands", "Philippines", "Republic", "States")
    return f"the {name}" if name.endswith(takes_article) else name


def _country_facts() -> dict[str, list[tuple[str, str]]]:
    """For each field of `_FORMS`: pairs of country and answer, for countries with one clear answer."""
    countries = _countries()
    name_of = {country["ISO"]["alpha3"]: country["name"] for country in countries}
    facts: dict[str, list[tuple[str, str]]] = {field: [] for field in _FORMS}
    for country in countries:
        answers = {
            "language": _only(country["languages"], _LANGUAGES),
            "currency": _only(country["currencies"], _CURRENCIES),
            "nationality": country["demonym"] if "," not in country["demonym"] else None,
            "continent": country["region"] if country["region"] in ("Africa", "Asia", "Europe") else None,
            "neighbour": next((name_of[code] for code in country["borders"] if code in name_of), None),
            "domain": next(iter(country["tld"]), None),
            "calling code": next(iter(country["callingCodes"]), None),
        }
        for field, answer in answers.items():
            if answer and country["name"] not in _PROBED.get(field, ()):
                facts[field].append((country["name"], answer))
    return facts


def _only(codes: list[str], names: dict[str, str]) -> str | None:
    return names.get(codes[0]) if len(codes) == 1 else None


def _code_titles() -> list[tuple[str, str]]:
    """Three-character ICD-10 codes with short titles."""
    icd = require("simple_icd_10_cm")
    codes = [code for code in icd.get_all_codes(True) if re.fullmatch("[A-Z][0-9][0-9A-Z]", code)]
    titles = ((code, icd.get_description(code)) for code in sorted(set(codes)))
    return [(code, title) for code, title in titles if len(title) <= 40]
