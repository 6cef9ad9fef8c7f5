"""The rules refuse what would silently be wrong, and the helpers compute the plain thing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite.errors import UserError
from t5x_lite.parallel import sharding
from t5x_lite.parallel.sharding import MeshConfig, Rules, make_mesh, resolve_mesh

X_BLD = jax.random.normal(jax.random.key(0), (8, 6, 4))
W_DF = jax.random.normal(jax.random.key(1), (4, 16))


def on(**sizes):
    """The active mesh and default rules, data=1 unless given."""
    return sharding.activate(make_mesh(MeshConfig(**{"data": 1, **sizes})), Rules())


# --- the mesh ---------------------------------------------------------------------------------

def test_minus_one_takes_the_rest():
    sizes = resolve_mesh(MeshConfig(stage=2, data=-1, tensor=2), 16)
    assert sizes == {"slice": 1, "stage": 2, "data": 4, "fsdp": 1, "expert": 1, "sequence": 1,
                     "tensor": 2}
    assert tuple(sizes) == sharding.MESH_AXES


@pytest.mark.parametrize("config, devices, message", [
    (MeshConfig(data=3), 8, r"mesh \(data=3\) needs 3 devices, but there are 8; .*1, 2, 4, 8"),
    (MeshConfig(tensor=3), 8, "needs a multiple of 3 devices"),
    (MeshConfig(tensor=0), 8, "mesh.tensor=0: must be a positive number, or -1"),
    (MeshConfig(tensor=-1), 8, "only one axis may be -1, not data and tensor"),
    (MeshConfig(data=2), 1, "there is 1;"),
])
def test_impossible_meshes_say_what_is_possible(config, devices, message):
    with pytest.raises(UserError, match=message):
        resolve_mesh(config, devices)


def test_neighbours_on_the_last_axis_are_neighbouring_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == sharding.MESH_AXES
    ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(4, 2)
    assert (ids[:, 1] - ids[:, 0] == 1).all()


# --- the rules --------------------------------------------------------------------------------

def test_specs_leave_out_axes_of_size_one():
    sizes = {"data": 2, "fsdp": 2, "tensor": 1}
    rules = Rules()
    assert rules.spec(("act_batch", None, "act_mlp"), sizes) == P(("data", "fsdp"), None, None)
    assert rules.spec(("embed", "mlp"), sizes) == P("fsdp", None)
    assert rules.spec(("embed", "mlp"), sizes, drop=("fsdp",)) == P(None, None)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="'act_bach'.*did you mean 'act_batch'"):
        Rules().spec(("act_bach",), {"data": 2})
    with pytest.raises(UserError, match="no logical axis is called 'mpl'.*did you mean 'mlp'"):
        Rules({"mpl": ("tensor",)})
    with pytest.raises(UserError, match="no mesh axis is called 'tensors'.*did you mean 'tensor'"):
        Rules({"mlp": ("tensors",)})


def test_one_mesh_axis_cannot_split_two_dims():
    with pytest.raises(UserError, match="'tensor' would split two dims.*'mlp' and 'heads'"):
        Rules().spec(("mlp", "heads"), {"tensor": 2})


def test_divisibility_is_counted_in_units():
    # T5-small: 6 heads of 64. 384 divides by 4, six heads do not.
    rules, sizes = Rules(), {"tensor": 4}
    rules.check("a/kernel", ("embed", "heads"), (512, 8), sizes)
    with pytest.raises(UserError, match="a/kernel: 6 heads cannot be split 4 ways"):
        rules.check("a/kernel", ("embed", "heads"), (512, 6), sizes)
    with pytest.raises(UserError, match="the same for act_kv_heads"):
        rules.check("a/kernel", ("embed", "kv_heads"), (512, 1), sizes)


def test_without_a_mesh_the_helpers_are_the_plain_calls():
    assert sharding.mesh_sizes() == {} and sharding.spec("act_batch") is None
    np.testing.assert_allclose(sharding.dense(X_BLD, W_DF, ("act_batch", None, "act_mlp")),
                               jnp.einsum("BLD,DF->BLF", X_BLD, W_DF), rtol=1e-6)
    assert sharding.shard(X_BLD, "act_batch", None, None) is X_BLD
    assert sharding.weight(W_DF, ("embed", "mlp"), jnp.bfloat16).dtype == jnp.bfloat16


# --- the helpers on meshes --------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"sequence": 2, "data": 4},
                                   {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_dense_is_the_matrix_product_and_its_gradient_keeps_the_stored_sharding(sizes):
    axes, out = ("embed", "mlp"), ("act_batch", "act_length", "act_mlp")

    def loss(w, x):
        return jnp.sum(jnp.sin(sharding.dense(x, sharding.weight(w, axes, jnp.float32), out)))

    want = jax.grad(loss, (0, 1))(W_DF, X_BLD)
    with on(**sizes):
        w = jax.device_put(W_DF, sharding.spec(*axes))
        x = jax.device_put(X_BLD, sharding.spec("act_batch", "act_length", "act_embed"))
        y = jax.jit(lambda w, x: sharding.dense(x, sharding.weight(w, axes, jnp.float32), out))(w, x)
        assert jax.typeof(y).sharding.spec == sharding.spec(*out)
        found = jax.jit(jax.grad(loss, (0, 1)))(w, x)
        assert jax.typeof(found[0]).sharding == jax.typeof(w).sharding
    np.testing.assert_allclose(y, jnp.einsum("BLD,DF->BLF", X_BLD, W_DF), rtol=1e-5, atol=1e-6)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_weight_is_cast_before_it_is_gathered():
    def use(w):
        return sharding.weight(w, ("embed", "mlp"), jnp.bfloat16)

    with on(fsdp=8):
        w = jax.device_put(jnp.ones((8, 16)), sharding.spec("embed", "mlp"))
        jaxpr = str(jax.make_jaxpr(use)(w))
        assert jaxpr.index("convert_element_type") < jaxpr.index("reshard")
        assert jax.typeof(jax.jit(use)(w)).sharding.spec == P(None, None)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_lookup_takes_rows_and_scatters_gradients(sizes):
    table_VD = jax.random.normal(jax.random.key(2), (16, 8))
    ids_BL = jax.random.randint(jax.random.key(3), (8, 5), 0, 16)

    def loss(table, ids):
        return jnp.sum(jnp.sin(sharding.lookup(table, ids, ("act_batch", "act_length", None))))

    want = jax.grad(loss)(table_VD, ids_BL)
    with on(**sizes):
        table = jax.device_put(table_VD, sharding.spec("vocab", "embed"))
        ids = jax.device_put(ids_BL, sharding.spec("act_batch", "act_length"))
        found = jax.jit(jax.grad(loss))(table, ids)
        assert jax.typeof(found).sharding == jax.typeof(table).sharding
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
