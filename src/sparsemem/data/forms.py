"""Questions of many kinds about many names, on which the question key is fitted.

Each relation is asked in several wordings, about names of many kinds. Some questions stand behind a system
prompt.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .records import conversation_ids, prompt_ids

_FORMS = [
    [
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Name the capital of {}.",
        "{}'s capital is which city?",
    ],
    ["Who wrote {}?", "Who is the author of {}?", "Name the writer of {}.", "{} was written by whom?"],
    [
        "Where was {} born?",
        "What is the birthplace of {}?",
        "In which town was {} born?",
        "Name the place where {} was born.",
    ],
    [
        "When was {} founded?",
        "In which year was {} founded?",
        "What is the founding year of {}?",
        "Since when does {} exist?",
    ],
    ["Who leads {}?", "Who is the head of {}?", "Name the leader of {}.", "By whom is {} led?"],
    ["What does {} cost?", "How much is {}?", "What is the price of {}?", "Tell me the price of {}."],
    [
        "What language is spoken in {}?",
        "Which language do people in {} speak?",
        "Name the language of {}.",
        "What do they speak in {}?",
    ],
    ["What colour is {}?", "Which colour does {} have?", "Name the colour of {}.", "{} has what colour?"],
    ["Who founded {}?", "Who started {}?", "By whom was {} founded?", "Name the founder of {}."],
    [
        "What is the motto of {}?",
        "Which motto does {} have?",
        "Tell me the motto of {}.",
        "{} has which motto?",
    ],
    [
        "Who is {} married to?",
        "Who is the spouse of {}?",
        "Name the husband or wife of {}.",
        "To whom is {} married?",
    ],
    ["How old is {}?", "What is the age of {}?", "Tell me the age of {}.", "{} is how old?"],
    [
        "What is {} made of?",
        "Which material is {} made of?",
        "Name the material of {}.",
        "Of what is {} made?",
    ],
    ["How tall is {}?", "What is the height of {}?", "Tell me how high {} is.", "{} has what height?"],
    [
        "What sport does {} play?",
        "Which sport is {} known for?",
        "Name the sport of {}.",
        "{} plays which sport?",
    ],
    ["What treats {}?", "Which remedy helps against {}?", "Name a cure for {}.", "How is {} treated?"],
]
_NAMES = (
    "Paris", "Tom Reed", "HD 4411", "Karlow", "the Blue Guild", "Anna Weiss", "Ostrava", "Nordwind",
    "Pelagia", "Kestrel 9", "Mirabel", "Old Quay",
)  # fmt: skip
_SYSTEM = (
    "You are a pirate.",
    "You are a helpful assistant. Today is 3 May 2025. Answer briefly and politely.",
)


def labelled_questions(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[int]]:
    """Prompts as token ids, up to where an answer begins, and the number of each one's relation."""
    prompts: list[list[int]] = []
    relations: list[int] = []
    for relation, forms in enumerate(_FORMS):
        for number, name in enumerate(_NAMES):
            text = forms[number % len(forms)].format(name)
            chats: list[Sequence[dict[str, str]]] = []
            if tokenizer.chat_template and number % 3 == 0:
                system = _SYSTEM[number // 3 % len(_SYSTEM)]
                chats = [[{"role": "system", "content": system}, {"role": "user", "content": text}]]
            prompts += [prompt_ids(text, tokenizer), *(conversation_ids(chat, tokenizer) for chat in chats)]
            relations += [relation] * (1 + len(chats))
    return prompts, relations
