"""Configuration of a draft head (model type `a3_draft_head`)."""

from transformers import LlamaConfig, PreTrainedConfig

# What a head shares with its base.
OF_THE_BASE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


class DraftHeadConfig(PreTrainedConfig):
    """Sizes of a `DraftHead` and of its base.

    Attributes:
        num_drafts: distances that are guessed: the token after the next one, and those that follow.
        first_layer: the first layer of the base that slots pass; `num_hidden_layers`: none.
        rank: of the adapters in those layers; 0: none.
        sampler_size: width of the layer between, in the network that tells each draft of the one before; 0: none.
        num_candidates: tokens of the vocabulary that a draft may be.
        base_model_name_or_path: the LLaMA that the head was trained for.
    """

    model_type = "a3_draft_head"

    hidden_size: int = 576
    intermediate_size: int = 1536
    num_attention_heads: int = 9
    head_dim: int = 64
    num_hidden_layers: int = 30
    vocab_size: int = 49152
    num_drafts: int = 3
    first_layer: int = 24
    rank: int = 32
    sampler_size: int = 768
    num_candidates: int = 8192
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, least, most in (
            ("num_drafts", 1, 16),
            ("first_layer", 0, self.num_hidden_layers),
            ("rank", 0, self.hidden_size),
            ("sampler_size", 0, None),
            ("num_candidates", 2, self.vocab_size),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                expected = f"at least {least}" if most is None else f"{least} to {most}"
                raise ValueError(f"{name}={value!r}: expected {expected}")

    @classmethod
    def for_base(cls, base: LlamaConfig, **settings) -> "DraftHeadConfig":
        """Returns the configuration of a head for a LLaMA; by default, slots pass the last fifth of its layers."""
        shared = {name: getattr(base, name) for name in OF_THE_BASE}
        head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        first_layer = base.num_hidden_layers - max(1, base.num_hidden_layers // 5)
        defaults = {"first_layer": first_layer, "num_candidates": min(8192, base.vocab_size)}
        return cls(**{**shared, "head_dim": head_dim, **defaults, **settings})
