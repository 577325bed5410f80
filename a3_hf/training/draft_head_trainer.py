"""Training of a draft head on what its base wrote."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from a3_hf.adapters.arguments import DraftHeadArguments
from a3_hf.adapters.checkpoint_info import CheckpointInfo
from a3_hf.data.collator import IGNORED_LABEL, RowCollator
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import DraftHead
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM

from .even_rows import EvenRowsTrainer

Row = Mapping[str, Sequence[int]]


def head_config(start: CheckpointInfo, sizes: DraftHeadArguments) -> DraftHeadConfig:
    """Returns the configuration of the head that a run trains: of new weights, or of the draft head that it starts from.

    Raises:
        ValueError: an adapter as start; a size out of range; sizes other than those of the head at the start.
    """
    if start.adapter_config is not None:
        raise ValueError(
            f"model_name_or_path={start.path!r} holds an adapter: expected a LLaMA or a draft head with architecture "
            "'draft_head'"
        )
    base = start.model_config("a3")
    given = {name: value for name, value in vars(sizes).items() if value is not None}
    if not start.is_draft_head:
        given["num_candidates"] = min(sizes.num_candidates, base.vocab_size)
        try:
            return DraftHeadConfig.for_base(base, base_model_name_or_path=start.base, **given)
        except ValueError as error:
            raise ValueError(f"draft_head.{error}") from error
    config = DraftHeadConfig.from_pretrained(start.path)
    changed = [name for name, value in given.items() if value != getattr(config, name)]
    if sizes != DraftHeadArguments() and changed:
        name = changed[0]
        raise ValueError(
            f"draft_head.{name}={given[name]}: expected {getattr(config, name)}, as in {start.path}, or no draft_head"
        )
    return config


def load_head_to_train(
    start: CheckpointInfo,
    config: DraftHeadConfig,
    rows: Iterable[Row],
    *,
    seed: int,
    finished: Path | None = None,
    **settings: Any,
) -> DraftHead:
    """Returns the head that a run trains, in float32, attached to its frozen base.

    Args:
        rows: the training rows, whose most frequent tokens become the candidates of a new head.
        seed: seed of a new head's weights.
        finished: a checkpoint of this run from which to load the weights instead.
        **settings: arguments of the base's `from_pretrained`.
    """
    base = A3LlamaForCausalLM.from_pretrained(start.base, **settings).eval().requires_grad_(False)
    stored = finished or (start.path if start.is_draft_head else None)
    if stored is not None:
        return DraftHead.from_pretrained(stored, dtype=torch.float32).attach_to(base)
    set_seed(seed)
    head = DraftHead(config)
    head.candidates.copy_(likely_tokens(rows, config.num_candidates))
    return head.attach_to(base)


def likely_tokens(rows: Iterable[Row], number: int) -> torch.Tensor:
    """Returns (number,) the tokens that are scored most often, and those of the lowest ids if there are fewer.

    Example:
        >>> likely_tokens([{"labels": [-100, 7, 7, 5]}], 3)
        tensor([0, 5, 7], dtype=torch.int32)
    """
    counts = Counter(token for row in rows for token in row["labels"] if token != IGNORED_LABEL)
    first = [token for token, _ in counts.most_common(number)]
    others = (token for token in range(number * 2) if token not in counts)
    return torch.tensor(sorted(first + [next(others) for _ in range(number - len(first))]), dtype=torch.int32)


@torch.no_grad()
def measure_guesses(head: DraftHead, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, float]]:
    """Returns, for each distance, `distance` (from 2), `nats` per token, `right`, the fraction of tokens whose likeliest
    guess is right, and `tokens`, the number that these are means of. Each guess is given the true tokens before it.
    """
    totals = torch.zeros(3, head.config.num_drafts, dtype=torch.float64)
    rows = [rows[index] for index in range(len(rows))]
    for first in range(0, len(rows), batch_size):
        batch = RowCollator()(rows[first : first + batch_size])
        output = head(**{name: value.to(head.device) for name, value in batch.items()})
        sums = (output.num_scored, output.losses * output.num_scored, output.right * output.num_scored)
        totals += torch.stack([one.double() for one in sums]).cpu()
    return [
        {"distance": 2 + number, "nats": loss / max(count, 1), "right": right / max(count, 1), "tokens": int(count)}
        for number, (count, loss, right) in enumerate(totals.T.tolist())
    ]


class DraftHeadTrainer(EvenRowsTrainer):
    """Identical to `EvenRowsTrainer` except: the frozen base moves to the head's device, and an evaluation gives each
    distance's `eval_loss_distance_…` (nats per token) and `eval_right_distance_…` (fraction of right guesses).
    """

    def __init__(self, model: DraftHead, args, **settings: Any):
        super().__init__(model, args, **settings)
        model.base[0].to(args.device)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        was_training = self.model.training
        guesses = measure_guesses(self.model.eval(), rows, batch_size=self.args.eval_batch_size)
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss_distance_{one['distance']}": one["nats"] for one in guesses}
        metrics |= {f"{metric_key_prefix}_right_distance_{one['distance']}": one["right"] for one in guesses}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
