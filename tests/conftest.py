"""A small byte-level tokenizer with a chat template, and tiny random models that go with it."""

import gc
import os
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sparsemem
from sparsemem import SparseMemoryConfig, calibrate
from tiny import SMALL, batch

# One thread, so that sums have one order on every machine. Set here, before any fixture runs: two test
# workers of two threads each mostly wait for each other. Child processes read the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A background job of a shell ignores interrupts, and so would each process that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _one_thread():
    """A forked child may wait for ever for a lock that another thread held; tests/killing.py has none."""
    assert psutil.Process().num_threads() == 1, "a test must not fork a process that has threads"


os.register_at_fork(before=_one_thread)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_finish():
    """Leave what the imports made out of garbage collection: each training run collects (.3 s)."""
    gc.collect()
    gc.freeze()


_CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *_CUDA])
def device(request):
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def on_device(device):
    """All that a test makes lies there."""
    with device:
        yield device


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes and two special tokens; chat template as SmolLM2's, without a system message."""
    return make_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def plain_tokenizer():
    """The same without a chat template."""
    return make_tokenizer(None)


@pytest.fixture(scope="session")
def bos_tokenizer():
    """BOS before text by the post-processor, before chats by the template: as Llama 3's or Gemma's."""
    return make_tokenizer("{{ bos_token }}" + CHAT_TEMPLATE, bos="<s>")


@pytest.fixture(scope="session")
def plain_bos_tokenizer():
    """The same without a chat template."""
    return make_tokenizer(None, bos="<s>")


@pytest.fixture(scope="session")
def tiny_llama(tokenizer):
    """A factory of Llama models of four layers, random by seed."""
    return partial(make_llama, tokenizer)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer, tiny_llama):
    """Folder of a random Llama of four layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_words(tmp_path_factory):
    """As `tiny`, with tokens of several bytes: real texts have a third of the tokens."""
    folder = tmp_path_factory.mktemp("models") / "words"
    text = (Path(sparsemem.__file__).parent / "data" / "general.jsonl").read_text(encoding="utf-8")
    trained = make_tokenizer(CHAT_TEMPLATE).train_new_from_iterator([text], 1000, show_progress=False)
    make_llama(trained, max_position_embeddings=2048).save_pretrained(folder)
    trained.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_llama):
    """A tiny Llama with an empty memory."""
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))


@pytest.fixture
def background(model):
    """What the memory of `model` was calibrated on."""
    return calibrate(model, [batch(seed) for seed in range(8)])


@pytest.fixture
def shared_data():
    """Folder of real data that is not part of the project."""
    beside = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SPARSEMEM_SHARED_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set SPARSEMEM_SHARED_DATA to its folder")
    return folder


def make_llama(tokenizer, seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings = sizes | {"num_key_value_heads": 2, "max_position_embeddings": 256} | config
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **settings, **ids)).eval()


def make_tokenizer(chat_template, bos=None):
    specials = ["<|im_end|>", "<|im_start|>"]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *([bos] if bos else [])]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, pieces.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=specials[0],
        pad_token=specials[0],
        bos_token=bos,
        additional_special_tokens=specials[1:],
        chat_template=chat_template,
    )
