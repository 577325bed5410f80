"""Every answer is what the model says in process: OpenAI's own client, llama.cpp's fields, streams, and scores."""

import itertools
import json

import pytest
import torch

from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_prompt

openai = pytest.importorskip("openai")
CONTENT = {"strategy": "speculative", "verify": "content", "draft": "ngram"}
LOTS = "The dog ran home. Tom was happy"


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def continued(live, prompt: str | list[int], count: int, **settings) -> list[str]:
    """The texts that the model writes in process, as the plain LLaMA if no settings say another way."""
    ids = encode_prompt(live.tokenizer, prompt) if isinstance(prompt, str) else prompt
    order = {} if {"strategy", "group_size", "order"} & set(settings) else CONTENT
    output = live.model.generate_any_order(
        torch.tensor([ids]), max_new_tokens=count, eos_token_id=[2], pad_token_id=2, **order, **settings
    )
    return [decode_after(live.tokenizer, ids, row[len(ids) :].tolist()) for row in output.sequences]


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == 128


def test_a_greedy_completion_is_generates(live, client):
    answer = client.completions.create(model="tiny", prompt=LOTS, max_tokens=12, temperature=0)
    ids = torch.tensor([encode_prompt(live.tokenizer, LOTS)])
    expected = live.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2)
    assert answer.choices[0].text == decode_after(live.tokenizer, ids[0].tolist(), expected[0, ids.shape[1] :].tolist())
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("seed", [0, 7, -3])
def test_sampled_completions_by_seed(live, client, seed):
    settings = {"temperature": 0.7, "top_p": 0.9}
    answer = client.completions.create(model="tiny", prompt=LOTS, max_tokens=9, n=3, seed=seed, **settings)
    expected = continued(live, LOTS, 9, do_sample=True, num_return_sequences=3, seed=seed, **settings)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = client.completions.create(model="tiny", prompt=LOTS, max_tokens=9, n=3, seed=seed, **settings)
    assert [choice.text for choice in again.choices] == expected


