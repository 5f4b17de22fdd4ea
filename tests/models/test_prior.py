"""The prior of unCLIP against diffusers on random weights, and karlo's names."""
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PriorTransformer as ReferencePrior
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer as ReferenceNormalizer,
)

import tinyldm
from tests.support import strict
from tests.support.arrays import read_only
from tests.support.keys import digest
from tests.support.models import PRIOR, PRIORS, random_weights, with_weights
from tests.support.reference import (
    assert_same_gradients,
    copy_weights,
    randomise,
    sinusoidal,
)
from tests.support.tolerance import assert_close
from tinyldm import backend
from tinyldm.checkpoints.components import save_model
from tinyldm.errors import TinyldmError
from tinyldm.files import read_json, write_json
from tinyldm.layers import Tape
from tinyldm.models import PriorTransformer, StableUnCLIPImageNormalizer

LIST = Path(__file__).parents[3] / "shared" / "reference" / "keys_karlo_prior.txt"
KARLO = {"_class_name": "PriorTransformer", "additional_embeddings": 4, "attention_head_dim": 64,
         "dropout": 0.0, "embedding_dim": 768, "num_attention_heads": 32, "num_embeddings": 77,
         "num_layers": 20}


def make_inputs(config, kind=np.float64, batch=3):
    """-> latents, timesteps, text_embeds, context, and a mask whose first token is always seen."""
    rng, M, C = np.random.default_rng(1), config["num_embeddings"], config["embedding_dim"]
    P = config.get("embedding_proj_dim") or C
    latents, text_embeds, context = (rng.standard_normal((batch, *shape)).astype(kind)
                                    for shape in ((C,), (P,), (M, C)))
    mask = np.arange(M) < np.array([M, 1, max(M // 2, 1)])[:batch, None]
    return tuple(map(read_only, (latents, np.array([3, 981, 500][:batch]), text_embeds, context,
                                 mask)))


def pair(config, dtype):
    """-> reference, ours, inputs. In float64 the reference embeds its timesteps so, too."""
    reference = randomise(ReferencePrior(**config).to(dtype)).eval()
    module = copy_weights(reference, PriorTransformer(config))
    if dtype == torch.float64:
        width = reference.time_proj.num_channels
        reference.time_proj.forward = lambda t: sinusoidal(t, width, False, 0)
    return reference, module, make_inputs(config, np.float64 if dtype == torch.float64
                                          else np.float32)


def call(reference, latents, timesteps, text_embeds, context, mask=None):
    mask = None if mask is None else torch.from_numpy(mask.copy())
    found = reference(latents, torch.from_numpy(timesteps.copy()), text_embeds, context, mask)
    return reference.post_process_latents(found.predicted_image_embedding)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "each token sees all"])
@pytest.mark.parametrize("name", PRIORS)
def test_gradients(name, masked):
    reference, module, (*inputs, mask) = pair(PRIORS[name], torch.float64)
    mask = mask if masked else None
    x, text, context = (torch.from_numpy(inputs[i].copy()).requires_grad_() for i in (0, 2, 3))
    theirs = call(reference, x, inputs[1], text, context, mask)
    tape = Tape()
    predicted = module.forward(*inputs, tape, mask=mask)
    ours = module.post_process_latents(predicted, tape)
    assert_close(ours, theirs.detach().numpy(), 1e-10, "output")

    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(torch.from_numpy(dy.copy()))
    gradients = module.backward(module.post_process_latents_backward(dy, tape), tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    for ours_in, theirs_in, what in zip(gradients, (x, text, context), gradients._fields):
        assert_close(ours_in, theirs_in.grad.numpy(), 1e-6, what)
    np.testing.assert_array_equal(predicted, module.forward(*inputs, mask=mask))


@pytest.mark.parametrize("name", PRIORS)
def test_float32(name):
    reference, module, (*inputs, mask) = pair(PRIORS[name], torch.float32)
    x, text, context = (torch.from_numpy(inputs[i].copy()) for i in (0, 2, 3))
    with torch.no_grad():
        theirs = call(reference, x, inputs[1], text, context, mask).numpy()
    for plain in (False, True):
        with backend.plain(plain):
            ours = module.post_process_latents(module(*inputs, mask=mask))
        assert ours.dtype == np.float32
        assert_close(ours, theirs, 1e-4, "plain" if plain else "fast")


def test_what_is_hidden_changes_nothing():
    """Padding is never seen. The timestep comes after the text, and is always seen."""
    _, module, (latents, timesteps, text_embeds, context, mask) = pair(PRIOR, torch.float64)
    before = module(latents, timesteps, text_embeds, context, mask=mask)
    other = np.where(mask[..., None], context, 7.0)
    np.testing.assert_array_equal(
        before, module(latents, timesteps, text_embeds, other, mask=mask))
    assert abs(before - module(latents, timesteps, text_embeds, other)).max() > 0.01
    later = module(latents, timesteps + 5, text_embeds, context, mask=mask)
    assert (abs(before - later).max(axis=1) > 1e-4).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_on_strict_arrays(dtype):
    """What CuPy would refuse is refused; in float16 the numbers are near."""
    module = with_weights(PriorTransformer(PRIOR),
                          random_weights(PriorTransformer(PRIOR), 0, dtype))
    *inputs, mask = make_inputs(PRIOR, dtype)
    with backend.plain():
        expected = module(*(x if x.dtype.kind == "i" else x.astype(np.float32) for x in inputs),
                          mask=mask)
    with strict.installed() as xp:
        for parameter in module.parameters():
            parameter.data = strict.Array(parameter.data)
        tape = Tape()
        y = module(*map(strict.Array, inputs), tape, mask=strict.Array(mask))
        assert y.dtype == dtype
        assert_close(y.get().astype(np.float32), expected, 0.03 if dtype == np.float16 else 1e-4)
        assert all(isinstance(dx, xp.ndarray) for dx in module.backward(y, tape))
        y = module.post_process_latents(y, tape)
        module.post_process_latents_backward(y, tape)
        assert all(parameter.grad.dtype == dtype for parameter in module.parameters())


# ---- names --------------------------------------------------------------------------------------

def rows(config):
    return [("prior", name, parameter.shape)
            for name, parameter in PriorTransformer(config).named_parameters()]


def test_karlos_names_and_shapes():
    found = rows(KARLO)
    assert len(found) == 338
    assert sum(int(np.prod(shape)) for *_, shape in found) == 1_022_030_080
    assert digest(found) == "393e5e301ed25db9"


@pytest.mark.skipif(not LIST.is_file(), reason="the list of names is not here")
def test_karlos_names_are_those_of_the_list():
    listed = [line.split("\t")[:3] for line in LIST.read_text().splitlines() if line[0] != "#"]
    assert sorted(listed) == sorted([part, name, str(list(shape))] for part, name, shape
                                    in rows(KARLO))


def test_the_folder_is_read_by_both(tmp_path):
    reference, module, (*inputs, mask) = pair(PRIOR, torch.float32)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = tinyldm.load_model(tmp_path / "theirs")
    assert np.array_equal(loaded(*inputs, mask=mask), module(*inputs, mask=mask))
    save_model(loaded, tmp_path / "ours", np.float32)
    again = ReferencePrior.from_pretrained(tmp_path / "ours")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("change, message", [
    ({"additional_embeddings": 5}, "additional_embeddings = 5 is not supported, only 4"),
    ({"added_emb_type": None}, "added_emb_type = null"),
    ({"norm_in_type": "layer"}, "norm_in_type = \"layer\""),
    ({"embedding_proj_norm_type": "layer"}, "embedding_proj_norm_type"),
    ({"encoder_hid_proj_type": None}, "encoder_hid_proj_type"),
    ({"time_embed_act_fn": "gelu"}, "time_embed_act_fn"),
    ({"time_embed_dim": 8}, "time_embed_dim = 8 is not supported, only null or 12"),
    ({"num_attention_heads": 1, "attention_head_dim": 3}, "must be even, .*, not 3"),
    ({"num_layers": 0}, "num_layers must be a positive whole number"),
    ({"embedding_dim": "8"}, "embedding_dim must be a positive whole number .* not \"8\"")])
def test_a_config_that_is_not_built_is_named(tmp_path, change, message):
    with pytest.raises(TinyldmError, match=message) as error:
        PriorTransformer(PRIOR | change)
    assert "\n" not in str(error.value)


def test_wrong_inputs_are_named():
    _, module, (latents, timesteps, text_embeds, context, _) = pair(PRIOR, torch.float32)
    with pytest.raises(AssertionError, match=r"must be \(B,M,C\) = \(3,7,C\), not \(3, 6, 8\)"):
        module(latents, timesteps, text_embeds, context[:, 1:])
    with pytest.raises(AssertionError, match=r"timesteps must be an array of shape \(3,\)"):
        module(latents, 3, text_embeds, context)


# ---- the normaliser -----------------------------------------------------------------------------

def test_image_normalizer(tmp_path):
    reference = ReferenceNormalizer(5)
    with torch.no_grad():
        reference.mean += torch.arange(5.0)
        reference.std += torch.arange(5.0) / 3
    reference.save_pretrained(tmp_path / "theirs")
    module = tinyldm.load_model(tmp_path / "theirs")
    assert isinstance(module, StableUnCLIPImageNormalizer)
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    for name in ("scale", "unscale"):
        theirs = getattr(reference, name)(torch.from_numpy(x)).detach().numpy()
        assert_close(getattr(module, name)(x), theirs, 1e-6, name)
    save_model(module, tmp_path / "ours", np.float32)
    again = ReferenceNormalizer.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.std, reference.std) and torch.equal(again.mean, reference.mean)
    write_json(tmp_path / "ours" / "config.json",
               read_json(tmp_path / "ours" / "config.json") | {"embedding_dim": 0})
    with pytest.raises(TinyldmError, match="embedding_dim must be a positive whole number"):
        tinyldm.load_model(tmp_path / "ours")
