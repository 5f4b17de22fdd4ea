"""NaN and infinity are traced to the step and the layer where they began."""
import pytest

from tests.support.models import spoil
from tinyldm.errors import TinyldmError

UNET_LAYERS = ["conv_in.weight", "time_embedding.linear_2.bias",
               "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight",
               "mid_block.resnets.1.conv2.weight", "up_blocks.1.resnets.0.norm1.weight",
               "conv_out.bias"]


@pytest.mark.parametrize("name", UNET_LAYERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_in_the_unet_is_traced_to_its_layer(small, name):
    states = small.stream("cat", num_inference_steps=3)
    next(states)
    spoil(small.unet, name)
    layer = name.rpartition(".")[0]
    with pytest.raises(TinyldmError, match=rf"at step 2 \(timestep 334\): .* is {layer} of UNet2D"):
        next(states)
    assert "forward" not in vars(small.unet.conv_in)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_elsewhere(small):
    with pytest.raises(TinyldmError, match="at step 1 .*no layer is to blame, so lower guidance"):
        list(small.stream("cat", num_inference_steps=3, guidance_scale=1e39))
    spoil(small.vae, "decoder.up_blocks.0.resnets.1.conv1.weight")
    with pytest.raises(TinyldmError, match="picture 0 .* decoder.up_blocks.0.resnets.1.conv1 of"):
        small("cat", num_inference_steps=1)
    spoil(small.text_encoder, "text_model.encoder.layers.1.mlp.fc1.bias")
    with pytest.raises(TinyldmError, match="'dog': .* text_model.encoder.layers.1.mlp.fc1 of CLIP"):
        small.encode_prompt("dog")
