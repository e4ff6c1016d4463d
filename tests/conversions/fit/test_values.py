"""Values refitted in closed form: the dense solution, for mixers that are linear in them, and only where it helps."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.context import StageRun
from rnnzoo.conversions.fit.closed_form import ClosedForm, Layer, Stream
from rnnzoo.conversions.fit.linear_layers import with_bias
from rnnzoo.conversions.fit.values import Values
from rnnzoo.conversions.layers import InMemoryLayers
from rnnzoo.conversions.stages.calibrate import Calibrate, fit_layers
from rnnzoo.conversions.teachers import resolve_teacher

from ..stages.test_calibrate_parts import job_of
from ..tiny import tiny_teacher
from .test_closed_form import dense, models, rows_of, some_rows

LINEAR = ["linear_attention", "gla", "liger", "retnet", "hgrn2", "gated_delta_net", "kda", "xlstm", "aaren"]
NOT_LINEAR = ["mamba2", "mamba", "gateloop", "supra", "hawk"]
HEADS, WIDTH = 6, 8


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def teacher(request, tmp_path_factory):
    """With two kv heads; Qwen2's projections have biases."""
    ref = resolve_teacher(str(tiny_teacher(request.param, tmp_path_factory.mktemp("t"))))
    return ref, ref.load()


def layer_of(student, teacher_model, data, number: int = 0, **how) -> tuple[Layer, list[Stream]]:
    """A layer that its teacher has taught, and the student's streams before it."""
    theirs, ours = ([Stream.of(model, data[i]) for i in range(len(data))] for model in (teacher_model, student))
    blocks = teacher_model.model.layers[number], student.model.layers[number]
    layer = Layer(*blocks, blocks[1].mixer.output_projection(), ClosedForm(("values",), **how), None)
    for streams, model in ((theirs, teacher_model), (ours, student)):
        for stream in streams:
            for block in model.model.layers[:number]:
                stream.advance(block)
    layer.teach(theirs)
    return layer, ours


