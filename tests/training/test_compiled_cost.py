"""What compiled programs cost, against counts by hand; compiled for the CPU, for a TPU that is not here, and as text."""

import math
import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vgpt_jax.hardware import ACCELERATORS
from vgpt_jax.training.compiled_cost import Collective, Cost, cost_of, memory_of
from vgpt_jax.training.hlo import parse

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Error reading persistent compilation cache"
)  # of devices that are not here


@pytest.fixture(scope="module")
def tpu():
    """Four TPU chips that are not here, as a mesh of "data" 2 and "fsdp" 2."""
    from vgpt_jax.compile_ahead import slice_devices

    before = dict(os.environ)
    devices = slice_devices("v5e:2x2")
    yield Mesh(np.array(devices).reshape(2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    os.environ.clear()
    os.environ.update(before)


def shape(*sizes, dtype=jnp.float32, mesh=None, spec=()):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=mesh and NamedSharding(mesh, PartitionSpec(*spec)))


def compiled(function, *shapes, **options):
    return jax.jit(function, **options).lower(*shapes).compile()


# What the CPU runs.


def test_products_in_nested_loops_count_as_often_as_they_are_done():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    def outer(x, ws):
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, ws)[0]

    program = compiled(outer, shape(16, 32), shape(7, 32, 32))
    cost = cost_of(program)
    assert cost.flops == 7 * 5 * 2 * 16 * 32 * 32
    assert cost.unknown_loops == 0 and cost.collectives == {}


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def until_small(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, lambda x: x @ w, x)

    cost = cost_of(compiled(until_small, shape(16, 32), shape(32, 32)))
    assert (cost.flops, cost.unknown_loops) == (2 * 16 * 32 * 32, 1)


def test_of_a_conditional_the_branch_that_does_least_counts():
    def sometimes(x, w, rarely):
        once = lambda x: x @ w  # noqa: E731
        return jax.lax.cond(rarely, lambda x: once(once(once(x))), once, x)

    cost = cost_of(compiled(sometimes, shape(16, 32), shape(32, 32), shape(dtype=bool)))
    assert cost.flops == 2 * 16 * 32 * 32


@pytest.mark.parametrize("stride, padding", [(1, "SAME"), (2, "SAME"), (2, "VALID")])
def test_a_convolution_and_its_gradients_do_the_same_arithmetic(stride, padding):
    """A place of the window that lies on padding, or between the images' places, is no arithmetic."""
    images, kernel = shape(2, 9, 9, 4), shape(3, 3, 4, 6)
    convolve = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    places = {(1, "SAME"): 9 * 3 - 2, (2, "SAME"): 5 * 3 - 2, (2, "VALID"): 4 * 3}[stride, padding]
    by_hand = 2 * 2 * 4 * 6 * places**2
    outputs = jax.eval_shape(convolve, images, kernel)
    for argument in (0, 1):
        gradient = lambda x, w, g, a=argument: jax.vjp(convolve, x, w)[1](g)[a]  # noqa: E731
        assert cost_of(compiled(gradient, images, kernel, outputs)).flops == by_hand
    assert cost_of(compiled(convolve, images, kernel)).flops == by_hand


# What a TPU would run.


@needs_libtpu
def test_collectives_and_loops_of_a_sharded_training_step_by_hand(tpu):
    """Six layers split over "fsdp", four parts of a batch: by its own analysis XLA sees one layer of one part."""
    layers, parts, rows, width = 6, 4, 1024, 512

    def loss(w, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, w)[0] ** 2)

    def step(w, x):
        total, _ = jax.lax.scan(lambda total, x: (total + jax.grad(loss)(w, x), None), jnp.zeros_like(w), x)
        return w - 0.1 * total

    w = shape(layers, width, width, mesh=tpu, spec=(None, "fsdp"))
    x = shape(parts, rows, width, mesh=tpu, spec=(None, ("data", "fsdp")))
    program = compiled(step, w, x, donate_argnums=0, out_shardings=w.sharding)
    cost, memory = cost_of(program), memory_of(program)

    products = 3 * layers * parts
    assert cost.flops == products * 2 * rows * width * width / 4
    assert cost.unknown_loops == 0
    half = width * width / 2  # of a layer's weights: what a chip has of them
    each = layers * parts
    assert cost.collectives == {
        "all-reduce": Collective(each, each * half * 4),  # float32, over "data": 2 (n - 1) / n of it, with n = 2
        "all-gather": Collective(2 * each, 2 * each * half * 2),  # bfloat16, forwards and backwards
        "reduce-scatter": Collective(each, each * half * 4),
    }
    assert memory.arguments == layers * half * 4 + parts * rows / 4 * width * 4
    assert memory.aliased == memory.outputs == layers * half * 4
    assert memory.total == memory.arguments + memory.temporaries + memory.code


