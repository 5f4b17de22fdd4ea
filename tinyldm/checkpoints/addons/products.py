"""What a LoRA and its relatives add to a weight: products of small matrices.

A weight (O,C) or (O,C,K,K) is changed as a matrix (O,N), N = C*K*K. Each Product makes a matrix of
two smaller ones, a (P,r) and b (r,Q), or stores it whole. The formulas differ in what they do with
one or two of them:

    LoRA          a @ b                           up and down
    LoHa          (a1 @ b1) * (a2 @ b2)           hada_w1_a, _w1_b, _w2_a, _w2_b
    LoKr          kron(a1 @ b1, a2 @ b2)          lokr_w1 or _w1_a, _w1_b; lokr_w2 or _w2_a, _w2_b
    difference    the change itself, whole        diff, w_norm; of a bias: diff_b, b_norm

A convolution may be in Tucker's form, with a core t (r,r,K,K) between a and b, one matrix per place
of the kernel: lora_mid, hada_t1 and _t2, lokr_t2.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1 (LoRA); Hyeon-Woo et al. 2021, "FedPara",
arXiv:2108.06098, eq. 3 and proposition 3 (LoHa); Yeh et al. 2023, "Navigating Text-To-Image
Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv:2309.14859, section 3 (LoKr).
"""
import math
from typing import NamedTuple

from ..formats.stored import StoredTensor

DIFFERENCES = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
POINTS = ((), (1, 1))                   # how a matrix ends: with two axes, or as a 1x1 convolution


class Product(NamedTuple):
    """A matrix in a file: a (P,N) whole; a (P,r) @ b (r,N); or Tucker's a (r,P), b (r,Q) and t."""

    a: StoredTensor
    b: StoredTensor | None = None
    t: StoredTensor | None = None

    def shape(self, kernel):
        """(P,N), or None if the tensors fit neither each other nor a kernel (K,K), () for none."""
        a, b, t = self
        for tensor, ends in ((a, POINTS if b else (*POINTS, kernel)),
                             (b, POINTS if t else (*POINTS, kernel)), (t, (kernel,))):
            if tensor and (not tensor.shape or 0 in tensor.shape or tensor.shape[2:] not in ends):
                return None
        (P, inner), (rank, N) = _matrix(a), _matrix(b or a)
        if t:
            return (inner, N * math.prod(kernel)) if t.shape[:2] == (P, rank) else None
        return (P, N) if b is None or inner == rank else None

    def read(self, xp, dtype):
        """The matrix (P,N). Raises TinyldmError if a number in the file is not finite."""
        a, b, t = (tensor and xp.asarray(tensor.read(dtype)) for tensor in self)
        a = a.reshape(len(a), -1)
        if b is None:
            return a
        b = b.reshape(len(b), -1)
        if t is None:
            return a @ b
        P, Q, r = a.shape[1], b.shape[1], len(b)
        core = (a.T @ t.reshape(len(t), -1)).reshape(P, r, -1)          # (P,r,K*K)
        rows = core.transpose(0, 2, 1).reshape(-1, r) @ b               # (P*K*K,Q)
        return rows.reshape(P, -1, Q).transpose(0, 2, 1).reshape(P, -1)     # (P,Q*K*K)


class Change(NamedTuple):
    """One or two Products, and how they become what is added to a parameter."""

    what: str                                           # "weight" or "bias" of the layer
    products: list
    kronecker: bool = False                             # of two Products; else elementwise

    @property
    def rank(self):
        """The rank by which alpha is divided; None where every matrix is stored whole."""
        return next((product.b.shape[0] for product in self.products[::-1] if product.b), None)

    def shape(self, kernel=()):
        """(O,N), or None if something does not fit."""
        *first, last = self.products
        shapes = [product.shape(() if self.kronecker else kernel) for product in first]
        shapes.append(last.shape(kernel))
        if None in shapes:
            return None
        if self.kronecker:
            (P, Q), (R, S) = shapes
            return P * R, Q * S
        return shapes[0] if shapes[0] == shapes[-1] else None

    def read(self, xp, dtype):
        """The matrix (O,N), before it is scaled. Raises TinyldmError as Product.read does."""
        first, *second = (product.read(xp, dtype) for product in self.products)
        if not second:
            return first
        if not self.kronecker:
            return first * second[0]
        blocks = first[:, None, :, None] * second[0][None, :, None, :]          # (P,R,Q,S)
        return blocks.reshape(first.shape[0] * second[0].shape[0], -1)


def changes_of(tensors):
    """What one layer's tensors {role: StoredTensor} change -> [Change].

    The roles are the ends of names in files. Raises KeyError if one is missing.
    """
    found = []
    if tensors.keys() & {"down", "up", "mid"}:
        up, down, mid = tensors["up"], tensors["down"], tensors.get("mid")
        found.append(Change("weight", [Product(_turned(up) if mid else up, down, mid)]))
    for kind in ("hada", "lokr"):
        if any(role.startswith(kind) for role in tensors):
            found.append(Change("weight", [_product(tensors, kind, i) for i in "12"],
                                kind == "lokr"))
    return found + [Change(what, [Product(tensors[role])])
                    for role, what in DIFFERENCES.items() if role in tensors]


def _product(tensors, kind, i):
    if whole := tensors.get(f"{kind}_w{i}"):
        return Product(whole)
    return Product(tensors[f"{kind}_w{i}_a"], tensors[f"{kind}_w{i}_b"],
                   tensors.get(f"{kind}_t{i}"))


def _turned(up):
    """A matrix (O,r) or (O,r,1,1) in a file -> (r,O)."""
    if up.shape[2:] not in POINTS:
        return up
    return up._replace(shape=up.shape[:2], strides=up.strides[:2]).transposed()


def _matrix(tensor):
    return tensor.shape[0], math.prod(tensor.shape[1:])
