"""Functions of the tasks: requests with text on both sides, prompts, and metrics."""

import re
import string
from collections.abc import Callable
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
    """Identical to lm-eval's task except: its requests have text on both sides of the answer. In a task's YAML,
    `class: !function a3_hf.evaluation.tasks.functions.InfillTask`, and besides lm-eval's own keys (a field is a column or a
    template):

        doc_to_suffix: field of the text after the answer; none by default.
        doc_to_length_of: field of a text with as many tokens as the answer.
        lengths: [least, most] tokens, between which the model chooses; `--metadata lengths=[4,48]` replaces it.
        sentences: with `lengths`: the number of sentences after which a model that writes left to right stops.
        doc_to_max_gen_toks: field of a number of tokens, for lm-eval's plain continuation.

    With `output_type: multiple_choice` only the first is allowed; `generate_until` needs exactly one of `doc_to_length_of`,
    `lengths` and `doc_to_max_gen_toks`.

    Raises:
        ValueError: incompatible keys, lengths that are not a range, a chat template with a suffix.
    """

    OWN_KEYS = ("doc_to_suffix", "doc_to_length_of", "lengths", "doc_to_max_gen_toks", "sentences")

    def __init__(self, *, config: dict[str, Any]):
        self.own = {key: config[key] for key in self.OWN_KEYS if key in config}
        task, kind = config["task"], config["output_type"]
        sizes = [key for key in self.own if key in self.OWN_KEYS[1:4]]
        if kind == "multiple_choice" and list(self.own) != ["doc_to_suffix"]:
            raise ValueError(f"{task} has {sorted(self.own)}: expected doc_to_suffix with output_type: multiple_choice")
        if kind == "generate_until" and len(sizes) != 1:
            raise ValueError(f"{task} has {sizes}: expected exactly one of {', '.join(self.OWN_KEYS[1:4])}")
        if "sentences" in self.own and "lengths" not in self.own:
            raise ValueError(f"{task} has sentences={self.own['sentences']} without lengths")
        if kind not in ("multiple_choice", "generate_until"):
            raise ValueError(f"{task} has output_type {kind!r}: expected multiple_choice or generate_until")
        if "doc_to_max_gen_toks" in self.own and "doc_to_suffix" in self.own:
            raise ValueError(
                f"{task} has doc_to_max_gen_toks and doc_to_suffix: expected one, because a plain continuation has no suffix"
            )
        if "lengths" in self.own:
            self.own["lengths"] = _range(task, config.get("metadata", {}).get("lengths", self.own["lengths"]))
        super().__init__(config={key: config[key] for key in config if key not in (*self.OWN_KEYS, "class")})

    def dump_config(self) -> dict[str, Any]:
        """Returns lm-eval's config with this class's own keys."""
        return {**super().dump_config(), **self.own}

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs) -> list[Instance] | Instance:
        """Returns a request for each choice, (context, choice, {"suffix": …}), or one request to write, (context, gen_kwargs),
        with a `Blank` in its gen_kwargs.
        """
        has_template = kwargs.pop("apply_chat_template", False)
        kwargs.pop("chat_template", None)
        suffix = self.resolve_field(doc, self.own.get("doc_to_suffix")) or ""
        if has_template and suffix:
            raise ValueError(
                f"{self.config.task} has text after the answer, for which a chat template has no place. Leave out "
                "--apply_chat_template"
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
        raise ValueError(f"lengths={lengths!r} of {task}: expected [least, most] tokens, 1 ≤ least ≤ most")
    return list(lengths)


def _for_each(ask: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Dataset], Dataset]:
    """Makes `process_docs` of a task from a function that returns the columns to add to an item."""

    def process(docs: Dataset) -> Dataset:
        return docs.map(ask)

    process.__name__ = process.__qualname__ = ask.__name__
    process.__doc__ = ask.__doc__
    return process


# Multiple choice. `query`, `choices` and `gold` are the names of lm-eval's own HellaSwag.


@_for_each
def piqa_choices(doc: dict[str, Any]) -> dict[str, Any]:
    """PIQA's goal as a question (prompt: stock)."""
    query = f"Question: {doc['goal']}\nAnswer:"
    return {"query": query, "choices": [doc["sol1"], doc["sol2"]], "gold": doc["label"]}


@_for_each
def siqa_choices(doc: dict[str, Any]) -> dict[str, Any]:
    """Social IQa's question (prompt: not specified in the paper; that of DiffuLLaMA's script, which it follows)."""
    query = f"Question: {doc['context']} {doc['question']}\nAnswer:"
    choices = [doc["answerA"], doc["answerB"], doc["answerC"]]
    return {"query": query, "choices": choices, "gold": int(doc["label"]) - 1}


