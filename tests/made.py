"""Data that the tests make for themselves, in the places and forms that the recipes expect: a text of small stories, a LLaMA
that has read some of it, with a tokenizer of LLaMA 2's kind, and stories of five sentences as ROCStories has them.
"""

import csv
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = "Tom Lily Mia Ben Anna Max Sue Tim Ella Sam Lucy Jack".split()
THINGS = "red ball,little boat,big box,old hat,blue kite,toy car,sweet cake,warm coat,green frog,shiny key".split(",")
PLACES = "the park,the garden,the old barn,a small shop,the river,the kitchen,the hill,school".split(",")
SENTENCES = (
    ("One day, {who} went to {place} with {friend}.", "{who} and {friend} were at {place}.", "Once upon a time, {who} hid."),
    ("{who} saw a {thing}.", "There was a {thing}, and {friend} wanted it.", "They had lost a {thing}."),
    ("\"Look at the {thing}!\" said {friend}.", "{friend} was sad, so {who} looked for the {thing}.", "It was a {thing}."),
    ("{who} took the {thing} home and showed it to mom.", "They played with the {thing} all day.", "{who} was so happy!"),
    ("In the end, {who} gave the {thing} to {friend}.", "{friend} hugged {who}, and they went home.", "Mom smiled."),
)  # fmt: skip
SEPARATOR = "<|endoftext|>"
VOCABULARY = 512


def tell(words: random.Random) -> list[str]:
    """The five sentences of a story."""
    who, friend = words.sample(NAMES, 2)
    facts = {"who": who, "friend": friend, "place": words.choice(PLACES), "thing": words.choice(THINGS)}
    return [words.choice(sentences).format(**facts) for sentences in SENTENCES]


def write_text(path: Path, *, num_documents: int, seed: int = 0) -> list[str]:
    """Documents of a few stories each, with a separator after each."""
    words = random.Random(seed)
    documents = ["\n".join(" ".join(tell(words)) for _ in range(words.randrange(1, 5))) for _ in range(num_documents)]
    path.write_text("".join(f"{document}\n{SEPARATOR}\n" for document in documents), encoding="utf-8")
    return documents


def write_rocstories(path: Path, *, num_stories: int, seed: int = 1) -> None:
    words = random.Random(seed)
    columns = ["InputStoryid", *(f"InputSentence{number}" for number in range(1, 5))]
    columns += ["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for number in range(num_stories):
            table.writerow([f"story-{number}", *tell(words), "Nobody came.", 1])


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Pieces that begin with "▁" where a space was, BOS (id 1) before each text, unknown characters as bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])  # fmt: skip
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*special, *pieces], show_progress=False)
    bpe.train_from_iterator([line for document in documents for line in document.split("\n")], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fields = json.loads(bpe.to_str())
    fields["added_tokens"] = [
        token for token in fields["added_tokens"] if token["content"] in special
    ]  # bytes are text
    bpe = Tokenizer.from_str(json.dumps(fields))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def pretrain(tokenizer: PreTrainedTokenizerFast, documents: list[str], *, steps: int = 60) -> LlamaForCausalLM:
    """A LLaMA of 260 thousand weights after a few seconds of next tokens."""
    ids = torch.tensor([token for document in documents for token in tokenizer.encode(document)])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = ids[torch.randint(len(ids) - 64, (16, 1)) + torch.arange(64)]
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_data(folder: Path) -> Path:
    """`folder`/data as the recipes and experiments expect it in `../shared`; returns `folder`."""
    data = folder / "data"
    for name in ("models/stories260K", "text", "rocstories"):
        (data / name).mkdir(parents=True)
    documents = write_text(data / "text" / "tinystories_sample_5M.txt", num_documents=1500)
    write_rocstories(data / "rocstories" / "cloze_test_val__spring2016.csv", num_stories=20)
    tokenizer = train_tokenizer(documents)
    tokenizer.save_pretrained(data / "models" / "stories260K")
    pretrain(tokenizer, documents[:200]).save_pretrained(data / "models" / "stories260K")
    return folder
