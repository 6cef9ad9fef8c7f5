"""Every preset builds abstractly and has the parameters of its published checkpoint."""

import pytest

from configs import gshard, mixtral, quickstart, st_moe, switch, t5_1_0, t5_1_1
from t5x_lite.config import RunConfig, from_mapping
from t5x_lite.errors import UserError
from t5x_lite.models import Model

# Counted from the public checkpoints; the papers give the first two or three digits.
PARAMETERS = {
    (t5_1_0, "small"): 60_506_624, (t5_1_0, "base"): 222_903_552,
    (t5_1_0, "large"): 737_668_096, (t5_1_0, "3b"): 2_851_598_336,
    (t5_1_0, "11b"): 11_307_321_344,
    (t5_1_1, "small"): 76_961_152, (t5_1_1, "base"): 247_577_856,
    (t5_1_1, "large"): 783_150_080, (t5_1_1, "xl"): 2_849_757_184,
    (t5_1_1, "xxl"): 11_135_332_352,
}


@pytest.mark.parametrize(("family", "size"), PARAMETERS,
                         ids=lambda x: getattr(x, "__name__", x))
def test_parameters_are_those_of_the_published_checkpoint(family, size):
    run = from_mapping(RunConfig, family.get_config(size))
    assert run == family.run(size)
    total = sum(info.size for info in Model(run.model).table.values())
    assert total == PARAMETERS[family, size]


@pytest.mark.parametrize(("family", "size", "billions", "digits"), [
    (switch, "base_8", 0.62, 2), (switch, "base_128", 7.4, 2), (switch, "base_256", 14.7, 3),
    (switch, "large_128", 26, 2), (switch, "xxl", 395, 3), (switch, "c", 1571, 4),
    (gshard, "600b", 600, 1), (st_moe, "32b", 269, 3), (mixtral, "8x7b", 46.7, 3)],
    ids=lambda x: getattr(x, "__name__", str(x)))
def test_mixtures_have_the_papers_parameters_to_its_digits(family, size, billions, digits):
    run = from_mapping(RunConfig, family.get_config(size))
    total = sum(info.size for info in Model(run.model).table.values()) / 1e9
    assert float(f"{total:.{digits}g}") == pytest.approx(billions), total


def test_mixtures_stand_where_the_papers_say():
    moe = [p for p in Model(st_moe.run().model).table if p.endswith("router/kernel")]
    assert moe == ["decoder/segment_0/block_3/mlp/router/kernel",
                   "encoder/segment_0/block_3/mlp/router/kernel"]
    assert [s.repeats for s in st_moe.run().model.encoder.segments] == [6, 3]


def test_the_quickstart_has_a_sparse_twin():
    dense, sparse = Model(quickstart.run().model), Model(quickstart.run("moe").model)
    assert sum(i.size for i in dense.table.values()) == 5_246_208
    assert any(p.endswith("experts/wi_0/kernel") for p in sparse.table)
    with pytest.raises(UserError, match="may be moe"):
        quickstart.get_config("mo")


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(UserError, match=r"did you mean 'xxl'\? Sizes: small, base, large, xl, xxl"):
        t5_1_1.get_config("xxxl")
