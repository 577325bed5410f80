"""Inputs of a run other than weights: the checkpoint it starts from, the tokenizer, the configuration, the rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from datasets import Dataset
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from a3_hf.adapters.checkpoint_info import CheckpointInfo
from a3_hf.adapters.checkpoints import check_start, load_tokenizer
from a3_hf.data.mixture import TextMixture, open_mixture
from a3_hf.data.packing import load_rows
from a3_hf.data.written import load_written
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig

from .arguments import Recipe
from .draft_head_trainer import head_config
from .run_checks import check_attention


@dataclass(frozen=True)
class RunInputs:
    """The checkpoint that a run starts from, its configuration as the recipe's architecture, the tokenizer, and the
    configuration of the draft head to train (None: with another architecture).
    """

    start: CheckpointInfo
    config: LlamaConfig
    tokenizer: PreTrainedTokenizerBase
    head_config: DraftHeadConfig | None = None

    @classmethod
    def load(cls, recipe: Recipe) -> "RunInputs":
        """Reads the inputs and checks that they are compatible, without loading weights.

        Raises:
            ValueError: no checkpoint or no tokenizer; a tokenizer of another model; an attention implementation, lora or
                slot_start that the checkpoint can't be trained with.
        """
        settings = recipe.model
        with _naming("model_name_or_path", settings.model_name_or_path):
            start = CheckpointInfo.read(settings.model_name_or_path)
            config = start.model_config(settings.architecture)
        if settings.tokenizer_name_or_path is None:
            with _naming("model_name_or_path", settings.model_name_or_path):
                tokenizer = load_tokenizer(start)
        else:
            with _naming("tokenizer_name_or_path", settings.tokenizer_name_or_path):
                tokenizer = load_tokenizer(settings.tokenizer_name_or_path)
        largest = max(tokenizer.get_vocab().values())
        if largest >= config.vocab_size:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} has ids up to {largest}, and the model {start.path} embeds ids "
                f"below {config.vocab_size}: they don't belong together. Set tokenizer_name_or_path to the model's own"
            )
        check_attention(recipe, config)
        if recipe.draft_head is not None:
            return cls(start, config, tokenizer, head_config(start, recipe.draft_head))
        check_start(start, recipe.lora, config)
        if recipe.lora is not None:
            start.base_settings(settings.slot_start)  # raises for a slot_start that the checkpoint does not support
        return cls(start, config, tokenizer)

    def load_rows(self, recipe: Recipe) -> tuple[Dataset | TextMixture, Dataset | None]:
        """Returns the rows to train on and to evaluate on (None: no evaluation data).

        Raises:
            ValueError: evaluations without data; the errors of `load_rows`, `open_mixture` and `load_written`.
        """
        training = recipe.training
        with training.main_process_first(local=False, desc="packing rows"):
            if recipe.draft_head is not None:
                train_rows, eval_rows = load_written(recipe.data, vocab_size=self.config.vocab_size)
            else:
                train_rows, eval_rows = self._packed_rows(recipe)
        if eval_rows is None and training.eval_strategy != IntervalStrategy.NO:
            raise ValueError(
                f"eval_strategy={training.eval_strategy.value!r} needs evaluation data. Set validation_file or "
                "validation_documents, or eval_strategy: no"
            )
        return train_rows, eval_rows

    def _packed_rows(self, recipe: Recipe) -> tuple[Dataset | TextMixture, Dataset | None]:
        words = {} if recipe.data.fim is None else {"suffix_template": self._suffix_template(recipe)}
        load = load_rows if recipe.data.sources is None else open_mixture
        context_length = self.config.max_position_embeddings
        return load(recipe.data, self.tokenizer, seed=recipe.training.seed, context_length=context_length, **words)

    def _suffix_template(self, recipe: Recipe) -> str | None:
        """The recipe's `suffix_template`, or the one stored with the adapter or model."""
        stored = getattr(self.config, "suffix_template", None)
        return self.start.base_settings(suffix_template=recipe.model.suffix_template).get("suffix_template", stored)


@contextmanager
def _naming(argument: str, path: str) -> Iterator[None]:
    """Names the recipe's argument in errors of the libraries, whose messages span lines and may not name the model."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{argument}={path!r}: can't be loaded: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if argument in str(error):
            raise
        raise ValueError(f"{argument}={path!r}: {error}") from error
