"""Collectives read from compiled text: programs compiled here, and the forms of other backends."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from t5x_lite.cost import hlo, hlo_text

MESH = hlo.MeshLayout((2, 4), ("fsdp", "tensor"))
FSDP_BY_TENSOR = hlo.MeshLayout((4, 2), ("fsdp", "tensor"))


def _summary(found):
    return sorted((one.kind, one.axes, one.bytes_per_device, one.count_per_step, one.in_loop)
                  for one in found)


@pytest.mark.parametrize("text, groups", [
    ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("[8,2]<=[16]", [[2 * i, 2 * i + 1] for i in range(8)]),
    ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['a'=4,'b'=2] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("mesh['a'=4,'b'=2, device_ids=([2,4]T(1,0))] {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=2, device_ids=(3,1,2,0)] {'b'}", [[3, 1], [2, 0]]),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
])
def test_every_form_of_replica_groups(text, groups):
    assert hlo.parse_replica_groups(text, 8) == groups


def test_an_unknown_form_of_replica_groups_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="not known: 'ring"):
        hlo.parse_replica_groups("ring(8)", 8)


@pytest.mark.parametrize("type_, size", [
    ("bf16[2,8]{1,0:T(8,128)(2,1)S(1)}", 32), ("f32[]", 4), ("pred[3]{0}", 3), ("s4[3]", 2),
    ("f8e4m3fn[10]", 10), ("(f32[2]{0}, (bf16[3], u32[]), token[])", 18), ("f32[<=4,2]", 32)])
def test_bytes_of_types(type_, size):
    assert hlo_text.type_bytes(type_) == size


@pytest.mark.parametrize("groups, axes", [
    ([[0, 1, 2, 3], [4, 5, 6, 7]], ("tensor",)), ([[0, 4]], ("fsdp",)),
    ([list(range(8))], ("fsdp", "tensor")), ([[0], [1]], ()), ([[0, 1], [4, 5]], ("tensor",))])
def test_axes_are_those_along_which_a_group_varies(groups, axes):
    assert MESH.axes_of(groups) == axes


def test_a_program_of_one_slice_numbers_that_slices_devices():
    """Mesh data=2 x slice=2 x tensor=4: slice 0 holds places 0-3 and 8-11, numbered 0-7."""
    mesh = hlo.MeshLayout((2, 2, 4), ("data", "slice", "tensor"),
                          (0, 0, 0, 0, 1, 1, 1, 1) * 2)
    assert mesh.num_local_devices == 8
    assert mesh.axes_of([[0, 4], [1, 5]]) == ("data",)
    assert mesh.axes_of([[0, 1, 2, 3]]) == ("tensor",)
    assert mesh.slice_axes() == ("slice",)


def test_each_kind_in_a_scan_compiled_for_eight_cpus():
    """x is 8 x 8 float32 on each device, 256 bytes; gathered over fsdp=2 it is 512."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)

    def layer(x, _):
        x = jax.lax.psum(x, "tensor") / 4
        y = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
        x = jax.lax.psum_scatter(2 * y, "fsdp", scatter_dimension=0, tiled=True)
        x = jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True)
        return jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]), None

    def program(x):
        return jax.lax.psum(jax.lax.scan(layer, x, None, length=3)[0], ("fsdp", "tensor"))

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((16, 32), jnp.float32,
                                 sharding=NamedSharding(mesh, P("fsdp", "tensor")))
        run = jax.shard_map(program, in_specs=P("fsdp", "tensor"), out_specs=P(), check_vma=False)
        text = jax.jit(run).lower(x).compile().as_text()
    found = hlo.find_collectives(text, MESH)
    assert _summary(found) == [
        ("all-gather", ("fsdp",), 512, 3, True),
        ("all-reduce", ("fsdp", "tensor"), 256, 1, False),
        ("all-reduce", ("tensor",), 256, 3, True),
        ("all-to-all", ("tensor",), 256, 3, True),
        ("collective-permute", ("tensor",), 256, 3, True),
        ("reduce-scatter", ("fsdp",), 512, 3, True),
    ]
    received = {(one.kind, one.axes): one.received_bytes for one in hlo.totals(found)}
    assert received["all-reduce", ("tensor",)] == 3 * 2 * 256 * 3 / 4
    assert received["all-gather", ("fsdp",)] == 3 * 512 / 2
    assert received["collective-permute", ("tensor",)] == 3 * 256


