"""Small random pipelines as single files in the original layout, made of diffusers' folders.

Loops over levels and blocks turn the public names into the original ones, in the other direction
than tinyldm/checkpoints/single_file/names.py; test_single_file.py compares
both with the lists of real checkpoints.
"""
import json

import numpy as np
import safetensors.numpy

from tests.support import small_pipelines
from tests.support.extra import torch
from tests.support.small_pipelines import make_unet, make_vae, save, save_xl, scheduler
from tinyldm.checkpoints import folders
from tinyldm.checkpoints.single_file import kinds
from tinyldm.files import read_json

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
                 "group_norm": "norm"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


# ---- names ----------------------------------------------------------------------------------

def unet_prefixes(levels=4, deepest_attends=False):
    """{a public prefix: the original one}, of modules. 4 levels, or Stable Diffusion XL's 3.

    deepest_attends: as in Stable Diffusion XL and the x4 upscaler.
    """
    names = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "class_embedding": "label_emb",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.attentions.0": "middle_block.1"}
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for i in range(levels):
        for j in range(2):
            resnets[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
        for j in range(3):
            resnets[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        alone = i == 0 and not deepest_attends          # without attention before it
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{3 * i + 2}.{1 if alone else 2}"
    return names | {f"{block}.{ours}": f"{resnets[block]}.{theirs}"
                    for block in resnets for ours, theirs in RESNET.items()}


def vae_prefixes(levels=4):
    names = {}
    for side, way in (("encoder", "down"), ("decoder", "up")):
        middle = f"{side}.mid_block"
        names |= {f"{side}.conv_norm_out": f"{side}.norm_out",
                  f"{middle}.resnets.0": f"{side}.mid.block_1",
                  f"{middle}.resnets.1": f"{side}.mid.block_2"}
        names |= {f"{middle}.attentions.0.{ours}": f"{side}.mid.attn_1.{theirs}"
                  for ours, theirs in VAE_ATTENTION.items()}
        for i in range(levels):
            block = f"{side}.{way}_blocks.{i}"
            level = f"{side}.{way}.{i if way == 'down' else levels - 1 - i}"
            names[f"{block}.{way}samplers.0"] = f"{level}.{way}sample"
            for j in range(3):
                names[f"{block}.resnets.{j}.conv_shortcut"] = f"{level}.block.{j}.nin_shortcut"
                names[f"{block}.resnets.{j}"] = f"{level}.block.{j}"
    return names


def renamed(name, prefixes):
    """A public name -> the original one, by the longest prefix; unchanged if no prefix fits."""
    found = max((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), key=len,
                default=None)
    return name if found is None else prefixes[found] + name.removeprefix(found)


def open_clip_layer(layer):
    """{public name in a layer: (original name, which third of that tensor)}."""
    start = f"transformer.resblocks.{layer}."
    names = {f"{ours}.{kind}": (f"{start}{theirs}.{kind}", None)
             for ours, theirs in OPEN_CLIP.items() for kind in ("weight", "bias")}
    names |= {f"self_attn.{word}_proj.{kind}": (f"{start}attn.in_proj_{kind}", i)
              for i, word in enumerate("qkv") for kind in ("weight", "bias")}
    return {f"text_model.encoder.layers.{layer}.{ours}": theirs for ours, theirs in names.items()}


def open_clip_names(layers):
    names = {"text_model.embeddings.position_embedding.weight": ("positional_embedding", None),
             "text_model.embeddings.token_embedding.weight": ("token_embedding.weight", None),
             "text_model.final_layer_norm.weight": ("ln_final.weight", None),
             "text_model.final_layer_norm.bias": ("ln_final.bias", None)}
    for layer in range(layers):
        names |= open_clip_layer(layer)
    return names


# ---- files ----------------------------------------------------------------------------------

def original(folder):
    """The tensors of a diffusers folder under their original names."""
    xl = (folder / "text_encoder_2").is_dir()
    ups, downs = (read_json(folder / part / "config.json")[f"{way}_block_types"]
                  for part, way in (("unet", "up"), ("vae", "down")))
    tensors, prefixes = {}, unet_prefixes(len(ups), ups[0] != "UpBlock2D")
    for name, tensor in component(folder / "unet").items():
        tensors[f"model.diffusion_model.{renamed(name, prefixes)}"] = tensor
    for name, tensor in component(folder / "vae").items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors[f"first_stage_model.{renamed(name, vae_prefixes(len(downs)))}"] = tensor
    text = text_component(folder / "text_encoder")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    if config["hidden_act"] == "gelu":
        last = {"text_projection": np.zeros(2 * [config["hidden_size"]], np.float32)}
        return tensors | open_clip_tensors(text, "cond_stage_model.model.", last, unused_layer=True)
    start = "conditioner.embedders.0" if xl else "cond_stage_model"
    tensors |= {f"{start}.transformer.{name}": tensor for name, tensor in text.items()}
    tensors[f"{start}.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    if xl:
        text = text_component(folder / "text_encoder_2")
        last = {"text_projection": text.pop("text_projection.weight").T}
        tensors |= open_clip_tensors(text, "conditioner.embedders.1.model.", last)
    return tensors


def open_clip_tensors(text, start, last, unused_layer=False):
    """With a scale that the model does not use, and on request such a layer."""
    layers = 1 + max(int(name.split(".")[3]) for name in text if ".layers." in name)
    names = open_clip_names(layers)
    tensors = {}
    for name, tensor in text.items():
        theirs, third = names[name]
        if third is None:
            tensors[theirs] = tensor
        else:
            tensors.setdefault(theirs, [None] * 3)[third] = tensor
    tensors = {name: np.concatenate(tensor) if isinstance(tensor, list) else tensor
               for name, tensor in tensors.items()}
    if unused_layer:
        last |= {name.replace(f"resblocks.{layers - 1}", f"resblocks.{layers}"):
                 np.zeros_like(tensor) for name, tensor in tensors.items()
                 if f"resblocks.{layers - 1}." in name}
    tensors |= last | {"logit_scale": np.float32(4.6)}
    return {start + name: tensor for name, tensor in tensors.items()}


def text_component(folder):
    return {name if name.startswith("text_") else f"text_model.{name}": tensor
            for name, tensor in component(folder).items()}


def component(folder):
    file, = folder.glob("*.safetensors")
    return safetensors.numpy.load_file(file)


def leftovers(tensors):
    """Leftovers of training: tables of the schedule, and averaged weights, here halved."""
    ema = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor / 2
           for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    tables = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
              "sqrt_recipm1_alphas_cumprod", "log_one_minus_alphas_cumprod", "posterior_variance",
              "posterior_log_variance_clipped", "posterior_mean_coef1", "logvar")
    return ema | {name: np.linspace(0, 1, 1000, dtype=np.float32) for name in tables} | {
        "model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int64(7)}


# ---- small pipelines of each kind -----------------------------------------------------------

VAE = {"layers_per_block": 2, "sample_size": 64}
WIDTHS, VAE_WIDTHS = (16, 24, 32, 32), (4, 8, 16, 16)


PNDM = scheduler("PNDM", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)


def sd1(folder, in_channels=4, **options):
    return save(folder, make_unet(WIDTHS, 24, "yyyn", attention_head_dim=8, layers_per_block=2,
                                  sample_size=8, in_channels=in_channels),
                make_vae(VAE_WIDTHS, **VAE), PNDM, 24, **options)


def sd1_inpainting(folder):
    return sd1(folder, in_channels=9, pipeline="StableDiffusionInpaintPipeline")


def sd2(folder, base=False):
    unet = make_unet(WIDTHS, 32, "yyyn", attention_head_dim=(2, 2, 4, 4), layers_per_block=2,
                     sample_size=8, use_linear_projection=True)
    steps = scheduler("DDIM", prediction_type="v_prediction", steps_offset=1,
                      set_alpha_to_one=False, clip_sample=False)
    if base:
        steps = PNDM                                    # which tells it from the other:
        unet[2]["up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"] *= np.float32(0.1)
    return save(folder, unet, make_vae(VAE_WIDTHS, **VAE), steps, 32, padding="!",
                hidden_act="gelu")


def sd2_base(folder):
    return sd2(folder, base=True)


def sdxl(folder):
    unet = make_unet(WIDTHS[:3], 24 + 32, "nyy", attention_head_dim=(2, 4, 4), layers_per_block=2,
                     sample_size=8, use_linear_projection=True,
                     transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time",
                     addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8)
    vae = make_vae(VAE_WIDTHS, **VAE, scaling_factor=0.13025, force_upcast=True)
    return save_xl(folder, unet, vae, scheduler("EulerDiscrete", timestep_spacing="leading",
                                                steps_offset=1), (24, 32), 20)


def upscaler(folder):
    unet = small_pipelines.upscaler_unet(WIDTHS, 32, "nyyy", layers_per_block=2)
    return small_pipelines.upscaler(folder, unet=unet, width=32,
                                    vae=make_vae(VAE_WIDTHS[:3], **VAE, scaling_factor=0.08333))


def shrink(monkeypatch, vocab_size, end):
    """Change the built-in configs to those of the small pipelines. end: the end token's id."""
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": vocab_size}
    unet = {"block_out_channels": list(WIDTHS), "norm_num_groups": 8, "sample_size": 8}
    xl = {"block_out_channels": list(WIDTHS[:3]), "transformer_layers_per_block": [1, 1, 2],
          "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 68}
    changes = {"SD1": (24, {}), "SD2": (32, {"attention_head_dim": [2, 2, 4, 4]}),
               "SDXL": (24, {"attention_head_dim": [2, 4, 4], **xl, "cross_attention_dim": 56})}
    changes["UPSCALER"] = (32, {"attention_head_dim": 4})
    for name in ("SD1", "SD2", "SD2_BASE", "SDXL", "SD1_INPAINTING", "SD2_INPAINTING",
                 "SDXL_INPAINTING", "UPSCALER"):
        kind = getattr(kinds, name)
        width, more = changes[name.partition("_")[0]]
        second = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 20,
                  "eos_token_id": end}
        monkeypatch.setattr(kinds, name, kind._replace(
            unet=kind.unet | unet | {"cross_attention_dim": width} | more,
            vae=kind.vae | {"block_out_channels": list(
                VAE_WIDTHS[:len(kind.vae["block_out_channels"])]), "norm_num_groups": 4,
                "sample_size": 64},
            text_encoder=kind.text_encoder | text | {"hidden_size": width,
                                                     "intermediate_size": 2 * width},
            text_encoder_2=kind.text_encoder_2 and kind.text_encoder_2 | text | second))


def as_file(folder, path, monkeypatch, metadata=None, drop="-", **more):
    """Write the folder's weights as a single file, and shrink the built-in configs to fit them.

    metadata: of a safetensors file's header. drop: the beginning of names to leave out. more: name
    and array of further tensors.
    """
    words = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    shrink(monkeypatch, len(words), words["<|endoftext|>"])
    monkeypatch.setenv(folders.TOKENIZER_VARIABLE, str(folder / "tokenizer"))
    tensors = {name: np.require(tensor, requirements="C")
               for name, tensor in (original(folder) | more).items() if not name.startswith(drop)}
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path, metadata)
    else:
        tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        torch.save({"state_dict": tensors, "global_step": 1}, path)
    return path


def assert_same_weights(pipe, other):
    assert pipe.models.keys() == other.models.keys()
    for part, model in pipe.models.items():
        theirs = dict(other.models[part].named_parameters())
        for name, parameter in model.named_parameters():
            assert np.array_equal(parameter.data, theirs[name].data), name
