"""Vocabularies whose tokenisation is Python, which runs ahead of tf.data (tokenized.py)."""

import numpy as np
import seqio
import tensorflow as tf


class PythonVocabulary(seqio.Vocabulary):
    """A vocabulary with `_encode(text) -> ids` and `decode(ids) -> text` in Python; the rest follows."""

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(texts):
            rows = [self._encode(t.decode()) for t in np.ravel(texts.numpy())]
            return (np.array([i for row in rows for i in row], np.int32),
                    np.array([len(row) for row in rows], np.int64))

        flat, lengths = tf.py_function(encode, [s], [tf.int32, tf.int64])
        flat, lengths = tf.ensure_shape(flat, [None]), tf.ensure_shape(lengths, [None])
        return tf.RaggedTensor.from_row_lengths(flat, lengths) if s.shape.rank else flat

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.py_function(lambda x: self.decode(x.numpy()), [ids], tf.string)
