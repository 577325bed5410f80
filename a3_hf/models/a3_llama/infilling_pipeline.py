"""The transformers pipeline `"infilling"`."""

from collections.abc import Sized

from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .infilling_templates import Template
from .modeling_a3_llama import A3LlamaForCausalLM


class A3InfillingPipeline(Pipeline):
    """Pipeline for infilling: `pipeline("infilling", model="runs/mine")("The dog <blank:auto> home.")`.

    Returns a dict per text with `text` (filled), `written` (text of each blank), `lengths` (tokens of each blank),
    `length_scores` and `log_likelihood` (nats); with `num_return_sequences` above 1, a list of such dicts. A list of texts
    gives a list of results; a generator or torch dataset of texts (e.g. transformers' `KeyDataset(dataset, "text")`) gives an
    iterator over results, in batches of `batch_size`. Accepts `infill`'s settings, on construction or per call.

    `save_pretrained` saves model, tokenizer and the code of all three, for use without this package:
    `pipeline("infilling", model=FOLDER, trust_remote_code=True)`.

    Raises:
        ValueError: inputs that are not texts, `return_outputs`, or an error of `infill`.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __call__(self, inputs, **settings):
        if isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            for text in inputs:
                self.preprocess(text)  # fail before any text is filled
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **settings)

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        """Identical to `Pipeline.get_iterator` except: a batch is a list of texts, so no pad token is needed."""
        dataset = (PipelineDataset if isinstance(inputs, Sized) else PipelineIterator)(
            inputs, self.preprocess, preprocess_params
        )
        loader = DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=_together)
        results = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(results, self.postprocess, postprocess_params)

    def _sanitize_parameters(self, **settings):
        if "return_outputs" in settings:
            raise ValueError("return_outputs: the pipeline returns dicts. Call model.infill for an A3InfillOutput.")
        return {}, settings, {}

    def preprocess(self, text: str) -> dict:
        if not isinstance(text, str):
            raise ValueError(
                f"inputs holds a {type(text).__name__}, {text!r:.60}: expected a string, a list of strings, or a generator or "
                'torch dataset of strings (KeyDataset(dataset, "text"))'
            )
        Template.parse(text)
        return {"texts": [text]}

    def _forward(self, inputs: dict, **settings) -> dict:
        texts = inputs["texts"]
        output = self.model.infill(self.tokenizer, texts, return_outputs=True, **settings)
        rows = [
            {
                "text": output.texts[row],
                "written": output.written[row],
                "lengths": list(output.lengths[row]),
                "length_scores": output.length_scores[row],
                "log_likelihood": float(log_probs.sum()),
            }
            for row, log_probs in enumerate(output.generation.log_probs)
        ]
        copies = len(rows) // len(texts)
        if copies > 1:
            rows = [rows[start : start + copies] for start in range(0, len(rows), copies)]
        return {"results": rows}

    def postprocess(self, output: dict) -> dict | list[dict]:
        result = output["results"]  # of one text; or, in a batch of one, a list of one result
        return result[0] if isinstance(result, list) and len(result) == 1 else result


def _together(items: list[dict]) -> dict:
    return {"texts": [text for item in items for text in item["texts"]]}


PIPELINE_REGISTRY.register_pipeline(
    "infilling",
    pipeline_class=A3InfillingPipeline,
    pt_model=A3LlamaForCausalLM,
    default=None,
    type="text",
)
# The model class in a saved pipeline's config must be a class of transformers.
A3InfillingPipeline._registered_impl = {
    "infilling": {"impl": A3InfillingPipeline, "pt": (AutoModelForCausalLM,), "type": "text"}
}
