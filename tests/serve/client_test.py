"""OpenAI's own Python client against `recoup serve`."""

import json
import math
import typing
from concurrent.futures import ThreadPoolExecutor

import openai
import pydantic
import pytest

from conftest import NAME

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "time", "parameters": {
        "type": "object", "properties": {"zone": {"enum": ["CET", "UTC"]}}, "required": ["zone"], "additionalProperties": False}}},
]
ASK = [{"role": "user", "content": "Tell me of the sea."}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)


def complete(client, prompt="It was a dark night", **more):
    return client.completions.create(**{"model": NAME, "prompt": prompt, "max_tokens": 12, "temperature": 0, **more})


def chat(client, messages=ASK, **more):
    return client.chat.completions.create(**{"model": NAME, "messages": messages, "max_completion_tokens": 24, "temperature": 0, **more})


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_chat(client):
    answer = chat(client)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.object == "chat.completion" and answer.model == NAME


def test_streams_say_what_the_whole_answer_says(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [whole.choices[0].finish_reason]
    used = lambda usage: (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.completion_tokens_details)
    assert chunks[-1].choices == [] and used(chunks[-1].usage) == used(whole.usage)
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1
    assert len(chunks) > 5, "it came in few pieces"
    without = list(chat(client, stream=True))
    assert all(c.usage is None and c.choices for c in without)
    text = complete(client).choices[0].text
    assert "".join(c.choices[0].text for c in complete(client, stream=True)) == text


def checked_call(call):
    assert call.type == "function" and call.id
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert set(arguments) == {"city", "days"} and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
    else:
        assert call.function.name == "time" and set(arguments) == {"zone"} and arguments["zone"] in ("CET", "UTC")
    return call.function.name


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_tool_is_called_where_one_must_be(client, seed):
    answer = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=seed, max_completion_tokens=200)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert len([checked_call(call) for call in answer.choices[0].message.tool_calls]) == 1
    # Several, if they may be, until the tokens are used up: each that is whole is right.
    several = chat(client, tools=TOOLS, tool_choice="required", temperature=1, seed=seed, max_completion_tokens=200).choices[0]
    calls = several.message.tool_calls
    if several.finish_reason == "length":
        # The last is told as far as it came.
        assert calls.pop().function.name in ("weather", "time")
    assert [checked_call(call) for call in calls]


def test_the_named_tool_is_called(client):
    answer = chat(client, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "time"}}, temperature=1, seed=5, max_completion_tokens=200)
    assert [checked_call(call) for call in answer.choices[0].message.tool_calls] == ["time"]


def test_a_call_streams_in_pieces(client):
    chunks = list(chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=1, max_completion_tokens=200, stream=True))
    name, arguments, indices = "", "", set()
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or []:
            indices.add(part.index)
            if part.index == 0:
                name += part.function.name or ""
                arguments += part.function.arguments or ""
    whole = chat(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=1, max_completion_tokens=200)
    calls = whole.choices[0].message.tool_calls
    assert (name, json.loads(arguments)) == (calls[0].function.name, json.loads(calls[0].function.arguments))
    assert len(indices) == len(calls)


