"""The config sections of the layers: plain numbers and names, so that all may import them.

What is allowed is checked where a value acts: each layer's module has the table of its variants
and a `validate`.
"""

import dataclasses

from t5x_lite.errors import Count, Positive, Rate, Seed, Share


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """How fresh parameters are drawn; every number is a standard deviation or a factor on one."""

    # fan_in: std = fan_in**-0.5 (T5); fan_avg: (2 / (fan_in + fan_out))**0.5 (Xavier);
    # fixed: kernel_std (GPT-2 section 2.3, BERT).
    kernel: str = "fan_in"
    kernel_std: float = 0.02
    embedding_std: float = 1.0     # token embeddings (T5: 1.0)
    position_std: float = 0.02     # learned absolute positions
    logits_std: float = 0.0        # 0: as kernels
    scale_query: bool = True       # T5: query std divided by sqrt(head_dim), attention unscaled
    output_factor: float = 1.0     # attention-out and mlp-out kernels (GPT-2: (2 layers)**-0.5)
    value_factor: float = 1.0      # value, attention-out and mlp kernels (DeepNorm's beta)


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """RMSNorm (Zhang & Sennrich 2019, T5) or LayerNorm (Ba et al. 2016)."""

    kind: str = "rms"        # one of norm.KINDS
    epsilon: float = 1e-6
    use_bias: bool = False   # layer only
    scale_offset: float = 0.0   # the scale is this plus its parameter, in float32 (Gemma: 1)


