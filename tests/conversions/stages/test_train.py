"""End-to-end training: reverse and cached divergences, LoRA, learning rates by part, epochs, another teacher."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages import cached_teacher
from rnnzoo.conversions.stages.cached_teacher import CachedRows, repeated, write_shards
from rnnzoo.conversions.stages.distilled import check_same_tokenizer
from rnnzoo.conversions.stages.end_to_end import check_lora, lora_targets, trainable
from rnnzoo.conversions.stages.parameters import parts_of
from rnnzoo.conversions.stages.train import Train, TrainEndToEnd
from rnnzoo.conversions.stages.training import TrainingArguments
from rnnzoo.conversions.student import zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from ..tiny import tiny_teacher
from .jobs import LENGTH, OneStage, Stop, changed, random_rows, resolved, stop_at, student_of, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return resolved(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def teacher_model(teacher):
    return zoo_teacher(*teacher, torch.float32)


def stage_of(**settings) -> Train:
    return Train("distill", **({"share": 1.0, "lr": 1e-3, "new_lr": 1e-2} | settings))


def trainer_of(student, teacher_model, folder, **settings):
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    return TrainEndToEnd(
        model=student,
        args=arguments,
        train_dataset=random_rows(2),
        stage=stage_of(**settings),
        teacher_model=teacher_model,
    )


def divergences(student, teacher_model, ids, top=None):
    """(KL(teacher || student), KL(student || teacher)), over the classes kept and the rest."""
    p, q = (model(ids, use_cache=False).logits.softmax(-1) for model in (teacher_model, student))
    if top:
        indices = p.topk(top, -1).indices
        p, q = (torch.cat([x.gather(-1, indices), 1 - x.gather(-1, indices).sum(-1, True)], -1) for x in (p, q))
    return (p * (p / q).log()).sum(-1).mean(), (q * (q / p).log()).sum(-1).mean()


def test_both_divergences_are_mixed_by_their_weights(teacher, teacher_model, tmp_path):
    student, ids = student_of(teacher), random_rows(3).input_ids.long()
    loss = trainer_of(student, teacher_model, tmp_path, kl=0.3, reverse_kl=2.0).loss(student, ids, None)
    forward, backward = divergences(student, teacher_model, ids)
    torch.testing.assert_close(loss, 0.3 * forward + 2.0 * backward, rtol=1e-4, atol=1e-5)
    parameter = student.model.layers[0].mixer.proj.v_proj.weight
    (found,) = torch.autograd.grad(loss, parameter)
    (expected,) = torch.autograd.grad(0.3 * forward + 2.0 * backward, parameter)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("documents", [1, 3])
def test_kept_predictions_are_the_teachers(teacher, teacher_model, tmp_path, documents):
    """Over the K likeliest and the rest, with each document on its own, through the files."""
    student, rows = student_of(teacher), random_rows(5, documents=documents)
    per_shard = write_shards(lambda: teacher_model, rows, 6, tmp_path, lambda *_: None, 320)
    kept = CachedRows(rows, tmp_path, per_shard)
    trainer = trainer_of(student, None, tmp_path, kl=0.5, reverse_kl=0.25, ce=1.0, labels="teacher")
    for number in range(5):
        row = {name: value[None] for name, value in kept[number].items()}
        loss = trainer.compute_loss(student, row)
        parts = [row["input_ids"][row["seq_ids"] == document][None] for document in range(documents)]
        forward, backward = (
            sum(divergences(student, teacher_model, part, 6)[i] * part.numel() for part in parts) / LENGTH
            for i in (0, 1)
        )
        entropy = sum(
            torch.nn.functional.cross_entropy(
                student(part, use_cache=False).logits[0], teacher_model(part).logits[0].argmax(-1), reduction="sum"
            )
            for part in parts
        )
        torch.testing.assert_close(loss, 0.5 * forward + 0.25 * backward + entropy / LENGTH, rtol=1e-4, atol=1e-5)


def test_shards_that_are_there_are_not_made_again(teacher_model, tmp_path, monkeypatch):
    """Killed while a shard is written: what was whole stays as it is, what was not is made as it would have been."""
    rows = random_rows(5)
    monkeypatch.setattr(cached_teacher, "SHARD_BYTES", 2 * LENGTH * (8 * 4 + 4))
    write_shards(lambda: teacher_model, rows, 4, tmp_path / "whole", lambda *_: None, 320)
    whole = {file.name: file for file in (tmp_path / "whole").iterdir()}
    assert sorted(whole) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]

    def stop(done, total):
        if done:
            raise Stop

    with pytest.raises(Stop):
        write_shards(lambda: teacher_model, rows, 4, tmp_path / "cut", stop, 320)
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["00000.safetensors"]
    first = (tmp_path / "cut" / "00000.safetensors").stat().st_mtime_ns
    (tmp_path / "cut" / "00001.safetensors.partial").write_bytes(b"half")
    per_shard = write_shards(lambda: teacher_model, rows, 4, tmp_path / "cut", lambda *_: None, 320)
    assert (tmp_path / "cut" / "00000.safetensors").stat().st_mtime_ns == first
    one, two = (CachedRows(rows, tmp_path / name, per_shard) for name in ("whole", "cut"))
    for number in range(5):
        assert all(torch.equal(one[number][name], two[number][name]) for name in one[number])

    def never():
        raise AssertionError("the teacher was loaded")

    write_shards(never, rows, 4, tmp_path / "cut", lambda *_: None, 320)


@pytest.mark.parametrize("settings", [{"cache_top_k": 5}, {"trains": "lora"}, {"trains": "lora", "cache_top_k": 5}])
def test_a_stopped_stage_ends_at_the_same_weights(teacher, tmp_path, settings):
    whole, again = student_of(teacher, keep=[0]), student_of(teacher, keep=[0])
    expected = OneStage(teacher, tmp_path / "whole", rows=random_rows(12)).do(stage_of(epochs=2, **settings), whole)
    stopping = OneStage(teacher, tmp_path / "cut", rows=random_rows(12), callback=stop_at(4 * 2 * LENGTH))
    with pytest.raises(Stop):
        stopping.do(stage_of(epochs=2, **settings), student_of(teacher, keep=[0]))
    report = OneStage(teacher, tmp_path / "cut", rows=random_rows(12)).do(stage_of(epochs=2, **settings), again)
    assert not changed(weights(whole), again)
    same = ("tokens", "loss_first", "loss_last")
    assert {name: report[name] for name in same} == {name: expected[name] for name in same}
    assert expected["tokens"] == 12 * LENGTH
    if "cache_top_k" in settings:
        assert expected["teacher_bytes"] > 6 * LENGTH * (8 * 5 + 4)  # the first six rows, which are read twice


def test_training_on_kept_predictions_does_not_run_the_teacher(teacher, tmp_path):
    stage, rows = stage_of(cache_top_k=5), random_rows(4)
    job = OneStage(teacher, tmp_path, rows=rows)
    calls = []
    hook = job.teacher_model.model.register_forward_hook(lambda *_: calls.append(1))
    job.do(stage, student_of(teacher))
    hook.remove()
    assert len(calls) == len(rows)


def test_rows_come_in_another_order_each_epoch():
    rows = random_rows(6)
    seen = repeated(rows, 16, seed=3)
    order = [next(i for i in range(6) if torch.equal(seen[n]["input_ids"], rows[i]["input_ids"])) for n in range(16)]
    assert order[:6] == list(range(6)) and sorted(order[6:12]) == list(range(6)) and order[6:12] != list(range(6))
    assert len(set(order[12:])) == 4
    again = repeated(rows, 16, seed=3)
    assert all(torch.equal(seen[n]["input_ids"], again[n]["input_ids"]) for n in range(16))
    assert repeated(rows, 6, seed=3) is rows


# LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["hedgehog", "supra", "gated_delta_net", "rwkv7"])
def test_adapters_move_their_matrices_alone_and_are_gone_afterwards(teacher, tmp_path, mixer):
    student = student_of(teacher, mixer, keep=[0])
    before = weights(student)
    expected = {f"{name}.weight" for name in lora_targets(student, stage_of(trains="lora"))}
    assert expected == {f"model.layers.1.mixer.proj.{x}_proj.weight" for x in "qkvo"}
    OneStage(teacher, tmp_path, rows=random_rows(6)).do(stage_of(trains="lora", lora_rank=3), student)
    assert changed(before, student) == expected and not hasattr(student, "peft_config")
    for name in expected:
        difference = student.state_dict()[name] - before[name]
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 3


def test_adapters_add_alpha_over_rank_times_their_product(teacher):
    student, ids = student_of(teacher), random_rows(2).input_ids.long()
    stage = stage_of(trains="lora", lora_rank=2, lora_alpha=8.0, lora_targets=["v_proj"])
    with torch.no_grad():
        alone = student(ids).logits
        before = weights(student)
        with trainable(student, stage, 0) as trains:
            assert torch.equal(student(ids).logits, alone)  # they begin at nothing
            parameters = {name: p for name, p in student.named_parameters() if trains(name)}
            for name, parameter in parameters.items():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
            products = {}
            for name in parameters:
                if ".lora_B" in name:
                    a = parameters[name.replace("lora_B", "lora_A")]
                    products[name.split(".lora_B")[0] + ".weight"] = 4.0 * parameters[name] @ a
            with_adapters = student(ids).logits
        torch.testing.assert_close(student(ids).logits, with_adapters, rtol=1e-4, atol=1e-4)
    assert len(products) == 2 and changed(before, student) == set(products)
    for name, product in products.items():
        torch.testing.assert_close(student.state_dict()[name] - before[name], product, rtol=1e-3, atol=1e-5)


def test_targets_that_the_mixers_lack_are_told(teacher):
    stage = stage_of(trains="lora", lora_targets=["q_proj", "gate_proj"])
    with pytest.raises(RnnzooError, match="no matrix 'gate_proj' for LoRA; lora_targets may name q_proj, k_proj"):
        check_lora(stage, student_of(teacher))


# Learning rates ------------------------------------------------------------------------------------------------------


def test_each_part_has_its_own_learning_rate(teacher, teacher_model, tmp_path):
    student = student_of(teacher, keep=[0])
    rates = {"lr": 1e-3, "new_lr": 2e-3, "rest_lr": 3e-3, "attention_lr": 4e-3}
    trainer = trainer_of(student, teacher_model, tmp_path, trains="all", **rates)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    found = {}
    for group in trainer.create_optimizer().param_groups:
        found |= {names[id(parameter)]: group["lr"] for parameter in group["params"]}
    assert found.keys() == {name for name, _ in student.named_parameters()}
    assert found["model.layers.0.mixer.proj.q_proj.weight"] == 4e-3
    assert found["model.layers.1.mixer.proj.q_proj.weight"] == 1e-3
    assert found["model.layers.1.mixer.key_map"] == 2e-3
    others = {name: rate for name, rate in found.items() if ".mixer." not in name}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= others.keys()
    assert set(others.values()) == {3e-3}


def test_rates_that_are_not_given_are_lr():
    stage = stage_of()
    assert {part: stage.rate(part) for part in ("mixers", "rest", "attention", "new")} == {
        "mixers": 1e-3,
        "rest": 1e-3,
        "attention": 1e-3,
        "new": 1e-2,
    }


def test_adapters_have_the_rate_of_the_mixers(teacher):
    student, stage = student_of(teacher), stage_of(trains="lora")
    with trainable(student, stage, 0) as trains:
        parts = parts_of(student)
        assert {parts[name] for name in parts if trains(name)} == {"mixers"}
        assert parts["model.layers.1.mixer.proj.q_proj.base_layer.weight"] == "mixers"
        assert parts["model.layers.1.mixer.key_map"] == "new"


# Another teacher -----------------------------------------------------------------------------------------------------


def test_a_wider_teacher_with_unused_rows_in_its_head_teaches(teacher, tmp_path):
    folder = tiny_teacher("llama", tmp_path / "large", seed=5, hidden_size=96, num_hidden_layers=3, vocab_size=352)
    other = resolve_teacher(str(folder))
    check_same_tokenizer(other, teacher[0])
    student, ids = student_of(teacher), random_rows(1).input_ids.long()
    with torch.no_grad():
        p = other.load()(ids).logits[..., :320].softmax(-1)
        expected = (p * (p / student(ids).logits.softmax(-1)).log()).sum(-1).mean()
    report = OneStage(teacher, tmp_path / "run", rows=random_rows(1), per_step=1).do(
        stage_of(teacher=str(folder)), student
    )
    assert report["loss_first"] == pytest.approx(float(expected), rel=1e-3)
    kept = OneStage(teacher, tmp_path / "kept", rows=random_rows(1), per_step=1).do(
        stage_of(teacher=str(folder), cache_top_k=319), student_of(teacher)
    )
    assert kept["loss_first"] == pytest.approx(float(expected), rel=1e-3)


def test_a_teacher_with_another_tokenizer_or_shorter_positions_is_refused(teacher, tmp_path):
    folder = tiny_teacher("llama", tmp_path, seed=5, max_position_embeddings=16)
    file = folder / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace("<|im_end|>", "<|im_fin|>"))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|im_end|>", "<|im_fin|>"))
    other = resolve_teacher(str(folder))
    with pytest.raises(RnnzooError, match=r"another tokenizer than tiny-llama \(the token .* is .*unknown") as raised:
        check_same_tokenizer(other, teacher[0])
    assert "\n" not in str(raised.value)
    with pytest.raises(RnnzooError, match=r"A sequence length of 32 does not suit the teacher tiny-llama"):
        stage_of(teacher=str(folder)).other_teacher(Recipe("test", "hedgehog", [], seq_len=32))
