"""The drawing of shardings names the devices that JAX itself would give a block."""

import jax
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.models.params import ParamInfo
from t5x_lite.parallel.sharding import Rules, named_sharding
from t5x_lite.reporting import shards


def info(shape, axes, units=None):
    return ParamInfo("a/b/kernel", shape, np.float32, axes, units or shape, 1, "zeros")


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2},
                                  {"tensor": 8}, {"fsdp": 1, "data": 8}])
@pytest.mark.parametrize(("shape", "axes"), [
    ((16, 32), ("embed", "mlp")), ((32, 16), ("vocab", "embed")), ((16,), ("embed",)), ((16,), (None,)),
    ((3, 16, 32), ("layers", "embed", "mlp"))])
def test_blocks_are_where_jax_puts_them(mesh, shape, axes):
    (rows, columns), held = shards.blocks(info(shape, axes), Rules(), mesh)
    devices = jax.make_mesh(tuple(mesh.values()), tuple(mesh),
                            axis_types=(jax.sharding.AxisType.Explicit,) * len(mesh))
    numbers = {device: i for i, device in enumerate(devices.devices.ravel())}
    expected = {}
    for device, index in named_sharding(devices, Rules(), axes).devices_indices_map(shape).items():
        places = [(part.start or 0) * count // size for part, count, size in zip(
            index[-2:], (rows, columns)[-len(shape):], shape[-2:], strict=True)]
        expected.setdefault(((0, *places))[-2:], []).append(numbers[device])
    assert held == {place: sorted(found) for place, found in expected.items()}


def test_the_drawing_and_what_it_refuses():
    table = {"a/b/kernel": info((16, 32), ("embed", "mlp")), "norm": info((16,), ("embed",))}
    drawing = shards.drawn(table, Rules(), {"fsdp": 4, "tensor": 2}, ["a/b/kernel", "norm"])
    kernel, norm = drawing.axes
    assert sorted(text.get_text() for text in kernel.texts) == list("01234567")
    assert [text.get_text() for text in norm.texts] == ["0, 1", "2, 3", "4, 5", "6, 7"]
    assert (kernel.get_ylabel(), kernel.get_xlabel(), norm.get_ylabel()) == ("embed 16", "mlp 32", "")
    whole = shards.drawn(table, Rules(), {"data": 8}, ["norm"]).axes[0]
    assert [text.get_text() for text in whole.texts] == ["0 … 7"]
    with pytest.raises(UserError, match="kernels"):
        shards.drawn(table, Rules(), {"data": 8}, ["a/b/kernels"])
    with pytest.raises(UserError, match="fsdp"):
        shards.drawn(table, Rules(), {"fsdp": 3}, ["norm"])
