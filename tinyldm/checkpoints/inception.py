"""The weight file of the FID's Inception network, by the names of pytorch-fid."""
import os

from ..errors import TinyldmError
from ..files import as_path
from ..models.inception import InceptionV3
from . import layout
from .components import fill
from .formats.reading import read_tensors

FILE, VARIABLE = "pt_inception-2015-12-05-6726825d.pth", "TINYLDM_INCEPTION"


def load_inception(path=None):
    """The network in a file, in float32. It has logits if the file has its last layer, `fc`.

    path: None for the file that the environment variable TINYLDM_INCEPTION names.
    Raises TinyldmError where there is none, and for a file that does not fit.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise TinyldmError(f"the Inception network's weights are not part of tinyldm: get {FILE} "
                           "(91 MB; mseitzer/pytorch-fid on GitHub, release fid_weights; where "
                           "pytorch-fid ran, it lies in ~/.cache/torch/hub/checkpoints), and name "
                           f"it with --inception or {VARIABLE}; or use --features clip with a CLIP "
                           "of yours, or --features vae")
    path = as_path("the file of the Inception network", path)
    tensors = read_tensors(path)
    module = InceptionV3(logits="fc.weight" in tensors)
    tensors = layout.fitted(tensors, dict(module.named_parameters()))
    fill(module, tensors, f"{path} does not fit the Inception network of the FID, {FILE}")
    return module