def mixing(values: Values, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """M (H, T, T) as the derivative of the heads' outputs by the values, and what W_v is given, (T, D)."""
    made, given = [], []
    hook = values.projection.register_forward_hook(lambda _, args, out: (given.append(args[0]), made.append(out))[1])
    values.projection.weight.requires_grad_(True)
    with torch.enable_grad():
        o = values.mixed_values(stream)
        hook.remove()
        rows = [torch.autograd.grad(x, made[0], retain_graph=True)[0][0] for x in o[..., 0].flatten()]
    m = torch.stack(rows).unflatten(0, o.shape[:2])[..., :: values.width]  # (T, H, T, Hk), of every first channel
    groups = HEADS // values.kv_heads
    m = torch.stack([m[:, head, :, head // groups] for head in range(HEADS)])
    x = given[0][0].detach()
    return m, torch.nn.functional.pad(x, (0, values.inputs - x.shape[1]), value=1.0)


@pytest.mark.parametrize("weighting", ["none", "norm"])
@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_values_are_the_dense_solution(teacher, name, weighting):
    student, teacher_model = models(teacher, name)
    layer, streams = layer_of(student, teacher_model, some_rows(2, 24), weighting=weighting)
    layer.sums(streams)
    values = Values.of(layer.student_block, layer.output, HEADS, streams[0])
    assert values is not None and values.kv_heads in (2, 6)
    found, apart = values.fitted(streams, layer.heads, layer.weights, 0.05)
    groups, parts = HEADS // values.kv_heads, []
    for row, stream in enumerate(streams):
        m, x = mixing(values, stream)
        taught = layer.heads[row].unflatten(-1, (HEADS, WIDTH)).double()
        weight = torch.ones(24) if layer.weights[row] is None else layer.weights[row]
        parts.append((m @ x, taught.transpose(0, 1), weight.double().expand(HEADS, -1)))
    for kv in range(values.kv_heads):
        of = slice(kv * groups, (kv + 1) * groups)
        old = with_bias(values.projection)[kv * WIDTH : (kv + 1) * WIDTH]
        whole = [torch.cat([part[i][of].flatten(0, 1) for part in parts]) for i in range(3)]
        expected = dense(whole[0], whole[1], old, 0.05, whole[2])
        torch.testing.assert_close(found.unflatten(0, (-1, WIDTH))[kv], expected, rtol=1e-3, atol=1e-5)
        for half, part in zip(apart, parts, strict=True):  # of two rows, one each
            alone = dense(*(x[of].flatten(0, 1) for x in part[:2]), old, 0.05, part[2][of].flatten())
            torch.testing.assert_close(half.unflatten(0, (-1, WIDTH))[kv], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NOT_LINEAR)
@torch.no_grad()
def test_mixers_that_are_not_linear_in_their_values_keep_them(teacher, name):
    student, teacher_model = models(teacher, name, dtype=torch.float32)
    if (output := student.model.layers[0].mixer.output_projection()) is not None:
        stream = Stream.of(student, some_rows()[0])
        assert Values.of(student.model.layers[0], output, HEADS, stream) is None
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    fit_layers(InMemoryLayers(teacher_model, student), some_rows(), ClosedForm(("values",)))
    assert all(torch.equal(before[key], tensor) for key, tensor in student.state_dict().items())


@torch.no_grad()
def test_documents_of_a_row_are_apart(teacher):
    student, teacher_model = models(teacher, "gla")
    ids = some_rows(1, 40)[0]["input_ids"]
    packed, _ = layer_of(student, teacher_model, rows_of(ids[None], torch.arange(40)[None] // 20))
    p = Values.of(packed.student_block, packed.output, HEADS, stream := Stream.of(student, rows_of(ids[None])[0]))
    alone = [Stream.of(student, rows_of(part[None])[0]) for part in ids.split(20)]
    both = Stream.of(student, rows_of(ids[None], torch.arange(40)[None] // 20)[0])
    torch.testing.assert_close(p.summed(both), torch.cat([p.summed(part) for part in alone]))
    assert not torch.allclose(p.summed(both), p.summed(stream))


@pytest.mark.parametrize("parts", [("values",), ("values", "output")])
@torch.no_grad()
def test_values_change_where_the_layer_gains_by_them(teacher, parts):
    """A student whose values were spoilt gets them back; what noise asks for makes the layer worse."""
    for noise in (False, True):
        student, teacher_model = models(teacher, "liger")
        data = some_rows(6, 96)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            projection = student.model.layers[0].mixer.proj.v_proj
            if not noise:
                projection.weight += 0.5 * projection.weight.std() * torch.randn_like(projection.weight)
            before = projection.weight.clone()
            layer, streams = layer_of(student, teacher_model, data)
            layer.how = ClosedForm(parts)
            if noise:
                layer.heads = [torch.randn_like(x) for x in layer.heads]
        error_before, error_after = layer.fit(streams)
        assert torch.equal(projection.weight, before) == noise
        assert error_after <= error_before * (1 + 1e-9)
        assert noise or error_after < 0.8 * error_before


@pytest.mark.parametrize("name", ["linear_attention", "gated_delta_net", "mamba2"])
def test_the_stage_says_in_how_many_layers_values_are_new_and_makes_no_loss_larger(teacher, name):
    parts = [part for part in ("decay", "values", "scale", "output") if part != "decay" or name != "linear_attention"]
    job, student = job_of(teacher[0], name, stage := Calibrate("fit", parts=parts))
    before = {key: tensor.clone() for key, tensor in student.state_dict().items() if "v_proj.weight" in key}
    after, report = stage.run(job, student, StageRun("fit", range(0), [0, 1]))
    kept = report["fits_kept"]
    assert (report["loss_after"] <= report["loss_before"]) == kept
    changed = sum(not torch.equal(after.state_dict()[key], tensor) for key, tensor in before.items())
    assert changed == (report["values_refitted"] if kept else 0)
    assert name != "mamba2" or report["values_refitted"] == 0
