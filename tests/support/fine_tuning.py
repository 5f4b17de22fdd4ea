"""A fine-tuning of ours, recorded, and the same steps in torch with diffusers' models and peft."""
import numpy as np
import peft
from diffusers.training_utils import compute_snr

from tests.support.drawing import Reference
from tests.support.extra import diffusers, torch
from tests.support.reference import nchw, to_ours
from tinyldm.layers import to_file
from tinyldm.pipelines.loading import load
from tinyldm.training.options import parse
from tinyldm.training.stages import stage as stages
from tinyldm.training.stages import unet
from tinyldm.training.stages.fine_tuning import FineTuning

PARTS = ("unet", "text_encoder", "text_encoder_2")


def stage_of(command, monkeypatch, dtype=np.float32, captions=None):
    """The Stage of a command line, with its weights in dtype -> Stage, a list of all batches.

    The list gets, while it trains, one list of Batches with their token ids per step.
    """
    recorded, own = [], FineTuning.batches

    def batches(self, number):
        found = list(own(self, number))
        recorded.append([batch._asdict() | {"ids": self.texts.ids(batch.captions)}
                         for batch in found])
        return found

    monkeypatch.setattr(FineTuning, "batches", batches)
    for module in stages, unet:
        monkeypatch.setattr(module, "load_weights",
                            lambda weights, device, *_, **options: load(weights, device, dtype))
    options = parse([*map(str, command)])
    if options.stage == "unet":
        return unet.begin(options), recorded
    return stages.Stage(options, captions), recorded


class TorchSteps:
    """A pipeline's folder in torch: losses of given batches, as diffusers' training scripts have.

    A batch: the fields of a Batch and ids, as stage_of records them; a step is a list of batches.
    """

    def __init__(self, folder, dtype, min_snr=0):
        self.dtype, self.min_snr = dtype, min_snr
        reference = Reference(folder)                   # its sinusoids are float64
        self.pipe = reference.pipe
        if dtype == torch.float32:
            self.pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.parts = {part: getattr(self.pipe, part) for part in PARTS if hasattr(self.pipe, part)}
        self.tables = []
        for model in self.parts.values():
            model.requires_grad_(False).to(dtype)
        self.scheduler = diffusers.DDPMScheduler.from_config(self.pipe.scheduler.config)

    def add_lora(self, ours, rank, alpha):
        """Put peft's LoRA where ours are, {name with its part: LoRA}, with the same A."""
        self.matrices = {}
        for part, model in self.parts.items():
            layers = {name.removeprefix(f"{part}."): lora for name, lora in ours.items()
                      if name.startswith(f"{part}.")}
            if not hasattr(model, "text_model"):        # transformers 5 has flattened it
                layers = {name.removeprefix("text_model."): lora for name, lora in layers.items()}
            if not layers:
                continue
            config = peft.LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian",
                                     target_modules=[*layers])
            peft.inject_adapter_in_model(config, model)
            for name, lora in layers.items():
                for letter in "AB":
                    matrix = getattr(model.get_submodule(name), f"lora_{letter}").default.weight
                    own = to_file(getattr(lora, f"lora_{letter}").weight.data)
                    matrix.data = torch.from_numpy(own.copy()).to(self.dtype)
                    matrix.requires_grad_(True)
                    self.matrices[id(lora), letter] = matrix
        assert len(self.matrices) == 2 * len(ours)
        return [*self.matrices.values()]

    def lora_array(self, lora, letter):
        """A matrix after the training, in our layout."""
        return to_ours(self.matrices[id(lora), letter])

    def add_rows(self, rows):
        """Grow the tables of the text encoders by rows [(n,D)], and train them -> parameters."""
        for model, new in zip([*self.parts.values()][1:], rows, strict=True):
            old = model.get_input_embeddings().weight.data
            model.resize_token_embeddings(len(old) + len(new), mean_resizing=False)
            table = model.get_input_embeddings().weight
            table.data = torch.cat([old, torch.from_numpy(new.copy()).to(self.dtype)])
            table.requires_grad_(True)
            self.tables.append((table, len(old)))
        return [table for table, _ in self.tables]

    def add_all(self, named, scheduler):
        """Train what ours trains, [(name with its part, Parameter)], from the same numbers, on the
        noise schedule of a scheduler_config.json -> {name: parameter}."""
        self.scheduler = diffusers.DDPMScheduler.from_config(
            scheduler | {"_class_name": "DDPMScheduler"})
        theirs = {f"{part}.{name}": parameter for part, model in self.parts.items()
                  for name, parameter in model.named_parameters()}
        found = {}
        for name, parameter in named:
            flat = name.replace(".text_model.", ".")    # transformers 5 has flattened it
            found[name] = theirs[name if name in theirs else flat]
            own = to_file(parameter.data).copy()
            found[name].data = torch.from_numpy(own).to(self.dtype)
            found[name].requires_grad_(True)
        return found

    def loss(self, batch):
        noise, latents = (nchw(batch[name]).to(self.dtype) for name in ("noise", "latents"))
        timesteps = torch.from_numpy(batch["timesteps"])
        x_t, target = self.add_noise(latents, noise, timesteps), noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.add_noise(noise, -latents, timesteps)     # sqrt(a) noise - sqrt(1-a) z
        elif self.scheduler.config.prediction_type == "sample":
            target = latents
        output = self.pipe.unet(x_t, timesteps, **self.conditions(batch)).sample
        losses = ((output.float() if self.dtype == torch.float32 else output) - target).square()
        losses = losses.mean(dim=(1, 2, 3))
        if self.min_snr:
            snr = compute_snr(self.scheduler, timesteps)
            v = self.scheduler.config.prediction_type == "v_prediction"
            losses = losses * snr.clamp(max=self.min_snr) / (snr + v)
        return batch["weight"] * losses.mean()

    def add_noise(self, latents, noise, timesteps):
        """The scheduler's, with the roots of float32 numbers in every dtype, as ours."""
        if self.dtype == torch.float32:
            return self.scheduler.add_noise(latents, noise, timesteps)
        alpha_bar = self.scheduler.alphas_cumprod[timesteps][:, None, None, None]
        return alpha_bar.sqrt().double() * latents + (1 - alpha_bar).sqrt().double() * noise

    def conditions(self, batch):
        ids = [torch.from_numpy(own) for own in batch["ids"]]
        if len(ids) == 1:
            return {"encoder_hidden_states": self.pipe.text_encoder(ids[0])[0]}
        outputs = [encoder(own, output_hidden_states=True) for encoder, own in
                   zip((self.pipe.text_encoder, self.pipe.text_encoder_2), ids)]
        return {"encoder_hidden_states": torch.cat([o.hidden_states[-2] for o in outputs], -1),
                "added_cond_kwargs": {"text_embeds": outputs[1][0],
                                      "time_ids": torch.from_numpy(batch["time_ids"])}}

    def train(self, parameters, batches, rate, clip, weight_decay):
        """-> the losses, and the gradients' norms where they are clipped."""
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
        frozen = [(table, count, table.data[:count].clone()) for table, count in self.tables]
        losses, norms = [], []
        for step in batches:
            loss = sum(map(self.loss, step))
            loss.backward()
            if clip:
                norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, clip)))
            optimizer.step()
            optimizer.zero_grad()
            for table, count, rows in frozen:           # as textual_inversion.py puts them back
                table.data[:count] = rows
            losses.append(loss.item())
        return losses, norms
