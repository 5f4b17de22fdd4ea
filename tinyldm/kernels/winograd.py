"""Winograd's convolution: the fast twin of ops.conv2d for 3x3 kernels with stride 1.

A 4x4 tile of the output depends on a 6x6 tile of the input. By definition this takes 16 * 9 = 144
products per tile and pair of channels; Winograd's algorithm takes 36:

    Y = A.T [ (G w G.T) * (B.T d B) ] A          d 6x6 input, w 3x3 weight, Y 4x4 output

To multiply two polynomials, one can evaluate both at a few points, multiply the values, and
interpolate (Toom & Cook). For a fixed w that is a linear map, and a convolution as in deep learning
is its transpose. So w is evaluated at 6 points (G), the input goes through the transpose of
interpolation (B.T), and the products go through the transpose of evaluation (A.T). In two
dimensions this is done along the rows and along the columns.

The transforms are matrix products with the map as it lies in memory. One matrix transforms the
tiles side by side in eight pixels of a row or column; most of its numbers are zeros, but BLAS takes
a few large products faster than many small ones, and no tile is copied first. The products in the
middle are 36 of (tiles,C) @ (C,O). These need many tiles: small maps are cut into tiles of 2x2,
with 4 points.
Source: Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308,
section 4. The choice of points: Barabasz et al. 2020, "Error Analysis and Improving the Accuracy of
Winograd Convolution for Deep Neural Networks", arXiv:1803.10986.
"""
import math
from typing import NamedTuple

import numpy as np

from ..backend import free_threads, parallel, scratch
from .half import widen

STRIP_TILES = 128           # tiles at a time: their numbers stay in the cache
STRIP_NUMBERS = 1 << 15     # or tiles times channels: with few channels, NumPy's calls on 128 tiles
                            # are so short that threads wait for the interpreter's lock
CHUNK = 160                 # at most so many output channels at a time, if tiles are few
WIDTH = 8                   # pixels of a row or column that one product transforms
WEIGHTS = 1 << 11           # kernels transformed at a time: their 36 numbers stay in the cache


