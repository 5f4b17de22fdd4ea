"""DiT against diffusers on random weights, and its sizes. The original: checkpoints/test_dit.py."""
import math

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel as ReferenceDiT

import tinyldm
from tests.support import strict
from tests.support.arrays import read_only
from tests.support.keys import digest
from tests.support.models import DITS, random_weights, with_weights
from tests.support.reference import (
    assert_same_gradients,
    copy_weights,
    nchw,
    nhwc,
    randomise,
    widen_embeddings,
)
from tests.support.tolerance import assert_allclose, assert_close
from tinyldm import backend
from tinyldm.checkpoints.components import save_model
from tinyldm.errors import TinyldmError
from tinyldm.files import read_json, write_json
from tinyldm.layers import Tape, file_shape
from tinyldm.models import DiTTransformer2DModel
from tinyldm.models.dit import PatchEmbed, config_of

PAPER = {   # parameters of the original, with the stored positions: patches of 2, 4, 8
    "S": (32_963_360, 32_945_024, 33_148_160), "B": (130_512_416, 130_475_648, 130_881_536),
    "L": (458_102_816, 458_053_760, 458_594_816), "XL": (675_129_632, 675_074_432, 675_683_072)}


def make_inputs(config, kind=np.float64, batch=3):
    rng, size = np.random.default_rng(1), config["sample_size"]
    latents = rng.standard_normal((batch, size, size, config["in_channels"])).astype(kind)
    labels = np.array([0, config["num_embeds_ada_norm"], 2])[:batch]
    return tuple(map(read_only, (latents, np.array([3, 981, 500][:batch]), labels)))


def pair(config, dtype):
    """-> reference, ours, inputs. In float64 the reference embeds its timesteps so, too."""
    reference = randomise(ReferenceDiT(**config).to(dtype)).eval()
    if dtype == torch.float64:
        widen_embeddings(reference)
    module = copy_weights(reference, DiTTransformer2DModel(config))
    return reference, module, make_inputs(config, np.dtype(str(dtype).rpartition(".")[2]))


def call(reference, x, timesteps, labels):
    return reference(x, torch.from_numpy(timesteps.copy()), torch.from_numpy(labels.copy())).sample


