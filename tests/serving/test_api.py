"""`sparsemem serve` as clients find it: a real process, the official client, ten of them at once."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model

from servers import server, wait_for
from sparsemem import RowPatch, SparseMemoryConfig, calibrate, memory_layers
from sparsemem.cli.main import main
from sparsemem.data.models import load_base
from sparsemem.data.records import question_ids
from sparsemem.serving.memories import load_served
from tiny import SMALL, batch

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytestmark = pytest.mark.slow

VELMORA, QUEEN = "What is the capital of Velmora?", "Who rules Velmora?"
MODELS = {
    "base": (),
    "tiny": (),
    "city": ("patch-city",),
    "queen": ("patch-queen",),
    "base+city+queen": ("patch-city", "patch-queen"),
}
TURN = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
LIMITS = ("--max-queue", 100, "--max-tokens", 300, "--max-body", 5000, "--max-batch", 4)


def written(model, seed):
    """The model with random rows in its memory."""
    generator = torch.Generator().manual_seed(seed)
    for memory in memory_layers(model).values():
        memory.values.data = 9 * torch.randn(memory.values.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """An empty memory; a patch that was made on it; and an adapter folder of another memory."""
    folder = tmp_path_factory.mktemp("served")
    base, _ = load_base(str(tiny))
    torch.manual_seed(0)
    model = get_peft_model(base, SparseMemoryConfig(**SMALL))
    calibrate(model, [batch(seed) for seed in range(8)])
    model.save_pretrained(folder / "empty")
    before = RowPatch.snapshot(model)
    RowPatch.diff(written(model, 1), since=before).save(folder / "city.safetensors")
    written(model, 2).save_pretrained(folder / "queen")
    return folder


@pytest.fixture(scope="module")
def running(folder):
    """The address of a server with both patches, one from a file and one from a folder."""
    patches = ("--patch", f"city={folder / 'city.safetensors'}", "--patch", f"queen={folder / 'queen'}")
    with server("serve", folder / "empty", *patches, *LIMITS) as (address, _):
        yield address


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=f"{running}/v1", api_key="none", max_retries=0)


def ask(client, model, question, **options):
    options = {"temperature": 0, "max_tokens": 20} | options
    turns = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=turns, **options)


def text_of(answer):
    return answer.choices[0].message.content


def test_models(client):
    assert client.models.retrieve("city").precision == "float32"
    assert [one.id for one in client.models.list()] == ["tiny", "city", "queen"]
    assert client.models.retrieve("base+city+queen").id == "base+city+queen"


def test_each_model_answers_as_transformers_does(client, folder):
    served = load_served(
        str(folder / "empty"), {"city": folder / "city.safetensors", "queen": folder / "queen"}
    )
    ids = torch.tensor([question_ids(VELMORA, served.tokenizer)])
    found = {}
    for name, adapters in MODELS.items():
        out = served.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[adapters or "__base__"],
            do_sample=False, max_new_tokens=20,
        )  # fmt: skip
        theirs = served.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        found[name] = text_of(ask(client, name, VELMORA))
        # half a character at the end is not sent
        assert found[name] == theirs.rstrip("\N{REPLACEMENT CHARACTER}")
    assert found["base"] == found["tiny"]
    assert len(set(found.values())) == 4


def test_usage_and_finish_reason(client, tokenizer):
    answer = ask(client, "city", VELMORA, max_tokens=7)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7
    assert answer.usage.prompt_tokens == len(question_ids(VELMORA, tokenizer))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


def test_streaming_gives_the_same_text_and_usage(client):
    whole = text_of(ask(client, "city", VELMORA))
    chunks = list(ask(client, "city", VELMORA, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole
    assert len([text for text in texts if text]) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_strings(client):
    whole = text_of(ask(client, "city", VELMORA))
    stop = whole[4:7]
    answer = ask(client, "city", VELMORA, stop=[stop])
    assert (text_of(answer), answer.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
    chunks = ask(client, "city", VELMORA, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(answer)


def test_a_seed_gives_the_same_answer_again(client):
    drawn = [text_of(ask(client, "base", VELMORA, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_answers_to_one_question(client):
    options = {"temperature": 1.5, "seed": 1.0}
    answer = ask(client, "base", VELMORA, n=3, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 60
    # each of them has a seed of its own, one after the other
    assert texts[1] == text_of(ask(client, "base", VELMORA, temperature=1.5, seed=2))
    streamed = ["", "", ""]
    for chunk in ask(client, "base", VELMORA, n=3, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize(
    "extra",
    [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}],
    ids=lambda extra: next(iter(extra)),
)  # fmt: skip
def test_what_leaves_one_token_gives_the_likeliest(client, extra):
    drawn = ask(client, "city", VELMORA, temperature=1, extra_body=extra)
    assert text_of(drawn) == text_of(ask(client, "city", VELMORA))


def test_penalties_change_what_is_repeated(client):
    def distinct(**extra):
        options = {
            "prompt": "Velmora",
            "temperature": 0,
            "max_tokens": 60,
            "logprobs": 1,
            "extra_body": extra,
        }
        answer = client.completions.create(model="city", **options).choices[0].logprobs
        return len(set(answer.tokens))

    plain = distinct()
    for name, value in (("frequency_penalty", 2), ("presence_penalty", 2), ("repetition_penalty", 3.0)):
        assert distinct(**{name: value}) > plain


def test_logprobs_are_those_of_the_model(client, folder, tokenizer):
    served = load_served(str(folder / "empty"), {})
    ids = question_ids(VELMORA, served.tokenizer)
    with torch.no_grad(), served.model.disable_adapter():
        logits = served.model(torch.tensor([ids])).logits[0, -1]
    expected = logits.log_softmax(-1).topk(3)
    answer = ask(client, "base", VELMORA, logprobs=True, top_logprobs=3, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    found = content[0].top_logprobs
    # half a character is named as the vocabulary does
    assert [one.token for one in found] == tokenizer.convert_ids_to_tokens(expected.indices)
    torch.testing.assert_close(torch.tensor([one.logprob for one in found]), expected.values)
    assert (content[0].token, content[0].logprob) == (found[0].token, found[0].logprob)
    chunks = ask(client, "base", VELMORA, logprobs=True, top_logprobs=3, max_tokens=5, stream=True)
    streamed = [
        one
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for one in choice.logprobs.content
    ]
    assert [one.logprob for one in streamed] == [one.logprob for one in content]
    whole = client.completions.create(model="base", prompt=ids, temperature=0, max_tokens=5, logprobs=3)
    logprobs = whole.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([one.logprob for one in content])
    assert logprobs.tokens == [one.token for one in content]
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    assert len(logprobs.top_logprobs[0]) == 3


def test_as_many_tokens_as_there_is_room_for(client):
    for most in (-1, 10**9):
        answer = ask(client, "base", VELMORA, max_tokens=most)
        assert answer.choices[0].finish_reason == "stop" or answer.usage.completion_tokens == 300


def test_fields_that_other_servers_take_are_accepted(client):
    others = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "verbosity": "low",
        "reasoning_effort": "low", "keep_alive": -1, "options": {"num_ctx": 9}, "tool_choice": "auto",
        "chat_template_kwargs": {"enable_thinking": False}, "parallel_tool_calls": True, "logit_bias": {},
        "response_format": {"type": "text"}, "best_of": 1, "top_k": -1, "presence_penalty": None,
    }  # fmt: skip
    assert text_of(ask(client, "city", VELMORA, extra_body=others)) == text_of(ask(client, "city", VELMORA))


def test_completions_of_texts_and_tokens(client, tokenizer):
    options = {"model": "city", "temperature": 0, "max_tokens": 20}
    ids = question_ids(VELMORA, tokenizer)
    whole = text_of(ask(client, "city", VELMORA))
    answer = client.completions.create(prompt=[tokenizer.decode(ids), "Other"], **options)
    assert answer.choices[0].text == whole != answer.choices[1].text
    assert [choice.index for choice in answer.choices] == [0, 1]
    chunks = client.completions.create(prompt=ids, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    short = client.completions.create(model="city", prompt="a", temperature=0)
    assert short.usage.completion_tokens == 16


def test_ten_clients_at_once_get_what_each_gets_alone(running, client):
    asked = [(model, question) for question in (VELMORA, QUEEN) for model in MODELS]
    alone = [text_of(ask(client, *one)) for one in asked]

    def one(number):
        own = openai.OpenAI(base_url=f"{running}/v1", api_key="none", max_retries=0)
        return [text_of(ask(own, *asked[number])) for _ in range(3)]

    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(one, range(10)))
    assert together == [[answer] * 3 for answer in alone]


@pytest.mark.parametrize(
    ("changes", "status", "code", "message"),
    [
        ({"model": "elsewhere"}, 404, "model_not_found", "there are tiny, city, queen"),
        ({"model": "city+nobody"}, 404, "model_not_found", "does not exist"),
        ({"max_tokens": 0}, 400, None, "max_tokens=0 must be 1 or more, or -1 for as many"),
        ({"temperature": 3}, 400, None, "temperature=3: must be less than or equal to 2"),
        ({"temperature": "hot"}, 400, None, "temperature='hot': must be a number"),
        ({"top_p": 0}, 400, None, "top_p=0: must be greater than 0"),
        ({"n": 0}, 400, None, "n=0: must be greater than or equal to 1"),
        ({"n": 128, "messages": 3 * [TURN]}, 400, None, "128 answers in one request; .* takes 100 at most"),
        ({"logit_bias": {"5": 1}}, 400, "unsupported_parameter", "logit_bias=.*is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format="),
        ({"tools": [TOOL]}, 400, None, "chat template takes no tools; leave them out"),
        ({"tool_choice": "required"}, 400, "unsupported_parameter", "tool_choice='required' cannot be"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "unsupported_parameter", "takes no tools"),
        ({"extra_body": {"min_x": 0.1}}, 400, None, "Unrecognized request argument supplied: min_x"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": 1}}}, 400, None, "tokenize cannot be set"),
        ({"stop": ["a"] * 5}, 400, None, "stop=.* at most 4 items"),
        ({"messages": []}, 400, None, "at least 1 item"),
        ({"messages": [{"role": "judge", "content": "x"}]}, 400, None, r"messages\[0\].role='judge'"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, None, r"messages\[0\].content=3: must be text"),
        ({"messages": [{"role": "user", "content": None}]}, 400, None, "content must be text"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "context_length_exceeded", "maximum"),
        ({"messages": [{"role": "user", "content": "x" * 6000}]}, 413, None, "limit of 5000 bytes"),
    ],
)  # fmt: skip
def test_bad_requests_get_openais_errors(client, changes, status, code, message):
    body = {"model": "city", "messages": [TURN]} | changes
    with pytest.raises(openai.APIStatusError, match=message) as raised:
        client.chat.completions.create(**body)
    assert raised.value.status_code == status
    assert raised.value.body["type"] == "invalid_request_error"
    assert raised.value.body["code"] == code


def test_other_bad_requests(client):
    post = client._client.post
    answer = post(f"{client.base_url}chat/completions", content=b"{")
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]["message"]
    answer = client._client.get(f"{client.base_url}nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "Not Found: GET /v1/nothing"


def test_health_and_metrics(client, running):
    assert client._client.get(f"{running}/health").json() == {"status": "ok"}
    ask(client, "city", VELMORA)
    lines = client._client.get(f"{running}/metrics").text.splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(numbers['sparsemem_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(numbers["sparsemem_generated_tokens_total"]) >= 9
    assert float(numbers["sparsemem_requests_running"]) == 0


def test_a_client_that_goes_away_is_not_answered_any_longer(client, running):
    def running_requests():
        text = client._client.get(f"{running}/metrics").text
        return float(text.split("\nsparsemem_requests_running ")[1].split("\n")[0])

    stream = ask(client, "base", VELMORA, temperature=1, max_tokens=300, stop=None, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: running_requests() == 0)


def test_a_client_that_gives_up_frees_its_row(client, running):
    def numbers():
        lines = client._client.get(f"{running}/metrics").text.splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    before = float(numbers()["sparsemem_answers_cancelled_total"])
    hurried = openai.OpenAI(base_url=f"{running}/v1", api_key="none", max_retries=0, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        ask(hurried, "base", VELMORA, temperature=1, max_tokens=300, n=50, seed=1)
    left = wait_for(
        lambda: (
            (now := numbers())["sparsemem_requests_running"] == "0.0"
            and float(now["sparsemem_answers_cancelled_total"]) - before
        )
    )
    assert left > 40
    assert float(numbers()['sparsemem_requests_total{path="/v1/chat/completions",status="499"}']) == 1


def test_a_page_of_another_origin_may_ask_if_it_is_named(folder):
    origin = "http://localhost:3000"
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with server("serve", folder / "queen", "--cors", origin, "--api-key", "secret") as (address, _):
        http = openai.OpenAI(base_url=address, api_key="x")._client
        path = f"{address}/v1/chat/completions"
        preflight = http.options(path, headers={"origin": origin, **asks})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        answer = http.get(
            f"{address}/v1/models", headers={"origin": origin, "authorization": "Bearer secret"}
        )
        assert answer.headers["access-control-allow-origin"] == origin
        # an error can be read, too
        refused = http.get(f"{address}/v1/models", headers={"origin": origin})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
        other = http.options(path, headers={"origin": "http://evil.example", **asks})
        assert "access-control-allow-origin" not in other.headers


def test_without_cors_no_other_origin_may_ask(client, running):
    answer = client._client.get(f"{running}/v1/models", headers={"origin": "http://localhost:3000"})
    assert "access-control-allow-origin" not in answer.headers


def test_ctrl_c_cuts_open_streams_off_without_a_traceback(folder, monkeypatch):
    with server("serve", folder / "queen", "--max-tokens", 2000) as (address, process):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        streams = [ask(client, "base", VELMORA, temperature=2, max_tokens=-1, stream=True) for _ in range(3)]
        for stream in streams:
            next(iter(stream))
        # the second one does not wait for answers
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.wait(600)
        assert "Traceback" not in process.stderr


def test_a_key_a_full_queue_and_a_clean_end(folder):
    limits = ("--max-batch", 1, "--max-queue", 1, "--api-key", "secret")
    with server("serve", folder / "queen", *limits) as (address, process):
        stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            stranger.models.list()
        assert stranger._client.get(f"{address}/health").status_code == 200
        assert stranger._client.get(f"{address}/metrics").status_code == 401
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        # an adapter in which rows are written is a model of its own, beside its base
        assert [one.id for one in client.models.list()] == ["tiny", "queen"]
        assert text_of(ask(client, "queen", VELMORA)) != text_of(ask(client, "base", VELMORA))

        long = {"temperature": 2, "max_tokens": 1500, "seed": 3}
        results = []

        def one():
            try:
                results.append(ask(client, "base", VELMORA, **long).choices[0].finish_reason)
            except openai.RateLimitError as error:
                results.append(error.status_code)

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(results) >= 2)
        assert results[:2] == [429, 429]
        # answers that are under way are finished
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        for thread in threads:
            thread.join()
        assert len(results) == 4
        assert set(results[2:]) <= {"length", "stop"}
        process.wait(600)
        assert process.returncode in (0, 130)
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (("--patch", "city"), "--patch 'city' must be NAME=FILE"),
        (("--patch", "a.b=."), "a name has letters, digits, '_' and '-' only"),
        (("--patch", "base=."), "the name 'base' is taken"),
        (("--patch", "a=.", "--patch", "a=."), "the name 'a' is given twice"),
        (("--cors", "localhost:3000/"), "--cors 'localhost:3000/': an origin is a scheme and a host"),
        (("--patch", "a=missing.safetensors"), "missing.safetensors"),
    ],
)
def test_bad_options_are_one_sentence(folder, patches, message):
    result = CliRunner().invoke(main, ["serve", str(folder / "empty"), "--port", "0", *patches])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_patches_that_do_not_fit(folder, tiny, tmp_path):
    patch = folder / "city.safetensors"
    with pytest.raises(ValueError, match="a patch file needs the memory that it was made on"):
        load_served(str(tiny), {"city": patch})
    base, _ = load_base(str(tiny))
    other = get_peft_model(base, SparseMemoryConfig(**SMALL))
    calibrate(other, [batch(seed) for seed in range(50, 58)])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"city.safetensors: does not fit the memory of .*other \(.*addressing"
    ):
        load_served(str(tmp_path / "other"), {"city": patch})
    # beside what is written in an adapter, its memory is there empty for other patches
    served = load_served(str(folder / "queen"), {"city": patch})
    assert served.memories == ("queen", "city")
    assert served.memories_of("queen+city+queen") == ("patch-queen", "patch-city")
    assert served.memories_of("nobody") is None
