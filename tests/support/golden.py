"""Numbers of the reference, stored for machines that lack it: golden.npz, read by test_golden.py.

    python -m tests.support.golden       # writes them anew; needs the test extra

Weights and inputs are NumPy's and the same on both sides. Each function here names one stored array
and makes it with the reference; test_golden.py makes it with tinyldm.
"""
import tempfile
from pathlib import Path

import numpy as np

from tests.support import models
from tests.support.words import END, SHAPES, TEXTS, write_settings, write_toy_vocabulary

FILE = Path(__file__).with_name("golden.npz")
SEEDS = (0, 42, 2**32 + 5)
SIZES = (15, 16, 300)                       # torch draws fewer than 16 numbers in another way
SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "pndm": "PNDM", "euler": "EulerDiscrete",
            "euler_ancestral": "EulerAncestralDiscrete", "heun": "HeunDiscrete",
            "dpmpp_2m": "DPMSolverMultistep", "unipc": "UniPCMultistep", "lcm": "LCM"}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
            "steps_offset": 1, "clip_sample": False}
STEPS, LATENTS = 6, (1, 4, 4, 4)
PROMPT, SEED = "a big red star left of a small blue circle on a yellow background", 3


def network(x, t):
    """In place of a UNet: mixes channels, bends, and depends on t."""
    mix = np.float32([[3, -1, 0, 1], [1, 2, -2, 0], [0, 1, 3, -1], [-2, 0, 1, 2]]) * np.float32(0.2)
    signs = np.float32([1, -1, 1, -1]) * np.float32(np.sin(t / 200))
    return np.float32(0.8) * np.tanh(x @ mix + signs) + np.float32(0.3) * x


# ---- by the reference -----------------------------------------------------------------------

def model(name):
    """The outputs of a small model (models.cases) in float64, as one vector."""
    import diffusers
    import torch
    import transformers

    from tests.support.reference import widen_embeddings

    kind, config = models.cases()[name]
    if hasattr(transformers, kind.__name__):
        build = getattr(transformers, kind.__name__)
        reference = build(build.config_class(**config))
    else:
        reference = getattr(diffusers, kind.__name__)(**config)
    tensors = models.random_weights(kind(config), 0, np.float64)
    ours = set(dict(reference.named_parameters()))
    state = {key if key in ours else key.partition("_model.")[2]: torch.from_numpy(tensor)
             for key, tensor in tensors.items()}
    reference = reference.double().eval()
    widen_embeddings(reference)
    reference.load_state_dict(state, strict=False)
    assert state.keys() == ours, sorted(state.keys() ^ ours)
    x = {key: torch.from_numpy(array.copy()) for key, array in models.inputs(name).items()}
    with torch.no_grad():
        if "Prior" in name:
            latents = reference(x["latents"], x["timesteps"], x["text_embeds"], x["context"],
                                x["mask"]).predicted_image_embedding
            found = [reference.post_process_latents(latents)]
        elif "DiT" in name:
            found = [reference(x["latents"].permute(0, 3, 1, 2), x["timesteps"],
                               x["class_labels"]).sample.permute(0, 2, 3, 1)]
        elif "UNet2DModel" in name:
            found = [reference(x["latents"].permute(0, 3, 1, 2), x["timesteps"],
                               class_labels=x.get("class_labels")).sample.permute(0, 2, 3, 1)]
        elif "CLIPVision" in name:
            answer = reference(x["images"].permute(0, 3, 1, 2))
            found = [answer.last_hidden_state, answer.image_embeds if "Projection" in name
                     else answer.pooler_output]
        elif "CLIPModel" in name:
            found = [reference(x["ids"], x["images"].permute(0, 3, 1, 2)).logits_per_image]
        elif "images" in x:
            moments = reference.encode(x["images"].permute(0, 3, 1, 2)).latent_dist
            image = reference.decode(x["z"].permute(0, 3, 1, 2)).sample
            found = [y.permute(0, 2, 3, 1) for y in (moments.mean, moments.logvar, image)]
        elif "ids" in x:
            answer = reference(x["ids"], output_hidden_states=True)
            found = ([answer.hidden_states[-2], answer.text_embeds] if "Projection" in name
                     else [answer.last_hidden_state])
        else:
            added = {key: x[key] for key in ("text_embeds", "time_ids") if key in x}
            found = [reference(x["latents"].permute(0, 3, 1, 2), x["timesteps"], x["context"],
                               timestep_cond=x.get("timestep_cond"),
                               added_cond_kwargs=added).sample.permute(0, 2, 3, 1)]
    return flat(y.numpy() for y in found)


def flat(arrays):
    """At most 2000 numbers, evenly chosen, float32."""
    whole = np.concatenate([array.reshape(-1) for array in arrays])
    return whole[::-(-whole.size // 2000)].astype(np.float32)


def noise():
    import torch

    return np.concatenate([torch.randn(size, generator=torch.Generator().manual_seed(seed)).numpy()
                           for seed in SEEDS for size in SIZES])


def sampler(name, prediction):
    """Latents after every call of the network, (calls, *LATENTS)."""
    import diffusers
    import torch

    config = SCHEDULE | {"prediction_type": prediction}
    scheduler = getattr(diffusers, f"{SAMPLERS[name]}Scheduler").from_config(config)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0))
    latents, generator = latents * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
    takes = scheduler.step.__code__.co_varnames
    states = []
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(latents, t).numpy()
        output = torch.from_numpy(network(x, float(t)))
        options = {"generator": generator} if "generator" in takes else {}
        latents = scheduler.step(output, t, latents, **options).prev_sample
        states.append(latents.numpy())
    return np.stack(states)


def token_ids():
    """(2, texts, 77), with the toy vocabulary and with the bundled model's."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        write_toy_vocabulary(Path(folder))
        write_settings(Path(folder), END)
        readers = [transformers.CLIPTokenizer.from_pretrained(path)
                   for path in (folder, SHAPES / "tokenizer")]
        return np.stack([read(TEXTS, padding="max_length", max_length=77, truncation=True,
                              return_tensors="np")["input_ids"] for read in readers]
                        ).astype(np.int16)


def picture():
    """The bundled model's, (64, 64, 3) uint8."""
    import diffusers
    import torch

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(SHAPES, torch_dtype=torch.float32)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    image, = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=7.5,
                  generator=torch.Generator().manual_seed(SEED)).images
    return np.asarray(image)


def arrays():
    """{name in the file: what makes it}."""
    found = {f"model {name}": (model, name) for name in models.cases()}
    found |= {f"sampler {name} {prediction}": (sampler, name, prediction)
              for name in SAMPLERS for prediction in ("epsilon", "v_prediction")}
    return found | {"noise": (noise,), "token_ids": (token_ids,), "picture": (picture,)}


if __name__ == "__main__":
    np.savez_compressed(FILE, **{name: make(*args) for name, (make, *args) in arrays().items()})
    print(f"{FILE}: {FILE.stat().st_size} bytes")