def test_greedy_choices_are_all_the_same(client):
    answer = client.completions.create(model="tiny", prompt=LOTS, max_tokens=5, n=2, temperature=0)
    assert answer.choices[0].text == answer.choices[1].text


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"strategy": "groupwise", "group_size": 3},
        {"order": "random"},
        {"strategy": "groupwise", "order": "spans", "span_length": 2},
        {"strategy": "dynamic", "tokens_per_step": 2, "criterion": "margin"},
        {"strategy": "dynamic", "threshold": 0.4},
        {"strategy": "speculative", "draft_tokens": 2},
        {"strategy": "refine", "refine_rounds": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_suffix_is_infilled(live, client, order, temperature):
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    answer = client.completions.create(
        model="tiny",
        prompt="The dog ",
        suffix=" home.",
        max_tokens=7,
        temperature=temperature,
        seed=5,
        extra_body=order,
    )
    output = live.model.infill(
        live.tokenizer, ["The dog <blank:7> home."], seed=5, return_outputs=True, **sampling, **order
    )
    assert answer.choices[0].text == output.written[0][0]
    assert answer.usage.completion_tokens == 7


def test_several_choices_of_a_blank(live, client):
    answer = client.completions.create(
        model="tiny", prompt="The dog ", suffix=" home.", max_tokens=4, temperature=0.9, n=2, seed=1
    )
    settings = {"do_sample": True, "temperature": 0.9, "num_return_sequences": 2, "seed": 1}
    output = live.model.infill(live.tokenizer, ["The dog <blank:4> home."], return_outputs=True, **settings)
    assert [choice.text for choice in answer.choices] == [written[0] for written in output.written]


@pytest.mark.parametrize(
    "text", ["The <blank:3> home. Tom <blank:2..4> happy.", "A<blank:auto>, and so \\<blank:3>", "<blank:2>x"]
)
def test_several_blanks_and_lengths(live, client, text):
    answer = client.completions.create(
        model="tiny", prompt=text, max_tokens=None, temperature=0.8, seed=3, extra_body={"blanks": True}
    )
    output = live.model.infill(live.tokenizer, [text], do_sample=True, temperature=0.8, seed=3, return_outputs=True)
    assert answer.choices[0].text == output.texts[0]
    assert answer.choices[0].blanks == output.written[0]


def test_the_likeliest_length(live, client):
    answer = client.completions.create(
        model="tiny", prompt="The dog", suffix=" home.", max_tokens=5, temperature=0, extra_body={"auto_length": True}
    )
    output = live.model.infill(live.tokenizer, ["The dog<blank:1..5> home."], return_outputs=True)
    assert answer.choices[0].text == output.written[0][0] and answer.usage.completion_tokens == output.lengths[0][0]


def test_a_suffix_template(live, client):
    words = "Later:{suffix}\n\n"
    answer = client.completions.create(
        model="tiny",
        prompt="The dog ",
        suffix=" home.",
        max_tokens=4,
        temperature=0,
        extra_body={"suffix_template": words},
    )
    output = live.model.infill(live.tokenizer, ["The dog <blank:4> home."], suffix_template=words, return_outputs=True)
    assert answer.choices[0].text == output.written[0][0]


def test_prompts_in_all_forms(live, client):
    ids = encode_prompt(live.tokenizer, "One day")
    texts = {}
    for name, prompt in {"text": "One day", "ids": ids, "texts": ["One day", LOTS], "lists": [ids, ids[:3]]}.items():
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        texts[name] = [choice.text for choice in answer.choices]
    assert texts["text"] == texts["ids"] == continued(live, "One day", 6)
    assert texts["texts"] == texts["text"] + continued(live, LOTS, 6)
    assert texts["lists"] == texts["text"] + continued(live, ids[:3], 6)


def test_log_probabilities(live, client):
    answer = client.completions.create(model="tiny", prompt=LOTS, max_tokens=6, temperature=0, logprobs=3)
    ids = encode_prompt(live.tokenizer, LOTS)
    output = live.model.generate_any_order(
        torch.tensor([ids]), max_new_tokens=6, eos_token_id=[2], output_logits=True, **CONTENT
    )
    found = answer.choices[0].logprobs
    written = (output.commit_step[0] >= 0).nonzero()[:, 0]
    assert found.token_logprobs == pytest.approx(output.log_probs[0, written].tolist(), abs=1e-6)
    best = output.logits[0, written].log_softmax(dim=-1).topk(3).values
    for tops, values in zip(found.top_logprobs, best.tolist(), strict=True):
        assert sorted(tops.values(), reverse=True) == pytest.approx(values[: len(tops)], abs=1e-6)
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [0, *itertools.accumulate(map(len, found.tokens))][:-1]


def test_the_prompt_is_echoed_and_scored(live, client):
    answer = client.completions.create(model="tiny", prompt=LOTS, max_tokens=0, echo=True, logprobs=2)
    ids = torch.tensor([encode_prompt(live.tokenizer, LOTS)])
    with torch.no_grad():
        log_probs = live.model(ids).logits[0, :-1].log_softmax(dim=-1)
    expected = log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert answer.choices[0].text == LOTS and answer.usage.completion_tokens == 0
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(expected, abs=1e-6)
    both = client.completions.create(model="tiny", prompt=LOTS, max_tokens=3, echo=True, temperature=0)
    assert both.choices[0].text == LOTS + continued(live, LOTS, 3)[0]


def test_the_best_of_several(live, client):
    settings = {"temperature": 1.2, "seed": 4}
    answer = client.completions.create(model="tiny", prompt=LOTS, max_tokens=6, best_of=4, n=2, **settings)
    ids = encode_prompt(live.tokenizer, LOTS)
    output = live.model.generate_any_order(
        torch.tensor([ids]),
        max_new_tokens=6,
        eos_token_id=[2],
        do_sample=True,
        num_return_sequences=4,
        **CONTENT,
        **settings,
    )
    means = output.log_probs.sum(dim=1) / (output.commit_step >= 0).sum(dim=1)
    best = means.argsort(descending=True)[:2].tolist()
    texts = continued(live, LOTS, 6, do_sample=True, num_return_sequences=4, **settings)
    assert [choice.text for choice in answer.choices] == [texts[one] for one in best]


def first_repeated(text: str) -> str:
    """A part of a text that begins inside a word."""
    return text[len(text) // 2 : len(text) // 2 + 2]


def test_stop_sequences(live, client):
    whole = continued(live, LOTS, 20)[0]
    stop = first_repeated(whole)
    answer = client.completions.create(model="tiny", prompt=LOTS, max_tokens=20, temperature=0, stop=["@@", stop])
    assert answer.choices[0].text == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 20
    filled = live.model.infill(live.tokenizer, ["The dog <blank:12> home."], return_outputs=True).written[0][0]
    for order in ("left_to_right", "right_to_left"):
        settings = {"model": "tiny", "prompt": "The dog ", "suffix": " home.", "max_tokens": 12, "temperature": 0}
        filled = client.completions.create(**settings, extra_body={"order": order}).choices[0].text
        stop = first_repeated(filled)
        answer = client.completions.create(**settings, stop=stop, extra_body={"order": order})
        assert answer.choices[0].text == filled[: filled.index(stop)] and answer.choices[0].finish_reason == "stop"


def test_chat(live, client):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    text = "<s>system: Be kind.\n<s>user: Hi\n<s>assistant: "
    ids = live.tokenizer.encode(text, add_special_tokens=False)
    assert answer.choices[0].message.content == continued(live, ids, 8)[0]
    assert answer.choices[0].message.role == "assistant" and answer.usage.prompt_tokens == len(ids)
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens and all(len(one.top_logprobs) == 2 for one in content)
    assert bytes(content[0].bytes).decode() == content[0].token
    longest = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
    assert longest.usage.total_tokens <= 128


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": LOTS, "max_tokens": 14, "temperature": 0.9, "n": 2},
        {"prompt": LOTS, "max_tokens": 14, "temperature": 0, "stop": ["e", "zz"]},
        {"prompt": LOTS, "max_tokens": 9, "temperature": 0.8, "extra_body": {"strategy": "groupwise", "group_size": 2}},
        {"prompt": LOTS, "max_tokens": 9, "temperature": 0.8, "extra_body": {"order": "right_to_left"}},
        {"prompt": "The dog ", "suffix": " home.", "max_tokens": 9, "temperature": 0.8},
        {"prompt": "The dog ", "suffix": " home.", "max_tokens": 9, "extra_body": {"order": "random"}, "n": 3},
        {"prompt": "The dog ", "suffix": " home.", "max_tokens": 9, "extra_body": {"strategy": "refine"}, "stop": "e"},
        {"prompt": "中文 😀 ", "suffix": " 😀", "max_tokens": 9, "extra_body": {"strategy": "dynamic"}},
        {
            "prompt": "<blank:3> a<blank:3><blank:4> b",
            "max_tokens": None,
            "extra_body": {"blanks": True, "order": "random"},
        },
        {"prompt": "x", "echo": True, "max_tokens": 3},
    ],
    ids=str,
)
def test_a_stream_joined_is_the_whole_answer(client, settings):
    whole = client.completions.create(model="tiny", seed=11, **settings)
    texts, reasons = [""] * len(whole.choices), [None] * len(whole.choices)
    stream = client.completions.create(
        model="tiny", seed=11, stream=True, stream_options={"include_usage": True}, **settings
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunk.usage == whole.usage


def test_a_chat_stream(client):
    settings = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**settings, logprobs=True).choices[0]
    text, names = "", []
    for number, chunk in enumerate(client.chat.completions.create(**settings, stream=True, logprobs=True)):
        (choice,) = chunk.choices
        assert (choice.delta.role == "assistant") == (number == 0)
        text += choice.delta.content or ""
        names += [] if choice.logprobs is None else [one.token for one in choice.logprobs.content]
    assert (text, choice.finish_reason) == (whole.message.content, whole.finish_reason)
    assert names == [one.token for one in whole.logprobs.content]


