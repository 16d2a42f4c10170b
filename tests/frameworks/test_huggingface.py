"""`gradwatch.integrations.huggingface` in real trainings of transformers' Trainer, of TRL and of PEFT."""

from __future__ import annotations

import copy
import functools
import json
import linecache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.truth import Loop, check

pytest.importorskip("transformers", reason="needs the extra `frameworks`")
pytest.importorskip("accelerate", reason="needs the extra `frameworks`")
import transformers

from gradwatch.integrations.huggingface import GradwatchCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import gradwatch

pytestmark = pytest.mark.filterwarnings("default")  # of the framework's own code

STEPS, LONG, BATCH, LENGTH, WORDS = 12, 80, 4, 8, 32


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random texts, of which some tokens are no targets."""

    def __init__(self, count: int = STEPS * BATCH) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, WORDS, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index].clone()
        labels[: 1 + index % 4] = -100  # so that steps have different numbers of targets; the first token is never one
        return {"input_ids": self.ids[index], "labels": labels}


class Collator:
    """Makes batches as transformers does, and remembers them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        self.seen.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


def llama() -> Any:
    """A Llama of two layers that were never trained; its embedding is tied to its head."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def short(folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of a short training with plain SGD that draws nothing."""
    told: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return told | more


def trained(
    folder: Path,
    callback: Any,
    model: Any,
    *more: Any,
    steps: int = STEPS,
    resume: str | None = None,
    prepare: Callable[[Any], None] | None = None,
    **settings: Any,
) -> tuple[Any, Collator]:
    """Train under the Trainer; return it and the batches that it took.

    ``more`` are further callbacks; ``prepare`` receives the Trainer before it trains.
    """
    collator = Collator()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**short(folder, **settings)),
        train_dataset=Texts(steps * BATCH),
        eval_dataset=Texts(BATCH),
        data_collator=collator,
        callbacks=[callback, *more],
    )
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, collator


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The sum of the losses of all targets, by torch's own function."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum")


def own_loop(
    model: Any,
    batches: list[dict[str, Tensor]],
    accumulate: int,
    max_norm: float | None,
    dtype: torch.dtype = torch.float32,
) -> Loop:
    """The same training in plain torch: each step is the mean over all targets of its batches."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    loop = Loop(model, torch.optim.SGD(parameters, lr=0.1), max_norm)
    for start in range(0, len(batches), accumulate):
        group = batches[start : start + accumulate]
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)

        def part(batch: dict[str, Tensor], share: float = len(group) / targets) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                return token_losses(model, batch) * share

        loop.step([functools.partial(part, batch) for batch in group])
    return loop


@pytest.mark.parametrize(
    ("accumulate", "max_norm", "bf16"),
    [(1, None, False), (4, None, False), (4, 0.1, False), (5, 0.1, True), (1, 0.1, True)],
    ids=["plain", "accumulation", "accumulation, clipped", "bf16, the last step smaller", "bf16, clipped"],
)
def test_rows_agree_with_a_loop_of_ones_own(
    tmp_path: Path, accumulate: int, max_norm: float | None, bf16: bool
) -> None:
    """Loss of each optimizer step, norm of each layer before the clip, and what the clip left."""
    model, callback = llama(), GradwatchCallback(report=None, strict=True)
    twin = copy.deepcopy(model)
    _, collator = trained(
        tmp_path,
        callback,
        model,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=max_norm or 0.0,
        bf16=bf16,
    )
    dtype = torch.bfloat16 if bf16 else torch.float32
    check(callback.monitor, own_loop(twin, collator.seen, accumulate, max_norm, dtype), rtol=3e-2 if bf16 else 1e-4)


def test_rows_are_without_the_loss_scale_of_fp16(tmp_path: Path) -> None:
    """Accelerate leaves float16 out on the CPU, where torch has autocast and a scaler for it: here the Trainer gets both."""
    model, callback = llama(), GradwatchCallback(report=None, strict=True)
    twin = copy.deepcopy(model)
    computed: set[torch.dtype] = set()
    model.lm_head.register_forward_hook(lambda *told: computed.add(told[-1].dtype))

    def scale(trainer: Any) -> None:
        assert trainer.accelerator.mixed_precision == "fp16"
        assert trainer.accelerator.scaler is None
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    settings: dict[str, Any] = {"fp16": True, "gradient_accumulation_steps": 3, "max_grad_norm": 0.1}
    trainer, collator = trained(tmp_path, callback, model, prepare=scale, **settings)
    assert computed == {torch.float16}
    assert {one["gradwatch/loss_scale"] for one in trainer.state.log_history if "loss" in one} == {1024.0}
    check(callback.monitor, own_loop(twin, collator.seen, 3, 0.1, torch.float16), rtol=1e-2)


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """The parameters are bit-identical to those of a training without the callback."""
    watched, alone = llama(), llama()
    trained(tmp_path, GradwatchCallback(report=None), watched, max_grad_norm=0.5)
    trained(tmp_path, transformers.TrainerCallback(), alone, max_grad_norm=0.5)
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


class Surge(transformers.TrainerCallback):  # type: ignore[misc]
    """A rate that is far too high from step 50 on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1000.0 if state.global_step >= 50 else 0.1


