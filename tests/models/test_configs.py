"""Configs that a model refuses: a key that is missing is named."""
import pytest

from tests.support.models import CLIPS, UNETS, VAES
from tinyldm.errors import TinyldmError
from tinyldm.models import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
)


@pytest.mark.parametrize("model, config, key", [
    (UNet2DConditionModel, UNETS["as SD 1"], "cross_attention_dim"),
    (AutoencoderKL, VAES["one level"], "latent_channels"),
    (CLIPTextModel, CLIPS["as SD 1"], "hidden_size"),
    (CLIPTextModelWithProjection, CLIPS["as SD 1"], "projection_dim"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_missing_key_is_named(model, config, key):
    config = {name: value for name, value in config.items() if name != key}
    with pytest.raises(TinyldmError, match=f"lacks {key}: get"):
        model(config)