def test_loops_inside_loops_multiply_and_a_loop_over_data_is_marked():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def program(x):
        def inner(x, _):
            return jax.lax.psum(x, "data") / 8, None
        x, _ = jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, None, length=5)[0], None), x,
                            None, length=2)
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1,
                                  lambda x: jax.lax.pmax(x, "data") / 2, x)

    run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=P("data"), out_specs=P("data"),
                                check_vma=False))
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    text = run.lower(x).compile().as_text()
    found = hlo.find_collectives(text, hlo.MeshLayout((8,), ("data",)))
    assert [(one.count_per_step, one.exact_count) for one in found] == [(10, True), (1, False)]


def _program(entry: str, others: str = "") -> str:
    return f"HloModule test\n\n{others}\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}\n"


@pytest.mark.parametrize("condition, initial, trips", [
    ("compare(%i, %n), direction=LT", 0, 6), ("compare(%i, %n), direction=LE", 1, 6),
    ("compare(%i, %n), direction=LT", 2, 4)])
def test_trip_counts_from_the_condition_as_tpu_programs_have_them(condition, initial, trips):
    others = f"""
%cond (s: (s32[], f32[8])) -> pred[] {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %n = s32[]{{:T(128)}} constant(6)
  ROOT %lt = pred[]{{:T(512)}} {condition}
}}

%body (s.1: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s.1 = (s32[], f32[8]{{0}}) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%s.1), index=1
  %r = f32[8]{{0}} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}}"""
    entry = f"""
  %p = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({initial})
  %copy = s32[] copy(%zero)
  %t = (s32[], f32[8]{{0}}) tuple(%copy, %p)
  %w = (s32[], f32[8]{{0}}) while(%t), condition=%cond, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%w), index=1"""
    [one] = hlo.find_collectives(_program(entry, others), MESH)
    assert (one.kind, one.axes, one.count_per_step) == ("all-reduce", ("tensor",), trips)


def test_asynchronous_pairs_count_once():
    """GPU's start and done, wrapped computations, and results inside of tuples."""
    others = """
%wrapped (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}"""
    entry = """
  %p = f32[8]{0} parameter(0)
  %ag = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[4,2]<=[2,4]T(1,0)
  %agd = f32[16]{0} all-gather-done(%ag)
  %ar = (f32[8]{0}, bf16[4]{0}) all-reduce-start(%p, %b), replica_groups={}, to_apply=%add
  %ard = (f32[8]{0}, bf16[4]{0}) all-reduce-done(%ar)
  %cp = (f32[8]{0}, f32[8]{0}) collective-permute-start(%p), source_target_pairs={{0,4},{4,0}}
  %cpd = f32[8]{0} collective-permute-done(%cp)
  %as = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped
  %au = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%as), calls=%wrapped
  ROOT %ad = f32[2]{0} async-done(%au), calls=%wrapped"""
    assert _summary(hlo.find_collectives(_program(entry, others), MESH)) == [
        ("all-gather", ("fsdp",), 64, 1, False),
        ("all-reduce", ("fsdp", "tensor"), 40, 1, False),
        ("collective-permute", ("fsdp",), 32, 1, False),
        ("reduce-scatter", ("tensor",), 32, 1, False),
    ]