class Raises(transformers.TrainerCallback):  # type: ignore[misc]
    """Interrupts the training before its sixth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise RuntimeError("no more data")


def monitor_of(callback: GradwatchCallback) -> gradwatch.Monitor:
    """The monitor of the training that has been."""
    assert callback.monitor is not None
    assert not callback.monitor.attached
    return callback.monitor


def test_the_trainers_logger_has_the_numbers_and_the_terminal_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In TensorBoard, under the Trainer's own steps: norms before and after the clip, worst layers, incidents as text."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = GradwatchCallback(report=None, worst=2)
    trainer, _ = trained(
        tmp_path, callback, llama(), Surge(), steps=60, max_grad_norm=0.5, logging_steps=5, report_to=["tensorboard"]
    )
    history = monitor_of(callback).history
    board = events.EventAccumulator(str(tmp_path / "board")).Reload()
    assert board.Tags()["scalars"].count("train/gradwatch/global_norm") == 1
    norms, after = (board.Scalars(f"train/gradwatch/global_norm{end}") for end in ("", "_after_clip"))
    assert [one.step for one in norms] == list(range(5, 61, 5))
    np.testing.assert_allclose([one.value for one in norms], history.global_norm()[4::5], rtol=1e-6)
    np.testing.assert_allclose([one.value for one in after][:10], [0.5] * 10, rtol=1e-3)
    np.testing.assert_allclose(
        [one.value for one in board.Scalars("train/gradwatch/clip_coefficient")],
        history.clip_coefficient()[4::5],
        rtol=1e-6,
    )
    worst = {name.rpartition("/")[2] for name in board.Tags()["scalars"] if "gradient_norm/" in name}
    assert worst <= set(history.layers)
    assert len(worst) >= 2
    texts = {
        name: [one.tensor_proto.string_val[0].decode() for one in board.Tensors(name)]
        for name in board.Tags()["tensors"]
    }
    told = next(found for name, found in texts.items() if "gradwatch/incidents" in name)
    assert "exploding" in "".join(told)
    assert next(found for name, found in texts.items() if "gradwatch/verdict" in name) == ["healthy", "confirmed"]
    assert trainer.state.log_history[0]["gradwatch/global_norm"] == pytest.approx(history.global_norm()[4])
    assert "gradwatch/" not in capsys.readouterr().out


def test_a_training_is_ended_when_an_incident_is_confirmed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the Trainer's own flag, and the warning says why; the last step is logged."""
    callback = GradwatchCallback(report=None, stop_on="confirmed")
    trainer, _ = trained(tmp_path, callback, llama(), Surge(), steps=LONG, logging_steps=500)
    assert 50 < trainer.state.global_step < 60
    logged = next(one for one in trainer.state.log_history if "loss" in one)
    assert logged["step"] == trainer.state.global_step
    assert logged["gradwatch/global_norm"] == pytest.approx(monitor_of(callback).history.global_norm()[-1])
    assert monitor_of(callback).verdict == "confirmed"
    assert "training is ended, because the run is confirmed: exploding confirmed" in caplog.text


