"""Model shapes by name, for `model: {preset: NAME}`."""

from __future__ import annotations

from lhcp.config import ModelConfig

MODEL_PRESETS: dict[str, ModelConfig] = {
    # Byte-level, small enough for two CPU cores.
    "tiny": ModelConfig(vocab_size=257, dim=128, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=64, ffn_dim=384),
    # The model of arXiv:2605.06554: its vocabulary makes it 530M parameters (267M without).
    "llama-530m": ModelConfig(
        vocab_size=128_256, dim=1024, num_layers=30, num_heads=8, num_kv_heads=8, head_dim=128, ffn_dim=1536
    ),
}
