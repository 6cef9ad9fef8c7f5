"""C4 through TFDS, with T5's public vocabulary (Raffel et al. 2020, arXiv:1910.10683).

    c4_span_corruption   T5's pre-training task
    c4_causal_lm         the same text for decoder-only models

TFDS_DATA_DIR must hold c4/en:3.0.1 (a local folder or gs://); T5X_LITE_T5_VOCAB names the
vocabulary where the network does not reach gs://t5-data.
"""

import seqio

from tasks import preprocessors, vocabularies
from tasks.span_corruption import span_corruption

_SOURCE = seqio.TfdsDataSource("c4/en:3.0.1", splits={"train": "train",
                                                      "validation": "validation"},
                               read_only=True)


def _register() -> None:
    feature = seqio.Feature(vocabularies.load("t5"), add_eos=True)
    for name, preprocessor, features in (
            ("c4_span_corruption", span_corruption, ("inputs", "targets")),
            ("c4_causal_lm", preprocessors.causal_lm, ("targets",))):
        seqio.TaskRegistry.add(name, source=_SOURCE,
                               preprocessors=[preprocessors.tokenize, preprocessor],
                               output_features={f: feature for f in features})


_register()