class Points:
    """n points: 0, the given numbers, their negatives, and infinity, for tiles of t = n - 2 by t.

    Rows of A and G evaluate a polynomial at the points; its value at infinity is its highest
    coefficient. A row of B.T has the coefficients of the polynomial that is 0 at all points except
    one, as interpolation needs them. The division by its value at that point is in G.

    A_T (t,n), and of `side` neighbouring tiles of a row or column at once: outputs (side*t,side*n)
    applies A.T to each, inputs (side*n,side*t+2) applies B.T to each. G (n*n,9) is for both
    dimensions at once, a Kronecker product.
    """

    def __init__(self, *positive):
        points = np.array([0, *(sign * p for p in positive for sign in (1, -1))])
        n = len(points) + 1
        t, side = n - 2, max(1, WIDTH // (n - 2))
        self.size, self.tile, self.count = n, t, n * n
        others = [np.delete(points, i) for i in range(n - 1)]
        values = np.array([np.prod(p - rest) for p, rest in zip(points, others)])
        A = np.vstack([points[:, None] ** np.arange(t), np.eye(t)[-1]])                  # (n,t)
        G = np.vstack([points[:, None] ** np.arange(3) / values[:, None], np.eye(3)[-1]])
        B_T = np.zeros((n, n))
        for i, roots in enumerate([*others, points]):
            B_T[i, :len(roots) + 1] = np.poly(roots)[::-1]
        inputs = np.zeros((side * n, side * t + 2))
        for i in range(side):
            inputs[n * i:n * (i + 1), t * i:t * i + n] = B_T
        self.A_T, self.G, self.outputs, self.inputs = (
            m.astype(np.float32) for m in (A.T, np.kron(G, G), np.kron(np.eye(side), A.T), inputs))


# Of 120 pairs +-a, +-b this one has the smallest error: 8e-7 of the output's standard deviation
# (root mean square, C = 64). The usual 0, +-1, +-2 has 18e-7, and 0, +-1, 1/2, -2 has 12e-7.
LARGE, SMALL = Points(2 / 3, 3 / 2), Points(1)
PIXELS = 256                # Winograd pays from so many on, large tiles from twice as many;
SMALL_WEIGHT = 1 << 16      # with more pairs of channels, from four times as many


def pays(x_shape):
    """Whether this is faster than im2col: enough whole tiles to share the weight's transform."""
    B, H, W, C = x_shape
    return C >= 16 and min(H, W) >= 4 and B * H * W >= PIXELS


def dweight_pays(x_shape, O):
    """For a large weight, its sums over few pixels take longer than im2col."""
    B, H, W, C = x_shape
    return pays(x_shape) and (C * O <= SMALL_WEIGHT or B * H * W >= 2 * PIXELS)


def conv3x3(x, weight, bias, padding=(1, 1), turned=False):
    """ops.conv2d with stride 1, without the cache.

    x (B,H,W,C), weight (3,3,C,O), bias (O,) or None -> y (B,Ho,Wo,O). turned: the weight is
    (3,3,O,C), and stands for turn(weight): so dx is a convolution of dy with the same weight.
    """
    C, O = weight.shape[:1:-1] if turned else weight.shape[2:]
    B, H, W, _ = x.shape
    y = np.empty((B, H + sum(padding) - 2, W + sum(padding) - 2, O), np.float32)
    points = _points(y.shape, C)
    whole, = _strips(y.shape, points, math.prod(y.shape))
    share = whole.tiles // (2 * free_threads() + 1)
    strips = _strips(y.shape, points,
                     max(STRIP_TILES, min(share, STRIP_NUMBERS // max(C, O))))
    if len(strips) >= 2 * free_threads():
        values = _transform_weight(weight, points, turned)

        def strip(item):
            tiles = scratch("tiles", points.size, item.tiles, points.size, C)
            _transform_tiles(x, item, padding, points, tiles)
            _write(_products(tiles, values), bias, item, points, y)
        parallel(strip, strips)
    else:                               # too few strips: threads share the output channels
        tiles = np.empty((points.size, whole.tiles, points.size, C), np.float32)
        parallel(lambda item: _transform_tiles(x, item, padding, points, tiles[:, item.place]),
                 _strips(y.shape, points, whole.tiles // (2 * free_threads())))

        step = min(CHUNK, -(-O // free_threads()))

        def chunk(start):
            part = slice(start, start + step)
            own = weight[:, :, part] if turned else weight[..., part]
            values = _transform_weight(own, points, turned)
            _write(_products(tiles, values), None if bias is None else bias[part],
                   whole, points, y[..., part])
        parallel(chunk, range(0, O, step))
    return y


def _products(tiles, values):
    """tiles (n,tiles,n,C), values (n*n,C,O) -> their products (n,tiles,n,O), in scratch memory."""
    n, count, _, C = tiles.shape
    products = scratch("products", n, count, n, values.shape[-1])
    np.matmul(tiles.swapaxes(1, 2), values.reshape(n, n, C, -1), out=products.swapaxes(1, 2))
    return products


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
    points = _points(dy.shape, C)
    n = points.size
    total = np.zeros((n, n, C, O), np.float32)
    for strip in _strips(dy.shape, points, STRIP_TILES):
        tiles = scratch("tiles", n, strip.tiles, n, C)
        _transform_tiles(x, strip, padding, points, tiles)
        outputs = scratch("outputs", n, strip.tiles, n, O)
        _transform_outputs(dy, strip, points, outputs)
        total += np.matmul(tiles.transpose(0, 2, 3, 1), outputs.swapaxes(1, 2),
                           out=scratch("products", *total.shape))
    return (points.G.T @ total.reshape(points.count, -1)).reshape(3, 3, C, O)


def _points(y_shape, C):
    B, H, W, O = y_shape
    return LARGE if B * H * W >= (2 if C * O <= SMALL_WEIGHT else 4) * PIXELS else SMALL


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
    """B.T d B of a strip's tiles: x (B,H,W,C) -> tiles (n,tiles,n,C), written."""
    _transform(points.inputs, x, strip, -padding[0], points, tiles)


def _transform_outputs(dy, strip, points, tiles):
    """A dY A.T of a strip's tiles: dy (B,H,W,O) -> tiles (n,tiles,n,O), written."""
    _transform(points.outputs.T, dy, strip, 0, points, tiles)


def _transform(matrix, x, strip, first, points, tiles):
    """Both axes of the tiles whose upper left one begins at pixel (first,first) of x (B,H,W,C)."""
    n, t = points.size, points.tile
    side = len(matrix) // n
    x = x[strip.images]
    B, H, W, C = x.shape
    rows = scratch("rows", B, strip.rows * n, W * C)
    _multiply(matrix, x.reshape(B, H, W * C), first + t * strip.row, side * t, rows)
    _multiply(matrix, rows.reshape(B, strip.rows, n, W, C).transpose(2, 0, 1, 3, 4), first,
              side * t, tiles.reshape(n, B, strip.rows, strip.columns * n, C))


def _multiply(matrix, x, first, step, out):
    """out (...,R,N) = matrix @ x (...,Q,N), a stretch of rows after the other.

    A stretch of out has as many rows as the matrix. The first one comes from row `first` of x, each
    other one from `step` rows further on. Outside x there are zeros, so these columns of the matrix
    are left out: no map must be padded, and none cut.
    """
    (height, width), Q = matrix.shape, x.shape[-2]
    for i in range(-(-out.shape[-2] // height)):
        start, part = first + i * step, out[..., i * height:(i + 1) * height, :]
        low, high = (min(max(row, 0), Q) for row in (start, start + width))
        np.matmul(matrix[:part.shape[-2], low - start:high - start], x[..., low:high, :], out=part)


def _write(products, bias, strip, points, y):
    """A.T and bias: products (n,tiles,n,O) -> the strip of y (B,H,W,O)."""
    n, t = points.size, points.tile
    y = y[strip.images, t * strip.row:t * (strip.row + strip.rows)]
    B, H, W, O = y.shape
    columns = strip.columns * n
    rows = scratch("rows", B, strip.rows * t, columns, O)
    np.matmul(points.A_T, products.reshape(n, B, strip.rows, columns * O).transpose(1, 2, 0, 3),
              out=rows.reshape(B, strip.rows, t, columns * O))
    _multiply(points.outputs, rows[:, :H], 0, points.outputs.shape[1], y)
    if bias is not None:
        y += bias
