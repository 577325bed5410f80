"""Splits texts into sentences."""

import re

SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")


def sentence_ends(text: str) -> list[int]:
    """Offsets of the ends of sentences: after a full stop, an exclamation or question mark, or several, and closing quotes and
    brackets, before white space or the end of the text.
    """
    return [match.end() for match in SENTENCE_END.finditer(text)]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space before it; joined, they are the stripped text.

    Example:
        >>> split_sentences('"Hi, Tim!" said Mr. Toad. He left')
        ['"Hi, Tim!"', ' said Mr.', ' Toad.', ' He left']
    """
    text = text.strip()
    ends = sentence_ends(text)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if start < end]
