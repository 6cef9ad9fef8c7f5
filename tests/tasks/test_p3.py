"""P3's ready mixture: real templates over real records, at T0's rates."""

import pytest

from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig
from t5x_lite.data.tasks import vocabulary_of
from t5x_lite.errors import UserError
from tests.helpers import shared_data


def test_p3_registers_what_is_at_hand(monkeypatch, tmp_path):
    monkeypatch.setenv("T5X_LITE_FILES", str(tmp_path))
    config = DataConfig(train="p3", task_modules="tasks.p3", vocabulary="byt5", num_shards=1,
                        inputs_length=256, targets_length=64, shuffle_buffer=4,
                        cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no template file p3_NAME.yaml with its data"):
        data_tasks.train_mixture(config, "seq2seq")
    data = shared_data("README.md").parent
    for name in ("nq_open", "web_questions"):
        (tmp_path / f"p3_{name}.yaml").symlink_to(data / f"templates/p3_{name}.yaml")
    (tmp_path / "webquestions.train").symlink_to(data / "cbqa/web_questions/webquestions.train")
    lines = (data / "cbqa/nq_open/NQ-open.dev.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "NQ-open.train.jsonl").write_text("".join(lines[:40]))
    mixture = data_tasks.train_mixture(config, "seq2seq")
    share = {name: sum(weight for task, weight in mixture if task.name.startswith(f"p3_{name}"))
             for name in ("nq_open", "web_questions")}
    assert share["nq_open"] == pytest.approx(40 / (40 + 3778))
    rows = next(ShardedRows(config, objective="seq2seq", global_batch_size=8, seed=0, shards=[0]))
    texts = [vocabulary_of(config).decode(r[r > 1].tolist())
             for r in rows[0]["encoder_input_tokens"]]
    assert all("?" in t or "question" in t.lower() or "answer" in t.lower() for t in texts), texts
