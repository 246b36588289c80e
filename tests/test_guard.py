"""The guard in our Trainer and in a plain one: what it judges, and what it says."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tinytrain.callbacks import LossError, LossGuard
from tinytrain.checkpoints import last_checkpoint, train
from tinytrain.loss import save_loss_memory
from tinytrain.modeling import build_model


class Spoil(TrainerCallback):
    """From a step on, spoils what the model returns or its gradients; remembers the weights."""

    def __init__(self, step, change_loss=None, change_gradient=None):
        self.step, self.change_loss, self.change_gradient = step, change_loss, change_gradient

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.state = state
        if self.change_loss:
            model.register_forward_hook(self.after_forward)
        if self.change_gradient:
            model.lm_head.weight.register_hook(self.in_backward)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    def now(self):
        return self.state.global_step + 1 >= self.step

    def after_forward(self, module, inputs, output):
        if self.now() and module.training:
            output.loss = self.change_loss(output.loss)
        return output

    def in_backward(self, gradient):
        return self.change_gradient(gradient) if self.now() else gradient


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"change_loss": lambda loss: loss * math.nan}, "the loss is nan"),
        ({"change_loss": lambda loss: loss * math.inf}, "the loss is inf"),
        ({"change_gradient": lambda g: g * math.nan}, "the gradient is not finite"),
        ({"change_gradient": lambda g: g * math.inf}, "the gradient is not finite"),
        ({"change_loss": lambda loss: loss + 10}, "the loss spikes to"),
    ],
    ids=["nan", "infinite", "gradient-nan", "gradient-infinite", "spike"],
)
# With a clip of 0 the Trainer has no norm to hand on.
@pytest.mark.parametrize(("accumulation", "clip"), [(1, 1.0), (2, 0.0)])
def test_a_loss_gone_wrong_stops_the_run_before_it_does_harm(
    smoke, small_trainer, tmp_path, spoil, words, accumulation, clip
):
    spoiling = Spoil(8, **spoil)
    guard = LossGuard(window=6, tokenizer=smoke.tokenizer, find_checkpoint=last_checkpoint)
    trainer = small_trainer(
        tmp_path,
        [spoiling, guard],
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clip,
        save_steps=3,
        eval_strategy="no",
    )
    with pytest.raises(LossError) as caught:
        train(trainer)
    assert f"step 8: {words}" in str(caught.value)
    assert caught.value.step == 8
    assert caught.value.checkpoint.name == "checkpoint-6"
    assert "The last good checkpoint is checkpoint-6" in str(caught.value)
    for name, value in trainer.model.state_dict().items():  # those after step 7
        assert torch.equal(value, spoiling.weights[name]) and torch.isfinite(value).all()
    # The documents that it names are those that the batch was cut from.
    texts = [smoke.split["train"][number]["text"] for number in caught.value.documents]
    named = str(caught.value).split("blocks ")[1].split(" of the")[0].split(", ")
    assert len(named) == 8
    for row in map(int, named):
        pieces = smoke.tokenizer.decode(smoke.blocks["train"][row]["input_ids"])
        for piece in pieces.split(smoke.tokenizer.eos_token):
            assert any(piece.strip("�") in text for text in texts)


@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
@pytest.mark.parametrize("overrides", [{}, {"bf16": True}, {"gradient_accumulation_steps": 3}])
def test_in_a_plain_trainer_it_judges_the_loss_that_is_logged(
    smoke, plain_trainer, overrides, accepts_loss_kwargs
):
    """Whether the model divides by the tokens of the step, or the Trainer by the micro-batches."""
    guard, model = LossGuard(), build_model(smoke.config, seed=1)
    model.accepts_loss_kwargs = accepts_loss_kwargs
    save_loss_memory(model, 64)
    trainer = plain_trainer([guard], model, **overrides)
    # The last step of an epoch has fewer blocks.
    trainer.train_dataset = smoke.blocks["train"].select(range(14))
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 4 and list(guard._recent) == pytest.approx(logged, rel=1e-6)
    assert not model._forward_hooks  # the model is as it was


def test_a_plain_trainer_is_stopped_and_its_batch_may_be_anything(smoke, plain_trainer):
    """No packed blocks, no datasets.Dataset, and no loss from the model."""
    spoil = Spoil(2, change_gradient=lambda gradient: gradient * math.nan)
    guard = LossGuard(tokenizer=smoke.tokenizer)
    overrides = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = plain_trainer([spoil, guard], **overrides)
    trainer.train_dataset = [{"input_ids": [5] * length} for length in (3, 4, 5, 6)]
    words = "step 2: the gradient is not finite.*They begin.*checkpoint does not exist yet"
    with pytest.raises(LossError, match=words) as caught:
        trainer.train()
    assert caught.value.documents == []
    assert not trainer.model._forward_hooks
    guard = LossGuard()
    plain_trainer([guard], label_smoothing_factor=0.1).train()
    assert not guard._recent


def test_a_run_that_failed_leaves_nothing_that_grows(plain_trainer):
    guard, spoil = LossGuard(), Spoil(1, change_gradient=lambda gradient: 1 / 0)
    trainer = plain_trainer([guard, spoil])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    spoil.change_gradient = lambda gradient: gradient
    plain_trainer([], trainer.model).train()
    assert len(guard._batch) == 1
    trainer.train()
    assert not trainer.model._forward_hooks


def test_only_the_documents_of_the_batch_are_named(smoke):
    """Against documents packed by hand: 3, 2 and 5 tokens, an end after each, in blocks of 4."""
    end = smoke.tokenizer.eos_token_id
    rows = [[1, 1, 1, end], [2, 2, end, 3], [3, 3, 3, 3]]
    guard = LossGuard(tokenizer=smoke.tokenizer)
    guard._dataset = Dataset.from_dict({"input_ids": rows})
    for number, documents in ((0, [0]), (1, [1, 2]), (2, [2])):
        assert guard._find(torch.tensor(rows[number : number + 1])) == ([number], documents)


def test_the_guard_lets_usual_noise_pass():
    guard = LossGuard(window=20)
    generator = torch.Generator().manual_seed(0)
    falling = 8 - torch.arange(400) / 60 + 0.3 * torch.randn(400, generator=generator)
    for loss in falling.tolist():
        assert guard._trouble(loss) == ""
        guard._recent.append(loss)
    assert "spikes" in guard._trouble(float(falling[-1]) + 5)
    assert LossGuard(spike=None)._trouble(1e9) == ""
