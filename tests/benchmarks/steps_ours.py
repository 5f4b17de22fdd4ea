"""Our side of steps.py, a process without torch: python -m tests.benchmarks.steps_ours STAGE."""
import sys
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import numpy as np

from tests.benchmarks import steps
from tests.benchmarks.steps import RANK, RATE, STAGES, normal, numbers
from tinyldm import backend, ops
from tinyldm.diffusion.objective import target
from tinyldm.diffusion.schedule import Schedule
from tinyldm.layers import Tape
from tinyldm.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from tinyldm.models.lora import DIFFUSERS, add_lora
from tinyldm.training.objectives import DiffusionLoss, vae_loss
from tinyldm.training.optim import AdamW
from tinyldm.training.shards import split_batch
from tinyldm.training.stages import denoising, fine_tuning
from tinyldm.training.stages.contrastive import Pairs
from tinyldm.training.stages.lora import named_matrices
from tinyldm.training.stages.round_trip import AutoencoderLoss, latent_shape
from tinyldm.training.stages.textual_inversion import NewRows


def filled(module):
    for name, parameter in module.named_parameters():
        parameter.data = numbers(name, parameter.shape)
    return module


def unet(name):
    _, config, batch, _ = STAGES[name]
    model = filled(UNet2DConditionModel(config))
    x_start, noise, timesteps = steps.diffusion(name)
    schedule = Schedule.from_config(steps.configs.SCHEDULER)
    x_t = schedule.add_noise(x_start, noise, timesteps)
    wanted = target(schedule, x_start, noise, timesteps)
    context = normal("context", batch, 77, config["cross_attention_dim"])

    def loss_of(x_t, timesteps, context, wanted, share):
        tape = Tape()
        loss, cache = ops.mse(model(x_t, timesteps, context, tape), wanted)
        model.backward(ops.mse_backward(np.float32(share), cache)[0], tape)
        return {"loss": share * loss}
    return (lambda: split_batch(loss_of, [x_t, timesteps, context, wanted]),
            model.named_parameters())


def vae(name):
    model = filled(AutoencoderKL(STAGES[name][1]))
    images = steps.images(name)
    return (lambda: split_batch(partial(vae_loss, model), [images], np.random.default_rng(0)),
            model.named_parameters())


def autoencoder(name):
    model = filled(AutoencoderKL(STAGES[name][1]))
    images = steps.images(name)
    noise = normal("noise", len(images), *latent_shape(model, images))
    loss = AutoencoderLoss(model)
    return lambda: loss(images, noise), model.named_parameters()


def ddpm(name):
    model = filled(UNet2DModel(STAGES[name][1]))
    x_start, noise, timesteps = steps.diffusion(name)
    loss = DiffusionLoss(linear())
    tuning = denoising.Denoising(model, None, None, loss, 0)
    batch = denoising.Batch(x_start, loss.schedule.add_noise(x_start, noise, timesteps), timesteps,
                            noise, None)
    part = partial(tuning.part_loss, batch, 1.0)
    return lambda: split_batch(part, [range(len(x_start))]), model.named_parameters()


def linear():
    return Schedule.from_config({"beta_schedule": "linear", "num_train_timesteps": 1000,
                                 "beta_start": 1e-4, "beta_end": 0.02,
                                 "prediction_type": "epsilon"})


def tuned(name, model, text_encoder, context=None):
    """A FineTuning's step on a given batch."""
    batch = STAGES[name][2]
    V = steps.TEXT_ENCODER["vocab_size"]
    ids = steps.token_ids(V, 1, [V])
    pipe = SimpleNamespace(unet=model, tokenizers={"tokenizer": lambda caption: ids},
                           models={"text_encoder": text_encoder})
    loss = DiffusionLoss(linear())
    tuning = fine_tuning.FineTuning(pipe, [], loss, 0, checkpoints=True)
    if context is not None:
        tuning.texts.kept[""] = {"context": context}
    x_start, noise, timesteps = steps.diffusion(name)
    x_t = loss.schedule.add_noise(x_start, noise, timesteps)
    given = fine_tuning.Batch(x_start, x_t, timesteps, noise, [""] * batch, None, 1.0)
    part = partial(tuning.part_loss, given, 1.0)
    return lambda: split_batch(part, [range(batch)])


def lora(name):
    model = filled(UNet2DConditionModel(STAGES[name][1]))
    layers = add_lora(model, DIFFUSERS, RANK, RANK, np.random.default_rng(0))
    for path, layer in layers.items():
        A = layer.lora_A.weight
        A.data = normal(path, *A.shape) / np.float32(RANK)
    context = normal("context", 1, 77, model.config["cross_attention_dim"])
    encoder = CLIPTextModel(steps.TEXT_ENCODER)
    encoder.freeze()                                    # and never used: the context is kept
    return tuned(name, model, encoder, context), named_matrices(layers)


def textual_inversion(name):
    model = filled(UNet2DConditionModel(STAGES[name][1]))
    encoder = filled(CLIPTextModel(steps.TEXT_ENCODER))
    model.freeze()
    encoder.freeze()
    embeddings = encoder.text_model.embeddings
    V, D = embeddings.token_embedding.weight.shape
    rows = NewRows(embeddings.token_embedding, V, normal("rows", 1, D) * np.float32(D ** -0.5))
    embeddings.token_embedding = rows
    encoder.config = encoder.config | {"vocab_size": V + 1}
    return tuned(name, model, encoder), [("rows", rows.rows)]


def clip(name):
    _, config, batch, _ = STAGES[name]
    model = filled(CLIPModel(config))
    images, ids = steps.images(name), steps.token_ids(config["text_config"]["vocab_size"], batch)
    row = namedtuple("Row", "number caption")

    class Given(Pairs):
        def samples(self, number, size):
            return [row(i, str(i)) for i in range(size)]

        def pixels(self, samples):
            return images[[sample.number for sample in samples]]

        def ids(self, captions):
            return ids

    pairs = Given(SimpleNamespace(model=model), None, 0)
    return lambda: pairs.batch_loss(0, batch), model.named_parameters()


STEPS = {function.__name__: function for function in (
    unet, vae, lora, textual_inversion, autoencoder, ddpm, clip)}


def main():
    name = sys.argv[1]
    backend.keep_freed_memory()                         # as a training does
    loss_of, named = STEPS[name](name)
    optimizer = AdamW(named, weight_decay=0.01, eps=1e-8, clip=0, ema=None, decay_vectors=True)

    def step():
        report = loss_of()
        optimizer.step(RATE)
        return report["loss"]
    steps.serve(step)


if __name__ == "__main__":
    main()
