"""Winograd's convolution: the fast twin of ops.conv2d for 3x3 kernels with stride 1.

A 4x4 tile of the output depends on a 6x6 tile of the input. By definition this takes 16 * 9 = 144
products per tile and pair of channels; Winograd's algorithm takes 36:

    Y = A.T [ (G w G.T) * (B.T d B) ] A          d 6x6 input, w 3x3 weight, Y 4x4 output

To multiply two polynomials, one can evaluate both at a few points, multiply the values, and
interpolate (Toom & Cook). For a fixed w that is a linear map, and a convolution as in deep learning
is its transpose. So w is evaluated at 6 points (G), the input goes through the transpose of
interpolation (B.T), and the products go through the transpose of evaluation (A.T). In two
dimensions this is done along the rows and along the columns.

With a tile as a column of 36 numbers, each of the three transforms is a matrix product (with the
Kronecker product of the matrix with itself), and the products in the middle are 36 of (tiles,C) @
(C,O). These need many tiles: small maps are cut into tiles of 2x2, with 4 points.
Source: Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308,
section 4. The choice of points: Barabasz et al. 2020, "Error Analysis and Improving the Accuracy of
Winograd Convolution for Deep Neural Networks", arXiv:1803.10986.
"""
import math
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..backend import free_threads, parallel, scratch
from .half import widen

STRIP_TILES = 128           # tiles at a time: their numbers stay in the cache
STRIP_NUMBERS = 1 << 15     # or tiles times channels: with few channels, NumPy's calls on 128 tiles
                            # are so short that threads wait for the interpreter's lock
CHUNK = 320                 # at most so many output channels at a time, if tiles are few
WEIGHTS = 1 << 11           # kernels transformed at a time: their 36 numbers stay in the cache


class Points:
    """n points: 0, the given numbers, their negatives, and infinity, for tiles of t = n - 2 by t.

    The matrices for both dimensions at once, as Kronecker products: A_T (t*t,n*n), G (n*n,9), B_T
    (n*n,n*n). Rows of A and G evaluate a polynomial at the points; its value at infinity is its
    highest coefficient. A row of B.T has the coefficients of the polynomial that is 0 at all points
    except one, as interpolation needs them. The division by its value at that point is in G.
    """

    def __init__(self, *positive):
        points = np.array([0, *(sign * p for p in positive for sign in (1, -1))])
        n = len(points) + 1
        self.size, self.tile, self.count = n, n - 2, n * n
        others = [np.delete(points, i) for i in range(n - 1)]
        values = np.array([np.prod(p - rest) for p, rest in zip(points, others)])
        A = np.vstack([points[:, None] ** np.arange(n - 2), np.eye(n - 2)[-1]])          # (n,t)
        G = np.vstack([points[:, None] ** np.arange(3) / values[:, None], np.eye(3)[-1]])
        B_T = np.zeros((n, n))
        for i, roots in enumerate([*others, points]):
            B_T[i, :len(roots) + 1] = np.poly(roots)[::-1]
        self.A_T, self.G, self.B_T = (np.kron(m, m).astype(np.float32) for m in (A.T, G, B_T))
        # B.T's rows for a and -a differ in the sign of the odd columns: keep even and odd part.
        plus, minus = B_T[1:-1:2].copy(), B_T[2:-1:2].copy()
        B_T[1:-1:2], B_T[2:-1:2] = (plus + minus) / 2, (plus - minus) / 2
        self.parts = B_T.astype(np.float32)

    def transform(self, planes, out):
        """out[i] = sum_j B.T[i,j] planes[j], n each. The rows for a and -a share their two parts.

        Sums of whole planes take fewer operations than a product with B.T.
        """
        spare = scratch("spare", *out[0].shape)
        _sum(self.parts[0], planes, out[0], spare)
        for i in range(1, self.size - 1, 2):
            _sum(self.parts[i], planes, out[i], spare)
            _sum(self.parts[i + 1], planes, spare, out[i + 1])
            np.subtract(out[i], spare, out=out[i + 1])
            out[i] += spare
        _sum(self.parts[-1], planes, out[-1], spare)


def _sum(coefficients, planes, out, spare):
    """out = the sum of coefficient * plane, without the products with 0 and 1."""
    terms = [(c, plane) for c, plane in zip(coefficients, planes) if abs(c) > 1e-6]
    terms.sort(key=lambda term: abs(term[0] - 1) < 1e-6)
    (c, first), *rest = terms
    np.multiply(first, c, out=out)
    for c, plane in rest:
        out += plane if abs(c - 1) < 1e-6 else np.multiply(plane, c, out=spare)


# Of 120 pairs +-a, +-b this one has the smallest error: 8e-7 of the output's standard deviation
# (root mean square, C = 64). The usual 0, +-1, +-2 has 18e-7, and 0, +-1, 1/2, -2 has 12e-7.
LARGE, SMALL = Points(2 / 3, 3 / 2), Points(1)
LARGE_TILES = 64            # with at least so many, use large tiles
LONG = 4096                 # from so many columns of tiles times channels, sums beat a product


