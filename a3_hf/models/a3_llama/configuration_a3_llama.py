"""Configuration of A3 on LLaMA (model type `a3_llama`)."""

from transformers import LlamaConfig

LOADABLE_MODEL_TYPES = ("llama", "a3_llama")
SLOT_STARTS = ("query_embed", "left_token")


def check_suffix_template(suffix_template: str | None) -> None:
    """Raises ValueError unless a template holds `{suffix}` once."""
    if suffix_template is not None and (not isinstance(suffix_template, str) or suffix_template.count("{suffix}") != 1):
        raise ValueError(
            f"suffix_template={suffix_template!r}: expected text with {{suffix}} in it once, as 'Later: {{suffix}}\n\n'"
        )


class A3LlamaConfig(LlamaConfig):
    """Configuration of an A3 any-order LLaMA. Identical to `LlamaConfig` except:

    - `model_type` is `"a3_llama"`; a `config.json` of model type `"llama"` is accepted too, so plain LLaMA checkpoints load
      directly. Any other model type raises a `ValueError`.
    - `slot_start` is the input embedding of a query slot. `"left_token"` (default; not in the paper): the embedding of the
      token to the left of the predicted one if the slot sees it, else `query_embed`; RoPE uses the left token's position.
      From left to right, a slot's logits then equal LLaMA's before any training. `"query_embed"` (the paper's): one learnt
      vector for all slots, useless before training. Checkpoints of type `"a3_llama"` without the field get `"query_embed"`,
      the default when they were saved.
    - `suffix_template`: words with `{suffix}` in them (not in the paper). `infill` puts them in front of a text, with the text
      after the last blank in place of `{suffix}`, because a LLaMA has learnt from text on its left. None: the suffix stays in
      place.
    """

    model_type = "a3_llama"

    slot_start: str = "left_token"
    suffix_template: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.slot_start not in SLOT_STARTS:
            raise ValueError(f"slot_start={self.slot_start!r}: expected {' or '.join(map(repr, SLOT_STARTS))}")
        check_suffix_template(self.suffix_template)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The Auto classes pass a file's content; `get_config_dict` has already converted a LLaMA's.
        if config_dict.get("model_type") == cls.model_type and "slot_start" not in config_dict:
            config_dict = {**config_dict, "slot_start": "query_embed"}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type not in LOADABLE_MODEL_TYPES:
            raise ValueError(
                f"pretrained_model_name_or_path={str(pretrained_model_name_or_path)!r} holds a checkpoint of model type "
                f"{model_type!r}: A3 expects {' or '.join(map(repr, LOADABLE_MODEL_TYPES))} (LLaMA 2 and 3.x, TinyLlama, "
                "SmolLM2, …)"
            )
        if model_type != cls.model_type:
            start = {"slot_start": config_dict.get("slot_start", cls.slot_start)}
            config_dict = {**config_dict, **start, "model_type": cls.model_type, "architectures": None}
        return config_dict, kwargs
