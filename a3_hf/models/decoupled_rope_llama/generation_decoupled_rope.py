"""Any-order generation of Decoupled RoPE, as a difference from A3's: there are no slots."""

import torch
from transformers.cache_utils import Cache

from a3_hf.models.a3_llama.generation import A3GenerationMixin
from a3_hf.models.a3_llama.generation_cache import first_tokens
from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.models.a3_llama.generation_runner import ForwardRunner

from .configuration_decoupled_rope_llama import SINGLETONS_ONLY


class DecoupledRopeRunner(ForwardRunner):
    """Identical to `ForwardRunner` except: a pass has no rows for slots. A slot is predicted by the token before it, the last
    one that its row encodes; a row without a slot holds its last token back until it has one.
    """

    held: torch.Tensor | None = None  # (B, 1) columns held back until there is a slot; the padding column if none

    def forward(
        self,
        content: torch.Tensor,
        slots: torch.Tensor,
        *,
        singletons: bool = False,
        slot_groups: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encodes the new columns `content` (B, C), each a group, and returns logits (B, 1, V) of the columns `slots` (B, 1),
        given all content so far. C = 1 after the first pass. `singletons` and `slot_groups` are ignored.

        Raises:
            ValueError: more than one slot per row.
        """
        canvas, pad_column = self.canvas, self.canvas.pad_column
        if slots.shape[1] != 1:
            raise ValueError(f"order has {slots.shape[1]} tokens in a group: expected 1. {SINGLETONS_ONLY}")
        # 1. The columns to encode. The last one of each row predicts its slot.
        if self.held is not None:
            content = torch.where(content == pad_column, self.held, content)
        place = torch.arange(1, content.shape[1] + 1, device=content.device)
        last = (place * (content != pad_column)).argmax(dim=1, keepdim=True)
        text = torch.cat([self.encoded, content, slots], dim=1)
        if self.ragged:
            asking = content.gather(1, last)
            asks_nothing = slots == pad_column
            self.held = asking.masked_fill(~asks_nothing, pad_column)
            content = content.scatter(1, last, asking.masked_fill(asks_nothing, pad_column))
        num_cached = self.encoded.shape[1]
        self.encoded = torch.cat([self.encoded, content], dim=1)

        # 2. Each token's successor: the next column that is not the padding column.
        columns, successors = self.encoded, text[:, 1:]
        if self.ragged:
            places = torch.arange(text.shape[1], device=text.device)
            next_places = torch.where(text == pad_column, text.shape[1] - 1, places)
            successors = text.gather(1, next_places.flip(1).cummin(dim=1).values.flip(1)[:, 1:])
        if self.cache is None:
            last = last + num_cached
        else:
            columns, successors = columns[:, num_cached:], successors[:, num_cached:]

        # 3. One pass.
        call = self.call if self.compiled_call is None or self.passes == 0 else self.compiled_call
        self.passes += 1
        return call(
            input_ids=canvas.sequences.gather(1, columns),
            position_ids=canvas.position_ids.gather(1, columns),
            target_position_ids=canvas.position_ids.gather(1, successors),
            attention_mask=(self.encoded != pad_column).long() if self.ragged else None,
            cache=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=last,
        ).logits

    def _encode_again(self, columns: torch.Tensor, cache: Cache, key_mask: torch.Tensor) -> None:
        canvas = self.canvas
        place = torch.arange(canvas.pad_column, device=columns.device)
        after = canvas.given_mask & (place > columns)
        successors = torch.where(after, place, canvas.pad_column).amin(dim=1, keepdim=True)
        self.model.model(
            input_ids=canvas.sequences.gather(1, columns),
            position_ids=canvas.position_ids.gather(1, columns),
            target_position_ids=canvas.position_ids.gather(1, successors),
            attention_mask=key_mask.long(),
            cache=cache,
            use_cache=True,
        )

    def _take(self, cache: Cache) -> None:
        # The states of a row's last token depend on the position of its successor, which may differ now.
        length = cache.get_seq_length()
        if length <= self.lead:
            given = self.canvas.given_mask[:, :length]
            place = torch.arange(length, device=given.device)
            last = torch.where(given.any(dim=1), place.masked_fill(~given, -1).amax(dim=1), length - 1)
            cache = first_tokens(cache, int(last.min()))
        if cache.get_seq_length() > 0:
            super()._take(cache)


class DecoupledRopeGenerationMixin(A3GenerationMixin):
    """Mixin with `generate_any_order`, one token per pass in a predefined order; otherwise as A3's."""

    encoder_class = DecoupledRopeRunner

    def check_generation(self, config: A3GenerationConfig) -> None:
        """Raises a ValueError for settings that predict several positions in one pass: other strategies, groups larger than
        one, and `max_time`, which fills the remaining blanks at once.
        """
        if config.strategy != "groupwise":
            raise ValueError(f"strategy={config.strategy!r}: expected 'groupwise'. {SINGLETONS_ONLY}")
        if (config.group_size or 1) > 1:
            raise ValueError(f"group_size={config.group_size}: expected 1. {SINGLETONS_ONLY}")
        if config.max_time is not None:
            raise ValueError(
                f"max_time={config.max_time}: expected None, as it fills the remaining blanks at once. {SINGLETONS_ONLY}"
            )
