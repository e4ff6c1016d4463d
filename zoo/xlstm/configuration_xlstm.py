"""Configuration of xLSTM."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..core.configuration import RecurrentConfig


@strict
class xLSTMConfig(RecurrentConfig):
    """`RecurrentConfig`, where `head_dim` is the width of a value head, with bounded logits and the sizes of the mLSTM.

    Args:
        xlstm_key_width: channels of a head of q and k; None: half of `head_dim`.
        xlstm_gate_cap: c in c * tanh(x / c), the bound of the logits of input and forget gates; None: no bound.
        xlstm_eps: added to the normaliser.
    """

    model_type = "rnnzoo-xlstm"
    mixer = "xlstm"
    sizes = {
        "7B": {"vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 32}
        | {"num_attention_heads": 8}
    }

    rms_norm_eps: float = 1e-6
    logit_cap: float | None = 30.0
    xlstm_key_width: int | None = None
    xlstm_gate_cap: float | None = 15.0
    xlstm_eps: float = 1e-6

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        if config.xlstm_key_width is None:
            config.xlstm_key_width = max(1, config.head_dim // 2)
        if config.xlstm_key_width < 1:
            raise ValueError(f"xlstm_key_width must be positive, got {config.xlstm_key_width}.")
        if config.xlstm_gate_cap is not None and config.xlstm_gate_cap <= 0:
            raise ValueError(f"xlstm_gate_cap must be positive, or None for no bound; got {config.xlstm_gate_cap}.")

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Keys as wide as an attention layer's, and logits without the bound that the teacher does not have."""
        return {"xlstm_key_width": head_dim, "logit_cap": None}
