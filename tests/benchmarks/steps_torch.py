"""PyTorch's side of steps.py: diffusers, transformers and peft, autograd and torch.optim.AdamW.

    python -m tests.benchmarks.steps_torch STAGE

Gradient checkpointing as the public scripts switch it on, by enable_gradient_checkpointing.
"""
import sys

import diffusers
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from tests.benchmarks import steps
from tests.benchmarks.steps import RANK, RATE, STAGES, normal, numbers
from tests.support.reference import nchw, reference_names
from tinyldm import backend
from tinyldm.layers import OUR_AXES
from tinyldm.shapes.configs import SCHEDULER
from tinyldm.training.objectives import KL_WEIGHT, L1_WEIGHT, MSE_WEIGHT


def filled(model):
    """The same numbers as ours, parameter by parameter. model: made on the device meta."""
    state = {}
    names = reference_names(model)
    for (published, _), (name, parameter) in zip(names, model.named_parameters()):
        shape = tuple(parameter.shape)
        if len(shape) == 4:
            own = numbers(published, [shape[axis] for axis in OUR_AXES])
            state[name] = torch.from_numpy(own).permute(3, 2, 0, 1).contiguous()
        else:
            state[name] = torch.from_numpy(np.asarray(numbers(published, shape)))
    for name, tensor in state.items():
        *path, last = name.split(".")
        owner = model.get_submodule(".".join(path))
        setattr(owner, last, torch.nn.Parameter(tensor))
    return model.train()


def made(kind, config):
    with torch.device("meta"):
        return kind(**config) if isinstance(config, dict) else kind(config)


def scheduler(config):
    return diffusers.DDPMScheduler.from_config(config | {"_class_name": "DDPMScheduler"})


LINEAR = {"beta_schedule": "linear", "num_train_timesteps": 1000, "beta_start": 1e-4,
          "beta_end": 0.02, "prediction_type": "epsilon"}


def noisy(name, config):
    """x_t, timesteps, and what is to be predicted."""
    x_start, noise, timesteps = steps.diffusion(name)
    x_start, noise, timesteps = nchw(x_start), nchw(noise), torch.from_numpy(timesteps)
    process = scheduler(config)
    wanted = noise
    if process.config.prediction_type == "v_prediction":
        wanted = process.get_velocity(x_start, noise, timesteps)
    return process.add_noise(x_start, noise, timesteps), timesteps, wanted


def unet(name):
    _, config, batch, _ = STAGES[name]
    model = filled(made(diffusers.UNet2DConditionModel, config))
    x_t, timesteps, wanted = noisy(name, SCHEDULER)
    context = torch.from_numpy(normal("context", batch, 77, config["cross_attention_dim"]))
    context.requires_grad_()                            # the text encoder's, as ours

    def loss():
        context.grad = None
        return F.mse_loss(model(x_t, timesteps, context).sample, wanted)
    return loss, model.parameters()


def vae(name):
    model = filled(made(diffusers.AutoencoderKL, STAGES[name][1]))
    images = nchw(steps.images(name))
    h, C = images.shape[-1] // 4, model.config.latent_channels
    noise = np.concatenate([rng.standard_normal((len(images) // 4, h, h, C), np.float32)
                            for rng in np.random.default_rng(0).spawn(4)])
    noise = nchw(noise)

    def loss():
        posterior = model.encode(images).latent_dist
        output = model.decode(posterior.mean + posterior.std * noise).sample
        return (L1_WEIGHT * F.l1_loss(output, images) + MSE_WEIGHT * F.mse_loss(output, images)
                + KL_WEIGHT * posterior.kl().mean())
    return loss, model.parameters()


def autoencoder(name):
    model = filled(made(diffusers.AutoencoderKL, STAGES[name][1]))
    images = steps.images(name)
    h, C = images.shape[1] // 4, model.config.latent_channels
    noise, images = nchw(normal("noise", len(images), h, h, C)), nchw(images)

    def loss():
        posterior = model.encode(images).latent_dist
        output = model.decode(posterior.mean + posterior.std * noise).sample
        return ((output - images).abs().sum() + 1e-6 * posterior.kl().sum()) / len(images)
    return loss, model.parameters()


def ddpm(name):
    model = filled(made(diffusers.UNet2DModel, STAGES[name][1]))
    x_t, timesteps, wanted = noisy(name, LINEAR)
    return lambda: F.mse_loss(model(x_t, timesteps).sample, wanted), model.parameters()


def lora(name):
    model = filled(made(diffusers.UNet2DConditionModel, STAGES[name][1]))
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian",
                                      target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    for path, parameter in model.named_parameters():
        if ".lora_A." in path:
            own = normal(path.partition(".lora_A.")[0], *parameter.shape) / np.float32(RANK)
            parameter.data = torch.from_numpy(own)
    model.enable_gradient_checkpointing()
    context = torch.from_numpy(normal("context", 1, 77, model.config.cross_attention_dim))
    x_t, timesteps, wanted = noisy(name, LINEAR)
    return (lambda: F.mse_loss(model(x_t, timesteps, context).sample, wanted),
            [parameter for parameter in model.parameters() if parameter.requires_grad])


def textual_inversion(name):
    """As the script: the whole table gets gradients, and all rows but the new one are put back."""
    model = filled(made(diffusers.UNet2DConditionModel, STAGES[name][1]))
    config = transformers.CLIPTextConfig(**{key: value for key, value in steps.TEXT_ENCODER.items()
                                            if key != "architectures"})
    encoder = filled(made(transformers.CLIPTextModel, config))
    encoder = restore_buffers(encoder)
    for part in model, encoder:
        part.requires_grad_(False)
    V, D = encoder.get_input_embeddings().weight.shape
    table = encoder.get_input_embeddings()
    rows = torch.from_numpy(normal("rows", 1, D) * np.float32(D ** -0.5))
    table.weight = torch.nn.Parameter(torch.cat([table.weight.data, rows]))
    model.enable_gradient_checkpointing()
    encoder.gradient_checkpointing_enable()
    ids = torch.from_numpy(steps.token_ids(V, 1, [V]))
    x_t, timesteps, wanted = noisy(name, LINEAR)
    before = table.weight.data[:V].clone()

    def loss():
        with torch.no_grad():                           # after the update before
            table.weight[:V] = before
        return F.mse_loss(model(x_t, timesteps, encoder(ids)[0]).sample, wanted)
    return loss, [table.weight]


def restore_buffers(model):
    """position_ids, which a model on meta has no numbers for."""
    for module in model.modules():
        if isinstance(getattr(module, "position_ids", None), torch.Tensor):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return model


def clip(name):
    _, config, batch, _ = STAGES[name]
    model = restore_buffers(filled(made(transformers.CLIPModel, transformers.CLIPConfig(**config))))
    images = nchw(steps.images(name))
    ids = torch.from_numpy(steps.token_ids(config["text_config"]["vocab_size"], batch))
    return (lambda: model(input_ids=ids, pixel_values=images, return_loss=True).loss,
            model.parameters())


STEPS = {function.__name__: function for function in (
    unet, vae, lora, textual_inversion, autoencoder, ddpm, clip)}


def main():
    name = sys.argv[1]
    torch.set_num_threads(backend.num_threads())
    loss_of, parameters = STEPS[name](name)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)

    def step():
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    steps.serve(step)


if __name__ == "__main__":
    main()
