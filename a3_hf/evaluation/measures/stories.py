"""Stories with a blank: a sentence or a word to fill in, and the tokens on both sides of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_hf.data.fim import fim_prompt, template_words
from a3_hf.evaluation.tasks.datasets import rocstories
from a3_hf.evaluation.tasks.sentences import split_sentences
from a3_hf.models.a3_llama.infilling_templates import encode_piece, encode_prompt

from .batching import order_inputs, pad_rows, span_mask
from .trained_run import Trained


@dataclass(frozen=True)
class StoryBlank:
    """A story with a blank, in token ids.

    Attributes:
        texts: before the blank, in it, and after it; joined, they are the story.
        before: BOS and the tokens before the blank.
        target: the tokens of the blank.
        after: the tokens after it.
    """

    texts: tuple[str, str, str]
    before: list[int]
    target: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, before: str, target: str, after: str) -> "StoryBlank":
        """Encodes the three parts, each by itself, as inside a text."""
        pieces = (encode_piece(tokenizer, text, is_start=False) for text in (target, after))
        return cls((before, target, after), encode_prompt(tokenizer, before), *pieces)

    @property
    def text(self) -> str:
        """The text of the blank, without the white space around it."""
        return self.texts[1].strip()

    @property
    def tokens(self) -> list[int]:
        """The whole story, from BOS on."""
        return [*self.before, *self.target, *self.after]

    def shown_by(self, trained: Trained, line: Sequence[int]) -> "StoryBlank":
        """The blank as its model reads it: with the `suffix_template` of an A3 model, or in the form of the recipe's `fim`;
        for another LLaMA, the text after the blank and a line break in front. Otherwise in the story's own order.
        """
        fim, config, tokenizer = trained.recipe.data.fim, trained.model.config, trained.tokenizer
        template = getattr(config, "suffix_template", None)
        if template is not None:
            form, words = "suffix_template", template_words(tokenizer, template)
        elif fim is not None and fim.tokens is not None:
            form, words = "psm" if fim.psm >= fim.spm else "spm", tokenizer.convert_tokens_to_ids(fim.tokens)
        elif trained.architecture == "llama":
            form, words = "suffix_template", ([], line)
        else:
            return self
        bos, prefix = self.before[:1], self.before[1:]
        return replace(self, before=[*bos, *fim_prompt(form, prefix, self.after, words)], after=[])


class BlankBatch(NamedTuple):
    """Padded stories: token ids, True at the blanks, and the attention mask; each (B, S)."""

    input_ids: torch.Tensor
    blank_mask: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, blanks: Sequence[StoryBlank], device: torch.device, *, side: str = "right") -> "BlankBatch":
        """Pads stories on one side."""
        ids, mask = pad_rows([blank.tokens for blank in blanks], side=side)
        offsets = (mask == 0).sum(dim=1).tolist() if side == "left" else [0] * len(blanks)
        starts = [offset + len(blank.before) for offset, blank in zip(offsets, blanks, strict=True)]
        is_blank = span_mask(starts, [len(blank.target) for blank in blanks], ids.shape[1])
        return cls(*(tensor.to(device) for tensor in (ids, is_blank, mask)))

    def log_likelihood(self, model: PreTrainedModel, sequences: torch.Tensor | None = None) -> float:
        """Nats of all blanks together, left to right given both sides, filled as in `sequences` (None: the true tokens)."""
        ids = self.input_ids if sequences is None else sequences
        inputs = order_inputs(ids, self.attention_mask, self.blank_mask, model.device)
        return model.log_likelihood(**inputs).double().sum().item()


def read_stories(trained: Trained, data_dir: str | None) -> tuple[Iterable[list[str]], str]:
    """Reads the stories in which measures make blanks.

    Args:
        data_dir: the folder that holds ROCStories (`a3_hf.evaluation.tasks.datasets`); None: held-out documents.

    Returns:
        The sentences of each story, with the white space before each; and a description of the stories for messages.
    """
    if data_dir is None:
        stories = (split_sentences(document) for document in trained.documents)
        return stories, f"{len(trained.documents)} held-out documents"
    told = rocstories(data_dir=data_dir)["validation"]["sentences"]
    return ([first, *(f" {one}" for one in others)] for first, *others in told), f"{len(told)} stories of ROCStories"
