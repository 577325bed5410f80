"""The configuration: LLaMA's, under the model type `decoupled_rope_llama`."""

from transformers import LlamaConfig

LOADABLE_MODEL_TYPES = ("llama", "decoupled_rope_llama")
SINGLETONS_ONLY = "Decoupled RoPE is not defined for groups larger than one: the query of a token asks for one position"


class DecoupledRopeLlamaConfig(LlamaConfig):
    """Configuration of a LLaMA with Decoupled RoPE. Identical to `LlamaConfig` except:

    - `model_type` is `"decoupled_rope_llama"`, and a `config.json` of model type `"llama"` is read as one of ours, so that
      a plain LLaMA checkpoint loads as it is;
    - any other model type raises a `ValueError` that names those two. Of an A3 checkpoint, whose weights are trained for two
      streams, only the LLaMA in it can be taken, and only by hand.
    """

    model_type = "decoupled_rope_llama"

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type not in LOADABLE_MODEL_TYPES:
            hint = ""
            if model_type == "a3_llama":
                hint = "; an A3 model has two streams: save the LLaMA in it (LlamaForCausalLM.from_pretrained), and load that"
            raise ValueError(
                f"pretrained_model_name_or_path={str(pretrained_model_name_or_path)!r} holds a checkpoint of model type "
                f"{model_type!r}; Decoupled RoPE loads checkpoints of model type "
                f"{' or '.join(map(repr, LOADABLE_MODEL_TYPES))}{hint}"
            )
        if model_type != cls.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type, "architectures": None}
        return config_dict, kwargs
