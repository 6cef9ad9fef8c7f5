"""C4 through TFDS, with T5's public vocabulary (Raffel et al. 2020, arXiv:1910.10683).

    c4_span_corruption   T5's pre-training task
    c4_causal_lm         the same text for decoder-only models

TFDS_DATA_DIR must hold c4/en:3.0.1 (a local folder or gs://); T5X_LITE_T5_VOCAB names the
vocabulary where the network does not reach gs://t5-data.
"""

import os

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_lite.errors import UserError
from tasks import preprocessors, vocabularies
from tasks.span_corruption import span_corruption


class PreparedTfdsDataSource(seqio.TfdsDataSource):
    """A TFDS data set that is never prepared on the fly: 800 GB for C4, on a Beam cluster."""

    def __init__(self, name: str, splits: tuple[str, ...]):
        super().__init__(name, splits=splits, read_only=True)

    @property
    def tfds_dataset(self):
        try:
            folder = str(self._tfds_dataset.builder.data_path)
        except (AssertionError, tfds.core.DatasetNotFoundError):
            folder = ""   # the installed TFDS makes other versions, and no folder holds this one
        if not folder or not tf.io.gfile.exists(folder):
            where = os.environ.get("TFDS_DATA_DIR", "(not set)")
            raise UserError(f"the TFDS data set {self._tfds_dataset.name} is not in TFDS_DATA_DIR="
                            f"{where}; set it to the folder or gs:// path that holds the prepared "
                            "data (https://www.tensorflow.org/datasets/catalog/c4 says how to "
                            "make it)")
        return self._tfds_dataset


def _register() -> None:
    source = PreparedTfdsDataSource("c4/en:3.0.1", ("train", "validation"))
    feature = seqio.Feature(vocabularies.load("t5"), add_eos=True)
    for name, preprocessor, features in (
            ("c4_span_corruption", span_corruption, ("inputs", "targets")),
            ("c4_causal_lm", preprocessors.causal_lm, ("targets",))):
        seqio.TaskRegistry.add(name, source=source,
                               preprocessors=[preprocessors.tokenize, preprocessor],
                               output_features={f: feature for f in features})


_register()
