"""FID, KID, precision and recall, CMMD, inception score: known answers, and other programs' values.
"""
import numpy as np
import pytest

from tests.support.tolerance import assert_allclose, within
from tinyldm.errors import TinyldmError
from tinyldm.metrics import cmmd as cmmd_module
from tinyldm.metrics import fid
from tinyldm.metrics import precision_recall as precision_recall_module
from tinyldm.metrics.cmmd import cmmd
from tinyldm.metrics.fid import (
    Statistics,
    frechet_distance,
    read_statistics,
    statistics,
    write_statistics,
)
from tinyldm.metrics.inception_score import inception_score
from tinyldm.metrics.kid import kid, mmd
from tinyldm.metrics.precision_recall import precision_recall

# Values of pytorch-fid, torch-fidelity and cmmd for these two, from the reference of the project.
REAL, DRAWN = np.sin(np.arange(24.0)).reshape(6, 4), np.cos(1.3 * np.arange(24)).reshape(6, 4)


def distance(x, y):
    return frechet_distance(statistics(x), statistics(y))


def test_values_of_other_programs():
    # Both covariances have rank 2 of 4. There scipy's root of their product, which pytorch-fid
    # takes, keeps 8 digits: the features themselves give 0.32343118120754.
    assert_allclose(distance(REAL, DRAWN), 0.323431146460349, atol=1e-7)
    assert_allclose(distance(REAL, DRAWN), 0.32343118120754, 1e-12)
    assert_allclose(mmd(REAL, DRAWN), -0.6685234891372942, 1e-9)
    assert_allclose(kid(REAL, DRAWN, subsets=3)[0], -0.6685234891372942, 1e-9)
    assert_allclose(precision_recall(REAL, DRAWN, k=1), [2 / 3, 1])
    assert_allclose(precision_recall(REAL, DRAWN), [1, 1])
    assert_allclose(cmmd(REAL, DRAWN), 0.10408471739364877, 1e-9)


# ---- FID --------------------------------------------------------------------------------------

def gaussian(mean, variances):
    return Statistics(np.asarray(mean, float), np.diag(np.asarray(variances, float)))


def test_known_distances():
    assert_allclose(frechet_distance(gaussian(np.zeros(256), np.ones(256)),
                                     gaussian(np.ones(256), np.ones(256))), 256, 1e-12)
    assert_allclose(frechet_distance(gaussian([0, 0, 0], [1, 4, 9]),
                                     gaussian([1, 2, 2], [4, 4, 1])), 14, 1e-12)
    assert_allclose(frechet_distance(gaussian([1], [9]), gaussian([3], [1])), 8, 1e-12)


def test_statistics_are_numpys(rng, monkeypatch):
    monkeypatch.setattr(fid, "ROWS", 7)
    features = rng.standard_normal((40, 5)).astype(np.float32)
    found = statistics(features, "some")
    assert found.kind == "some" and found.count == 40 and found.covariance.dtype == np.float64
    assert_allclose(found.mean, features.astype(float).mean(0), 1e-12, 1e-12)
    assert_allclose(found.covariance, np.cov(features.astype(float), rowvar=False), 1e-12, 1e-14)


@pytest.mark.parametrize("counts", [(50, 60), (10, 60), (8, 9), (2, 3)])
def test_the_trace_is_that_of_the_roots_eigenvalues(counts, rng):
    """Also of sets with fewer pictures than features. The eigenvalues of the product lose digits:
    those that should be 0 are about 1e-16, and their roots 1e-8."""
    mix = rng.standard_normal((16, 16))
    A, B = (np.cov(rng.standard_normal((n, 16)) @ mix, rowvar=False) for n in counts)
    eigenvalues = np.linalg.eigvals(A @ B).real.clip(0)
    allowed = 1e-8 if min(counts) > 16 else 1e-5
    assert_allclose(fid.trace_of_root(A, B), np.sqrt(eigenvalues).sum(), allowed)


