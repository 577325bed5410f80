"""Configuration of Decoupled RoPE on LLaMA (model type `decoupled_rope_llama`)."""

from transformers import LlamaConfig

LOADABLE_MODEL_TYPES = ("llama", "decoupled_rope_llama")
SINGLETONS_ONLY = "Decoupled RoPE is not defined for groups larger than one: a token's query predicts one position"


class DecoupledRopeLlamaConfig(LlamaConfig):
    """Configuration of a LLaMA with Decoupled RoPE. Identical to `LlamaConfig` except:

    - `model_type` is `"decoupled_rope_llama"`; a `config.json` of model type `"llama"` is accepted too, so plain LLaMA
      checkpoints load directly;
    - any other model type raises a `ValueError`, including A3's, whose weights are trained for two streams.
    """

    model_type = "decoupled_rope_llama"

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type not in LOADABLE_MODEL_TYPES:
            hint = ""
            if model_type == "a3_llama":
                hint = (
                    ". To use an A3 model's LLaMA weights, load it as LlamaForCausalLM, save that, and load the result."
                )
            raise ValueError(
                f"pretrained_model_name_or_path={str(pretrained_model_name_or_path)!r} holds a checkpoint of model type "
                f"{model_type!r}: Decoupled RoPE expects {' or '.join(map(repr, LOADABLE_MODEL_TYPES))}{hint}"
            )
        if model_type != cls.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type, "architectures": None}
        return config_dict, kwargs
