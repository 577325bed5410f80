"""`infill` for vLLM's `LLM`, without a server."""

import math
import time
from collections.abc import Sequence
from typing import Any

from a3_hf.serving.engine import Ticket
from a3_hf.serving.plans import Plan
from a3_hf.serving.schemas import CompletionRequest
from a3_hf.serving.texts import Row

from .adapters import adapter_settings
from .engine_jobs import EngineJob
from .plans import EnginePlanner


def infill(llm, texts: str | Sequence[str], *, lora_request=None, **fields: Any) -> list[Row]:
    """Fills the blanks of texts, which are decoded together.

    Args:
        llm: vLLM's `LLM`.
        texts: with markers `<blank:N>`, `<blank:MIN..MAX>` or `<blank:auto>`.
        lora_request: vLLM's, of an adapter that `a3 export` wrote.
        **fields: those of `/v1/completions` that choose tokens: `temperature`, `top_p`, `seed`, `group_size`, `strategy`, …

    Returns:
        A row for each text and each of its `n` choices: `row.text()` is the filled text, `row.written` the text of each blank,
        `row.commits` its tokens.

    Raises:
        ValueError: as `/v1/completions` answers with 400.
    """
    planner = _planner(llm, lora_request)
    plan = Plan(Ticket(math.inf))
    for text in [texts] if isinstance(texts, str) else texts:
        request = CompletionRequest(prompt=text, blanks=True, **fields)
        plan.choices = request.n or 1
        plan.jobs += planner.completion(request, plan.ticket).jobs
    planner.engine.submit(*plan.jobs)
    return [row for job in plan.jobs for row in job.rows]


class _OfflineJobs:
    """Stands where `EngineJobs` does: jobs run at once, in the order in which they come."""

    def __init__(self, llm):
        self.llm = llm

    def submit(self, *jobs: EngineJob) -> None:
        rows = [(job, row, asked) for job in jobs for row, asked in zip(job.rows, job.asked, strict=True)]
        outputs = self._generate([(asked.prompt, asked.params, job.adapter) for job, _, asked in rows])
        for (job, row, asked), output in zip(rows, outputs, strict=True):
            commits = asked.commits(output.outputs[0])
            job.ticket.first_token = job.ticket.first_token or time.monotonic()
            row.take(commits)
            if not row.is_done:
                asked.check_end(len(output.outputs[0].token_ids))
            tokens = asked.given | {one.column: one.token_id for one in commits}
            row.close([tokens.get(column, 0) for column in range(job.num_columns)])
        for job in jobs:
            job.done.set_result(None)

    def ask(self, asked, ticket: Ticket, adapter=None) -> list[Any]:
        return self._generate([(prompt, params, adapter) for prompt, params in asked])

    def _generate(self, asked: Sequence[tuple]) -> list[Any]:
        if not asked:
            return []
        prompts, params, adapters = zip(*asked, strict=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(prompts, list(params), use_tqdm=False, lora_request=list(adapters))


def _planner(llm, lora_request) -> EnginePlanner:
    model_config, tokenizer = llm.llm_engine.model_config, llm.get_tokenizer()
    config = model_config.hf_config
    settings = {} if lora_request is None else adapter_settings(lora_request.lora_path)
    return EnginePlanner(
        tokenizer,
        config=config,
        context=model_config.max_model_len,
        ends=[],
        canvas_length=getattr(config, "canvas_length", None),
        engine=_OfflineJobs(llm),
        adapter_of=lambda name: (lora_request, settings),
    )
