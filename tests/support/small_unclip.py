"""Small Stable unCLIP pipelines in folders as diffusers writes them; see small_pipelines.py."""
import numpy as np

from tests.support.models import random_weights
from tests.support.small_pipelines import (
    FILES,
    change_json,
    make_text_encoder,
    make_unet,
    make_vae,
    save,
    scheduler,
    write_component,
    write_words,
)
from tinyldm.files import read_json, write_json
from tinyldm.models import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PriorTransformer,
    StableUnCLIPImageNormalizer,
)

EMBEDDING = 20                      # channels of an image embedding
# As the conversion of karlo's scheduler to DDPM gives it.
PRIOR_SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000,
                   "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample",
                   "variance_type": "fixed_small_log", "clip_sample": True,
                   "clip_sample_range": 5.0}
PRIOR = {"_class_name": "PriorTransformer", "num_attention_heads": 2, "attention_head_dim": 6,
         "num_layers": 2, "embedding_dim": EMBEDDING, "num_embeddings": 77,
         "additional_embeddings": 4}
VISION = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model",
          "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 12, "patch_size": 4, "hidden_act": "gelu",
          "projection_dim": EMBEDDING}
PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "crop_size": 12, "size": 12}
FILES |= {CLIPVisionModelWithProjection: "model", PriorTransformer: "diffusion_pytorch_model",
          StableUnCLIPImageNormalizer: "diffusion_pytorch_model"}


def common(folder, kind, width=2 * EMBEDDING):
    """The parts that both public classes share."""
    unet = make_unet((16, 32), 24, "yn", attention_head_dim=(2, 4), sample_size=8,
                     use_linear_projection=True, class_embed_type="projection",
                     projection_class_embeddings_input_dim=width)
    save(folder, unet, make_vae((8, 16, 16)),
         scheduler("DDIM", prediction_type="v_prediction", clip_sample=False, steps_offset=1,
                   set_alpha_to_one=False), 24, padding="!", pipeline=kind, hidden_act="gelu")
    config = {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": EMBEDDING}
    rng = np.random.RandomState(5)
    write_component(folder / "image_normalizer", (StableUnCLIPImageNormalizer, config, {
        "mean": 0.2 * rng.standard_normal((1, EMBEDDING)).astype(np.float32),
        "std": rng.uniform(0.5, 1.5, (1, EMBEDDING)).astype(np.float32)}))
    (folder / "image_noising_scheduler").mkdir()
    write_json(folder / "image_noising_scheduler" / "scheduler_config.json",
               {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"})
    index = read_json(folder / "model_index.json")
    for name in ("safety_checker", "feature_extractor", "requires_safety_checker"):
        index.pop(name)
    write_json(folder / "model_index.json", index | {
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"]})
    return folder


def unclip(folder, **prior_scheduler):
    """StableUnCLIPPipeline: a prompt, through a prior."""
    common(folder, "StableUnCLIPPipeline")
    words = write_words(folder / "prior_tokenizer", "<|endoftext|>")
    end = read_json(folder / "prior_tokenizer" / "vocab.json")["<|endoftext|>"]
    write_component(folder / "prior_text_encoder", make_text_encoder(
        EMBEDDING, words, CLIPTextModelWithProjection, projection_dim=EMBEDDING, eos_token_id=end))
    tensors = random_weights(PriorTransformer(PRIOR), 7)
    tensors["clip_std"] = abs(tensors["clip_std"]) + np.float32(0.5)
    write_component(folder / "prior", (PriorTransformer, PRIOR, tensors))
    (folder / "prior_scheduler").mkdir()
    config = PRIOR_SCHEDULER | prior_scheduler
    write_json(folder / "prior_scheduler" / "scheduler_config.json", config)
    change_json(folder / "model_index.json",
                prior=["diffusers", "PriorTransformer"],
                prior_text_encoder=["transformers", "CLIPTextModelWithProjection"],
                prior_tokenizer=["transformers", "CLIPTokenizer"],
                prior_scheduler=["diffusers", config["_class_name"]])
    return folder


def unclip_img2img(folder):
    """StableUnCLIPImg2ImgPipeline: a picture, through CLIP's image encoder."""
    common(folder, "StableUnCLIPImg2ImgPipeline")
    tensors = random_weights(CLIPVisionModelWithProjection(VISION), 8)
    write_component(folder / "image_encoder", (CLIPVisionModelWithProjection, VISION, tensors))
    (folder / "feature_extractor").mkdir()
    write_json(folder / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR)
    change_json(folder / "model_index.json",
                image_encoder=["transformers", "CLIPVisionModelWithProjection"],
                feature_extractor=["transformers", "CLIPImageProcessor"])
    return folder
