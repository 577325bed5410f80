"""From finished or growing rows to the answers of OpenAI and llama.cpp, and to the events of a stream."""

import time
from collections.abc import Sequence
from typing import Any

from .plans import Plan
from .schemas import InfillRequest
from .texts import Commit, FilledRow, Row, token_names


class Answer:
    """What all parts of one answer share: its id, its model and its rows in the order of the choices.

    Args:
        shows_commits: choices have `commits`.
        shows_log_probs: choices have `logprobs`.
        echoes: the prompt stands before the text.
        is_chat: in the shapes of chat completions.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        request_id: str,
        model: str,
        tokenizer,
        shows_commits: bool = False,
        shows_log_probs: bool = False,
        echoes: bool = False,
        is_chat: bool = False,
    ):
        self.plan, self.tokenizer, self.is_chat, self.echoes = plan, tokenizer, is_chat, echoes
        self.shows_commits, self.shows_log_probs = shows_commits, shows_log_probs
        self.names = token_names(tokenizer, len(tokenizer))
        kind = "chat.completion" if is_chat else "text_completion"
        self.head = {"id": request_id, "object": kind, "created": int(time.time()), "model": model}

    def rows(self) -> list[Row | None]:
        """The row of each choice; None where nothing is written."""
        plan = self.plan
        if not plan.jobs:
            return [None] * plan.choices * len(plan.prompts)
        chosen: list[Row | None] = []
        for job in plan.jobs:
            rows = sorted(job.rows, key=_mean_log_prob, reverse=True) if len(job.rows) > plan.choices else job.rows
            chosen += rows[: plan.choices] if len(rows) > 1 else rows * plan.choices
        return chosen

    def usage(self) -> dict[str, int]:
        """The tokens given and written, those of choices that were not chosen, too."""
        written = sum(row.num_written() for job in self.plan.jobs for row in job.rows)
        given = self.plan.prompt_tokens
        return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}

    def whole(self) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        choices = [self._choice(number, row) for number, row in enumerate(self.rows())]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def _choice(self, index: int, row: Row | None) -> dict[str, Any]:
        prompt = index // self.plan.choices
        text = "" if row is None else row.text()
        if self.echoes:
            text = self.plan.prompts[prompt] + text
        choice: dict[str, Any] = {"index": index}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        scored = self.plan.scored[prompt] if self.plan.scored else []
        commits = [*scored, *sorted([] if row is None else row.commits, key=lambda one: one.column)]
        offset = self.plan.offsets[prompt] if scored else 0
        choice["logprobs"] = self.log_probs(commits, offset) if self.shows_log_probs else None
        choice["finish_reason"] = "length" if row is None else row.finish_reason
        if isinstance(row, FilledRow):
            choice["blanks"] = row.written or []
        if self.shows_commits and row is not None:
            choice["commits"] = [self.commit(row, one) for one in row.commits]
        return choice

    def log_probs(self, commits: Sequence[Commit], offset: int = 0) -> dict[str, Any]:
        """OpenAI's `logprobs` of tokens, in text order; `text_offset` counts from `offset`."""
        names = [self.name(one.token_id) for one in commits]
        if self.is_chat:
            content = [
                {
                    **_token(name, one.log_prob),
                    "top_logprobs": [_token(self.name(token), value) for token, value in one.top],
                }
                for name, one in zip(names, commits, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = [offset]
        for name in names:
            offsets.append(offsets[-1] + len(name))
        tops = [{self.name(token): value for token, value in reversed(one.top)} for one in commits]
        return {
            "tokens": names,
            "token_logprobs": [one.log_prob for one in commits],
            "top_logprobs": tops if self.plan.num_top else None,
            "text_offset": offsets[:-1],
        }

    def commit(self, row: Row, one: Commit) -> dict[str, Any]:
        """A written token, as an event of an any-order stream."""
        blank, place = row.place(one.column) if isinstance(row, FilledRow) else (0, one.column - len(row.prompt))
        # the space before a blank is given, where it is that of the blank's first token
        is_lent = isinstance(row, FilledRow) and place == 0 and row.lent[blank]

        def text(token_id: int) -> str:
            return self.name(token_id).removeprefix(" " if is_lent else "")

        return {
            "blank": blank,
            "position": place,
            "step": one.step,
            "token_id": one.token_id,
            "text": text(one.token_id),
            "logprob": one.log_prob,
            "top_logprobs": [{"text": text(token), "logprob": value} for token, value in one.top],
        }

    def name(self, token_id: int) -> str:
        """The text of a token inside a text; special tokens have none."""
        return self.names.get(token_id, "")


class Stream:
    """The chunks of a stream: joined, the texts of a choice are the text of the whole answer.

    `chunks` is called by the engine's thread after a pass; `first` and `last` once, by anybody.
    """

    def __init__(self, answer: Answer):
        self.answer = answer
        self.rows = answer.rows()
        self.sent = [0] * len(self.rows)
        self.told = [0] * len(self.rows)
        self.names_sent = [0] * len(self.rows)

    def first(self) -> list[dict[str, Any]]:
        """A chunk for each choice: the role of a message, the lengths of blanks, the prompt that is echoed."""
        answer, chunks = self.answer, []
        for index, row in enumerate(self.rows):
            prompt = index // answer.plan.choices
            text = answer.plan.prompts[prompt] if answer.echoes else ""
            choice = self._choice(index, text, [], role="assistant" if answer.is_chat else None)
            if answer.shows_log_probs and answer.plan.scored:
                scored, offset = answer.plan.scored[prompt], answer.plan.offsets[prompt]
                choice["logprobs"] = answer.log_probs(scored, offset)
                self.names_sent[index] = offset + sum(len(answer.name(one.token_id)) for one in scored)
            if answer.shows_commits and row is not None:
                filled = isinstance(row, FilledRow)
                width = answer.plan.jobs[prompt].num_columns
                choice["blank_lengths"] = list(row.template.lengths) if filled else [width - len(row.prompt)]
            if text or answer.is_chat or "blank_lengths" in choice:
                chunks.append(self._chunk(choice))
        return chunks

    def chunks(self) -> list[dict[str, Any]]:
        """What is new since the last call, a chunk for each choice that has something."""
        chunks = []
        for index, row in enumerate(self.rows):
            if row is None:
                continue
            text, told = row.text(), len(row.commits)
            new, fresh = text[self.sent[index] :], row.commits[self.told[index] :]
            tells = fresh and (self.answer.shows_commits or self.answer.shows_log_probs)
            if not new and not tells:
                continue
            self.sent[index], self.told[index] = max(self.sent[index], len(text)), told
            chunks.append(self._chunk(self._choice(index, new, fresh, row=row)))
        return chunks

    def last(self) -> list[dict[str, Any]]:
        """The rest of each choice, and why it ended."""
        chunks = self.chunks()
        for index, row in enumerate(self.rows):
            choice = self._choice(index, "", [], finish_reason="length" if row is None else row.finish_reason)
            if isinstance(row, FilledRow):
                choice["blanks"] = row.written or []
                if self.answer.shows_commits:
                    choice["pieces"] = row.pieces()
            chunks.append(self._chunk(choice))
        return chunks

    def usage(self) -> dict[str, Any]:
        """The last chunk of a stream with `include_usage`."""
        return {**self._chunk(None), "usage": self.answer.usage()}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        head = self.answer.head
        kind = "chat.completion.chunk" if self.answer.is_chat else head["object"]
        return {**head, "object": kind, "choices": [] if choice is None else [choice]}

    def _choice(
        self,
        index: int,
        text: str,
        fresh: Sequence[Commit],
        *,
        row: Row | None = None,
        finish_reason: str | None = None,
        role: str | None = None,
    ) -> dict[str, Any]:
        answer = self.answer
        choice: dict[str, Any] = {"index": index}
        if answer.is_chat:
            choice["delta"] = {"role": role, "content": ""} if role else ({"content": text} if text else {})
        else:
            choice["text"] = text
        choice["logprobs"], choice["finish_reason"] = None, finish_reason
        if fresh and answer.shows_log_probs:
            choice["logprobs"] = answer.log_probs(fresh, self.names_sent[index])
            self.names_sent[index] += sum(len(answer.name(one.token_id)) for one in fresh)
        if fresh and answer.shows_commits:
            choice["commits"] = [answer.commit(row, one) for one in fresh]
        return choice


def infill_answer(
    request: InfillRequest, plan: Plan, *, model: str, seconds: tuple[float, float], content: str, is_last: bool = True
) -> dict[str, Any]:
    """llama.cpp's answer to `/infill`, or a chunk of its stream.

    Args:
        seconds: until the first token, and from there to the end.
    """
    row = plan.jobs[0].rows[0] if plan.jobs else None
    if not is_last:
        return {"index": 0, "content": content, "tokens": [], "stop": False, "id_slot": -1}
    written = 0 if row is None else len(row.commits)
    text = "" if row is None else row.text()
    stopped = None if row is None else row.finish_reason == "stop"
    stopping_word = getattr(row.stops, "found", None) if stopped else None
    answer = {
        "index": 0,
        "content": content,
        "tokens": [one.token_id for one in sorted(row.commits, key=lambda one: one.column)]
        if row is not None and request.return_tokens
        else [],
        "id_slot": -1,
        "stop": True,
        "model": model,
        "tokens_predicted": written,
        "tokens_evaluated": plan.prompt_tokens,
        "generation_settings": request.model_dump(
            include={"n_predict", "temperature", "top_k", "top_p", "min_p", "seed", "stop"}
        ),
        "prompt": "",
        "has_new_line": "\n" in text,
        "truncated": False,
        "stop_type": "none" if row is None else "limit" if not stopped else "word" if stopping_word else "eos",
        "stopping_word": stopping_word or "",
        "tokens_cached": 0,
        "timings": {**_timings("prompt", plan.prompt_tokens, seconds[0]), **_timings("predicted", written, seconds[1])},
    }
    if request.response_fields:
        found = {name: _nested(answer, name.split("/")) for name in request.response_fields}
        return {name: value for name, value in found.items() if value is not None}
    return answer


def score_answer(scored, *, model: str, tokenizer) -> dict[str, Any]:
    """The answer to `/v1/score`; sums and means over orders in nats."""
    names = token_names(tokenizer, len(tokenizer))
    return {
        "object": "score",
        "model": model,
        "tokens": [names.get(token, "") for token in scored.token_ids.tolist()],
        "token_ids": scored.token_ids.tolist(),
        "group_ids": scored.group_ids.tolist(),
        "token_logprobs": scored.log_probs.tolist(),
        "totals": scored.totals.tolist(),
        "total": float(scored.totals.mean()),
        "mean": scored.mean.tolist(),
        "spread": scored.spread.tolist(),
    }


def _mean_log_prob(row: Row) -> float:
    return sum(one.log_prob for one in row.commits) / max(len(row.commits), 1)


def _token(name: str, log_prob: float) -> dict[str, Any]:
    return {"token": name, "logprob": log_prob, "bytes": list(name.encode())}


def _timings(name: str, count: int, seconds: float) -> dict[str, float]:
    seconds = max(seconds, 1e-9)
    return {
        f"{name}_n": count,
        f"{name}_ms": 1000 * seconds,
        f"{name}_per_token_ms": 1000 * seconds / max(count, 1),
        f"{name}_per_second": count / seconds,
    }


def _nested(answer: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(answer, dict) or name not in answer:
            return None
        answer = answer[name]
    return answer
