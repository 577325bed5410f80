"""The tasks' own parts: requests with text on both sides, scores per token, and what is counted as right."""

import re
import string
from copy import deepcopy
from functools import cache
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from rouge_score.rouge_scorer import RougeScorer

from .code_execution import run_program
from .requests import Blank, LogLikelihood

ROUGE = ("rouge1", "rouge2", "rougeL")


class InfillTask(ConfigurableTask):
    """Identical to lm-eval's task except: its requests have text on both sides of what is asked. In a task's YAML,
    `class: !function a3_hf.evaluation.tasks.functions.InfillTask`, and
    beside lm-eval's own keys (a field is a column or a template):

        doc_to_suffix: field of the text behind; none by default.
        doc_to_length_of: field of a text; what is written has as many tokens.
        lengths: [least, most] tokens, from which the model chooses; `--metadata lengths=[4,48]` replaces it.
        sentences: with `lengths`: how many sentences are asked for, which tells a model that writes left to right its end.
        doc_to_max_gen_toks: field of a number of tokens, for lm-eval's plain continuation.

    `output_type: multiple_choice` takes the first of these, `generate_until` exactly one of the others too.

    Raises:
        ValueError: keys that do not go together, lengths that are no range, a chat template around a suffix.
    """

    OWN_KEYS = ("doc_to_suffix", "doc_to_length_of", "lengths", "doc_to_max_gen_toks", "sentences")

    def __init__(self, *, config: dict[str, Any]):
        self.own = {key: config[key] for key in self.OWN_KEYS if key in config}
        task, kind = config["task"], config["output_type"]
        sizes = [key for key in self.own if key in self.OWN_KEYS[1:4]]
        if kind == "multiple_choice" and list(self.own) != ["doc_to_suffix"]:
            raise ValueError(f"{task} has {sorted(self.own)}; with output_type: multiple_choice it takes doc_to_suffix")
        if kind == "generate_until" and len(sizes) != 1:
            raise ValueError(f"{task} has {sizes}; it takes exactly one of {', '.join(self.OWN_KEYS[1:4])}")
        if "sentences" in self.own and "lengths" not in self.own:
            raise ValueError(f"{task} has sentences={self.own['sentences']} without lengths")
        if kind not in ("multiple_choice", "generate_until"):
            raise ValueError(f"{task} has output_type {kind!r}; it takes multiple_choice or generate_until")
        if "doc_to_max_gen_toks" in self.own and "doc_to_suffix" in self.own:
            raise ValueError(f"{task} has doc_to_max_gen_toks and doc_to_suffix; a plain continuation has no suffix")
        if "lengths" in self.own:
            self.own["lengths"] = _range(task, config.get("metadata", {}).get("lengths", self.own["lengths"]))
        super().__init__(config={key: config[key] for key in config if key not in (*self.OWN_KEYS, "class")})

    def dump_config(self) -> dict[str, Any]:
        """As in lm-eval, its own keys included."""
        return {**super().dump_config(), **self.own}

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs) -> list[Instance] | Instance:
        """As in lm-eval: one request for each choice, (context, choice, {"suffix": …}), or one request to write, (context,
        gen_kwargs), with a `Blank` in its gen_kwargs.
        """
        has_template = kwargs.pop("apply_chat_template", False)
        kwargs.pop("chat_template", None)
        suffix = self.resolve_field(doc, self.own.get("doc_to_suffix")) or ""
        if has_template and suffix:
            raise ValueError(
                f"{self.config.task} has text behind what is asked, which a chat template has no place for; leave "
                "--apply_chat_template out"
            )
        if self.OUTPUT_TYPE == "multiple_choice":
            choices = [f"{self.config.target_delimiter}{choice}" for choice in self.doc_to_choice(doc)]
            return [
                Instance("loglikelihood", doc, (ctx, choice, {"suffix": suffix}), index, **kwargs)
                for index, choice in enumerate(choices)
            ]
        settings = deepcopy(self.config.generation_kwargs)
        if "doc_to_max_gen_toks" in self.own:
            settings["max_gen_toks"] = int(self.resolve_field(doc, self.own["doc_to_max_gen_toks"]))
        else:
            lengths = self.own.get("lengths")
            length_of = self.resolve_field(doc, self.own.get("doc_to_length_of"))
            blank = Blank(suffix, length_of, lengths=lengths and tuple(lengths), sentences=self.own.get("sentences"))
            settings |= blank.in_kwargs()
        return Instance("generate_until", doc, (ctx, settings), 0, **kwargs)


def _range(task: str, lengths: Any) -> list[int]:
    if (
        not isinstance(lengths, list | tuple)
        or len(lengths) != 2
        or not all(type(one) is int for one in lengths)
        or not 1 <= lengths[0] <= lengths[1]
    ):
        raise ValueError(f"lengths={lengths!r} of {task}; it takes [least, most] tokens, 1 ≤ least ≤ most")
    return list(lengths)


# Multiple choice. `query`, `choices` and `gold` are what lm-eval's own HellaSwag calls them.


def piqa_choices(docs: Dataset) -> Dataset:
    """PIQA's goal as a question (prompt: stock)."""
    return docs.map(
        lambda doc: {
            "query": f"Question: {doc['goal']}\nAnswer:",
            "choices": [doc["sol1"], doc["sol2"]],
            "gold": doc["label"],
        }
    )