def test_singular_values_of_the_features_give_the_same(rng):
    """Exact where there are few pictures: tr sqrt(S1 S2) is the nuclear norm of X Y.T."""
    x, y = rng.standard_normal((20, 64)), rng.standard_normal((20, 64)) + 0.5
    centred = [(a - a.mean(0)) / 19 ** 0.5 for a in (x, y)]
    expected = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    S = [statistics(a).covariance for a in (x, y)]
    assert_allclose(fid.trace_of_root(*S), expected, 1e-12)


@pytest.mark.parametrize("counts, eighs", [((90, 70), 0), ((20, 90), 1), ((20, 20), 2)])
def test_both_factors_give_the_same(counts, eighs, rng, monkeypatch):
    """Cholesky's of covariances of full rank, and the one of eigenvectors of the others."""
    A, B = (statistics(rng.standard_normal((n, 32)) * np.geomspace(1, 1e-3, 32)).covariance
            for n in counts)
    eigh, calls = np.linalg.eigh, []
    monkeypatch.setattr(np.linalg, "eigh", lambda S: calls.append(S) or eigh(S))
    found = fid.trace_of_root(A, B)
    assert len(calls) == eighs

    def fails(S):
        raise np.linalg.LinAlgError
    monkeypatch.setattr(np.linalg, "cholesky", fails)
    assert_allclose(found, fid.trace_of_root(A, B), 1e-12)


def test_rank_that_rounding_hides(rng, monkeypatch):
    """Cholesky may succeed on a covariance that lacks one rank: its last pivot is rounding."""
    lower = np.tril(rng.standard_normal((5, 5)) / 4, -1) + np.diag([1, 1, 1, 1, 1e-9])
    monkeypatch.setattr(np.linalg, "cholesky", lambda S: lower)
    assert fid._factor(lower @ lower.T).shape == (5, 4)


def test_scale_and_sameness(rng):
    x, y = rng.standard_normal((2, 30, 6))
    within(abs(distance(x, x)), 1e-10)
    assert_allclose(distance(3 * x, 3 * y), 9 * distance(x, y), 1e-9)
    assert_allclose(distance(x, y), distance(y, x), 1e-9)


def test_where_lapack_finds_no_eigenvalues(monkeypatch, rng):
    """Then 1e-6 is added to both diagonals, as in pytorch-fid."""
    A, B = (np.cov(rng.standard_normal((9, 4)), rowvar=False) for _ in range(2))
    eigh, calls = np.linalg.eigh, []

    def always_fails(S):
        raise np.linalg.LinAlgError

    def fails_once(S):
        calls.append(S)
        if len(calls) == 1:
            raise np.linalg.LinAlgError
        return eigh(S)
    monkeypatch.setattr(np.linalg, "cholesky", always_fails)
    monkeypatch.setattr(np.linalg, "eigh", fails_once)
    found = fid.trace_of_root(A, B)
    assert_allclose(calls[1], A + 1e-6 * np.eye(4), 1e-12)
    monkeypatch.undo()
    assert_allclose(found, fid.trace_of_root(A, B), 1e-4)


@pytest.mark.parametrize("other, message", [
    (gaussian([0], [1]), "features of 3 and 1 numbers"),
    (gaussian([0] * 3, [1] * 3)._replace(kind="clip"), "vae against clip")])
def test_features_that_do_not_compare(other, message):
    with pytest.raises(TinyldmError, match=message):
        frechet_distance(gaussian([0] * 3, [1] * 3)._replace(kind="vae"), other)


def test_a_single_picture_has_no_covariance():
    with pytest.raises(TinyldmError, match="at least 2 pictures, not 1"):
        statistics(np.ones((1, 3)))


# ---- files ------------------------------------------------------------------------------------

def test_statistics_in_files(tmp_path):
    found = statistics(REAL, "inception-2048, pytorch")
    write_statistics(tmp_path / "a.npz", found)
    with np.load(tmp_path / "a.npz") as arrays:             # as pytorch-fid reads it
        np.testing.assert_array_equal(arrays["mu"], found.mean)
        np.testing.assert_array_equal(arrays["sigma"], found.covariance)
    again = read_statistics(tmp_path / "a.npz")
    assert again.kind == found.kind and again.count == 6
    assert frechet_distance(again, found) == frechet_distance(found, found)


