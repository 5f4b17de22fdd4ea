"""The VAE against diffusers on random weights: outputs and all gradients."""
import numpy as np
import pytest
import torch

from tests.support.arrays import read_only
from tests.support.models import VAES
from tests.support.pairs import vae_pair
from tests.support.reference import assert_same_gradients, nchw, nhwc
from tests.support.tolerance import assert_close
from tinyldm import backend
from tinyldm.layers import Tape


@pytest.mark.parametrize("name", VAES)
def test_vae_gradients(name):
    reference, module = vae_pair(VAES[name], torch.float64)
    rng = np.random.default_rng(1)
    images = read_only(rng.standard_normal((2, 16, 24, 3)))
    x = nchw(images).requires_grad_()
    moments = reference.encode(x).latent_dist
    tape = Tape()
    mean, logvar = module.encode(images, tape)
    assert_close(mean, nhwc(moments.mean), 1e-8, "mean")
    assert_close(logvar, nhwc(moments.logvar), 1e-8, "logvar")

    eps = rng.standard_normal(mean.shape)       # through the sample and the decoder, and both back
    z = mean + np.exp(0.5 * logvar) * eps
    theirs = reference.decode(moments.mean + moments.std * nchw(eps)).sample
    ours = module.decode(z, tape)
    assert_close(ours, nhwc(theirs), 1e-8, "image")

    dy = read_only(rng.standard_normal(ours.shape))
    theirs.backward(nchw(dy))
    dz = module.decode_backward(dy, tape)
    dimages = module.encode_backward(dz, dz * eps * 0.5 * np.exp(0.5 * logvar), tape)
    assert not tape.entries
    assert_same_gradients(reference, module)
    assert_close(dimages, nhwc(x.grad), 1e-6, "dimages")
    np.testing.assert_array_equal(ours, module.decode(z))


def test_vae_float32():
    reference, module = vae_pair(VAES["four levels"], torch.float32)
    rng = np.random.default_rng(1)
    images = read_only(rng.standard_normal((1, 40, 48, 3)).astype(np.float32))
    z = read_only(rng.standard_normal((1, 5, 7, 4)).astype(np.float32))
    with torch.no_grad():
        mean = nhwc(reference.encode(nchw(images)).latent_dist.mean)
        decoded = nhwc(reference.decode(nchw(z)).sample)
    assert_close(module.encode(images)[0], mean, 1e-3, "encode, fast")
    assert_close(module.decode(z), decoded, 1e-3, "decode, fast")
    with backend.plain():
        assert_close(module.encode(images)[0], mean, 1e-4, "encode, plain")
        assert_close(module.decode(z), decoded, 1e-4, "decode, plain")
