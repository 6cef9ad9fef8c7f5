"""Mesh TensorFlow's names of T5's parameters (the first public T5 and T5 1.1 checkpoints).

The mapping to T5X's names is the one that T5X published with its importer; the arrays
themselves are laid out alike. Reading the files needs TensorFlow and is the command's part.
"""

import re
from collections.abc import Mapping

from t5x_lite.errors import UserError
from t5x_lite.formats.mapping import Shape, Tensors

_ATTENTION = {"encoder": {"SelfAttention": "attention"},
              "decoder": {"SelfAttention": "self_attention",
                          "EncDecAttention": "encoder_decoder_attention"}}
_MATRIX = {"q": "query", "k": "key", "v": "value", "o": "out"}
_NORMS = {"encoder": ("pre_attention", "pre_mlp"),
          "decoder": ("pre_self_attention", "pre_cross_attention", "pre_mlp"),
          "transformer": ("pre_self_attention", "pre_mlp")}   # decoder-only
_SIDE = r"(encoder|decoder|transformer)"
_LAYER = rf"{_SIDE}/block_(\d{{1,9}})/layer_(\d{{1,9}})"
_NORM = r"(?:layer|rms|final_layer)_norm/scale"


def t5x_name(name: str) -> str | None:
    """T5X's name of a parameter; None for optimizer slots and the step.

    Raises:
        UserError: a variable that is none of T5's.
    """
    if name == "global_step" or re.search(r"_slot_\w+$", name):
        return None
    if name == "shared/embedding":
        return "token_embedder/embedding"
    if re.fullmatch(r"(decoder|transformer)/logits/kernel", name):
        return "decoder/logits_dense/kernel"
    if match := re.fullmatch(rf"{_SIDE}/{_NORM}", name):
        side = _side(match.group(1))
        return f"{side}/{side}_norm/scale"
    match = re.fullmatch(rf"{_LAYER}/(.+)", name)
    if match is not None:
        tower, block, layer, rest = match.groups()
        if ours := _in_layer(tower, int(layer), rest):
            return f"{_side(tower)}/layers_{int(block)}/{ours}"
    raise UserError(f"variable {name} of the Mesh TensorFlow checkpoint is none of T5's.")


def _side(tower: str) -> str:
    return "encoder" if tower == "encoder" else "decoder"


def _in_layer(tower: str, layer: int, rest: str) -> str | None:
    if re.fullmatch(_NORM, rest):
        if layer >= len(_NORMS[tower]):
            return None
        return f"{_NORMS[tower][layer]}_layer_norm/scale"
    if rest == "SelfAttention/relative_attention_bias":
        return "relpos_bias/rel_embedding"
    if match := re.fullmatch(r"(SelfAttention|EncDecAttention)/([qkvo])", rest):
        return f"{_ATTENTION[_side(tower)][match.group(1)]}/{_MATRIX[match.group(2)]}/kernel"
    if match := re.fullmatch(r"DenseReluDense/(wi|wi_0|wi_1|wo)/kernel", rest):
        return f"mlp/{match.group(1)}/kernel"
    return None


def by_t5x_names(tensors: Tensors) -> Tensors:
    """The parameters by T5X's names, without the optimizer's.

    A relative bias that only layer 0 has is shared by the stack. Raises UserError, see t5x_name.
    """
    stored = {t5x: name for name in tensors.shapes if (t5x := t5x_name(name)) is not None}
    shared = {side: _shares_bias(side, stored) for side in ("encoder", "decoder")}
    stored = {re.sub(r"^(encoder|decoder)/layers_0/relpos_bias",
                     lambda m: f"{m[1]}/relpos_bias" if shared[m[1]] else m[0], t5x): name
              for t5x, name in stored.items()}
    return Tensors({t5x: tensors.shapes[name] for t5x, name in stored.items()},
                   {t5x: tensors.dtypes[name] for t5x, name in stored.items()},
                   lambda t5x: tensors.read(stored[t5x]))


def _shares_bias(side: str, names: Mapping[str, Shape | str]) -> bool:
    return sum(bool(re.fullmatch(rf"{side}/layers_\d+/relpos_bias/rel_embedding", n))
               for n in names) == 1