def test_a_call_that_is_cut_off_is_a_call_as_far_as_it_goes(client):
    clock = {"type": "function", "function": {"name": "time"}}
    for tokens in (2, 16):
        ask = {"tools": TOOLS, "tool_choice": clock, "temperature": 1, "seed": 5, "max_completion_tokens": tokens}
        whole = chat(client, **ask).choices[0]
        assert whole.finish_reason == "length" and not whole.message.content
        arguments = whole.message.tool_calls[0].function.arguments
        assert [call.function.name for call in whole.message.tool_calls] == ["time"] and arguments[:1] in ("", "{")
        chunks = list(chat(client, stream=True, **ask))
        parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
        assert "".join(part.function.arguments or "" for part in parts) == arguments and parts[0].function.name == "time"
        assert chunks[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(model=NAME, messages=ASK, **(ask | {"tools": [openai.pydantic_function_tool(Fact)], "tool_choice": "required"}))


def test_cached_tokens_are_told(client):
    ask = [{"role": "user", "content": "Tell me of a sea that nobody has told of before."}]
    for first in (True, False):
        details = chat(client, ask).usage.prompt_tokens_details
        assert (details.cached_tokens < 10) == first
    answer = client.responses.create(model=NAME, input=ask[0]["content"], max_output_tokens=2)
    assert answer.usage.input_tokens_details.cached_tokens == details.cached_tokens


def test_calls_are_found_in_what_the_model_writes_by_itself(client):
    """`auto`: the text is forced here, since this model would never call."""
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 3}}</tool_call>'
    answer = chat(client, tools=TOOLS, max_completion_tokens=200, extra_body={"structured_outputs": {"choice": [text]}})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [checked_call(call) for call in answer.choices[0].message.tool_calls] == ["weather"]
    none = chat(client, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.tool_calls is None and none.choices[0].message.content


def test_thinking_is_told_apart(client):
    forced = {"structured_outputs": {"choice": ["<think>It is wide.</think>The sea."]}}
    message = chat(client, extra_body=forced, max_completion_tokens=60).choices[0].message
    assert (message.content, message.reasoning_content) == ("The sea.", "It is wide.")
    off = chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert off.choices[0].message.content and not getattr(off.choices[0].message, "reasoning_content", None)
    assert off.usage.prompt_tokens > chat(client).usage.prompt_tokens


class Fact(pydantic.BaseModel):
    colour: typing.Literal["red", "green", "blue"]
    count: int = pydantic.Field(ge=0, le=99)
    known: bool


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_answer_fits_its_schema(client, seed):
    answer = client.chat.completions.parse(model=NAME, messages=ASK, response_format=Fact, max_completion_tokens=200, temperature=1, seed=seed)
    assert isinstance(answer.choices[0].message.parsed, Fact)
    words = chat(client, extra_body={"structured_outputs": {"regex": "[a-z]{3}-[0-9]{2}"}}, temperature=1, seed=seed).choices[0].message.content
    assert len(words) == 6 and words[:3].isalpha() and words[3] == "-" and words[4:].isdigit()


def test_log_probabilities(client):
    answer = chat(client, logprobs=True, top_logprobs=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for place in content:
        top = [entry.logprob for entry in place.top_logprobs]
        assert len(top) == 5 and top == sorted(top, reverse=True)
        assert sum(map(math.exp, top)) <= 1 + 1e-4
        assert place.token == place.top_logprobs[0].token and place.logprob == top[0], "greedy takes the most probable"
    said = b"".join(bytes(place.bytes) for place in content).decode(errors="replace")
    assert said.startswith(answer.choices[0].message.content) or answer.choices[0].message.content in said


def test_several_answers(client):
    choices = complete(client, n=3, temperature=1, seed=3, max_tokens=20).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.text for choice in choices}) == 3
    two = complete(client, prompt=["One", "Two"], n=2, temperature=1, seed=3).choices
    assert [choice.index for choice in two] == [0, 1, 2, 3]


def test_a_seed_repeats_an_answer(client):
    def texts(seed):
        return [complete(client, temperature=1, seed=seed, max_tokens=30).choices[0].text for _ in range(2)]
    first, second = texts(11), texts(12)
    assert first[0] == first[1] and second[0] == second[1] and first[0] != second[0]


