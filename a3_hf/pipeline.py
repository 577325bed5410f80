"""The transformers pipeline "infilling"."""

from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling_a3_llama import A3LlamaForCausalLM


class A3InfillingPipeline(Pipeline):
    """`pipeline("infilling", model="runs/mine")("The dog <blank:auto> home.")`: a dict per text, with `text` (filled),
    `written` (what stands in each blank), `lengths` (their tokens), `length_scores` and `log_likelihood` (nats). Takes
    what `infill` takes, when it is made or called.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, **settings):
        return {}, settings, {}

    def preprocess(self, text: str) -> dict:
        return {"text": text}

    def _forward(self, inputs: dict, **settings):
        return self.model.infill(self.tokenizer, [inputs["text"]], return_outputs=True, **settings)

    def postprocess(self, output) -> dict:
        return {
            "text": output.texts[0],
            "written": output.written[0],
            "lengths": list(output.lengths[0]),
            "length_scores": output.length_scores[0],
            "log_likelihood": float(output.generation.log_probs.sum()),
        }


PIPELINE_REGISTRY.register_pipeline(
    "infilling",
    pipeline_class=A3InfillingPipeline,
    pt_model=A3LlamaForCausalLM,
    default=None,
    type="text",
)
