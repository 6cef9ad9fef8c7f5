"""The config section of a model: stacks of segments of blocks, and what stands around them."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from t5x_lite.errors import Count, Rate
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MixerConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
)
from t5x_lite.parallel.pipeline_schedules import PipelineConfig


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One block; what is None is absent."""

    self_attention: AttentionConfig = AttentionConfig()
    cross_attention: AttentionConfig | None = None
    mlp: MLPConfig = MLPConfig()
    moe: MoEConfig | None = None   # takes the place of `mlp`
    # None: the stack's; else rotary or none (Gemma 3: another base in local layers).
    position: PositionConfig | None = None
    mixer: MixerConfig = MixerConfig()   # what mixes tokens; attention: `self_attention`


@dataclasses.dataclass(frozen=True)
class SegmentConfig:
    """`blocks` in a row, `repeats` times, with stacked parameters."""

    blocks: tuple[BlockConfig, ...] = (BlockConfig(),)
    repeats: Count = 1


def segments_of(blocks: Sequence[BlockConfig]) -> tuple[SegmentConfig, ...]:
    """The segments of a stack with these layers: where a few of them recur (local, local, global,
    …), they are the blocks of one segment; what recurs most comes first."""
    names = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    kinds = [names[block] for block in blocks]
    segments: list[SegmentConfig] = []
    at = 0
    while at < len(blocks):
        period, repeats = max(_recurring(kinds[at:]), key=lambda pair: (pair[0] * pair[1], -pair[0]),
                              default=(1, 1))
        segments.append(SegmentConfig(tuple(blocks[at:at + period]), repeats))
        at += period * repeats
    return tuple(segments)


_MAX_PERIOD = 64   # more blocks than any pattern has


def _recurring(kinds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(period, repeats) of each beginning that recurs at once."""
    for period in range(1, min(_MAX_PERIOD, len(kinds) // 2) + 1):
        same = itertools.takewhile(lambda pair: pair[0] == pair[1],
                                   zip(kinds, kinds[period:], strict=False))
        repeats = 1 + sum(1 for _ in same) // period
        if repeats > 1:
            yield period, repeats


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """An encoder or a decoder."""

    segments: tuple[SegmentConfig, ...] = (SegmentConfig(),)
    causal: bool = False
    position: PositionConfig = PositionConfig()
    norm: NormConfig = NormConfig()
    residual: str = "pre"           # a row of blocks.RESIDUALS
    residual_alpha: float = 1.0     # deepnorm: weight of the skip path, see blocks.deepnorm_constants
    branch_scale: float = 1.0       # on what each sub-layer adds to the residual stream
    embedding_norm: bool = False    # a norm on the embeddings, positions included (BERT, BART)
    final_norm: bool = True
    dropout_rate: Rate = 0.0       # on embeddings, sub-layer outputs and the final norm
    adapter_dim: int = 0            # of bottleneck adapters behind every sub-layer; 0: none
    scan: bool = True               # see pipeline.run_layers
    remat: str = "none"             # see remat.py
    pipeline: PipelineConfig = PipelineConfig()   # where mesh.stage > 1
    init: InitConfig | None = None  # None: the model's

    @property
    def num_layers(self) -> int:
        """Blocks in all."""
        return sum(len(s.blocks) * s.repeats for s in self.segments)

    @property
    def has_mixtures(self) -> bool:
        """Whether some block has a mixture of experts."""
        return any(block.moe for s in self.segments for block in s.blocks)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model."""

    architecture: str = "encoder_decoder"   # a row of language_model.ARCHITECTURES
    vocab_size: Count = 32128                 # rows of the embedding, padding included
    embed_dim: Count = 512
    encoder: StackConfig | None = StackConfig()
    decoder: StackConfig | None = StackConfig(causal=True)
    tie_logits: bool = False                # logits through the embedding table
    logits_scale: float = 1.0               # on the hidden state (T5 1.0, tied: embed_dim**-0.5)
    logits_softcap: float = 0.0             # c * tanh(logits / c); 0: none
    logits_bias: bool = False
    head_transform: str = ""                # BERT: dense, this activation, norm, before the logits
    embedding_scale: float = 1.0            # on the embedded tokens
    token_types: int = 0                    # BERT: 2; ids in the batch's encoder_token_types
    decoder_start_id: int = 0               # the token that the decoder behind an encoder begins with
    further_tokens: int = 0                 # predicted beside the next one, see further_tokens.py
    # A number a position beside the logits: what objectives reward (the score of an answer) and ppo (the
    # value of its beginning) learn. It starts at 0, and init_from need not hold it.
    scalar_head: bool = False
    prompt_length: int = 0                  # learned vectors before the encoder's row, or before
    #                                         that of a decoder without encoder; not for packing
    init: InitConfig = InitConfig()
    # A row of parametrization.PARAMETRIZATIONS. mup: learning rates, and all numbers here that are no
    # sizes, are those of the model of width base_width, and serve every width.
    parametrization: str = "standard"
    base_width: int = 0                     # mup: embed_dim of the model that was tuned
    base_head_dim: int = 0                  # mup: its head_dim; 0: the same as here
    base_depth: int = 0                     # mup: layers of each of its stacks; 0: as many as here

    @property
    def has_mixtures(self) -> bool:
        """Whether some block has a mixture of experts."""
        return any(stack.has_mixtures for stack in (self.encoder, self.decoder) if stack)
