"""The configuration: LLaMA's, under the model type `a3_llama`."""

from transformers import LlamaConfig

LOADABLE_MODEL_TYPES = ("llama", "a3_llama")


class A3LlamaConfig(LlamaConfig):
    """Configuration of an A3 any-order LLaMA. Identical to `LlamaConfig` except:

    - `model_type` is `"a3_llama"`, and a `config.json` of model type `"llama"` is read as one of ours, so that a plain
      LLaMA checkpoint loads as it is;
    - any other model type raises a `ValueError` that names those two.
    """

    model_type = "a3_llama"

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type not in LOADABLE_MODEL_TYPES:
            raise ValueError(
                f"pretrained_model_name_or_path={str(pretrained_model_name_or_path)!r} holds a checkpoint of model type "
                f"{model_type!r}; A3 loads checkpoints of model type {' or '.join(map(repr, LOADABLE_MODEL_TYPES))} "
                "(LLaMA 2 and 3.x, TinyLlama, SmolLM2, …)"
            )
        if model_type != cls.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type, "architectures": None}
        return config_dict, kwargs
