"""Tiny random causal language models, built from configs: no download, milliseconds to make."""

import torch
import transformers

from sparsemem.layer.facts import Facts
from sparsemem.layer.scope import KNOWN_WEIGHT, centre_scope
from sparsemem.layer.space import plain_space

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gpt_neox")
# Room for the ids of conftest's byte-level tokenizer.
VOCABULARY = 260
HIDDEN = 16

# A memory for models with the byte-level tokenizer.
SMALL = {"task_type": "CAUSAL_LM", "num_keys": 6, "num_heads": 2, "top_k": 3, "key_dim": 8}

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_attention_heads": 2, **_SPECIAL}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_head": 2, "n_positions": 64, **_SPECIAL}


def tiny_config(architecture: str = "llama", num_layers: int = 4) -> transformers.PreTrainedConfig:
    common = {**_COMMON, "num_hidden_layers": num_layers, "max_position_embeddings": 64}
    match architecture:
        case "llama":
            return transformers.LlamaConfig(num_key_value_heads=1, intermediate_size=40, **common)
        case "qwen2":
            return transformers.Qwen2Config(num_key_value_heads=1, intermediate_size=40, **common)
        case "gpt_neox":
            return transformers.GPTNeoXConfig(intermediate_size=40, **common)
        case "gpt2":
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return transformers.GPT2Config(n_layer=num_layers, **_GPT2, **dropout)
        case "opt":
            return transformers.OPTConfig(ffn_dim=40, word_embed_proj_dim=HIDDEN, dropout=0.0, **common)
        case "mixtral":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            return transformers.MixtralConfig(
                num_key_value_heads=1, intermediate_size=40, **experts, **common
            )
        case "gpt_oss":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
            return transformers.GptOssConfig(num_key_value_heads=1, intermediate_size=40, **experts, **common)
    raise ValueError(architecture)


def tiny_model(
    architecture: str = "llama", num_layers: int = 4, seed: int = 0
) -> transformers.PreTrainedModel:
    """In eval mode, with weights large enough that tokens and layers differ."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, num_layers))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()


def write_tiny_gguf(path, tokenizer, *, hidden=32, num_layers=4):
    """A random Llama of two heads with a byte-level tokenizer and its chat template, as one GGUF file."""
    import gguf

    torch.manual_seed(0)
    # two merges: a GGUF file cannot hold an empty list, transformers before 5.23 cannot read a list of one
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "ab", "cd"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(num_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "c d"])
    # transformers before 5.23 reads a file with an end token only if it names a first one too
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    maps = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    blocks = [f"blk.{index}" for index in range(num_layers)]
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", torch.randn(len(tokens), hidden).mul(0.1).numpy())
    for name in (f"{block}.{one}" for block in blocks for one in maps):
        writer.add_tensor(f"{name}.weight", torch.randn(hidden, hidden).mul(0.1).numpy())
    for name in ("output_norm", *(f"{block}.{one}" for block in blocks for one in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", torch.ones(hidden).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ids(least: int, end: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """The same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    made = torch.randint(least, end, shape, generator=generator, device="cpu")
    return made.to(torch.get_default_device())


def tiny_batch(batch_size: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded: the last row is two tokens shorter."""
    ids = _ids(3, VOCABULARY, (batch_size, length), seed)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask}


def batch(seed=0, rows=6, length=12, labels=True):
    """Right-padded, the answers being each row's tokens 5 to 7."""
    ids = _ids(2, 250, (rows, length), seed)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    out = {"input_ids": ids, "attention_mask": mask}
    if labels:
        out["labels"] = torch.full_like(ids, -100)
        out["labels"][:, 5:8] = ids[:, 5:8]
    return out


def checkpoint(model, **options):
    """Switch gradient checkpointing on, by the name that this version of transformers has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(options)


def scope_of(centres, lo, hi, known=None):
    """A scope in a space that is not whitened."""
    d = centres.shape[1]
    known = torch.zeros(0, d) if known is None else known
    space = plain_space(torch.zeros(d), torch.eye(d), known, KNOWN_WEIGHT)
    return centre_scope(space, known[:0], centres, torch.as_tensor(lo), torch.as_tensor(hi))


def facts_with(answers, keys, names=(), *, states=None, least=(0.5, -2.0), openings=None, rows=None):
    """Facts with identities 1, 2, ...

    Args:
        answers: the tokens of each fact's answer.
        keys: [num_facts, key_width].
        names: (fact's place, token classes) of each name.
        rows: [num_tokens, d_out]; None: a row of ones for each token.
    """
    number = len(answers)
    length = max((len(run) for _, run in names), default=0)
    table = [[place + 1, *run, *[-1] * (length - len(run))] for place, run in names]
    tokens = torch.tensor([token for answer in answers for token in answer])
    return Facts(
        fact_ids=torch.arange(1, number + 1),
        fact_keys=torch.as_tensor(keys, dtype=torch.float32),
        fact_states=torch.eye(4)[:1].repeat(number, 1) if states is None else states,
        fact_least=torch.tensor([least] * number),
        fact_openings=torch.tensor([[-1, -1]] * number if openings is None else openings),
        fact_sizes=torch.tensor([len(answer) for answer in answers]),
        names=torch.tensor(table, dtype=torch.int64).view(-1, 1 + length),
        answers=tokens,
        rows=torch.ones(len(tokens), 3) if rows is None else rows,
    )
