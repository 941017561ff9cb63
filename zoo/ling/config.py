"""The architecture's numbers, with the presets of the report.

Source: "Every FLOP Counts", arXiv 2503.05139, and the configurations released with the weights.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["LingConfig", "Preset", "RopeScaling", "preset"]

Preset = Literal["ling_tiny", "ling_lite", "ling_plus"]
ScalingType = Literal["linear", "dynamic", "yarn"]


def _check_types(config: "RopeScaling | LingConfig", prefix: str) -> None:
    """Refuse values that are not of their attribute's type; whole numbers pass as floating-point ones.

    Raises:
        ValueError: there is one.
    """
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint) or (hint,)
        if get_origin(hint) is Literal:
            continue
        plain = tuple(kind for kind in kinds if get_origin(kind) is None)
        fits = isinstance(value, (*plain, int) if float in plain else plain) and isinstance(value, bool) == (bool in plain)
        fits |= list[int] in kinds and isinstance(value, list) and all(type(item) is int for item in value)
        if not fits:
            names = ["null" if kind is type(None) else str(kind) if get_origin(kind) else kind.__name__ for kind in kinds]
            raise ValueError(f"{prefix}{name}={value!r} must be of type {' or '.join(names)}.")


@dataclass
class RopeScaling:
    """Stretching of rotary positions beyond the trained length.

    Attributes:
        type: ``linear`` divides positions by ``factor``; ``dynamic`` raises the base with the length, beyond
            ``max_position_embeddings``; ``yarn`` divides low frequencies only and scales cosine and sine.
        factor: Ratio of the stretching, at least 1.
        original_max_position_embeddings: length that was trained, for ``yarn``; None: ``max_position_embeddings``.
        beta_fast: rotations over the trained length above which ``yarn`` leaves a frequency as it is.
        beta_slow: rotations below which it divides by ``factor``.
        mscale: coefficient of the scale of cosine and sine.
        mscale_all_dim: coefficient of the divisor of that scale.

    Raises:
        ValueError: an unknown type, or numbers out of range.
    """

    type: ScalingType = "yarn"
    factor: float = 4.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.type not in get_args(ScalingType):
            raise ValueError(f"rope_scaling.type={self.type!r} must be one of {', '.join(get_args(ScalingType))}.")
        _check_types(self, "rope_scaling.")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling.factor={self.factor} must be a number of at least 1.")
        if self.original_max_position_embeddings is not None and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings={self.original_max_position_embeddings} must be at least 1."
            )
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise ValueError(f"rope_scaling: beta_slow={self.beta_slow} must be positive and at most beta_fast={self.beta_fast}.")
        if not (math.isfinite(self.mscale) and math.isfinite(self.mscale_all_dim)):
            raise ValueError(
                f"rope_scaling: mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} must be finite numbers."
            )

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> "RopeScaling":
        """Build it from plain data.

        Args:
            entries: values by the names of the attributes; ``type`` must be among them.

        Raises:
            ValueError: an unknown name, no type, or values that do not fit.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in entries if name not in known]
        if unknown or "type" not in entries:
            raise ValueError(
                f"rope_scaling={dict(entries)!r} needs type, and may have {', '.join(known[1:])}"
                + (f", but not {', '.join(unknown)}." if unknown else ".")
            )
        return cls(**entries)