def test_a_checkpoint_that_is_not_worth_keeping_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those before the explosion are saved; the reason stands in the log."""
    trained(
        tmp_path, GradwatchCallback(report=None), llama(), Surge(), steps=LONG, save_strategy="steps", save_steps=20
    )
    assert {one.name for one in tmp_path.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-40"}
    assert "checkpoint-60 is not saved: an incident has been open since step 51: exploding" in caplog.text


class Progress(transformers.TrainerCallback):  # type: ignore[misc]
    """A metric by which each model is better than the one before."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_progress"] = state.global_step


def test_a_model_that_is_not_worth_keeping_is_never_the_best(tmp_path: Path) -> None:
    """With the strategy that saves the best model only."""
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 20, "save_strategy": "best"}
    settings |= {"metric_for_best_model": "progress", "greater_is_better": True}
    callback = GradwatchCallback(report=None)
    trainer, _ = trained(tmp_path, callback, llama(), Surge(), Progress(), steps=LONG, **settings)
    assert {one.name for one in tmp_path.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-40"}
    assert trainer.state.best_metric == 40
    assert "_determine_best_metric" not in vars(trainer)


def test_a_resumed_training_goes_on_with_its_reference_values(tmp_path: Path) -> None:
    """They are in the checkpoint; steps are counted on."""

    class Begins(transformers.TrainerCallback):  # type: ignore[misc]
        state: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            Begins.state = second.monitor.state_dict() if second.monitor is not None else None

    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 40}
    trained(tmp_path, GradwatchCallback(report=None), llama(), steps=LONG, **settings)
    checkpoint = tmp_path / "checkpoint-40"
    saved = json.loads((checkpoint / "gradwatch.json").read_text())
    second = GradwatchCallback(report=None, strict=True)
    trained(tmp_path, second, llama(), Begins(), steps=LONG, resume=str(checkpoint), **settings)
    assert json.dumps(Begins.state) == json.dumps(saved)
    assert saved["step"] == 40
    assert monitor_of(second).history.row.step == LONG - 1


@pytest.mark.parametrize("kept", ["{", "{}", None], ids=["cut off", "empty", "missing"])
def test_a_checkpoint_without_reference_values_can_be_resumed(
    tmp_path: Path, kept: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says that they are learned anew."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    trained(tmp_path, GradwatchCallback(report=None), llama(), **settings)
    file = tmp_path / "checkpoint-6" / "gradwatch.json"
    file.unlink() if kept is None else file.write_text(kept)
    second = GradwatchCallback(report=None)
    trained(tmp_path, second, llama(), resume=str(file.parent), **settings)
    assert monitor_of(second).history.rows == 6
    assert ("They are learned anew." in caplog.text) is (kept is not None)


def test_it_detaches_when_training_raises(tmp_path: Path) -> None:
    """The run log keeps the state at which it did; the error is the user's."""
    callback = GradwatchCallback(report=None, log=tmp_path / "log")
    with pytest.raises(RuntimeError, match="no more data"):
        trained(tmp_path, callback, llama(), Raises())
    assert monitor_of(callback).history.rows == 5


def test_a_trainer_trains_twice(tmp_path: Path) -> None:
    """Each training has a monitor of its own, and callbacks stand as they stood."""
    callback = GradwatchCallback(report=None)
    trainer, _ = trained(tmp_path, callback, llama())
    before, first = list(trainer.callback_handler.callbacks), monitor_of(callback)
    trainer.train()
    assert monitor_of(callback) is not first
    assert monitor_of(callback).history.rows == first.history.rows == STEPS
    assert trainer.callback_handler.callbacks == before


def test_evaluation_in_between_and_a_compiled_model_leave_the_rows_alone(tmp_path: Path) -> None:
    """Names are the model's own."""
    model = llama()
    twin = copy.deepcopy(model)
    callback = GradwatchCallback(report=None, strict=True)
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "torch_compile": True,
        "torch_compile_backend": "eager",
    }
    _, collator = trained(tmp_path, callback, model, **settings)
    evaluated = Texts(BATCH).ids
    batches = [batch for batch in collator.seen if not torch.equal(batch["input_ids"], evaluated)]
    assert len(collator.seen) == STEPS + 4
    check(callback.monitor, own_loop(twin, batches, 1, None))