@needs_libtpu
def test_traffic_is_what_goes_to_and_from_the_main_memory(tpu):
    one = jax.sharding.Mesh(tpu.devices[:1, :1], ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    large = shape(64, 2**20, mesh=one)  # 256 MiB: more than there is room for on the chip itself
    assert cost_of(compiled(lambda x: x + 1, large)).bytes == pytest.approx(2 * 2**28, rel=1e-3)

    def summed(xs):  # a slice each time, and not all of it
        return jax.lax.scan(lambda total, x: (total + x, None), jnp.zeros(2**20), xs)[0]

    assert 2**28 <= cost_of(compiled(summed, large)).bytes < 1.2 * 2**28

    def written(xs):  # an update in place each time
        return jax.lax.scan(lambda total, x: (total + 1, x * total), 0.0, xs)[1]

    assert 2 * 2**28 <= cost_of(compiled(written, large)).bytes < 2.2 * 2**28


# Texts: of a GPU, and of what is rarer.


def text_of(*lines: str) -> str:
    return "\n".join(["HloModule test, num_partitions=8", "", "ENTRY %main () -> f32[] {", *lines, "}", ""])


@pytest.mark.parametrize(
    "line, flops",
    [
        (
            'ROOT %r = (bf16[64,256]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
            '"rhs_contracting_dimensions":["0"]}}}',
            2 * 64 * 256 * 128,
        ),
        (
            "ROOT %r = bf16[64,256]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            2 * 64 * 256 * 128,
        ),
    ],
)
def test_products_by_a_library_of_a_gpu(line, flops):
    operands = "  %a = bf16[64,128]{1,0} parameter(0)", "  %b = bf16[128,256]{1,0} parameter(1)"
    assert cost_of(text_of(*operands, f"  {line}")).flops == flops


IMAGES, KERNEL, OUTPUTS = "bf16[2,9,9,4]", "bf16[6,3,3,4]", "bf16[2,9,9,6]"


@pytest.mark.parametrize(
    "kind, a, b, result",
    [
        ("Forward", IMAGES, KERNEL, OUTPUTS),
        ("BackwardInput", OUTPUTS, KERNEL, IMAGES),
        ("BackwardFilter", IMAGES, OUTPUTS, KERNEL),
    ],
)
def test_convolutions_by_a_library_of_a_gpu(kind, a, b, result):
    text = text_of(
        f"  %a = {a}{{3,2,1,0}} parameter(0)",
        f"  %b = {b}{{3,2,1,0}} parameter(1)",
        f"  ROOT %r = ({result}{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b), window={{size=3x3 pad=1_1x1_1}}, "
        f'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{kind}"',
    )
    assert cost_of(text).flops == 2 * 2 * 4 * 6 * (9 * 3 - 2) ** 2


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", 4),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_the_devices_of_a_message(groups, size):
    """A ring of n sends (n - 1) / n of what is exchanged, twice for a sum; a sum of 1000 float32."""
    text = text_of(
        "  %x = f32[1000]{0} parameter(0)",
        f"  %s = f32[1000]{{0}} all-reduce-start(%x), channel_id=1, replica_groups={groups}, to_apply=%add",
        "  ROOT %d = f32[1000]{0} all-reduce-done(%s)",
    )
    assert cost_of(text).collectives == {"all-reduce": Collective(1, pytest.approx(2 * (size - 1) / size * 4000))}


def test_each_kind_of_message_sends_its_share():
    text = text_of(
        "  %x = bf16[80]{0} parameter(0)",
        "  %g = bf16[640]{0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}",
        "  %s = bf16[10]{0} reduce-scatter(%x), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
        "  %a = bf16[80]{0} all-to-all(%x), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}",
        "  ROOT %p = bf16[80]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}",
    )
    found = {kind: messages.bytes for kind, messages in cost_of(text).collectives.items()}
    assert found == {"all-gather": 7 * 160, "reduce-scatter": 140, "all-to-all": 140, "collective-permute": 160}


def test_the_least_times_are_the_counts_over_the_rates():
    cost = Cost(197e12, 819e9 / 2, {"all-reduce": Collective(3, 50e9), "all-gather": Collective(1, 50e9)}, 0)
    assert cost.least_seconds(ACCELERATORS["TPU v5 lite"]) == {"arithmetic": 1.0, "memory": 0.5, "interconnect": 0.5}


def test_sizes_of_arrays():
    line = "  ROOT %x = (s4[3]{0}, pred[5]{0}, bf16[2,<=7]{1,0:T(8,128)(2,1)S(1)}, f8e4m3fn[9]{0}, token[]) tuple()"
    shapes = parse(text_of(line)).entry.instructions["x"].shapes
    assert [s.bytes for s in shapes] == [1.5, 5, 28, 9, 0]
    assert [s.space for s in shapes] == [0, 0, 1, 0, 0]
    assert math.prod(shapes[2].sizes) == 14
