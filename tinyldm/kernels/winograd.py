"""Winograd's convolution: the fast twin of ops.conv2d for 3x3 kernels, stride 1, from 32 tiles up.

A 4x4 tile of the output sees a 6x6 tile of the input. Seen as polynomials, a convolution is a
product, and a product of polynomials is cheap where both are known by their values at a few points:
take the tile's values and the kernel's at 6 x 6 points, multiply point by point, interpolate. That
is 36 products a tile and channel pair, where the definition takes 16 * 9 = 144:

    Y = A.T [ (G w G.T) * (B.T d B) ] A          d 6x6 input, w 3x3 weight, Y 4x4 output

With a tile laid out as a column of 36 numbers each of the three transforms is one matrix product
(with the Kronecker product of the matrix with itself), and the middle is 36 of (tiles,C) @ (C,O).
Source: Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308,
section 4. The choice of points: Barabasz et al. 2020, "Error Analysis and Improving the Accuracy of
Winograd Convolution for Deep Neural Networks", arXiv:1803.10986.

Measured on two cores at SD 1.5's shapes, of PyTorch's time: 0.5 to 0.7 on the UNet's 64x64 maps,
0.6 to 0.85 at 32x32, 0.4 to 0.75 in the VAE, where im2col takes 1.25 to 2. 16x16 is a draw.
"""
import math

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..backend import num_threads, parallel

TILE = 4                    # outputs a tile, in each direction; it sees TILE + 2 inputs
# The sixth point is infinity. Of 120 pairs +-a, +-b these gave the smallest error: 8e-7 of the
# output's deviation (root mean square, C = 64); the usual 0, +-1, +-2 gave 18e-7, and
# 0, +-1, 1/2, -2 gave 12e-7.
POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
STRIP_TILES = 128           # tiles at a time: their 36 * (C + O) numbers stay near the core
BLOCK_OUTPUTS = 64          # where tiles are few: output channels at a time, all tiles


def _matrices(points):
    """The Kronecker squares of A.T (16,36), G (36,9) and B.T (36,36).

    Rows of A and G take a polynomial's values at the points, the row of infinity its highest
    coefficient. B holds the polynomials that vanish at all points but one; dividing by their value
    there is left to G.
    """
    points = np.array(points)
    n = len(points) + 1
    others = [np.delete(points, i) for i in range(n - 1)]
    values = np.array([np.prod(p - rest) for p, rest in zip(points, others)])
    A = np.vstack([points[:, None] ** np.arange(TILE), np.eye(TILE)[-1]])                # (6,4)
    G = np.vstack([points[:, None] ** np.arange(3) / values[:, None], np.eye(3)[-1]])    # (6,3)
    B = np.zeros((n, n))                                                                 # rows: B.T
    for i, roots in enumerate([*others, points]):
        B[i, :len(roots) + 1] = np.poly(roots)[::-1]
    return [np.kron(matrix, matrix).astype(np.float32) for matrix in (A.T, G, B)]


A_T, G, B_T = _matrices(POINTS)


def pays(x_shape, weight_shape):
    """Whether this is faster than im2col: 32 tiles or more share the weight's transform."""
    B, H, W, C = x_shape
    return B * H * W >= 32 * TILE * TILE and min(C, weight_shape[-1]) >= 32


def conv3x3(x, weight, bias, padding=(1, 1)):
    """As ops.conv2d at stride 1, float32.

    x (B,H,W,C), weight (3,3,C,O), bias (O,) or None -> y (B,Ho,Wo,O).
    """
    C, O = weight.shape[2:]
    B, H, W, _ = x.shape
    Ho, Wo = H + sum(padding) - 2, W + sum(padding) - 2
    rows, columns = math.ceil(Ho / TILE), math.ceil(Wo / TILE)           # of tiles
    y = np.empty((B, Ho, Wo, O), np.float32)
    strips = _strips(B, rows, columns)
    if len(strips) >= 2 * num_threads():
        weight = _transform_weight(weight)

        def strip(item):
            images, row, count = item
            tiles = _transform_tiles(x[images], row, count, columns, padding)
            _write(tiles @ weight, bias, y[images, TILE * row:TILE * (row + count)])
        parallel(strip, strips)
    else:                               # too few for the threads: share out the output channels
        tiles = _transform_tiles(x, 0, rows, columns, padding)

        def block(start):
            outputs = slice(start, start + BLOCK_OUTPUTS)
            _write(tiles @ (G @ weight[..., outputs].reshape(9, -1)).reshape(36, C, -1),
                   None if bias is None else bias[outputs], y[..., outputs])
        parallel(block, range(0, O, BLOCK_OUTPUTS))
    return y


