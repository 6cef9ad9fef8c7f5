"""Every preset builds abstractly and has the parameters of its published checkpoint."""

import pytest

from configs import t5_1_0, t5_1_1
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


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(UserError, match=r"did you mean 'xxl'\? Sizes: small, base, large, xl, xxl"):
        t5_1_1.get_config("xxxl")
