"""A small language of stories in which some words are settled only by what comes after them.

Every story loses a thing in its first sentence, brings in two people in the second and tells all five facts again in
the third:

    someone hid a [red] [key] in the [attic] . [mia] asked [tom] for help . later [mia] found the [red] [key] in the
    [attic] and gave it to [tom] .

The facts are drawn uniformly and independently, so that nothing before a fact's first mention says anything about it:
only the right settles it. A fact's second mention is settled by the left.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"

# No word is in two slots: a word tells which fact it belongs to.
SLOTS = {
    "colour": "red blue green black white brown golden silver purple yellow pink grey crimson violet teal scarlet".split(),
    "thing": "key lamp ring map coin book bell crown drum flute kite mask rope shell sword watch".split(),
    "place": "attic barn cave cellar garden harbour kitchen library mill museum orchard shed stable temple tower well".split(),
    "finder": "mia anna clara ella fiona grace hana iris julia kate lena nora olga rosa sara vera".split(),
    "friend": "tom adam boris carl david erik felix george hugo ivan jonas karl leo max oscar peter".split(),
}  # fmt: skip

# One sentence of each list makes a story. Sentences of a list are equally long, so that all stories are.
SENTENCES = (
    (
        "someone hid a {colour} {thing} in the {place} .",
        "in the {place} a {colour} {thing} was lost .",
        "a {colour} {thing} was lost in the {place} .",
    ),
    (
        "{finder} asked {friend} for help .",
        "{finder} went looking with {friend} .",
    ),
    (
        "later {finder} found the {colour} {thing} in the {place} and gave it to {friend} .",
        "when {friend} reached the {place} , {finder} was holding up the lost {colour} {thing} .",
        "at last {finder} and {friend} had the {colour} {thing} from the {place} back home .",
    ),
)

NUM_FACTS = prod(len(words) for words in SLOTS.values())
NUM_STORIES = NUM_FACTS * prod(len(sentences) for sentences in SENTENCES)


@dataclass(frozen=True)
class Story:
    """One story.

    Attributes:
        tokens: `<s>`, the words, `</s>`.
        facts: the value of each slot, in the order of `SLOTS`.
        right_settled: indices into `tokens` of first mentions, about which the tokens before them say nothing and which
            the tokens after them determine.
        left_settled: indices of second mentions, which the tokens before them determine.
    """

    tokens: tuple[str, ...]
    facts: tuple[str, ...]
    right_settled: tuple[int, ...]
    left_settled: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join(self.tokens[1:-1])


def tell(sentences: tuple[str, ...], facts: tuple[str, ...]) -> Story:
    """Writes a story: one template of each list of `SENTENCES`, and one value of each of `SLOTS`."""
    value_of = dict(zip(SLOTS, facts, strict=True))
    tokens, mentioned, first, second = [BOS], set(), [], []
    for word in " ".join(sentences).split():
        if slot := re.fullmatch(r"\{(\w+)\}", word):
            (second if slot[1] in mentioned else first).append(len(tokens))
            mentioned.add(slot[1])
            word = value_of[slot[1]]
        tokens.append(word)
    return Story((*tokens, EOS), facts, tuple(first), tuple(second))


def sample_stories(count: int, *, seed: int) -> list[Story]:
    """`count` stories of which no two share all their facts: any part is unseen for a model trained on the rest."""
    rng = random.Random(seed)
    stories = []
    for number in rng.sample(range(NUM_FACTS), count):
        facts = []
        for words in SLOTS.values():
            number, choice = divmod(number, len(words))
            facts.append(words[choice])
        stories.append(tell(tuple(rng.choice(sentences) for sentences in SENTENCES), tuple(facts)))
    return stories


def all_stories(num_options: int) -> Iterator[Story]:
    """Every story over the first `num_options` words of each slot, each once: what is exact there is so in the whole
    language, because its slots differ in nothing but their number of words.
    """
    for facts in product(*(words[:num_options] for words in SLOTS.values())):
        for sentences in product(*SENTENCES):
            yield tell(sentences, facts)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word; `<s>` and `</s>` are added around a text."""
    filler = {word for sentences in SENTENCES for sentence in sentences for word in sentence.split() if word[0] != "{"}
    words = [PAD, BOS, EOS, UNK, *sorted(filler), *(word for words in SLOTS.values() for word in words)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK
    )