def events(response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_commits_of_any_order(live):
    body = {
        "prompt": "The <blank:4> home. Tom <blank:3>.",
        "blanks": True,
        "order": "random",
        "seed": 2,
        "temperature": 0,
    }
    chunks = events(live.post("/v1/completions", **body, stream=True, commits=True, logprobs=2))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["blank_lengths"] == [4, 3]
    commits = [commit for choice in choices for commit in choice.get("commits", [])]
    text = body["prompt"]
    output = live.model.infill(live.tokenizer, [text], order="random", seed=2, return_outputs=True)
    steps = output.generation.commit_step[0]
    columns = (steps >= 0).nonzero()[:, 0].tolist()
    expected = {(n // 4, n % 4): int(steps[column]) for n, column in enumerate(columns)}
    assert {(one["blank"], one["position"]): one["step"] for one in commits} == expected
    assert [one["step"] for one in commits] == list(range(7))
    log_probs = output.generation.log_probs[0]
    for one in commits:
        column = columns[4 * one["blank"] + one["position"]]
        assert one["token_id"] == int(output.generation.sequences[0, column])
        assert one["logprob"] == pytest.approx(float(log_probs[column]), abs=1e-6)
        assert len(one["top_logprobs"]) == 2
    assert ["".join(pieces) for pieces in choices[-1]["pieces"]] == choices[-1]["blanks"] == output.written[0]
    whole = live.post("/v1/completions", **body, commits=True, logprobs=2).json()["choices"][0]
    assert whole["commits"] == commits


def test_llama_cpps_infill(live):
    # the fields that llama.vscode sends
    body = {
        "input_prefix": "The dog ran\n", "input_suffix": "\nTom was happy",
        "input_extra": [{"text": "One day", "filename": "a.txt"}],
        "prompt": "Tom", "n_predict": 6, "top_k": 40, "top_p": 0.99, "stream": False, "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "n_indent": 2, "temperature": 0.0,
    }  # fmt: skip
    answer = live.post("/infill", **body).json()
    text = "One day\nThe dog ran\nTom<blank:1..6>\nTom was happy"
    output = live.model.infill(live.tokenizer, [text], return_outputs=True)
    assert answer["content"] == output.written[0][0] and answer["stop"] and answer["model"] == "tiny"
    assert answer["tokens_predicted"] == output.lengths[0][0] == answer["timings"]["predicted_n"]
    assert answer["tokens_evaluated"] == answer["timings"]["prompt_n"] > 10
    assert answer["stop_type"] == "limit" and answer["truncated"] is False
    assert {"predicted_ms", "predicted_per_second", "prompt_ms"} <= set(answer["timings"])
    some = live.post("/infill", **body, response_fields=["content", "timings/prompt_n", "nothing/at_all"]).json()
    assert some == {"content": answer["content"], "timings/prompt_n": answer["tokens_evaluated"]}
    warm = live.post("/infill", **{**body, "n_predict": 0}).json()
    assert warm["content"] == "" and warm["tokens_predicted"] == 0 and warm["stop_type"] == "none"
    end = live.post("/infill", **{**body, "input_suffix": ""}).json()
    assert end["content"] == continued(live, "One day\nThe dog ran\nTom", 6)[0]
    chunks = live.post("/infill", **{**body, "stream": True}).text.strip().split("\n\n")
    chunks = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert "".join(chunk["content"] for chunk in chunks) == answer["content"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert live.post("/infill", **body, model="any", n_cmpl=1).json()["content"] == answer["content"]
    sampled = [live.post("/infill", **{**body, "temperature": 0.9, "seed": 5}).json()["content"] for _ in range(2)]
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize(
    "order",
    [{}, {"order": "random", "num_orders": 3, "seed": 4}, {"order": "spans", "span_length": 2, "group_size": 2}],
)
def test_scores(live, order):
    answer = live.post("/v1/score", text=LOTS, **order).json()
    expected = live.model.score(live.tokenizer, LOTS, **order)
    assert answer["token_ids"] == expected.token_ids.tolist()
    found = torch.tensor(answer["token_logprobs"], dtype=torch.float64)
    torch.testing.assert_close(found, expected.log_probs.double(), rtol=0, atol=1e-6)
    assert answer["total"] == pytest.approx(float(expected.totals.mean()), abs=1e-6)
    assert "".join(answer["tokens"]) == LOTS