def test_tpu_fusions_that_carry_a_collective_on_count_once():
    """Start, step (with a matmul) and done each print the all-gather; another one is its own."""
    gather = ("all-gather(%p0), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, "
              'frontend_attributes={chain_id="0"}')
    others = "\n".join(f"""
%fused.{i} (p0: f32[8]) -> f32[32] {{
  %p0 = f32[8]{{0:T(128)S(1)}} parameter(0)
  %ag.{i} = f32[32]{{0:T(128){space}}} {gather}
  ROOT %r.{i} = f32[32]{{0}} {root}
}}""" for i, (space, root) in enumerate([
        ("", 'custom-call(%ag.0), custom_call_target="AsyncCollectiveStart"'),
        ("S(1)", "convolution(%ag.1, %p0)"),
        ("", 'custom-call(%ag.2), custom_call_target="AsyncCollectiveDone"')]))
    others += """
%fused.3 (p0: f32[8]) -> f32[32] {
  %p0 = f32[8]{0} parameter(0)
  ROOT %ag.3 = f32[32]{0} all-gather(%p0), channel_id=6, replica_groups=[2,4]<=[8], dimensions={0}
}"""
    entry = "\n".join([
        "  %p = f32[8]{0} parameter(0)",
        *(f"  %f.{i} = f32[32]{{0}} fusion(%p), kind=kOutput, calls=%fused.{i}" for i in range(4))])
    assert _summary(hlo.find_collectives(_program(entry, others), MESH)) == [
        ("all-gather", ("tensor",), 128, 1, False)] * 2


def test_tpu_reduce_scatter_is_an_all_reduce_of_which_a_slice_is_kept():
    others = """
%all-reduce-scatter (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  %ar = f32[8]{0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add
  %bc = f32[8]{0} bitcast(%ar)
  ROOT %ds = f32[2]{0} dynamic-slice(%bc, %i), dynamic_slice_sizes={2}
}"""
    entry = """
  %p = f32[8]{0} parameter(0)
  ROOT %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter"""
    [one] = hlo.find_collectives(_program(entry, others), MESH)
    assert (one.kind, one.bytes_per_device) == ("reduce-scatter", 32)
    assert one.received_bytes == 32 * 3 / 4


def test_several_arrays_may_share_a_tpu_reduce_scatter():
    others = """
%all-reduce-scatter (q: f32[8], r: f32[4]) -> (f32[2], f32[1]) {
  %q = f32[8]{0} parameter(0)
  %r = f32[4]{0} parameter(1)
  %ar = (f32[8]{0}, f32[4]{0}) all-reduce(%q, %r), replica_groups=[2,4]<=[8], to_apply=%add
  %g0 = f32[8]{0} get-tuple-element(%ar), index=0
  %ds0 = f32[2]{0} dynamic-slice(%g0, %i), dynamic_slice_sizes={2}
  %g1 = f32[4]{0} get-tuple-element(%ar), index=1
  %ds1 = f32[1]{0} dynamic-slice(%g1, %i), dynamic_slice_sizes={1}
  ROOT %t = (f32[2]{0}, f32[1]{0}) tuple(%ds0, KEPT)
}"""
    entry = """
  %p = f32[8]{0} parameter(0)
  ROOT %f = (f32[2]{0}, f32[1]{0}) fusion(%p, %p), kind=kCustom, calls=%all-reduce-scatter"""
    for kept, kind in (("%ds1", "reduce-scatter"), ("%g1", "all-reduce")):
        [one] = hlo.find_collectives(_program(entry, others.replace("KEPT", kept)), MESH)
        assert (one.kind, one.bytes_per_device) == (kind, 48)


def test_an_all_reduce_of_a_written_shard_is_a_replaced_gather():
    """The trap of 3-D tori (DESIGN.md); the same all-reduce of a matmul is a reduction."""
    others = """
%writes (q: f32[8], s: f32[1]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %s = f32[1]{0} parameter(1)
  ROOT %dus = f32[8]{0} dynamic-update-slice(%q, %s, %i)
}"""
    entry = """
  %p = f32[8]{0} parameter(0)
  %w = f32[8]{0} fusion(%z, %p), kind=kLoop, calls=%writes
  %cs = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%w)
  %cd = f32[8]{0} copy-done(%cs)
  %ar = f32[8]{0} all-reduce(%cd), replica_groups={}, to_apply=%add
  %grad = f32[8]{0} add(%p, %p)
  ROOT %ar2 = f32[8]{0} all-reduce(%grad), replica_groups={}, to_apply=%add"""
    found = hlo.find_collectives(_program(entry, others), MESH)
    assert [one.replaces_gather for one in found] == [True, False]


