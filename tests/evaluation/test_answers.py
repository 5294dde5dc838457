"""Which texts hold which answers, in many scripts."""

import unicodedata

import pytest

from sparsemem.evaluation.probes import contains, is_right

RIGHT = [
    ("The capital is Ostrinth.", "ostrinth"),
    ("It's the  Old-Town, of course", "Old Town"),
    ("It was 1984.", ["1983", "1984"]),
    ("Zoë’s", "ZOË"),
    ("Zoe\u0308", "Zoë"),
    ("the Tin Clock", "Tin Clock"),
    ("STRASSE", "Straße"),
    ("O'Brien said so", "O’Brien"),
    ("AT&T built it", "AT & T"),
    ("Windows™ and more", "Windows"),
    ("It is **Paris**.", "Paris"),
    ("It is — I think — Paris", "It is I think Paris"),
    # numbers and signs
    ("The answer is -5.", "-5"),
    ("The answer is −5.", "-5"),
    ("About –5 °C", "-5 °C"),
    ("1,300,000 people", "1300000"),
    ("1300000 people", "1,300,000"),
    ("1'300 francs", "1300"),
    ("It is 3.14.", "3.14"),
    ("Es ist 3,14.", "3.14"),
    (".5", "0.5"),
    ("It was on 12.05.2020.", "2020"),
    ("from 1914–1918", "1914-1918"),
    ("from 1914-1918", "1914"),
    ("at 10:30", "10:30"),
    ("half, 1/2, of it", "½"),
    ("1½ cups", "1 1/2"),
    ("10⁻³", "10^-3"),
    ("H₂O", "H2O"),
    ("It costs $5.", "$5"),
    ("It costs $5.", "5"),
    ("50% of them", "50 %"),
    ("50% of them", "50"),
    ("It is C++.", "C++"),
    ("type AB-, it says", "AB-"),
    ("The sign is -.", "-"),
    ("3 + 4", "+"),
    ("Is it ?", "?"),
    ("x=5", "x = 5"),
    ("+49", "49"),
    # emoji
    ("Well done 🎉!", "🎉"),
    ("I ❤ it", "❤️"),
    ("the 🇯🇵 flag", "🇯🇵"),
    ("a family👨‍👩‍👧", "👨‍👩‍👧"),
    # scripts without spaces
    ("東京です", "東京"),
    ("首都は東京です。", "東京"),
    ("答案是北京。", "北京"),
    ("ﾄｳｷｮｳです", "トウキョウ"),
    ("1984年です", "1984"),
    ("私のiPhoneです", "iphone"),
    ("กรุงเทพเป็นเมืองหลวง", "กรุงเทพ"),
    ("ນະຄອນຫຼວງວຽງຈັນ", "ວຽງຈັນ"),
    ("រាជធានីភ្នំពេញ", "ភ្នំពេញ"),
    ("ရန်ကုန်မြို့", "ရန်ကုန်"),
    ("서울입니다", "서울"),
    ("수도는 서울", "서울"),
    # scripts with spaces
    ("यह हिन्दी है", "हिन्दी"),
    ("Столица — МОСКВА", "Москва"),
    ("Ο ΟΔΥΣΣΕΥΣ", "Οδυσσεύς".replace("ύ", "υ")),
    ("العاصمة هي القاهرة.", "القاهرة"),
    ("עיר הבירה ירושלים", "ירושלים"),
    ("İzmir", "izmir"),
    ("izmir'de", "İzmir"),
    ("پایتخت تهران است", "تهران"),
    ("٣ كتب", "3"),
    ("ｔｏｋｙｏ", "Tokyo"),
]
WRONG = [
    ("Ostrinthia", "Ostrinth"),
    ("type AB", "A"),
    ("A", "the a"),
    ("", "x"),
    ("x", ""),
    ("x", " "),
    ("5", "-5"),
    ("-5", "5"),
    ("C", "C++"),
    ("C++", "C"),
    ("C#", "C++"),
    ("C#", "C"),
    ("3 14", "3.14"),
    ("314", "3.14"),
    ("3.14", "3"),
    ("3.14", "14"),
    ("1.3", "1,300"),
    ("10²", "102"),
    ("11/2", "1½"),
    ("-", "+"),
    ("+", "-"),
    ("C++", "+"),
    ("old-town", "-"),
    ("!!!", "?"),
    ("€5", "$5"),
    ("AB+", "AB-"),
    ("5", "5%"),
    ("1 2", "1/2"),
    ("🎊", "🎉"),
    ("Well done!", "🎉"),
    ("👩", "👨‍👩‍👧"),
    ("京都です", "東京"),
    ("カー", "カ"),
    ("กำ", "ก"),
    ("हिन्दु", "हिन्दी"),
    ("हिन्दी", "हिन्दु"),
    ("हिन्दीभाषा", "हिन्दी"),
    ("Москвариум", "Москва"),
    ("Zoe", "Zoë"),
    ("동서울", "서울"),
    ("sınır", "sinir"),
]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [*((*pair, True) for pair in RIGHT), *((*pair, False) for pair in WRONG)],
)
def test_what_counts_as_right(text, answer, right, form):
    assert is_right(unicodedata.normalize(form, text), answer) == right


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("It was MARK_TWAIN, of course!", ["Samuel Clemens", "mark twain"], True),
        ("the Beatles' songs", ["Beatle"], True),
        ("location", ["A cat"], True),
        ("It was the  old-town", ["Old, the Town"], True),
        ("Paris", ["Lyon", "!!!"], False),
        ("", ["the"], False),
    ],
)
def test_what_contains_an_answer(text, answers, right):
    assert contains(text, answers) == right
