"""Chat templates of the form that real models have, shortened; each with its special tokens."""

from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% endfor %}"
)
_NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOOL_LINES = "{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}"
_QWEN_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}"
)


class Shape(NamedTuple):
    """A template and what it makes of "Hi" and "Ho".

    Attributes:
        specials: the end of text first.
        prompt: up to where the answer to "Hi" begins.
        answer: what is learnt.
        examples: of a conversation of two answers.
        system: "read" or "refused".
        tools: "read" or "refused".
    """

    template: str
    specials: tuple[str, ...]
    prompt: str
    answer: str
    examples: int = 1
    system: str = "read"
    tools: str = "refused"


SHAPES = {
    "chatml": Shape(
        _CHATML,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Ho<|im_end|>",
    ),
    "smollm2": Shape(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a "
        "helpful AI assistant<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>", "<|im_start|>"),
        "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Ho<|im_end|>",
    ),
    "smollm3": Shape(
        "{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}"
        "<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}\nReasoning Mode: {{ mode }}\n\n"
        "{{ messages[0].content if messages[0].role == 'system' }}<|im_end|>\n"
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
        "{{ '<think>\n\n</think>\n' if mode == '/no_think' }}{{ m.content.lstrip('\n') }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{{ '<think>\n\n</think>\n' if mode == '/no_think' }}{% endif %}",
        ("<|im_end|>", "<|im_start|>"),
        "<|im_start|>system\nToday Date: DATE\nReasoning Mode: /no_think\n\n<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
        "Ho<|im_end|>",
    ),
    "llama2": Shape(
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + "
        "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{{ (system if loop.first else '') + m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        ("</s>", "<s>"),
        "<s>[INST] Hi [/INST]",
        " Ho </s>",
    ),
    "llama3": Shape(
        "{{ bos_token }}{% if tools is defined and tools %}<|start_header_id|>system<|end_header_id|>\n\n"
        "Environment: ipython" + _TOOL_LINES + "<|eot_id|>{% endif %}"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
        "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Ho<|eot_id|>",
        tools="read",
    ),
    "mistral": Shape(
        "{{ bos_token }}"
        + _NO_SYSTEM
        + _ALTERNATE
        + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("</s>", "<s>"),
        "<s>[INST] Hi [/INST]",
        "Ho</s>",
        system="refused",
    ),
    # tools stand before the last user's turn alone
    "mistral-v3": Shape(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools is defined and tools and "
        "m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}[AVAILABLE_TOOLS]"
        + _TOOL_LINES
        + "[/AVAILABLE_TOOLS]{% endif %}[INST] {{ system + '\n\n' if loop.last and system is defined }}"
        "{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
        "{{ c.function | tojson }}{% endfor %}]{{ eos_token }}{% elif m.role == 'tool' %}[TOOL_RESULTS] "
        "{{ m.content }}[/TOOL_RESULTS]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        ("</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        "<s>[INST] Hi[/INST]",
        " Ho</s>",
        tools="read",
    ),
    "qwen2.5": Shape(
        "{% if tools %}<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' }}\n# Tools"
        + _TOOL_LINES
        + "<|im_end|>\n{% elif messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n"
        "{% endif %}{% for m in messages %}{% if not (tools and loop.first and m.role == 'system') %}"
        "<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}"
        + _QWEN_CALLS
        + "<|im_end|>\n{% endif %}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_call>", "</tool_call>"),
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "Ho<|im_end|>",
        tools="read",
    ),
    # the last answer alone has a block of thoughts
    "qwen3": Shape(
        "{% if tools %}<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' }}\n# Tools"
        + _TOOL_LINES
        + "<|im_end|>\n{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
        "{% set thought = '' %}{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
        "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n"
        "{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
        + _QWEN_CALLS
        + "<|im_end|>\n{% else %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<think>", "</think>"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Ho<|im_end|>",
        examples=2,
        tools="read",
    ),
    "gemma": Shape(
        "{{ bos_token }}"
        + _NO_SYSTEM
        + _ALTERNATE
        + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "Ho<end_of_turn>",
        system="refused",
    ),
    "gemma3": Shape(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ first if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "Ho<end_of_turn>",
    ),
    # the end of text after the last answer alone
    "phi3": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "Ho<|end|>",
    ),
    "phi4": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|im_sep|>", "<|endoftext|>"),
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
        "Ho<|im_end|>",
    ),
    "deepseek": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
        "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
        "<｜begin▁of▁sentence｜>User: Hi\n\nAssistant:",
        " Ho<｜end▁of▁sentence｜>",
    ),
    # opens a block of thoughts for generation, and takes thoughts out of every answer
    "r1": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
        "{% endfor %}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>"),
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n\n</think>\n\n",
        "Ho<｜end▁of▁sentence｜>",
        examples=2,
    ),
    # no token after an answer: the next turn's role ends it
    "glm4": Shape(
        "[gMASK]<sop>{% if tools %}<|system|>\n# Tools" + _TOOL_LINES + "{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' %}<think></think>\n{{ m.content.strip() }}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
        "{% else %}{{ m.content + ('/nothink' if m.role == 'user' and enable_thinking is false else '') }}"
        "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{{ '\n<think></think>' if enable_thinking is false }}{% endif %}",
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<think>"),
        "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>",
        "\nHo<|endoftext|>",
        examples=2,
        tools="read",
    ),
    "zephyr": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("</s>", "<s>"),
        "<|user|>\nHi</s>\n<|assistant|>\n",
        "Ho</s>",
    ),
    "vicuna": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} "
        "{% elif m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ("</s>", "<s>"),
        "<s>USER: Hi ASSISTANT:",
        " Ho</s>",
    ),
    # no end of an answer at all
    "alpaca": Shape(
        "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n{% else %}{{ m.content }}\n\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
        ("</s>", "<s>"),
        "### Instruction:\nHi\n\n### Response:\n",
        "Ho</s>",
        examples=2,
    ),
    "command-r": Shape(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
        "{% if m.role == 'user' %}<|USER_TOKEN|>{% elif m.role == 'assistant' %}<|CHATBOT_TOKEN|>"
        "{% else %}<|SYSTEM_TOKEN|>{% endif %}{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        (
            "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
        ),
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "Ho<|END_OF_TURN_TOKEN|>",
    ),
    "granite": Shape(
        "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>You are Granite."
        "{{ ' Think.' if thinking }}<|end_of_text|>\n{% endif %}"
        "{% if tools %}<|start_of_role|>tools<|end_of_role|>" + _TOOL_LINES + "<|end_of_text|>\n{% endif %}"
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
        "{{ '<|tool_call|>' + m.tool_calls | tojson if m.tool_calls }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        "<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "Ho<|end_of_text|>",
        tools="read",
    ),
    # the last answer alone ends without a line break
    "olmo": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}"
        "{{ eos_token if loop.last else eos_token + '\n' }}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|endoftext|>", "<|padding|>"),
        "<|padding|><|user|>\nHi\n<|assistant|>\n",
        "Ho<|endoftext|>",
    ),
    "falcon": Shape(
        "{% for m in messages %}{{ '\n' if not loop.first }}"
        "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}User: {{ m.content }}"
        "{% else %}Falcon: {{ m.content }}{% endif %}{% endfor %}"
        "{{ '\nFalcon:' if add_generation_prompt }}",
        ("<|endoftext|>",),
        "User: Hi\nFalcon:",
        " Ho<|endoftext|>",
        examples=2,
    ),
}  # fmt: skip


def tokenizer_for(shape: Shape) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the shape's special tokens and template."""
    pieces = [*shape.specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    bos = shape.specials[1] if "{{ bos_token }}" in shape.template else None
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=shape.specials[0],
        pad_token=shape.specials[0],
        bos_token=bos,
        additional_special_tokens=list(shape.specials[1:]),
        chat_template=shape.template,
    )