def pays(x_shape, weight_shape):
    """Whether this is faster than im2col: enough whole tiles to share the weight's transform."""
    B, H, W, C = x_shape
    return B * H * W >= 512 and min(H, W) >= 8 and min(C, weight_shape[-1]) >= 32


def conv3x3(x, weight, bias, padding=(1, 1), turned=False):
    """ops.conv2d with stride 1, without the cache.

    x (B,H,W,C), weight (3,3,C,O), bias (O,) or None -> y (B,Ho,Wo,O). turned: the weight is
    (3,3,O,C), and stands for turn(weight): so dx is a convolution of dy with the same weight.
    """
    C, O = weight.shape[:1:-1] if turned else weight.shape[2:]
    B, H, W, _ = x.shape
    y = np.empty((B, H + sum(padding) - 2, W + sum(padding) - 2, O), np.float32)
    points = _points(y.shape)
    whole, = _strips(y.shape, points, math.prod(y.shape))
    share = whole.tiles // (2 * free_threads() + 1)
    strips = _strips(y.shape, points,
                     max(STRIP_TILES, min(share, STRIP_NUMBERS // max(C, O))))
    if len(strips) >= 2 * free_threads():
        values = _transform_weight(weight, points, turned)

        def strip(item):
            tiles = scratch("tiles", points.count, item.tiles, C)
            _transform_tiles(x, item, padding, points, tiles)
            products = np.matmul(tiles, values, out=scratch("products", *tiles.shape[:2], O))
            _write(products, bias, item, points, y)
        parallel(strip, strips)
    else:                               # too few strips: threads share the output channels
        tiles = np.empty((points.count, whole.tiles, C), np.float32)
        parallel(lambda item: _transform_tiles(x, item, padding, points, tiles[:, item.place]),
                 _strips(y.shape, points, whole.tiles // (2 * free_threads())))

        step = min(CHUNK, -(-O // free_threads()))

        def chunk(start):
            part = slice(start, start + step)
            own = weight[:, :, part] if turned else weight[..., part]
            values = _transform_weight(own, points, turned)
            products = scratch("products", *tiles.shape[:2], values.shape[-1])
            _write(np.matmul(tiles, values, out=products), None if bias is None else bias[part],
                   whole, points, y[..., part])
        parallel(chunk, range(0, O, step))
    return y


def turn(weight):
    """The weight of the convolution that is the gradient of x: turned by 180 degrees, input and
    output channels exchanged. (K,L,C,O) -> (K,L,O,C), a view."""
    return weight[::-1, ::-1].swapaxes(2, 3)


def dweight3x3(dy, x, padding=(1, 1)):
    """The gradient of the weight: dy (B,Ho,Wo,O), x (B,H,W,C) -> dweight (3,3,C,O), all float32.

    Each transform is linear, so its derivative is its transpose:

        dweight = G.T [ sum_tiles (B.T d B).T @ (A dY A.T) ] G
    """
    C, O = x.shape[-1], dy.shape[-1]
    points = _points(dy.shape)
    products = np.zeros((points.count, C, O), np.float32)
    for strip in _strips(dy.shape, points, STRIP_TILES):
        tiles = scratch("tiles", points.count, strip.tiles, C)
        _transform_tiles(x, strip, padding, points, tiles)
        products += tiles.swapaxes(1, 2) @ _transform_outputs(dy, strip, points)
    return (points.G.T @ products.reshape(points.count, -1)).reshape(3, 3, C, O)


def _points(y_shape):
    tiles = math.prod(y_shape[:3]) / LARGE.tile ** 2
    return LARGE if tiles >= LARGE_TILES else SMALL


class Strip(NamedTuple):
    """Some rows of tiles of one image, or all rows of several."""

    images: slice
    row: int                            # the first row of tiles
    rows: int
    columns: int
    place: slice                        # the place of its tiles among all tiles

    @property
    def tiles(self):
        return self.place.stop - self.place.start


def _strips(y_shape, points, size):
    """The strips of about `size` tiles that cover a map y (B,H,W,O)."""
    B, H, W, _ = y_shape
    rows, columns = math.ceil(H / points.tile), math.ceil(W / points.tile)
    images = min(B, max(1, size // (rows * columns)))
    height = min(rows, max(1, size // columns))
    return [Strip(slice(b, b + n), row, r, columns,
                  slice((b * rows + n * row) * columns, (b * rows + n * (row + r)) * columns))
            for b in range(0, B, images) for n in [min(images, B - b)]
            for row in range(0, rows, height) for r in [min(height, rows - row)]]


def _transform_weight(weight, points, turned=False):
    """Evaluate (3,3,C,O) at the points -> (n*n,C,O). turned: turn(weight) -> (n*n,O,C), a view.

    The columns of G are turned, not the weight, and BLAS reads a matrix in either order: so nothing
    is copied.
    """
    C, O = weight.shape[2:]
    G = np.ascontiguousarray(points.G[:, ::-1]) if turned else points.G
    values = np.empty((points.count, C, O), np.float32)
    step = max(1, WEIGHTS // O)

    def channels(c):
        kernels, part = weight[:, :, c:c + step], values[:, c:c + step]
        if weight.dtype == np.float16:
            kernels = widen(kernels, scratch("kernels", *kernels.shape))
        np.matmul(G, kernels.reshape(9, -1), out=part.reshape(points.count, -1))
    parallel(channels, range(0, C, step))
    return values.swapaxes(1, 2) if turned else values


def _transform_tiles(x, strip, padding, points, tiles):
    """B.T d B of a strip's tiles: x (B,H,W,C) -> tiles (n*n,tiles,C), written."""
    n, t, columns = points.size, points.tile, strip.columns
    phases = _phases(x[strip.images], strip, padding[0], t)
    _, B, _, _, C = phases.shape
    sP, sB, sH, sW, sC = phases.strides
    # Row i of all tiles: (n,t,B,rows,columns+1,C). Column j of a tile is phase j, or j - t of the
    # next tile.
    rows = as_strided(phases, (n, t, B, strip.rows, columns + 1, C), (sH, sP, sB, t * sH, sW, sC))
    tiles = tiles.reshape(n, n, B, strip.rows, columns, C)
    if columns * C >= LONG:                                 # along the rows, then along the columns
        halfway = scratch("halfway", *rows.shape)
        points.transform(rows, halfway)
        points.transform([halfway[:, j % t, :, :, j // t:][:, :, :, :columns] for j in range(n)],
                        tiles.swapaxes(0, 1))
    else:                                                   # both at once
        gathered = scratch("gathered", *tiles.shape)
        for j in range(n):
            gathered[:, j] = rows[:, j % t, :, :, j // t:][:, :, :, :columns]
        np.matmul(points.B_T, gathered.reshape(n * n, -1), out=tiles.reshape(n * n, -1))


def _phases(x, strip, before, t):
    """The input of a strip, columns sorted by phase, their place within a tile.

    x (B,H,W,C) -> (t,B,H',columns+1,C), H' = t * rows + 2. Outside the map there are zeros.
    """
    B, H, W, C = x.shape
    top = t * strip.row - before                            # the first row of the strip in x
    phases = scratch("phases", t, B, t * strip.rows + 2, strip.columns + 1, C)
    inside = x[:, max(top, 0):max(top + phases.shape[2], 0)]
    phases[:] = 0
    for p, phase in enumerate(phases):
        skipped = max(0, math.ceil((before - p) / t))       # columns left of the map
        place = phase[:, max(-top, 0):, skipped:]
        part = inside[:, :, t * skipped + p - before::t][:, :, :place.shape[2]]
        place[:, :part.shape[1], :part.shape[2]] = part
    return phases


def _transform_outputs(dy, strip, points):
    """A dY A.T of a strip's tiles: dy (B,H,W,O) -> (n*n,tiles,O)."""
    dy, tile, rows, columns = dy[strip.images], points.tile, strip.rows, strip.columns
    B, H, W, O = dy.shape
    part = dy[:, tile * strip.row:tile * (strip.row + rows)]
    if part.shape[1] != tile * rows or W != tile * columns:
        padded = np.zeros((B, tile * rows, tile * columns, O), np.float32)
        padded[:, :part.shape[1], :W] = part
        part = padded
    tiles = part.reshape(B, rows, tile, columns, tile, O).transpose(2, 4, 0, 1, 3, 5)
    return (points.A_T.T @ tiles.reshape(tile * tile, -1)).reshape(points.count, -1, O)


def _write(products, bias, strip, points, y):
    """(n*n,tiles,O) -> the strip of y (B,H,W,O): A.T, bias, and a cut at the map's edges."""
    tile, O = points.tile, y.shape[-1]
    y = y[strip.images, tile * strip.row:tile * (strip.row + strip.rows)]
    B, H, W, _ = y.shape
    tiles = scratch("outputs", tile * tile, strip.tiles * O)
    np.matmul(points.A_T, products.reshape(points.count, -1), out=tiles)
    tiles = tiles.reshape(tile, tile, B, strip.rows, strip.columns, O).transpose(2, 3, 0, 4, 1, 5)
    shape = B, tile * strip.rows, tile * strip.columns, O
    whole = y if y.shape == shape else scratch("whole", *shape)
    np.add(tiles, 0 if bias is None else bias, out=whole.reshape(tiles.shape))
    if whole is not y:
        y[:] = whole[:, :H, :W]