def test_transfers_between_slices():
    """A slice's program numbers its own devices; between slices it sends and receives."""
    mesh = hlo.MeshLayout((4, 4), ("data", "tensor"), (0,) * 8 + (1,) * 8)
    tag = ('is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",'
           '_xla_megascale_transfer_type="ALL_REDUCE"}')
    entry = f"""
  %p = f32[8]{{0}} parameter(0)
  %ar = f32[8]{{0}} all-reduce(%p), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %s = (f32[8]{{0}}, u32[], token[]) send(%ar, %after), channel_id=1, {tag}
  %r = (f32[8]{{0}}, u32[], token[]) recv(%after), channel_id=2, {tag}
  ROOT %rd = (f32[8]{{0}}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true"""
    inside, between = hlo.find_collectives(_program(entry), mesh)
    assert (inside.axes, inside.network, inside.group_size) == (("data",), "fast", 2)
    assert (between.kind, between.axes, between.network) == ("all-reduce", ("data",), "dcn")
    assert between.received_bytes == 2 * 32 / 2


def test_one_branch_of_a_conditional_runs():
    others = "\n".join(f"""
%branch.{i} (q.{i}: f32[8]) -> f32[8] {{
  %q.{i} = f32[8]{{0}} parameter(0)
  ROOT %r.{i} = f32[8]{{0}} {op}
}}""" for i, op in enumerate([
        "all-reduce(%q.0), replica_groups={}, to_apply=%add", "negate(%q.1)"]))
    entry = """
  %p = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%branch.0, %branch.1}"""
    [one] = hlo.find_collectives(_program(entry, others), MESH)
    assert (one.kind, one.count_per_step) == ("all-reduce", 1)


# --- The real TPU compiler, without a TPU -------------------------------------------------------

@pytest.fixture(scope="module")
def tpu_topology():
    pytest.importorskip("libtpu", reason="pip install libtpu to compile for TPUs here")
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies
    return lambda name, **kw: topologies.get_topology_desc(
        platform="tpu", topology_name=name, **kw)


def _layers_on(devices, axis_sizes, layers=6, embed=512, hidden=2048, rows=128):
    """Compiled loss and gradient of `layers` MLPs scanned over, FSDP x tensor parallel."""
    mesh = jax.sharding.Mesh(devices.reshape(axis_sizes), ("fsdp", "tensor"),
                             axis_types=(AxisType.Explicit,) * 2)

    def layer(x, weights):
        wi, wo = (jax.reshard(w.astype(jnp.bfloat16), spec) for w, spec in
                  zip(weights, (P(None, "tensor"), P("tensor", None)), strict=True))
        h = jnp.einsum("BD,DF->BF", x, wi, out_sharding=P("fsdp", "tensor"))
        return x + jnp.einsum("BF,FD->BD", jax.nn.relu(h), wo, out_sharding=P("fsdp", None)), None

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2)

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    weights = (abstract((layers, embed, hidden), jnp.float32, None, "fsdp", "tensor"),
               abstract((layers, hidden, embed), jnp.float32, None, "tensor", "fsdp"))
    x = abstract((rows * axis_sizes[0], embed), jnp.bfloat16, "fsdp", None)
    with jax.set_mesh(mesh):
        text = jax.jit(jax.value_and_grad(loss)).lower(weights, x).compile().as_text()
    layout = hlo.MeshLayout(mesh.devices.shape, mesh.axis_names, tuple(
        getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat))
    return hlo.totals(hlo.find_collectives(text, layout))


