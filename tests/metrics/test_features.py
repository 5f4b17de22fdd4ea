"""Features of folders, and python -m tinyldm.metrics."""
import numpy as np
import pytest
from PIL import Image

from tests.support.extra import torch
from tests.support.inception_reference import inception
from tests.support.models import inception_weights
from tests.support.reference import nchw
from tests.support.tolerance import assert_allclose, assert_close
from tinyldm.checkpoints.inception import load_inception
from tinyldm.errors import TinyldmError
from tinyldm.metrics import features
from tinyldm.metrics.__main__ import main
from tinyldm.metrics.fid import frechet_distance, statistics
from tinyldm.models import InceptionV3


def draw(folder, count, seed, size=(20, 24)):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    return draw(place / "real", 5, 0), draw(place / "drawn", 4, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as pytorch-fid's: with counts of batches."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    arrays = inception_weights(InceptionV3(), np.float32)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors |= {name.replace("running_var", "num_batches_tracked"): torch.tensor(7)
                for name in arrays if name.endswith("running_var")}
    torch.save(tensors, path)
    return path


@pytest.fixture
def said(capsys):
    def run(*arguments):
        assert main([*map(str, arguments)]) == 0
        return capsys.readouterr().out.split()
    return run


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("error: ") == 1 and error.endswith("\n")
    return error[error.index("error: "):]


# ---- the file of weights ----------------------------------------------------------------------

def test_the_public_layout_loads(weights, monkeypatch):
    module = load_inception(weights)
    monkeypatch.setenv("TINYLDM_INCEPTION", str(weights))
    x = np.random.default_rng(0).uniform(-1, 1, (1, 75, 75, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = inception(torch.load(weights), nchw(x)).numpy()
    assert_close(module(x), theirs, 1e-3)
    np.testing.assert_array_equal(load_inception()(x), module(x))


def test_the_last_layer_may_be_missing(weights, tmp_path):
    tensors = torch.load(weights)
    torch.save({name: t for name, t in tensors.items() if "fc." not in name}, tmp_path / "a.pth")
    module = load_inception(tmp_path / "a.pth")
    assert module.fc is None
    with pytest.raises(TinyldmError, match="lacks its last layer, fc"):
        features.inception(module, 1008)
    del tensors["Mixed_6a.branch3x3.bn.bias"]
    tensors["AuxLogits.fc.weight"] = torch.zeros(2)
    torch.save(tensors, tmp_path / "b.pth")
    with pytest.raises(TinyldmError, match="does not fit the Inception network") as caught:
        load_inception(tmp_path / "b.pth")
    assert "missing: 1: Mixed_6a.branch3x3.bn.bias" in str(caught.value)
    assert "unexpected: 1: AuxLogits.fc.weight" in str(caught.value)


def test_no_weights(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TINYLDM_INCEPTION", raising=False)
    error = refused(capsys, "fid", *folders)
    assert "pt_inception-2015-12-05-6726825d.pth" in error and "--features clip" in error
    assert "no" in refused(capsys, "fid", *folders, "--inception", tmp_path / "none.pth")


# ---- folders ----------------------------------------------------------------------------------

def test_which_files_are_pictures(tmp_path):
    folder = draw(tmp_path / "a", 3, 0)
    (folder / "notes.txt").write_text("none")
    (folder / "inner").mkdir()
    Image.new("RGB", (3, 4)).save(folder / "Z.JPG", "JPEG")
    assert [path.name for path in features.pictures_in(folder)] == ["0.png", "1.png", "2.png",
                                                                    "Z.JPG"]


def test_pictures_are_read_as_they_are_stored(tmp_path):
    """Without a background behind transparent parts, and without turning: as pytorch-fid."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6                                    # turn it by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(features.as_image(tmp_path / "a.png"),
                                  np.asarray(image)[..., :3])


def test_batches_give_the_same(folders, weights):
    chosen = features.inception(load_inception(weights), 64, "clean")
    pictures, done = features.pictures_in(folders[0]), []
    whole = features.extract(pictures, chosen)
    assert whole.shape == (5, 64) and whole.dtype == np.float32
    assert_allclose(features.extract(pictures, chosen, 2, done.append), whole, 1e-5)
    assert done == [2, 2, 1]


# ---- the command ------------------------------------------------------------------------------

def test_fid_of_folders_and_statistics(folders, weights, said, tmp_path):
    options = "--inception", weights, "--dims", 64, "--batch", 2
    name, value = said("fid", *folders, *options)
    chosen = features.inception(load_inception(weights), 64)
    real, drawn = (statistics(features.extract(features.pictures_in(f), chosen)) for f in folders)
    assert name == "fid"
    assert_allclose(float(value), frechet_distance(real, drawn), 1e-3)
    out = tmp_path / "real.npz"
    assert said("stats", folders[0], out, *options) == [str(out)]
    assert_allclose(float(said("fid", tmp_path / "real.npz", folders[1], *options)[1]),
                    float(value), 1e-3)


def test_the_bundled_models_features(folders, said):
    real, drawn = folders
    assert float(said("fid", real, drawn, "--features", "vae")[1]) > 0
    assert len(said("kid", real, drawn, "--features", "vae", "--subsets", 3)) == 4
    assert said("precision-recall", real, real, "--features", "vae") == [
        "precision", "1.0000", "recall", "1.0000"]
    assert said("cmmd", real, real, "--features", "vae")[0] == "cmmd"


def test_inception_score(folders, weights, said):
    name, mean, _, std = said("inception-score", folders[0], "--inception", weights, "--splits", 1)
    assert name == "inception-score" and float(mean) >= 1 and float(std) == 0


def test_pictures_in_an_npz(folders, said, tmp_path):
    """As ADM's code writes samples."""
    pixels = np.stack([np.asarray(Image.open(path)) for path in features.pictures_in(folders[1])])
    np.savez(tmp_path / "drawn.npz", pixels)
    both = [said("fid", folders[0], drawn, "--features", "vae")
            for drawn in (tmp_path / "drawn.npz", folders[1])]
    assert both[0] == both[1]


def test_mistakes(folders, capsys, tmp_path):
    real, drawn = folders
    broken = draw(tmp_path / "broken", 2, 0)
    (broken / "1.png").write_bytes((broken / "0.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    vae = "--features", "vae"
    for arguments, message in [
            (("fid", real), "DRAWN"), ((), "COMMAND"), (("fidd", real, drawn), "invalid choice"),
            (("fid", tmp_path / "none", real), "cannot read the folder"),
            (("fid", tmp_path / "empty", real), "holds no pictures"),
            (("fid", real, broken, *vae), "1.png as a picture"),
            (("fid", real, tmp_path / "other.npz", *vae), "128 and 3 numbers do not compare"),
            (("kid", tmp_path / "other.npz", real, *vae), "holds no pictures, arr_0"),
            (("fid", real, drawn, *vae, "--dims", "64"), "--dims belongs to --features inception"),
            (("fid", real, drawn, *vae, "--clip", "x"), "--clip belongs to --features clip"),
            (("fid", real, drawn, "--features", "clip"), "needs a CLIP"),
            (("fid", real, drawn, *vae, "--batch", "0"), "--batch must be at least 1"),
            (("fid", real, drawn, *vae, "--batchh", "2"), "did you mean --batch"),
            (("stats", real, tmp_path / "a.json", *vae), "must end in .npz"),
            (("clip-score", real, "--texts", tmp_path / "no.txt", "--clip", "x"), "cannot read"),
            (("precision-recall", real, drawn, *vae, "--neighbours", "4"), "more than 4 pictures")]:
        assert message in refused(capsys, *arguments), arguments