def test_statistics_of_other_programs(tmp_path):
    """ADM's files hold the pictures and other statistics, too."""
    S = np.cov(REAL, rowvar=False)
    np.savez(tmp_path / "a.npz", mu=REAL.mean(0), sigma=S, mu_s=np.zeros(3), sigma_s=np.eye(3),
             arr_0=np.zeros((2, 4, 4, 3), np.uint8), odd=np.array([{}], object))
    found = read_statistics(tmp_path / "a.npz")
    assert found.kind == "" and found.count == 0
    np.testing.assert_array_equal(found.covariance, S)


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.zeros(3)}, "holds no sigma"), ({}, "no mu and no sigma"),
    ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"not \(3,\) and \(2, 2\)"),
    ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "NaN or infinity"),
    ({"mu": np.zeros(3), "sigma": np.array([{}])}, "cannot read"),
    ({"mu": np.array("a"), "sigma": np.eye(2)}, "must hold floating-point numbers"),
])
def test_files_that_are_no_statistics(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(TinyldmError, match=message):
        read_statistics(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\3\4 broken", b"\x93NUMPY\1\0"])
def test_damaged_files(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(TinyldmError, match="cannot read"):
        read_statistics(tmp_path / "a.npz")


def test_statistics_are_written_as_npz(tmp_path):
    with pytest.raises(TinyldmError, match="must end in .npz"):
        write_statistics(tmp_path / "a.json", statistics(REAL))


# ---- the others -------------------------------------------------------------------------------

def test_kid_takes_torch_fidelitys_subsets(rng):
    x, y = rng.standard_normal((30, 8)).astype(np.float32), rng.standard_normal((20, 8)) + 0.1
    random, values = np.random.RandomState(5), []
    for _ in range(4):
        a = x[random.choice(30, 10, replace=False)].astype(float)
        values.append(mmd(a, y[random.choice(20, 10, replace=False)]))
    assert_allclose(kid(x, y, 4, 10, seed=5), [np.mean(values), np.std(values)], 1e-12)
    with pytest.raises(TinyldmError, match="at least 2 pictures of each kind, not 1"):
        kid(x[:1], y)


def test_a_collapsed_generator(rng, monkeypatch):
    """Its pictures look real, but most real ones are missing. torch-fidelity once had it reversed.
    """
    real, drawn = rng.normal(0, 3, (200, 16)), rng.normal(0, 0.1, (200, 16))
    precision, recall = precision_recall(real, drawn)
    assert precision > 0.8 and recall < 0.3
    monkeypatch.setattr(precision_recall_module, "ROWS", 33)
    assert precision_recall(real, drawn) == (precision, recall)
    assert precision_recall(real, real) == (1, 1)
    with pytest.raises(TinyldmError, match="more than 3 pictures of each kind, not 200 and 3"):
        precision_recall(real, drawn[:3])


def test_cmmd_in_blocks(rng, monkeypatch):
    x, y = rng.standard_normal((20, 5)), rng.standard_normal((9, 5))
    whole = cmmd(x, y)
    monkeypatch.setattr(cmmd_module, "ROWS", 7)
    assert_allclose(cmmd(x, y), whole, 1e-9)
    assert_allclose(cmmd(5 * x, y), whole, 1e-9)        # only directions count
    within(abs(cmmd(x, x)), 1e-9)


def test_inception_score():
    sure = 50 * np.eye(4)[np.arange(40) % 4]
    assert_allclose(inception_score(sure), [4, 0], 1e-9, 1e-9)      # four classes, each clear
    assert_allclose(inception_score(np.zeros((20, 4))), [1, 0], 1e-9, 1e-9)
    with pytest.raises(TinyldmError, match="at least 10 pictures, not 5"):
        inception_score(sure[:5])
