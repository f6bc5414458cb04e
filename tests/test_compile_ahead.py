"""Training steps and the sampler, compiled for TPU slices that are not here."""

import contextlib
import io
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import jax
import pytest
from ml_collections import ConfigDict

from vgpt_jax import compile_ahead
from vgpt_jax.errors import UserError
from vgpt_jax.training.compile_report import Job, Report, advice, compiled_report, in_units, needed_memory

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),  # of devices that are not here
    pytest.mark.filterwarnings("ignore:the load_module"),  # which ml_collections calls
]

BATCH = 16
"""Pictures of a step, over all chips."""

TINY_ADVERSARY = {
    "adversarial.discriminator": "patchgan",
    "patchgan.ndf": 8,
    "patchgan.num_layers": 1,
    "vector_quantize.pretrain_steps": 0,
}


def run_main(*arguments: str) -> tuple[int, str, str]:
    """Runs the command line: its status, and what it printed to both streams."""
    sys.argv = ["compile_ahead", "--config=configs/emoji.py", *arguments]  # where the config's flags look for them too
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            compile_ahead.main(sys.argv)
        except SystemExit as stopped:
            return stopped.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def command():
    """`run_main`, in a process of its own: where libtpu is loaded and no TPU is, JAX's profiler crashes, which others test."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda *arguments: pool.submit(run_main, *arguments).result()


@pytest.fixture(scope="module")
def compiled(command, tiny_overrides, tmp_path_factory):
    """Runs the command line on the tiny config, and gives what it printed and the reports by their programs."""

    def run(*arguments: str, **fields):
        path = tmp_path_factory.mktemp("reports") / "reports.json"
        changes = [f"--config.{name}={value}" for name, value in (tiny_overrides | fields).items()]
        status, printed, said = command(f"--json={path}", *arguments, *changes)
        assert status == 0, said
        return printed, {report["program"]: report for report in json.loads(path.read_text())}

    return run


@pytest.fixture
def error_of(command):
    """The one line with which the command refuses its arguments."""

    def run(*arguments: str) -> str:
        status, _, said = command(*arguments)
        assert status == 2
        assert said.splitlines()[-1].startswith("error: ")
        return said.splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def over_data(compiled):
    """All stages and the sampler on four chips, the batch split over them."""
    return compiled("--stage=all", "--topology=v5e:2x2", "--sample=2")


@pytest.fixture(scope="module")
def over_fsdp(compiled):
    """The same of another type, the state split too; the tokenizer with a discriminator, the generator's batch in two parts."""
    fields = {"mesh.data": 1, "mesh.fsdp": 4, "generator_training.accumulate": 2, **TINY_ADVERSARY}
    return compiled("--stage=all", "--topology=v4:2x2x1", "--sample", **fields)


STEPS = ("tokenizer step", "generator step", "classifier step")


@needs_libtpu
@pytest.mark.parametrize("program", STEPS)
def test_data_parallel_sums_gradients_and_sends_nothing_else(over_data, program):
    report = over_data[1][program]
    assert set(report["cost"]["collectives"]) == {"all-reduce"}
    gradients = 2 * 3 / 4 * report["parts"]["parameters"]  # float32, in a ring of four
    assert gradients <= report["cost"]["collectives"]["all-reduce"]["bytes"] < 1.1 * gradients
    assert (report["chip"], report["mesh"]) == ("TPU v5 lite", {"data": 4, "fsdp": 1, "tensor": 1})
    assert (report["pictures"], report["cost"]["unknown_loops"]) == (BATCH, 0)


@needs_libtpu
@pytest.mark.parametrize("program", [*STEPS[1:], "tokenizer step from 0 on", "tokenizer step from 13 on"])
def test_fsdp_keeps_a_part_of_the_state_and_gathers_weights(over_data, over_fsdp, program):
    report, whole = over_fsdp[1][program], over_data[1][program.split(" from")[0]]
    assert report["chip"] == "TPU v4"
    assert report["parts"]["parameters"] < 0.5 * whole["parts"]["parameters"]
    assert report["parts"]["optimizer"] < 0.5 * whole["parts"]["optimizer"]
    sent = report["cost"]["collectives"]
    assert "all-gather" in sent and {"reduce-scatter", "all-reduce"} & set(sent)
    lacks = (
        whole["parts"]["parameters"] - report["parts"]["parameters"]
    )  # float32; sent as bfloat16 where products take it
    assert sent["all-gather"]["bytes"] >= lacks / 2


