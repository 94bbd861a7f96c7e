"""The OpenAI project's own Python client against a server: what it sends is understood, what comes back it reads."""

import pytest

pytest.importorskip("openai")

import openai

from tests.orchestrator.serving.test_server import served
from tests.processes import end

HELLO = [{"role": "user", "content": "the cat sees a dog"}]
KEY = "a-key"


@pytest.fixture(scope="module")
def client(adapters, tmp_path_factory):
    server = served(tmp_path_factory.mktemp("client"), adapters["plain"], key=KEY)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found
    end(server.process)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["base", "plain"]
    assert client.models.retrieve("plain").owned_by == "orchestrator"


def test_a_chat_answers_whole_and_in_parts(client):
    options = {"model": "plain", "messages": HELLO, "max_tokens": 12, "temperature": 0}

    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))

    text = whole.choices[0].message.content
    assert text == "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert whole.usage == parts[-1].usage and whole.usage.completion_tokens <= 12
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_a_completion_ends_at_its_stop(client):
    options = {"model": "base", "prompt": "the cat", "max_tokens": 20}
    text = client.completions.create(**options).choices[0].text

    stopped = client.completions.create(**options, stop=[text[3:6]])

    assert stopped.choices[0].text == text[: text.index(text[3:6])]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_text_again(client):
    options = {"model": "base", "messages": HELLO, "max_tokens": 12, "temperature": 1.5, "seed": 4}

    texts = {client.chat.completions.create(**options).choices[0].message.content for _ in range(3)}

    assert len(texts) == 1


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="plain", messages=HELLO, n=2)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()

    assert missing.value.code == "model_not_found" and wrong.value.param == "n"