@dataclass
class LingConfig:
    """A decoder-only mixture-of-experts language model; the defaults are Ling-Lite.

    Attributes:
        vocab_size: V, rows of embedding and head.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: L, blocks.
        num_attention_heads: H, query heads.
        num_key_value_heads: K, key and value heads; divides H.
        head_dim: width of a head, even; None: D / H.
        num_experts: E, routed experts a layer.
        num_experts_per_tok: k, routed experts that a token visits.
        num_shared_experts: S, width of the expert that every token visits, in units of I; 0: none.
        moe_intermediate_size: I, width of an expert.
        intermediate_size: width of a dense layer; needed where ``first_k_dense_replace`` > 0.
        first_k_dense_replace: Number of first layers that are dense instead of experts.
        norm_topk_prob: whether the k routing weights are divided by their sum (for k > 1).
        rope_theta: base of the rotary frequencies.
        rope_scaling: Stretching of positions; None: none. For ``yarn`` it names the trained length from here on.
        max_position_embeddings: trained length; tables grow beyond it on demand.
        rms_norm_eps: added to the mean square.
        norm_head: whether the head's weight is normalised over the vocabulary.
        use_bias: a bias in the attention's output projection.
        use_qkv_bias: a bias in the attention's input projection.
        tie_word_embeddings: whether the head is the embedding.
        initializer_range: standard deviation of the initial weights.
        attention_dropout: probability, in training.
        pad_token_id: id of padding, whose embedding gets no gradient; None: none.
        eos_token_id: id that ends a text, or several, the first of which ends those that are trained on; None: none.
        bos_token_id: id that begins a text; None: none.

    Raises:
        ValueError: numbers that do not fit one another, each named.
    """

    vocab_size: int = 126464
    hidden_size: int = 2048
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 6
    num_shared_experts: int = 2
    moe_intermediate_size: int = 1408
    intermediate_size: int | None = 5632
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = True
    rope_theta: float = 600000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-6
    norm_head: bool = True
    use_bias: bool = False
    use_qkv_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006
    attention_dropout: float = 0.0
    pad_token_id: int | None = 126081
    eos_token_id: int | list[int] | None = 126081
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):
            self.rope_scaling = RopeScaling.of(self.rope_scaling)
        if isinstance(self.eos_token_id, tuple):
            self.eos_token_id = list(self.eos_token_id)
        _check_types(self, "LingConfig: ")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "num_experts", "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"LingConfig: {name}={getattr(self, name)} must be at least 1.")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"LingConfig: head_dim={self.head_dim} must be at least 1, or null for hidden_size / heads.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"LingConfig: hidden_size={self.hidden_size} is no multiple of num_attention_heads="
                f"{self.num_attention_heads}: give head_dim."
            )
        if self.head_width % 2:
            raise ValueError(f"LingConfig: heads of width {self.head_width} cannot be rotated in pairs: make head_dim even.")
        if self.head_width == 2 and self.rope_scaling is not None and self.rope_scaling.type == "dynamic":
            raise ValueError("LingConfig: rope_scaling of type dynamic needs heads that are wider than 2.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"LingConfig: num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}."
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"LingConfig: num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}."
            )
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers or self.num_shared_experts < 0:
            raise ValueError(
                f"LingConfig: first_k_dense_replace={self.first_k_dense_replace} must lie in 0 ... num_hidden_layers, and "
                f"num_shared_experts={self.num_shared_experts} must not be negative."
            )
        if self.first_k_dense_replace and not self.intermediate_size:
            raise ValueError("LingConfig: dense layers (first_k_dense_replace > 0) need intermediate_size.")
        if not self.rope_theta > 1 or self.rms_norm_eps < 0 or self.initializer_range < 0:
            raise ValueError(
                f"LingConfig: rope_theta={self.rope_theta} must be above 1, rms_norm_eps={self.rms_norm_eps} and "
                f"initializer_range={self.initializer_range} must not be negative."
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"LingConfig: attention_dropout={self.attention_dropout} must lie in [0, 1).")
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            given = getattr(self, name)
            for token in given if isinstance(given, list) else [given]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"LingConfig: {name}={token} is outside of the vocabulary of {self.vocab_size}.")
        scaling = self.rope_scaling
        if scaling is not None and scaling.type == "yarn" and scaling.original_max_position_embeddings is None:
            self.rope_scaling = dataclasses.replace(scaling, original_max_position_embeddings=self.max_position_embeddings)

    @classmethod
    def presets(cls) -> dict[str, "LingConfig"]:
        """The named configurations, see `preset`."""
        return {name: cls(**changes) for name, changes in _PRESETS.items()}

    @property
    def head_width(self) -> int:
        """Width of a head: ``head_dim``, else D / H."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def replace(self, **changes: Any) -> "LingConfig":
        """A copy with other values.

        Raises:
            ValueError: there is no such value, or they do not fit one another.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := [name for name in changes if name not in known]:
            raise ValueError(f"LingConfig has no {', '.join(unknown)}; it has {', '.join(known)}.")
        return dataclasses.replace(self, **changes)

    def num_parameters(self, active: bool = False) -> int:
        """Parameters, embedding and head included.

        Args:
            active: only those that one token uses: k routed experts of each layer instead of all.
        """
        D, width = self.hidden_size, self.head_width
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * width
        attention = D * qkv + self.num_attention_heads * width * D + qkv * self.use_qkv_bias + D * self.use_bias
        experts = self.num_experts_per_tok if active else self.num_experts
        moe = self.num_experts * D + 3 * D * self.moe_intermediate_size * (experts + self.num_shared_experts)
        dense = 3 * D * (self.intermediate_size or 0)
        layers = self.num_hidden_layers * (attention + 2 * D) + self.num_moe_layers * moe + self.first_k_dense_replace * dense
        return layers + D + self.vocab_size * D * (1 if self.tie_word_embeddings else 2)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token: 6 for each parameter of its matrix products (with the head, without
        the embedding), and causal attention at half of the full square.

        Args:
            seq_len: tokens of the sequence that it stands in.
        """
        D, L = self.hidden_size, self.num_hidden_layers
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * D
        products = self.num_parameters(active=True) - embedding - D * (2 * L + 1)
        return 6.0 * products + 6.0 * L * seq_len * self.num_attention_heads * self.head_width


_PRESETS: dict[str, dict[str, Any]] = {
    "ling_lite": {},
    "ling_plus": {
        "hidden_size": 5376,
        "num_hidden_layers": 88,
        "num_attention_heads": 42,
        "num_key_value_heads": 6,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
        "moe_intermediate_size": 3072,
        "intermediate_size": 12288,
    },
    "ling_tiny": {
        "vocab_size": 264,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
        "moe_intermediate_size": 48,
        "intermediate_size": 240,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "pad_token_id": 258,
        "eos_token_id": 257,
        "bos_token_id": 256,
    },
}


def preset(name: str) -> LingConfig:
    """The configuration of a preset.

    Args:
        name: ``ling_lite`` (16.8 B parameters, 2.75 B active), ``ling_plus`` (290 B, 28.8 B active), or ``ling_tiny`` (bytes,
            for a CPU).

    Raises:
        ValueError: there is no such preset.
    """
    if name not in _PRESETS:
        raise ValueError(f"There is no preset {name!r}: choose one of {', '.join(_PRESETS)}, or give a LingConfig.")
    return LingConfig(**_PRESETS[name])
