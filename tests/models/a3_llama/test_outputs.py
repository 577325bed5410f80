"""What methods return can be printed."""

import torch

from tests.conftest import tiny_model


def test_outputs_are_printed_by_their_shapes(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, slot_start="left_token")
    ids = torch.tensor([[0, 5, 6]])
    output = model.generate_any_order(ids, max_new_tokens=4, output_history=True)
    shown = repr(output)
    assert (
        "sequences=<int64 (1, 7)>" in shown
        and "history=<4 of <int64 (1, 7)>>" in shown
        and "num_forward_passes=4" in shown
    )
    assert "tensor(" not in shown and len(shown) < 600
    filled = model.infill(tokenizer, "The dog <blank:2> home.", return_outputs=True)
    assert filled.texts[0] in eval(repr(filled.texts)) and "generation=A3GenerateOutput(sequences=<int64" in repr(
        filled
    )
    scored = model.score(tokenizer, "The dog ran home.")
    assert "log_probs=<float64 (1, " in str(scored) and "tensor(" not in str(scored)