def dweight3x3(dy, x, padding=(1, 1)):
    """The weight's gradient: dy (B,Ho,Wo,O), x (B,H,W,C) -> dweight (3,3,C,O), all float32.

    Each transform is linear, so its derivative is its transpose, and the product's is two products:

        dweight = G.T [ sum_tiles (B.T d B).T @ (A dY A.T) ] G
    """
    C, O = x.shape[-1], dy.shape[-1]
    B, Ho, Wo, _ = dy.shape
    rows, columns = math.ceil(Ho / TILE), math.ceil(Wo / TILE)
    products = np.zeros((36, C, O), np.float32)
    for images, row, count in _strips(B, rows, columns):
        tiles = _transform_tiles(x[images], row, count, columns, padding)       # (36,tiles,C)
        dtiles = _transform_outputs(dy[images], row, count, columns)            # (36,tiles,O)
        products += tiles.swapaxes(1, 2) @ dtiles
    return (G.T @ products.reshape(36, -1)).reshape(3, 3, C, O)


def _strips(B, rows, columns):
    """(images, first row of tiles, how many rows) of every strip of about STRIP_TILES tiles."""
    strip_rows = min(rows, max(1, STRIP_TILES // columns))
    images = max(1, STRIP_TILES // (rows * columns))        # small maps: several a strip
    return [(slice(b, b + images), row, min(strip_rows, rows - row))
            for b in range(0, B, images) for row in range(0, rows, strip_rows)]


def _transform_outputs(dy, row, rows, columns):
    """A dY A.T of the tiles in `rows` rows from `row` on: (B,H,W,O) -> (36, B*rows*columns, O)."""
    B, H, W, O = dy.shape
    part = dy[:, TILE * row:TILE * (row + rows)]
    if part.shape[1] != TILE * rows or W != TILE * columns:
        padded = np.zeros((B, TILE * rows, TILE * columns, O), np.float32)
        padded[:, :part.shape[1], :W] = part
        part = padded
    tiles = part.reshape(B, rows, TILE, columns, TILE, O).transpose(2, 4, 0, 1, 3, 5)
    return (A_T.T @ tiles.reshape(TILE * TILE, -1)).reshape(36, -1, O)


def _transform_weight(weight):
    """(3,3,C,O) -> (36,C,O), in slices of C over threads: it is four times the weight."""
    C, O = weight.shape[2:]
    values = np.empty((36, C, O), np.float32)

    def part(start):
        channels = slice(start, start + 32)
        values[:, channels] = (G @ weight[:, :, channels].reshape(9, -1)).reshape(36, -1, O)
    parallel(part, range(0, C, 32))
    return values


def _transform_tiles(x, row, rows, columns, padding):
    """B.T d B of the tiles in `rows` rows from `row` on: x (B,H,W,C) -> (36, B*rows*columns, C)."""
    B, H, W, C = x.shape
    padded = np.zeros((B, TILE * rows + 2, TILE * columns + 2, C), np.float32)
    top = TILE * row - padding[0]                           # the strip's first row in x
    rows_in = slice(max(top, 0), top + TILE * rows + 2)
    part = x[:, rows_in, :TILE * columns + 2 - padding[0]]
    padded[:, rows_in.start - top:, padding[0]:][:, :part.shape[1], :part.shape[2]] = part
    sB, sH, sW, sC = padded.strides
    tiles = as_strided(padded, (6, 6, B, rows, columns, C), (sH, sW, sB, TILE * sH, TILE * sW, sC))
    return (B_T @ tiles.reshape(36, -1)).reshape(36, -1, C)


def _write(products, bias, y):
    """(36,tiles,O) -> y (B,H,W,O): interpolate, add the bias, drop what sticks out of the map."""
    B, H, W, O = y.shape
    tiles = (A_T @ products.reshape(36, -1)).reshape(TILE, TILE, B, -1, math.ceil(W / TILE), O)
    for i in range(TILE):
        for j in range(TILE):
            pixels = y[:, i::TILE, j::TILE]
            kept = tiles[i, j][:, :pixels.shape[1], :pixels.shape[2]]
            np.add(kept, 0 if bias is None else bias, out=pixels)
