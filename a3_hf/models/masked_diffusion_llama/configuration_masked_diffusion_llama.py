"""Configuration of masked diffusion on LLaMA (model type `masked_diffusion_llama`)."""

from transformers import LlamaConfig

LOADABLE_MODEL_TYPES = ("llama", "masked_diffusion_llama")


class MaskedDiffusionLlamaConfig(LlamaConfig):
    """Configuration of a masked diffusion LLaMA. Identical to `LlamaConfig` except:

    - `mask_token_id`: the id for unknown tokens, never predicted. None until set by
      `MaskedDiffusionLlamaForCausalLM.set_mask_token`;
    - `is_causal` is False, which makes transformers' LLaMA bidirectional; True: plain LLaMA;
    - `model_type` is `"masked_diffusion_llama"`; a `config.json` of model type `"llama"` is accepted too, so plain LLaMA
      checkpoints load directly. Any other model type raises a `ValueError`.
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
                f"{model_type!r}: masked diffusion expects {' or '.join(map(repr, LOADABLE_MODEL_TYPES))} (LLaMA 2 and 3.x, "
                "TinyLlama, SmolLM2, …)"
            )
        if model_type != cls.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type, "architectures": None}
        return config_dict, kwargs
