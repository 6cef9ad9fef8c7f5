"""Salient span masking: a sentence, one of its names or dates hidden, to be filled in.

Guu et al. 2020 (REALM, arXiv:2002.08909, §3.4) and, for T5, Roberts et al. 2020
(arXiv:2002.08910): "nem: Franklin was born in _X_ in Boston." -> "January 1706". Each span of a
sentence makes an example of its own.

    salient_span_masked_wikipedia   the authors' sentences and spans, through TFDS
    span_corrupted_wikipedia        the same sentences under T5's span corruption
    data.denoising=salient          a user's own text files, with the detector below

The detector finds dates by patterns and names by capital letters: BERT's tagger of the paper is
not needed for text of a few languages and megabytes. It is Python, and runs ahead of tf.data.
"""


import seqio

from t5x_lite.data import preprocessors, text_to_text
from t5x_lite.data.salient_spans import mask_salient_spans
from t5x_lite.data.span_corruption import span_corruption

# --- the authors' data ----------------------------------------------------------------------


# --- dates and names in any text ------------------------------------------------------------


def _register() -> None:
    source = text_to_text.TfdsSource("salient_span_wikipedia/sentences:1.0.0", ("train",))
    text_to_text.register("salient_span_masked_wikipedia", source, mask_salient_spans)
    seqio.TaskRegistry.add(
        "span_corrupted_wikipedia", source=source,
        preprocessors=[preprocessors.tokenize, span_corruption],
        output_features=text_to_text.features())


_register()