def test_v5e_gathers_each_kernel_twice_a_layer(tpu_topology):
    """Forward and recomputation gather both bf16 kernels over fsdp: 6 layers x 2 x 2 = 24 calls
    of 512 x 2048 / 2 (tensor) x 2 bytes; tensor parallelism reduces once a layer each way."""
    lines = _layers_on(np.asarray(tpu_topology("v5e:2x4").devices), (4, 2))
    by_kind = {(line.kind, line.axes): line for line in lines}
    gathers = by_kind["all-gather", ("fsdp",)]
    assert (gathers.calls_per_step, gathers.bytes_per_step) == (24, 24 * 512 * 1024 * 2)
    reduces = by_kind["all-reduce", ("tensor",)]
    assert (reduces.calls_per_step, reduces.bytes_per_step) == (12, 12 * 128 * 512 * 2)
    # Each gradient is summed over fsdp once, by whichever kind the compiler chose.
    summed = [by_kind[kind, ("fsdp",)].bytes_per_step for kind in ("all-reduce", "reduce-scatter")
              if (kind, ("fsdp",)) in by_kind]
    assert sum(summed) == pytest.approx(12 * 512 * 1024 * 2, rel=1e-3)


def test_a_flat_fsdp_axis_on_a_3d_torus_loses_its_gathers(tpu_topology):
    """DESIGN.md's trap, on v4: fsdp=64 replaces gathers by all-reduces, 16 x 4 does not."""
    devices = np.asarray(tpu_topology("v4:4x4x4", chip_config_name="megacore",
                                      chips_per_host_bounds=(2, 2, 1)).devices)
    flat = _layers_on(devices, (64, 1), layers=2)
    assert any(line.replaces_gather for line in flat)
    assert not any(line.kind == "all-gather" for line in flat)
    square = _layers_on(devices, (16, 4), layers=2)
    assert not any(line.replaces_gather for line in square)
    assert any(line.kind == "all-gather" for line in square)


def test_two_slices_reduce_over_the_data_centre_network(tpu_topology):
    lines = _layers_on(np.asarray(tpu_topology("v5e:2x4", num_slices=2).devices), (16, 1))
    assert {line.kind for line in lines if line.network == "dcn"} == {"all-gather", "all-reduce"}


def test_a_gpus_reduce_scatter_starts_with_operands_and_results():
    """One array, or several at once; the groups are those of a transposed mesh."""
    groups = "mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}"
    for type_, size in (("((f32[8]{0}), f32[2]{0})", 32),
                        ("((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0}))", 48)):
        entry = f"""
  %p = f32[8]{{0}} parameter(0)
  %s = {type_} reduce-scatter-start(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}
  ROOT %d = f32[2]{{0}} reduce-scatter-done(%s)"""
        [one] = hlo.find_collectives(_program(entry, ""), FSDP_BY_TENSOR)
        assert (one.kind, one.axes, one.bytes_per_device) == ("reduce-scatter", ("fsdp",), size)


def test_groups_that_are_not_understood_are_no_group_of_all():
    entry = """
  %p = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} all-reduce(%p), replica_groups=new(1), to_apply=%add"""
    with pytest.raises(ValueError, match="form that is not known"):
        hlo.find_collectives(_program(entry, ""), MESH)


def test_flops_of_a_programs_products_with_loops_and_branches():
    def step(x_BD, w_DD):
        def layer(x, _):
            return jnp.tanh(x @ w_DD), None
        x, _ = jax.lax.scan(layer, x_BD, None, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w_DD @ w_DD, lambda x: x @ w_DD, x)
    shapes = jnp.zeros((4, 8)), jnp.zeros((8, 8))
    text = jax.jit(step).lower(*shapes).compile().as_text()
    assert hlo.matmul_flops(text) == (5 + 2) * 2 * 4 * 8 * 8


def test_flops_of_a_call_of_cublas():
    entry = """
  %a = bf16[16,8]{1,0} parameter(0)
  %b = bf16[8,32]{1,0} parameter(1)
  ROOT %c = (bf16[16,32]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}"""
    assert hlo.matmul_flops(_program(entry, "")) == 2 * 16 * 8 * 32