@_for_each
def winogrande_endings(doc: dict[str, Any]) -> dict[str, Any]:
    """The text before the blank; each option with the text after it (paper §1)."""
    before, options, suffix = _around_blank(doc)
    return {"query": before, "choices": [option + suffix for option in options], "gold": int(doc["answer"]) - 1}


@_for_each
def winogrande_options(doc: dict[str, Any]) -> dict[str, Any]:
    """The text before the blank; each option; the text after it."""
    before, options, suffix = _around_blank(doc)
    return {"query": before, "choices": options, "suffix": suffix, "gold": int(doc["answer"]) - 1}


def _around_blank(doc: dict[str, Any]) -> tuple[str, list[str], str]:
    """The text before the blank, the options and the suffix. Spaces before the blank belong to the options."""
    before, _blank, suffix = doc["sentence"].partition("_")
    query, spaces = _without_last_spaces(before)
    return query, [spaces + doc["option1"], spaces + doc["option2"]], suffix


def _without_last_spaces(text: str) -> tuple[str, str]:
    kept = text.rstrip(" ")
    return kept, text[len(kept) :]


def mean_per_token(doc: dict[str, Any], results: list[LogLikelihood]) -> dict[str, float]:
    """`acc`: whether the gold choice has the highest mean log-probability per token (paper §1). Among equal ones the
    first counts, as in lm-eval.

    Raises:
        ValueError: the model's answers have no number of tokens.
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


@_for_each
def triviaqa_questions(doc: dict[str, Any]) -> dict[str, Any]:
    """`query` as in paper §1, with one question mark at its end; `aliases`; and `longest` of them, in characters, since the
    number of tokens depends on the model.
    """
    return _with_longest(f"Question: {doc['question'].rstrip(' ?')}?\nAnswer:", doc["answer"]["aliases"])


@_for_each
def squad_as_published(doc: dict[str, Any]) -> dict[str, Any]:
    """The same columns from SQuAD, with the prompt of the published script, misspelling included."""
    return _with_longest(f"{doc['context']}\nQuesion{doc['question']}?\nAnswer:", doc["answers"]["text"])


def _with_longest(query: str, aliases: list[str]) -> dict[str, Any]:
    return {"query": query, "aliases": aliases, "longest": " " + max(aliases, key=len)}


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as is usual for TriviaQA and SQuAD.

    Example:
        >>> normalize(" The U.S.A., a country")
        'usa country'
    """
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def alias_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`alias_match`: whether a normalised alias is a substring of the normalised answer (paper §1). Aliases that are empty
    after normalisation are ignored.
    """
    answer = normalize(results[0])
    aliases = filter(None, map(normalize, doc["aliases"]))
    return {"alias_match": float(any(alias in answer for alias in aliases))}


# Blanks in texts


@_for_each
def third_sentence(doc: dict[str, Any]) -> dict[str, Any]:
    """Stories without their third sentence (paper §1): `query` before it, `target` the sentence, `suffix` after it, and
    `characters`, the length of the sentence.
    """
    return _without_sentences(doc["sentences"], 2, 3)


@_for_each
def second_to_fourth_sentence(doc: dict[str, Any]) -> dict[str, Any]:
    """Stories with their first and last sentence, the three between in one blank (paper §1, the harder variant)."""
    return _without_sentences(doc["sentences"], 1, 4)


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
    """`rouge1`, `rouge2`, `rougeL`: F-measures × 100 of the answer against the `target`, words unstemmed."""
    scores = _rouge_scorer().score(doc["target"], results[0])
    return {name: 100 * score.fmeasure for name, score in scores.items()}


@_for_each
def missing_line(doc: dict[str, Any]) -> dict[str, Any]:
    """HumanEval's prompt (`query`), the missing line of the solution (`target`), and the code after it (`suffix`)."""
    query, spaces = _without_last_spaces(doc["prompt"])
    return {"query": query, "target": spaces + doc["canonical_solution"]}


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`exact_match`: whether the answer is the `target`, apart from surrounding white space."""
    return {"exact_match": float(results[0].strip() == doc["target"].strip())}


def passes_tests(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`pass@1`: whether the program passes its tests with the answer in it (`run_program`)."""
    program = f"{doc['query']}{results[0]}{doc['suffix']}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(run_program(program).passed)}