def test_a_stop_ends_the_answer(client):
    plain = complete(client, max_tokens=40).choices[0].text
    word = plain.split()[5]
    stopped = complete(client, max_tokens=40, stop=[word])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == plain[: plain.index(word)]
    kept = complete(client, max_tokens=40, stop=[word], extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == plain[: plain.index(word) + len(word)]


def test_a_bias_decides(client):
    answer = complete(client, logit_bias={"313": 100}, extra_body={"return_token_ids": True})
    assert answer.choices[0].token_ids == [313] * 12
    never = complete(client, logit_bias={str(t): -100 for t in complete(client, extra_body={"return_token_ids": True}).choices[0].token_ids[:1]},
                     extra_body={"return_token_ids": True})
    assert never.choices[0].token_ids[0] != complete(client, extra_body={"return_token_ids": True}).choices[0].token_ids[0]


def test_echoed_log_probabilities_are_those_of_the_prompt(client):
    answer = complete(client, echo=True, logprobs=3, max_tokens=4)
    choice, found = answer.choices[0], answer.choices[0].logprobs
    assert choice.text.startswith("It was a dark night")
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == answer.usage.total_tokens
    assert found.token_logprobs[0] is None and all(p <= 0 for p in found.token_logprobs[1:])
    assert "".join(found.tokens) == choice.text
    assert [choice.text[at:].startswith(token) for at, token in zip(found.text_offset, found.tokens)].count(False) == 0
    scored = complete(client, prompt="It was a dark night", max_tokens=0, extra_body={"prompt_logprobs": 3, "return_token_ids": True})
    ids = scored.choices[0].prompt_token_ids
    given = [scored.choices[0].prompt_logprobs[i][str(token)]["logprob"] for i, token in enumerate(ids) if i]
    assert given == found.token_logprobs[1 : len(ids)]
    again = complete(client, prompt=ids, max_tokens=0, echo=True, logprobs=3)
    assert again.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(ids)]
    assert scored.choices[0].text == "" and scored.choices[0].finish_reason == "length"


def test_an_answer_does_not_depend_on_what_runs_beside_it(client):
    ask = {"temperature": 1, "seed": 7, "max_tokens": 40, "logprobs": 5}
    alone = complete(client, **ask).choices[0]
    with ThreadPoolExecutor(24) as pool:
        others = [pool.submit(complete, client, f"Number {i} of " * (1 + i % 5), temperature=1, seed=i, max_tokens=5 + 3 * i) for i in range(20)]
        beside = [pool.submit(complete, client, **ask) for _ in range(4)]
        for answer in beside:
            choice = answer.result().choices[0]
            assert choice.text == alone.text and choice.logprobs == alone.logprobs
        assert all(other.result().choices for other in others)


def test_responses(client):
    answer = client.responses.create(model=NAME, input="Tell me of the sea.", max_output_tokens=16, temperature=0)
    assert answer.output_text and answer.status in ("completed", "incomplete")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    events = list(client.responses.create(model=NAME, input="Tell me of the sea.", max_output_tokens=16, temperature=0, stream=True))
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text


def test_tokens_and_back(server):
    text = "It was a dark night — naïve, 東京, 🦀."
    found = server.http.post("/tokenize", json={"model": NAME, "prompt": text}).json()
    assert found["count"] == len(found["tokens"])
    back = server.http.post("/detokenize", json={"model": NAME, "tokens": found["tokens"]}).json()
    assert back["prompt"] == text


@pytest.mark.parametrize("more, param", [
    ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"), ({"max_tokens": -3}, "max_tokens"),
    ({"presence_penalty": 9}, "presence_penalty"), ({"logit_bias": {"x": 1}}, "logit_bias"), ({"extra_body": {"top_k": -7}}, "top_k"),
])
def test_a_wrong_parameter_is_named(client, more, param):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **more)
    assert refused.value.param == param and param in refused.value.message


def test_errors_are_those_that_the_client_knows(server, client):
    with pytest.raises(openai.NotFoundError) as refused:
        complete(client, model="no-such-model")
    assert refused.value.code == "model_not_found" and NAME in refused.value.message
    for key in ("wrong", "a-key-for-test", "a-key-for-tests2"):
        with pytest.raises(openai.AuthenticationError) as refused:
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0).models.list()
        assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, prompt="word " * 400)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="x")