@needs_libtpu
def test_the_generator_does_the_arithmetic_of_its_layers_and_no_more(over_data, over_fsdp):
    """By hand: a product with each weight and each key and value, forwards, and two backwards; in two parts or as one."""
    width, layers, places, codes, classes = 32, 2, 16, 32, 9
    pictures = BATCH / 4  # of a chip
    of_weights = layers * 12 * width**2 + width * (codes + classes + 2)
    forwards = 2 * pictures * places * (of_weights + layers * 2 * places * width)
    for _, reports in (over_data, over_fsdp):
        assert reports["generator step"]["cost"]["flops"] == 3 * forwards


@needs_libtpu
def test_the_discriminator_is_there_from_its_first_step_on(over_fsdp):
    before, after = (over_fsdp[1][f"tokenizer step from {first} on"] for first in (0, 13))
    assert before["parts"]["discriminator"] == after["parts"]["discriminator"] > 0
    assert after["cost"]["flops"] > 1.1 * before["cost"]["flops"]


@needs_libtpu
def test_the_sampler_writes_every_token(over_data, over_fsdp):
    """By hand, at the least: every token goes through every weight of the generator once."""
    of_weights = 2 * 12 * 32**2 + 32 * 32
    for (_, reports), pictures in ((over_data, 2), (over_fsdp, compile_ahead.PICTURES_A_CHIP)):
        sampler = reports["sampler"]
        assert sampler["pictures"] == 4 * pictures
        assert sampler["cost"]["flops"] > 2 * pictures * 16 * of_weights
        assert sampler["cost"]["unknown_loops"] == 0
    sent = over_data[1]["sampler"]["cost"][
        "collectives"
    ]  # each chip draws its own pictures, with guidance; scores and the
    assert set(sent) == {"all-gather", "all-reduce"}  # chosen of all chips are put together at the end
    assert sent["all-reduce"]["bytes"] == 2 * 3 / 4 * 4 * 8 * (16 * 16 * 3 + 16)


@needs_libtpu
def test_what_is_printed_is_what_was_found(over_data):
    printed, reports = over_data
    for report in reports.values():
        assert report["fits"] and sum(report["parts"].values()) + report["activations"] <= report["needed"]
        assert report["bound"] == max(report["seconds"].values()) and 0 < report["share_of_peak"] <= 1
        head = f"{report['program']}: {report['pictures']} pictures on data 4 x fsdp 1 x tensor 1 chips (TPU v5 lite)"
        table = printed.split(head)[1].split(" of peak")[0]
        assert f"{in_units(report['needed'])}   of 15.8 GiB" in table
        assert f"{report['pictures'] / report['bound']:.0f} pictures/s" in table


@needs_libtpu
def test_tensor_parallel_sums_activations(compiled, over_data):
    """Two sums a layer forwards, of what it gives, and two backwards; the weights stay where they are."""
    fields = {"mesh.data": 1, "mesh.tensor": 4}
    report = compiled("--stage=gpt", "--topology=v5e:2x2", **fields)[1]["generator step"]
    assert report["parts"]["parameters"] < 0.5 * over_data[1]["generator step"]["parts"]["parameters"]
    sent = report["cost"]["collectives"]
    assert sent["all-reduce"]["count"] + sent["reduce-scatter"]["count"] >= 2 * 2 * 2


