"""The tokenizer.json of a SentencePiece model: what transformers' AutoTokenizer reads as the same ids.

transformers' own T5Tokenizer is for T5's own kind of model alone (unigram, without bytes, spaces made
one) and ends every text with EOS; of another it makes other ids, without a word.
"""

from typing import Any

_EXTRA_ID = "<extra_id_"   # in seqio's sentinels, which it adds as pieces of the user's


def is_t5s_kind(processor: Any) -> bool:
    """Whether T5Tokenizer gives the ids of this model: a unigram as T5's own."""
    model = _model(processor)
    trained, text = model.trainer_spec, model.normalizer_spec
    return (trained.model_type == trained.UNIGRAM and not trained.byte_fallback
            and text.remove_extra_whitespaces and text.add_dummy_prefix
            and _special(processor) == {"pad_token": "<pad>", "eos_token": "</s>",
                                        "unk_token": "<unk>"})


def convert(processor: Any, ends: bool) -> tuple[bytes, dict[str, str]]:
    """(tokenizer.json, {"eos_token": its piece, …}); (b"", {}) of a kind that it cannot be written for.

    Args:
        processor: a sentencepiece.SentencePieceProcessor.
        ends: whether a text ends with EOS, as an encoder's does; it starts with nothing.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    model, special = _model(processor), _special(processor)
    pieces = _pieces_model(model)
    if pieces is None or "unk_token" not in special or (ends and "eos_token" not in special):
        return b"", {}
    tokenizer = Tokenizer(pieces)
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    tokenizer.decoder = _decoder(model)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special.values()])
    if ends:
        end = special["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(   # type: ignore[assignment]
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, processor.eos_id())])
    return tokenizer.to_str().encode(), special


def _model(processor: Any) -> Any:
    from sentencepiece import sentencepiece_model_pb2
    return sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())


def _special(processor: Any) -> dict[str, str]:
    """{what transformers calls it: its piece} of the special pieces that the model has; BOS is none that
    a model of ours reads."""
    ids = {"pad_token": processor.pad_id(), "eos_token": processor.eos_id(),
           "unk_token": processor.unk_id()}
    return {name: processor.IdToPiece(i) for name, i in ids.items() if i >= 0}


def _pieces_model(model: Any) -> Any:
    """What cuts a text into pieces; None of a kind that tokenizers has not."""
    from tokenizers import models
    trained, text = model.trainer_spec, model.normalizer_spec
    if trained.treat_whitespace_as_suffix or not text.escape_whitespaces:
        return None
    names = [piece.piece for piece in model.pieces]
    if trained.model_type == trained.UNIGRAM:
        unknown = next(i for i, p in enumerate(model.pieces) if p.type == p.UNKNOWN)
        return models.Unigram([(p.piece, p.score) for p in model.pieces], unk_id=unknown,
                              byte_fallback=trained.byte_fallback)
    # A symbol of the user's stands before all merges, which no merge can say.
    own = any(p.type == p.USER_DEFINED and _EXTRA_ID not in p.piece for p in model.pieces)
    if trained.model_type != trained.BPE or own or len(set(names)) < len(names):
        return None
    unknown = next(p.piece for p in model.pieces if p.type == p.UNKNOWN)
    return models.BPE({name: i for i, name in enumerate(names)}, _merges(model), unk_token=unknown,
                      fuse_unk=True, byte_fallback=trained.byte_fallback)


def _merges(model: Any) -> list[tuple[str, str]]:
    """Pairs of pieces, those that make the best piece first."""
    scores = {p.piece: p.score for p in model.pieces if p.type == p.NORMAL}
    ranks = {piece: rank for rank, piece in enumerate(sorted(scores, key=lambda p: -scores[p]))}
    found = []
    for whole, rank in ranks.items():
        cuts = ((whole[:i], whole[i:]) for i in range(1, len(whole)))
        found += [(rank, ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
    return [(a, b) for *_, a, b in sorted(found)]


def _normalizer(text: Any) -> Any:
    """Their table of characters, then spaces, then "▁" for each."""
    from tokenizers import Regex, normalizers
    steps: list[Any] = []
    if text.precompiled_charsmap:
        steps.append(normalizers.Precompiled(text.precompiled_charsmap))
    if text.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    if text.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _decoder(model: Any) -> Any:
    from tokenizers import decoders
    text = model.normalizer_spec
    steps: list[Any] = [decoders.Replace("▁", " ")]
    if model.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if text.add_dummy_prefix or text.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