@pytest.mark.parametrize("name", DITS)
def test_gradients(name):
    reference, module, (latents, timesteps, labels) = pair(DITS[name], torch.float64)
    x = nchw(latents).requires_grad_()
    theirs = call(reference, x, timesteps, labels)
    tape = Tape()
    ours = module.forward(latents, timesteps, labels, tape)
    assert_close(ours, nhwc(theirs), 1e-10, "output")
    dy = read_only(np.random.default_rng(2).standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    dlatents = module.backward(dy, tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    assert_close(dlatents, nhwc(x.grad), 1e-6, "dlatents")
    np.testing.assert_array_equal(ours, module.forward(latents, timesteps, labels))


@pytest.mark.parametrize("name", DITS)
def test_float32(name):
    reference, module, inputs = pair(DITS[name], torch.float32)
    with torch.no_grad():
        theirs = nhwc(call(reference, nchw(inputs[0]), *inputs[1:]))
    assert_close(module(*inputs), theirs, 1e-3, "fast")
    with backend.plain():
        assert_close(module(*inputs), theirs, 1e-4, "plain")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_on_strict_arrays(dtype):
    """What CuPy would refuse is refused; in float16 the numbers are near."""
    config = DITS["learned variance"]
    module = with_weights(DiTTransformer2DModel(config),
                          random_weights(DiTTransformer2DModel(config), 0, dtype))
    inputs = make_inputs(config, dtype)
    with backend.plain():
        expected = module(inputs[0].astype(np.float32), *inputs[1:])
    with strict.installed() as xp:
        for parameter in module.parameters():
            parameter.data = strict.Array(parameter.data)
        tape = Tape()
        y = module(*map(strict.Array, inputs), tape)
        assert y.dtype == dtype
        assert_close(y.get().astype(np.float32), expected, 0.03 if dtype == np.float16 else 1e-4)
        assert isinstance(module.backward(y, tape), xp.ndarray)
        # The gradients of a parameter that is used several times are added up in float32.
        assert {parameter.grad.dtype for parameter in module.parameters()} <= {
            np.dtype(dtype), np.dtype(np.float32)}


# ---- parts --------------------------------------------------------------------------------------

def test_positions():
    """The first half tells the column, the second the row."""
    layer = PatchEmbed(1, 8, 1)
    layer.proj.weight.data, layer.proj.bias.data = np.zeros((1, 1, 1, 8)), np.zeros(8)
    one, zero = [.841471, .01, .540302, .99995], [0, 0, 1, 1]
    assert_allclose(layer(np.zeros((1, 2, 2, 1)))[0],
                    [zero + zero, one + zero, zero + one, one + one], rtol=0, atol=1e-6)


def test_dropped_labels():
    """A mask for the batch, as in the original; or one for each block, as diffusers draws it."""
    config = DITS["learned variance"]
    reference, module, (latents, timesteps, labels) = pair(config, torch.float64)
    null, once = config["num_embeds_ada_norm"], np.array([True, False, False])
    np.testing.assert_array_equal(
        module(latents, timesteps, labels, dropped=once),
        module(latents, timesteps, np.where(once, null, labels)))
    reference.train()
    masks, embed = [], torch.rand

    def rand(*shape, **options):
        masks.append(np.random.default_rng(len(masks)).random(shape) < 0.5)
        return embed(*shape, **options) * 0 + torch.from_numpy(np.where(masks[-1], 0.0, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        theirs = call(reference, nchw(latents), timesteps, labels)
    assert len(masks) == config["num_layers"] + 1
    ours = module(latents, timesteps, labels, dropped=np.stack(masks))
    assert_close(ours, nhwc(theirs), 1e-10)


# ---- sizes ----------------------------------------------------------------------------------

@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", PAPER)
def test_sizes(size, patch):
    """The paper's numbers of parameters: the embedding counted once, the fixed positions too."""
    module = DiTTransformer2DModel(config_of(size, patch))
    settings, width = module.settings, module.settings.width
    count = {name: math.prod(parameter.shape) for name, parameter in module.named_parameters()}
    copies = sum(n for name, n in count.items() if ".emb." in name and ".0.norm1" not in name)
    tokens = (settings.sample_size // patch) ** 2
    assert sum(count.values()) - copies + tokens * width == PAPER[size][(2, 4, 8).index(patch)]


def test_names_are_those_of_the_published_file():
    """facebook/DiT-XL-2-256: every block has an embedding of its own, 28 equal copies."""
    module = DiTTransformer2DModel(config_of("XL", 2))
    rows = [("transformer", name, file_shape(parameter))
            for name, parameter in module.named_parameters()]
    assert digest(rows) == "975050642187320b" and len(rows) == 538
    assert sum(math.prod(shape) for _, _, shape in rows) == 749_826_464
    with torch.device("meta"):
        reference = ReferenceDiT.from_config(config_of("XL", 2))
    assert {name: tuple(tensor.shape) for name, tensor in reference.named_parameters()} == {
        name: shape for _, name, shape in rows}


def test_seed_example():
    """DiT(depth=12, hidden_size=384, patch_size=4, num_heads=6): learned variance, 64 tokens."""
    module = DiTTransformer2DModel(config_of("S", 4))
    module = with_weights(module, {name: np.zeros(file_shape(parameter), np.float32)
                                   for name, parameter in module.named_parameters()})
    y = module(np.ones((2, 32, 32, 4), np.float32), np.array([1, 2]), np.array([3, 1000]))
    assert y.shape == (2, 32, 32, 8) and not y.any()    # the last layer is 0, as at the start


# ---- configs ------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"patch_size": 3}, "patch_size must divide sample_size, 8, but 3 does not"),
    ({"attention_head_dim": 3, "num_attention_heads": 2}, "a multiple of 4, .* not 6"),
    ({"norm_type": "ada_norm_single"}, 'norm_type must be "ada_norm_zero"'),
    ({"activation_fn": "geglu"}, 'activation_fn must be "gelu-approximate"'),
    ({"norm_elementwise_affine": True}, "norm_elementwise_affine = true is not supported"),
    ({"caption_channels": 4096}, "caption_channels = 4096 is not supported"),
    ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm must be a positive whole number"),
    ({"num_layers": 0}, "num_layers must be"), ({"freq_shift": 2}, "freq_shift must be"),
    ({"sample_size": [8, 8]}, "sample_size must be"),
])
def test_refused_configs(changes, message):
    with pytest.raises(TinyldmError, match=message):
        DiTTransformer2DModel(DITS["learned variance"] | changes)


@pytest.mark.parametrize("changed, message", [
    ({0: np.zeros((3, 8, 4, 4))}, "the latents must be 8 high and wide"),
    ({1: 5}, r"timesteps must be an array of shape \(3,\)"),
    ({2: np.array([1])}, r"class_labels must be an array of shape \(3,\)"),
])
def test_inputs_that_do_not_fit(changed, message):
    config = DITS["learned variance"]
    inputs = [changed.get(i, x) for i, x in enumerate(make_inputs(config))]
    with pytest.raises(AssertionError, match=message):
        DiTTransformer2DModel(config)(*inputs)


# ---- folders ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_folders_of_both(name, tmp_path):
    """Ours in diffusers, and diffusers' here, also by the name that older files have."""
    reference, module, inputs = pair(DITS["learned variance"], torch.float32)
    reference.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    write_json(config, read_json(config) | {"_class_name": name})
    loaded = tinyldm.load_model(tmp_path / "theirs")
    np.testing.assert_array_equal(loaded(*inputs), module(*inputs))
    save_model(module, tmp_path / "ours", np.float32)
    theirs = ReferenceDiT.from_pretrained(tmp_path / "ours")
    for key, tensor in reference.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