@needs_libtpu
def test_between_slices_go_the_gradients_alone(compiled):
    """Of two slices each chip sends its quarter of the sums of its own slice to the other."""
    fields = {"classifier.widths": "(64,128)"}
    report = compiled("--stage=classifier", "--topology=v5e:2x2", "--slices=2", **fields)[1]["classifier step"]
    gradients, sent = report["parts"]["parameters"], report["cost"]["collectives"]
    assert report["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert gradients / 4 <= sent["send"]["bytes"] < gradients / 2
    assert report["seconds"]["interconnect"] < sum(messages["bytes"] for messages in sent.values()) / 200e9


@needs_libtpu
def test_what_does_not_fit_ends_with_a_line_and_is_written_down(error_of, tiny_overrides, tmp_path):
    path = tmp_path / "reports.json"
    fields = tiny_overrides | {"classifier_training.batch_size": 2**20, "classifier.widths": "(256, 256)"}
    changes = [f"--config.{name}={value}" for name, value in fields.items()]
    line = error_of("--stage=classifier", "--topology=v5e:2x2", f"--json={path}", *changes)
    assert "classifier step needs" in line and "more than the 15.8 GiB of a TPU v5 lite" in line
    assert "classifier_training.batch_size, classifier_training.accumulate" in line
    (report,) = json.loads(path.read_text())
    assert not report["fits"] and report["needed"] > report["available"] and report["cost"] is None


# Without a compiler.


def test_the_compilers_words_for_too_little_memory():
    said = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    said += "temporaries (34.00G) exceeds available HBM (15.75G). HLO module: jit__lambda."
    assert needed_memory(said) == 34 * 2**30
    assert needed_memory("UNIMPLEMENTED: Stable sorting of more than 2^31-1 elements is not implemented") is None


def test_another_error_of_the_compiler_is_not_taken_for_that():
    def lower():
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: something else")

    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        patch.setitem(
            compile_ahead.ACCELERATORS, mesh.devices.flat[0].device_kind, compile_ahead.ACCELERATORS["TPU v4"]
        )
        compiled_report(Job("step", 1, {}, lower), mesh)


@pytest.mark.parametrize("state, first", [(0.9, "mesh.fsdp"), (0.1, "generator_training.batch_size")])
def test_the_advice_goes_by_what_is_large(state, first):
    parts = {"parameters": state * 2**34, "batch": 2**20}
    report = Report("generator step", "TPU v5 lite", {}, 1, parts, None, 2**35, 2**34, None, {}, 0.0)
    assert f"16.0 GiB more than the 16.0 GiB of a TPU v5 lite ({in_units(state * 2**34)}" in advice(report)
    assert f"change {first}" in advice(report)


@pytest.mark.parametrize("count, words", [(0, "0 B"), (1000, "1000 B"), (1536, "1.5 KiB"), (3 * 2**40, "3072.0 GiB")])
def test_bytes_to_be_read(count, words):
    assert in_units(count) == words


@pytest.mark.parametrize(
    "data, classes",
    [
        ({"name": "emoji", "emoji_label": "group", "emoji_skin_tones": False}, 9),
        ({"name": "emoji", "emoji_label": "subgroup", "emoji_skin_tones": False}, 98),
        ({"name": "imagenet2012", "data_dir": ""}, 1000),
    ],
)
def test_the_number_of_classes_is_known_without_the_data(data, classes, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert compile_ahead.num_classes_of(ConfigDict(data)) == classes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--stage=gtp", "--topology=v5e:2x2"],
            "--stage is 'gtp', but must be one of all, classifier, generator, gpt, tokenizer",
        ),
        (["--stage=tokenizer", "--topology=v5e:2x2", "--sample"], "--sample draws with the generator"),
        (["--stage=gpt", "--topology=v5e:2x2", "--sample=0"], "--sample is 0, but must be at least 1"),
        (["--stage=gpt", "--topology=v5e:2x2", "--num_classes=0"], "--num_classes is 0, but must be at least 1"),
        (["--stage=gpt", "--topolgy=v5e:2x2"], "--topology"),
        (["--stage=gpt", "--topology=v5e:2x2", "--slcies=2"], "unknown flag --slcies: did you mean 'slices'?"),
        pytest.param(["--stage=gpt", "--topology=v5e"], "v5e is no TPU slice", marks=needs_libtpu),
        pytest.param(["--stage=gpt", "--topology=v5e:3x3"], "for example, v5e:2x2", marks=needs_libtpu),
        pytest.param(["--stage=gpt", "--topology=v3:2x2"], "(TPU v3) whose rates are not known", marks=needs_libtpu),
        pytest.param(
            ["--stage=gpt", "--topology=v5e:2x2", "--config.data.name=image_folder"],
            "how many classes image_folder has only its data says: give --num_classes",
            marks=needs_libtpu,
        ),
        pytest.param(
            ["--stage=gpt", "--topology=v5e:4x4", "--config.generator_training.batch_size=8"],
            "generator_training.batch_size is 8, but must be a multiple of the 16 devices",
            marks=needs_libtpu,
        ),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(arguments, words, error_of):
    assert words in error_of(*arguments)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(compile_ahead, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="there is no libtpu, the compiler for TPUs: pip install 'vgpt-jax\\[tpu\\]'"):
        compile_ahead.slice_devices("v5e:2x2", 1)
