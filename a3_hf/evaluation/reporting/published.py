"""The paper's own numbers, by the names of the corresponding tasks here."""

SOURCE = "arXiv 2601.13228, ICLR 2026"
# The columns of its table of results, as (task, metric) here; all are times 100.
COLUMNS = (
    ("a3_triviaqa", "alias_match"),
    ("a3_hellaswag", "acc"),
    ("a3_winogrande", "acc"),
    ("a3_siqa", "acc"),
    ("a3_piqa", "acc"),
    ("rocstories_infill_3", "rouge1"),
    ("rocstories_infill_3", "rouge2"),
    ("rocstories_infill_3", "rougeL"),
)
RESULTS = {
    "Llama-3.1-8B, autoregressive": (52.1, 76.0, 63.9, 46.7, 80.3, 11.7, 2.3, 10.5),
    "Dream-7B": (18.3, 26.9, 51.8, 36.6, 55.8, 11.7, 2.3, 10.5),
    "DiffuLLaMA-7B": (18.5, 58.7, 56.4, 43.2, 63.3, 23.3, 5.5, 21.2),
    "A3-1B": (10.2, 40.2, 52.8, 35.1, 64.7, 11.8, 1.7, 11.1),
    "A3-3B": (15.9, 49.6, 54.3, 38.9, 70.1, 11.3, 2.3, 10.2),
    "A3-8B": (19.4, 58.4, 60.2, 45.2, 78.1, 19.2, 4.6, 18.6),
}
# Reasons not to rely on figures: by model, whose line is then marked, or by topic.
SUSPECT = {
    "Llama-3.1-8B, autoregressive": "on ROCStories it was given the text before the blank only, and a length counted in "
    "characters; the others saw the text on both sides, and the true length in tokens",
    "Dream-7B": "its ROCStories figures are those of the autoregressive line, to the digit, and its own authors report "
    "73.3 on HellaSwag, 74.8 on WinoGrande and 75.8 on PIQA",
    "TriviaQA of the diffusion models": "the public script of that name loads SQuAD",
}
# Perplexity under Llama-3.1-8B of conditional generation on The Pile, at (512, 1024) steps.
JUDGE_STEPS = (512, 1024)
JUDGED = {
    ("A3-8B", "random"): (66.4, 49.3),
    ("A3-8B", "confidence"): (20.1, 16.8),
    ("A3-8B", "entropy"): (14.3, 11.2),
    ("Dream-7B", "entropy"): (18.7, 16.4),
    ("DiffuLLaMA-7B", "entropy"): (20.9, 14.3),
}


def published_scores(task: str, metric: str) -> dict[str, float]:
    """Returns the score of each of the paper's models, times 100; empty if the paper has no such task or metric."""
    if (task, metric) not in COLUMNS:
        return {}
    place = COLUMNS.index((task, metric))
    return {model: scores[place] for model, scores in RESULTS.items()}