def test_the_adapters_of_peft_are_watched(tmp_path: Path) -> None:
    """Only they have gradients; the frozen model has none."""
    peft = pytest.importorskip("peft", reason="needs the extra `frameworks`")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), settings)
    twin = copy.deepcopy(model)
    callback = GradwatchCallback(report=None, strict=True)
    _, collator = trained(tmp_path, callback, model, gradient_accumulation_steps=3, max_grad_norm=0.01)
    check(callback.monitor, own_loop(twin, collator.seen, 3, 0.01))


def test_the_supervised_fine_tuning_of_trl_is_watched(tmp_path: Path) -> None:
    """With the loss that TRL computes of tokenized texts."""
    pytest.importorskip("trl", reason="needs the extra `frameworks`")
    import datasets
    import trl

    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `frameworks`")
    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, WORDS)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))  # noqa: S106  no password
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")  # noqa: S106
    rows = [{"input_ids": ids.tolist()} for ids in Texts().ids]
    model = llama()
    twin = copy.deepcopy(model)
    batches: list[dict[str, Tensor]] = []

    class Trainer(trl.SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append({name: tensor.clone() for name, tensor in inputs.items() if torch.is_tensor(tensor)})
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = trl.SFTConfig(
        **short(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1),
        bf16=False,
        gradient_checkpointing=False,
        max_length=LENGTH,
    )
    callback = GradwatchCallback(report=None, strict=True)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    check(callback.monitor, own_loop(twin, batches, 2, 0.1))


def roots_of(outputs: Any) -> Tensor:
    """Return a penalty whose backward is singular where a logit is not positive."""
    logits = outputs.logits
    penalty: Tensor = (logits * (logits > 0)).sqrt().mean()
    return penalty


class Penalised(transformers.Trainer):  # type: ignore[misc]
    """Adds a penalty to the loss of the model."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        loss = loss + 0.1 * roots_of(outputs)
        return (loss, outputs) if return_outputs else loss


class Own(transformers.Trainer):  # type: ignore[misc]
    """Computes its loss, as the documentation of transformers shows it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.ones(self.model.config.vocab_size, device=model.device)
        loss = nn.CrossEntropyLoss(weight=weight)(outputs.logits.view(-1, WORDS), labels.view(-1))
        loss = loss + roots_of(outputs)
        return (loss, outputs) if return_outputs else loss


def passed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return a loss, as a function that is passed to the trainer."""
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    entropy = nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return entropy / count + roots_of(outputs)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("kind", "function"), [(Penalised, None), (Own, None), (transformers.Trainer, passed)])
def test_the_line_of_a_loss_is_named_where_the_trainer_calls_backward(
    tmp_path: Path, kind: Any, function: Any, accumulate: int
) -> None:
    """In `compute_loss`, which has ended by then and whose inputs the trainer has deleted, and in a function that is passed."""
    callback = GradwatchCallback(report=None, forensics=True)
    arguments = transformers.TrainingArguments(**short(tmp_path, gradient_accumulation_steps=accumulate, max_steps=1))
    trainer = kind(llama(), arguments, train_dataset=Texts(), compute_loss_func=function, callbacks=[callback])
    trainer.train()
    assert callback.monitor is not None
    found = next(one.origin for one in callback.monitor.incidents if one.origin is not None)
    assert (found.op, found.direction, found.part) == ("sqrt", "backward", "loss code")
    assert (
        linecache.getline(found.file, found.line).strip() == "penalty: Tensor = (logits * (logits > 0)).sqrt().mean()"
    )