@dataclasses.dataclass(frozen=True)
class RotaryScalingConfig:
    """Rotary frequencies for sequences longer than those of pre-training, see
    position.frequencies."""

    kind: str = "none"            # one of position.ROTARY_SCALINGS
    factor: Positive = 1.0           # new length / original_length
    original_length: Count = 8192   # llama3, yarn: length of pre-training
    low_frequency: float = 1.0    # llama3: fewer turns over original_length are slowed in full …
    high_frequency: float = 4.0   # … and more turns not at all
    beta_slow: float = 1.0        # yarn: the same two numbers
    beta_fast: float = 32.0
    feature_factor: float = 0.0   # yarn: on the rotated features; 0: 0.1 ln(factor) + 1


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How a stack knows the order of its tokens."""

    kind: str = "t5_bias"         # a row of position.POSITIONS
    num_buckets: Count = 32         # t5_bias
    max_distance: Count = 128       # t5_bias: farther tokens share the last bucket
    per_layer: bool = False       # t5_bias: one table a layer (UMT5) instead of one a stack
    max_length: Count = 512         # learned: the longest sequence
    offset: int = 0               # learned, sinusoidal: the index of the first token (BART: 2)
    rotary_base: Positive = 10000.0  # rotary: wavelengths 2 pi base**(2i/dim)
    rotary_fraction: Share = 1.0  # rotary: share of the head dim that is rotated
    rotary_interleaved: bool = False  # rotary: pairs (2i, 2i+1) as in RoFormer, not (i, i+dim/2)
    rotary_scaling: RotaryScalingConfig = RotaryScalingConfig()


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Latent attention, see attention.LatentAttention; defaults are DeepSeek-V2's."""

    rank: Count = 512            # features of the latent that keys and values are made of
    query_rank: int = 0          # features of the one that queries are made of; 0: none
    rotary_dim: Count = 64       # of head_dim: features that carry the position, shared by the heads
    value_dim: Count = 128       # features of a head's value
    norm_epsilon: Positive = 1e-6   # of the latents' RMSNorms


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """Which keys longformer and bigbird see, beside AttentionConfig.window; see sparse_attention.py."""

    block: Count = 64          # bigbird: tokens of a block; longformer's is the window
    global_tokens: int = 1     # first tokens of a row, which see all and are seen by all
    random_blocks: int = 0     # bigbird: random blocks of keys for each block of queries
    seed: Seed = 0             # of these blocks


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer."""

    num_heads: Count = 8
    head_dim: Count = 64
    num_kv_heads: int = 0          # 0: num_heads; 1: multi-query (Shazeer 2019); else grouped
    scale: float = 0.0             # factor on the logits; 0: head_dim**-0.5 (T5: 1)
    use_bias: bool = False         # on query, key and value
    use_out_bias: bool = False
    qk_norm: bool = False          # a norm over queries and keys, before positions
    qk_norm_over: str = "head"     # head: of each head (Qwen 3) | all: over all heads (OLMo 2)
    qk_norm_config: NormConfig = NormConfig()
    logit_softcap: float = 0.0     # c * tanh(logits / c); 0: none
    window: int = 0                # see masks.Masking.window
    # Share of the keys that each key/value head loses, for all queries alike (as T5X drops).
    dropout_rate: Rate = 0.0
    implementation: str = "auto"   # of attention_implementations.IMPLEMENTATIONS; decoding is plain
    chunk: Count = 1024              # chunked: queries, and keys, at a time
    kind: str = "heads"            # a row of attention.ATTENTIONS
    latent: LatentConfig = LatentConfig()   # of kind=latent
    sparse: SparseConfig = SparseConfig()   # of kind=longformer and bigbird

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.num_kv_heads or self.num_heads


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """What mixes the tokens of a row; of all kinds but `attention` this is the whole config."""

    kind: str = "attention"      # a row of blocks.MIXERS; attention: as self_attention says
    expand: Positive = 1.0       # inner features over embed_dim (Mamba-2: 2)
    head_dim: Count = 64         # of them in a head; rg_lru: in a block of its gates
    state_dim: Count = 64        # features of a head's keys and queries: rows of its state
    taps: Count = 4              # of convolutions along the row: conv, rg_lru, ssd
    max_length: Count = 512      # gmlp: the longest row
    chunk: Count = 64            # linear, retention, gated_linear, ssd: tokens at a time
    use_bias: bool = False       # on the projections into and out of it


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """wo(act(wi(x))), or gated wo(act(wi_0(x)) * wi_1(x)) (Shazeer 2020, GLU variants)."""

    mlp_dim: Count = 2048
    activation: str = "gelu_tanh"   # a row of mlp.ACTIVATIONS
    gated: bool = True              # T5 1.1: gelu_tanh gated; SwiGLU: silu gated
    use_bias: bool = False
    dropout_rate: Rate = 0.0       # on the hidden activations


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of an MLP."""

    num_experts: Count = 8
    mlp: MLPConfig = MLPConfig()       # each expert; its dropout_rate is the expert dropout,
    #                                    0.4 in fine-tuning (Switch section 2.4)
    router: str = "switch"             # a row of routing.ROUTERS
    top_k: Count = 2                     # experts a token uses, for router="top_k"
    renormalize: bool = True           # top_2 and top_k: the used experts' gates sum to 1
    second_policy: str = "all"         # top_2 in training: all | none | threshold | random
    eval_second_policy: str = "all"    # top_2 in evaluation: all | none | threshold
    second_threshold: float = 0.5      # of the second expert's share, for those policies
    prioritized: bool = False          # serve probable tokens first (V-MoE), not in order
    # Room an expert has for one group: factor * tokens of the group / experts (Switch eq. 3),
    # whatever the number of choices: top-2 routers want about twice as much.
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    expert_capacity: int = 0           # that room in tokens, instead of the factors
    dropless: bool = False             # every choice is computed, whatever the load
    overflow: str = "zero"             # what dropped tokens get: zero | identity (p x, as the
    #                                    Hugging Face Switch models were evaluated)
    group_size: int = 0                # tokens that compete for room: 0 is a sequence; else a
    #                                    divisor or a multiple of the sequence length
    mask_padding: bool = True          # padding takes no room and counts in no loss
    loss_mean: str = "real"            # tokens by whose number the losses divide: real | all, as
    #                                    Flaxformer does, whose runs continue with it
    jitter: float = 0.0                # multiplicative noise on the router's input, train only
    balance_weight: float = 0.01       # of the load-balancing loss
    balance_choices: str = "all"       # choices it counts: all | first (GShard)
    z_weight: float = 0.0              # of the router z-loss (ST-MoE: 0.001)
    expert_groups: Count = 1             # equal groups of experts, one a slice or host, …
    max_groups: Count = 1                # … of which a token's experts lie in this many at most
    gate_scale: Positive = 1.0         # top_k: on the gates (DeepSeek-V2: 16)
    shared_experts: int = 0            # experts that every token uses, as one MLP that wide
    router_bias: bool = False
    router_std: float = 0.02           # of the fresh router kernel
    hash_seed: Seed = 0                 # for router="hash"
