"""The configuration of masked diffusion: LLaMA's, bidirectional, with a mask token."""

from transformers import LlamaConfig

LOADABLE_MODEL_TYPES = ("llama", "masked_diffusion_llama")


class MaskedDiffusionLlamaConfig(LlamaConfig):
    """Configuration of a masked diffusion LLaMA. Identical to `LlamaConfig` except:

    - `mask_token_id`, what stands for an unknown token, with probability 0 everywhere. None until one is set (see
      `MaskedDiffusionLlamaForCausalLM.set_mask_token`);
    - `is_causal` is False, by which transformers' LLaMA sees both sides; True is LLaMA itself;
    - `model_type` is `"masked_diffusion_llama"`, and a `config.json` of model type `"llama"` is read as one of ours, so
      that a plain LLaMA checkpoint loads as it is; any other model type raises a `ValueError` that names those two.
    """

    model_type = "masked_diffusion_llama"

    mask_token_id: int | None = None
    is_causal: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id={self.mask_token_id}: expected an id below vocab_size={self.vocab_size}")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type not in LOADABLE_MODEL_TYPES:
            raise ValueError(
                f"pretrained_model_name_or_path={str(pretrained_model_name_or_path)!r} holds a checkpoint of model type "
                f"{model_type!r}; masked diffusion loads checkpoints of model type "
                f"{' or '.join(map(repr, LOADABLE_MODEL_TYPES))} (LLaMA 2 and 3.x, TinyLlama, SmolLM2, …)"
            )
        if model_type != cls.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type, "architectures": None}
        return config_dict, kwargs
