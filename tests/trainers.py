"""The trainers of the field round a marked model: `make test-stacks` runs this in an environment that has them.

Each trains in float32 and in its mixed precision, from the same seed on the same batches. The loop's own dtype is the
policy's in all of them; what differs is what the trainer makes of the layers round it.
"""

import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainingArguments, set_seed

import rampde_fx

STEPS, BATCH = 6, 8
BF16 = 2e-2  # a few unit roundoffs of bfloat16, 2^-9, in layers and steps


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)

    def velocity(self, t, y):
        return self.narrow(torch.tanh(self.wide(y)))

    def forward(self, y):
        return rampde_fx.odeint(self.velocity, y, torch.linspace(0, 1, 5), method="rk4")[-1]


class Model(nn.Module):
    """A layer, a compiled loop in bfloat16, a layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        flow = rampde_fx.mixed_precision(Flow(), dtype=torch.bfloat16)
        self.flow = torch.compile(flow, backend="rampde_fx", fullgraph=True, options={"compiler": "aot_eager"})

    def forward(self, x, labels=None):
        found = self.head(self.flow(self.stem(x)))
        return {"loss": nn.functional.mse_loss(found, labels.to(found)), "found": found}


def examples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * BATCH, 3, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True))


class Examples(Dataset):
    def __init__(self):
        self.x, self.labels = examples()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.labels[i]}


def by_lightning(tmp_path, *, mixed):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = Model(), []

        def training_step(self, batch, index):
            loss = self.model(*batch)["loss"]
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    seed_everything(0, verbose=False)
    module = Module()
    trainer = Trainer(
        accelerator="cpu", precision="bf16-mixed" if mixed else "32-true", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*examples()), BATCH))
    return module.losses, module.model


def by_accelerate(tmp_path, *, mixed):
    set_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a process it remembers one mixed precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if mixed else "no")
    model, losses = Model(), []
    prepared, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(*examples()), BATCH)
    )
    for x, labels in loader:
        optimizer.zero_grad()
        loss = prepared(x, labels)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def by_hugging_face(tmp_path, *, mixed):
    set_seed(0)
    model = Model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=mixed, max_steps=STEPS, per_device_train_batch_size=BATCH,
        learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, seed=0,
    )  # fmt: skip
    trainer = HuggingFaceTrainer(model=model, args=arguments, train_dataset=Examples())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.parametrize("train", [by_lightning, by_accelerate, by_hugging_face])
def test_a_mixed_trainer_trains_as_in_float32(train, tmp_path):
    """The loop is rewritten in both; its loss and its parameters agree within the dtype's bound."""
    found = []
    for mixed in (False, True):
        rampde_fx.evaluation_counts(reset=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", rampde_fx.errors.FullPrecisionWarning)
            losses, model = train(tmp_path, mixed=mixed)
        (count,) = rampde_fx.evaluation_counts().values()
        assert len(losses) == STEPS and count.forward == 16  # four steps of four stages
        found.append((losses, [parameter.detach() for parameter in model.parameters()]))
    (plain, parameters), (mixed, others) = found
    assert plain != mixed  # the layers round the loop ran in bfloat16
    torch.manual_seed(0)
    for parameter, start in zip(parameters, Model().parameters(), strict=True):
        assert (parameter - start).abs().max() > 1e-3  # it was trained
    torch.testing.assert_close(torch.tensor(mixed), torch.tensor(plain), rtol=BF16, atol=BF16 * max(plain))
    torch.testing.assert_close(others, parameters, rtol=BF16, atol=BF16)
    assert all(parameter.dtype is torch.float32 for parameter in others)