def siqa_choices(docs: Dataset) -> Dataset:
    """Social IQa's question (prompt: not specified in the paper; that of the script of DiffuLLaMA, which it follows)."""
    return docs.map(
        lambda doc: {
            "query": f"Question: {doc['context']} {doc['question']}\nAnswer:",
            "choices": [doc["answerA"], doc["answerB"], doc["answerC"]],
            "gold": int(doc["label"]) - 1,
        }
    )


def winogrande_endings(docs: Dataset) -> Dataset:
    """The text before the blank; each option with the text behind it (paper §1)."""

    def ask(doc: dict[str, Any]) -> dict[str, Any]:
        before, options, suffix = _around_blank(doc)
        return {"query": before, "choices": [option + suffix for option in options], "gold": int(doc["answer"]) - 1}

    return docs.map(ask)


def winogrande_options(docs: Dataset) -> Dataset:
    """The text before the blank; each option; the text behind it."""

    def ask(doc: dict[str, Any]) -> dict[str, Any]:
        before, options, suffix = _around_blank(doc)
        return {"query": before, "choices": options, "suffix": suffix, "gold": int(doc["answer"]) - 1}

    return docs.map(ask)


def _around_blank(doc: dict[str, Any]) -> tuple[str, list[str], str]:
    """Spaces before the blank belong to the options, since no context ends with one."""
    before, _blank, suffix = doc["sentence"].partition("_")
    query, spaces = _without_last_spaces(before)
    return query, [spaces + doc["option1"], spaces + doc["option2"]], suffix


def _without_last_spaces(text: str) -> tuple[str, str]:
    kept = text.rstrip(" ")
    return kept, text[len(kept) :]


def mean_per_token(doc: dict[str, Any], results: list[LogLikelihood]) -> dict[str, float]:
    """`acc`: whether the gold choice has the highest mean log-probability per token (paper §1). Of equal ones the first
    counts, as in lm-eval.

    Raises:
        ValueError: the model does not say how many tokens its log-likelihoods are sums of.
    """
    for result in results:
        if not isinstance(result, LogLikelihood):
            raise ValueError(
                "the mean log-probability per token needs a model that counts its tokens: `--model a3`, or `--model a3_ar` "
                f"for a plain LLaMA; this one answers {result!r}"
            )
    means = [result[0] / result.num_tokens for result in results]
    return {"acc": float(means.index(max(means)) == doc["gold"])}


# Questions


def triviaqa_questions(docs: Dataset) -> Dataset:
    """`query` as in paper §1, with one question mark at its end; `aliases`; `longest` of them, in characters, since how
    many tokens each has depends on the model.
    """

    def ask(doc: dict[str, Any]) -> dict[str, Any]:
        aliases = doc["answer"]["aliases"]
        query = f"Question: {doc['question'].rstrip(' ?')}?\nAnswer:"
        return {"query": query, "aliases": aliases, "longest": " " + max(aliases, key=len)}

    return docs.map(ask)


def squad_as_published(docs: Dataset) -> Dataset:
    """The same columns from SQuAD, with the prompt of the published script, its misspelling included."""

    def ask(doc: dict[str, Any]) -> dict[str, Any]:
        aliases = doc["answers"]["text"]
        query = f"{doc['context']}\nQuesion{doc['question']}?\nAnswer:"
        return {"query": query, "aliases": aliases, "longest": " " + max(aliases, key=len)}

    return docs.map(ask)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as is usual for TriviaQA and SQuAD.

    Example:
        >>> normalize(" The U.S.A., a country")
        'usa country'
    """
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def alias_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`alias_match`: whether a normalised alias is a substring of the normalised answer (paper §1). An alias of which
    nothing is left is none, or it would be in every answer.
    """
    answer = normalize(results[0])
    aliases = filter(None, map(normalize, doc["aliases"]))
    return {"alias_match": float(any(alias in answer for alias in aliases))}


# Blanks in texts


def third_sentence(docs: Dataset) -> Dataset:
    """Stories without their third sentence (paper §1): `query` before it, `target` the sentence, `suffix` behind it, and how
    many `characters` the sentence has.
    """
    return docs.map(lambda doc: _without_sentences(doc["sentences"], 2, 3))


def second_to_fourth_sentence(docs: Dataset) -> Dataset:
    """Stories with their first and last sentence, the three between in one blank (paper §1, the harder variant)."""
    return docs.map(lambda doc: _without_sentences(doc["sentences"], 1, 4))


def _without_sentences(sentences: list[str], start: int, end: int) -> dict[str, Any]:
    target = " ".join(sentences[start:end])
    return {
        "query": " ".join(sentences[:start]),
        "target": " " + target,
        "suffix": " " + " ".join(sentences[end:]),
        "characters": len(target),
    }


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(list(ROUGE), use_stemmer=False)


def rouge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL`: F-measures × 100 of what was written against the `target`, words unstemmed."""
    scores = _rouge_scorer().score(doc["target"], results[0])
    return {name: 100 * score.fmeasure for name, score in scores.items()}


def missing_line(docs: Dataset) -> Dataset:
    """HumanEval's prompt (`query`), the line of the solution that is asked for (`target`), and the code behind (`suffix`)."""

    def ask(doc: dict[str, Any]) -> dict[str, Any]:
        query, spaces = _without_last_spaces(doc["prompt"])
        return {"query": query, "target": spaces + doc["canonical_solution"]}

    return docs.map(ask)


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`exact_match`: whether the `target` was written, but for spaces around it."""
    return {"exact_match": float(results[0].strip() == doc["target"].strip())}


def passes_tests(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`pass@1`: whether the program passes its tests with what was written; it is run, see `run_program`."""
    program = f"{doc['query']}{results[0]}{doc['suffix']}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(run_program(program).passed)}
