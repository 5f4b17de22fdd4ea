"""Convolution, nearest upsampling, averaging: the ops that use neighbouring pixels."""
from ..backend import add_up, fast_twin, get_xp, wide, widen
from ..kernels import conv, cuda
from ..kernels.im2col import sides


def _pad(x, padding):
    """Add zeros around the map."""
    rows, columns = sides(padding)
    return get_xp(x).pad(x, ((0, 0), rows, columns, (0, 0))) if any(rows + columns) else x


def _taps(x_padded, kernel, stride, Ho, Wo):
    """For each position in the kernel: i, j, and the pixels under it, a view (B,Ho,Wo,C)."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            yield i, j, x_padded[:, i:i + stride * Ho:stride, j:j + stride * Wo:stride]


@fast_twin(cpu=conv.conv2d, gpu=cuda.conv2d)
def conv2d(x, weight, bias=None, stride=1, padding=(0, 0)):
    """Slide a K x L window over the map. Each position is the same matrix product.

        y[b,h,w] = bias + sum_ij  x[b, stride*h + i - before, stride*w + j - before] @ weight[i,j]

    x (B,H,W,C), weight (K,L,C,O), bias (O,) or None -> y (B,Ho,Wo,O),
    Ho = (H + before + after - K) // stride + 1, Wo likewise.
    padding = (before, after): rows and columns of zeros. (1, 1) keeps the size with a 3x3 kernel;
    (0, 1), right and bottom only, is the VAE encoder's. A kernel that is not square, K != L, may
    want a pair for each axis: ((top, bottom), (left, right)). The kernel is not flipped: deep
    learning calls a correlation a convolution.
    Source: Dumoulin & Visin 2016, "A guide to convolution arithmetic", arXiv:1603.07285.
    """
    B, *size, C = x.shape
    *kernel, weight_C, O = weight.shape
    assert C == weight_C, f"x has {C} channels, weight expects {weight_C}"
    Ho, Wo = ((n + sum(zeros) - k) // stride + 1
              for n, k, zeros in zip(size, kernel, sides(padding)))
    y = get_xp(x).zeros((B, Ho, Wo, O), wide(x.dtype))                  # the sum of K*L products
    for i, j, x_tap in _taps(_pad(x, padding), kernel, stride, Ho, Wo):
        y += (x_tap.reshape(-1, C) @ weight[i, j]).reshape(y.shape)     # (R,C) @ (C,O), R = B*Ho*Wo
    if bias is not None:
        y += bias
    return y.astype(x.dtype, copy=False), (x, weight, stride, padding)


@fast_twin(cpu=conv.conv2d_backward, gpu=cuda.conv2d_backward)
def conv2d_backward(dy, cache):
    """dy (B,Ho,Wo,O) -> dx (B,H,W,C), dweight (K,L,C,O), dbias (O,).

    Forward added y += x_tap @ weight[i,j] for each position (tap) of the kernel. So each tap gives

        dweight[i,j] = x_tap.T @ dy,        dx_tap += dy @ weight[i,j].T

    and the gradient of a pixel is the sum over the K*L taps that read it.
    """
    x, weight, stride, padding = cache
    *kernel, C, O = weight.shape
    rows, xp = dy.reshape(-1, O), get_xp(x)
    dx = conv2d_input_backward(dy, weight, x.shape, stride, padding)
    dweight = xp.empty_like(weight, xp.promote_types(x.dtype, weight.dtype))
    for i, j, x_tap in _taps(_pad(x, padding), kernel, stride, *dy.shape[1:3]):
        dweight[i, j] = x_tap.reshape(-1, C).T @ rows                   # (C,R) @ (R,O)
    return dx.astype(x.dtype, copy=False), dweight, add_up(rows, axis=0)


@fast_twin(cpu=conv.conv2d_input_backward, gpu=cuda.conv2d_input_backward)
def conv2d_input_backward(dy, weight, shape, stride=1, padding=(0, 0)):
    """dy (B,Ho,Wo,O), weight (K,L,C,O), shape (B,H,W,C) of x -> dx (B,H,W,C) alone.

    It does not depend on x.
    """
    (B, H, W, C), (rows, columns) = shape, sides(padding)
    dx = get_xp(dy).zeros((B, H + sum(rows), W + sum(columns), C), wide(dy.dtype))
    for i, j, dx_tap in _taps(dx, weight.shape[:2], stride, *dy.shape[1:3]):        # views into dx
        dx_tap += (dy.reshape(-1, dy.shape[-1]) @ weight[i, j].T).reshape(dx_tap.shape)
    dx = dx[:, rows[0]:rows[0] + H, columns[0]:columns[0] + W]
    return dx.astype(dy.dtype, copy=False)


@fast_twin(cpu=conv.upsample_nearest)
def upsample_nearest(x, size=None):
    """Repeat each pixel twice in both directions.

        y[b,h,w] = x[b, h//2, w//2]

    x (B,H,W,C) -> y (B,2H,2W,C). size = (2H or 2H-1, 2W or 2W-1) cuts y, for maps whose size was
    odd before it was halved.
    """
    H, W = size or (2 * x.shape[1], 2 * x.shape[2])
    assert (H + 1) // 2 == x.shape[1] and (W + 1) // 2 == x.shape[2], f"{x.shape} to {H, W}"
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :H, :W], (H, W)


def upsample_nearest_backward(dy, cache):
    """dy (B,2H,2W,C) -> dx (B,H,W,C), the sum of the gradients of the four copies."""
    H, W = cache
    if H % 2 or W % 2:                                          # what was cut has gradient 0
        dy = get_xp(dy).pad(dy, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)))
    B, H, W, C = dy.shape
    return add_up(dy.reshape(B, H // 2, 2, W // 2, 2, C), axis=(2, 4))


def upsample_bilinear(x, size):
    """Enlarge a map by straight lines between its pixels; the corners stay where they are.

        y = R x C^T,   R[i,j] = max(0, 1 - abs(i (H - 1) / (Ho - 1) - j)), and C the same of W

    x (B,H,W,C), size = (Ho, Wo) -> y (B,Ho,Wo,C). Each new pixel is a mean of the two nearest ones,
    in both directions ("align_corners" elsewhere).
    """
    assert size[0] >= x.shape[1] and size[1] >= x.shape[2], f"{x.shape} is larger than {size}"
    rows, columns = _lines(x, size[0], x.shape[1]), _lines(x, size[1], x.shape[2])
    return _along(_along(x, 1, rows), 2, columns), (rows, columns)


def upsample_bilinear_backward(dy, cache):
    """dy (B,Ho,Wo,C) -> dx (B,H,W,C) = R^T dy C: each pixel gets from the new ones it is in."""
    rows, columns = cache
    return _along(_along(dy, 2, columns.T), 1, rows.T)


def resize_bilinear(x, size):
    """Resize a map by weighted means of neighbouring pixels, with no jagged edges.

        y = R x C^T,   R[i,j] ~ max(0, 1 - abs(j + 1/2 - (i + 1/2) H / Ho) / max(1, H / Ho))

    and C the same of W; each row of R and of C sums to 1. x (B,H,W,C), size = (Ho, Wo) ->
    y (B,Ho,Wo,C). The mean is over the pixels that a new one covers, or of the two nearest ones
    ("antialias" elsewhere). Unlike upsample_bilinear, pixels are squares: the edges stay in place.
    """
    rows, columns = _means(x, size[0], x.shape[1]), _means(x, size[1], x.shape[2])
    return _along(_along(x, 1, rows), 2, columns), (rows, columns)


def resize_bilinear_backward(dy, cache):
    """dy (B,Ho,Wo,C) -> dx (B,H,W,C) = R^T dy C, as in upsample_bilinear_backward."""
    return upsample_bilinear_backward(dy, cache)


def _means(like, new, old):
    """(new,old): the weights of the old pixels in each new one."""
    xp, scale = get_xp(like), old / new
    middles = (xp.arange(new) + 0.5) * scale
    distance = abs(xp.arange(old) + 0.5 - middles[:, None])
    weights = (1 - distance / max(1, scale)).clip(0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(like.dtype)


def _lines(like, new, old):
    """(new,old): the weights of the old pixels in each new one."""
    xp = get_xp(like)
    places = xp.arange(new) * ((old - 1) / max(new - 1, 1))
    return (1 - abs(places[:, None] - xp.arange(old))).clip(0, None).astype(like.dtype)


def _along(x, axis, matrix):
    """Multiply x by a matrix (new,old) along an axis, as one product of matrices."""
    x = x.swapaxes(axis, -1)
    y = x.reshape(-1, x.shape[-1]) @ matrix.T
    return y.reshape(*x.shape[:-1], -1).swapaxes(axis, -1)


def downsample_average(x):
    """Halve the map: each pixel is the mean of 2x2 pixels. x (B,2H,2W,C) -> y (B,H,W,C)."""
    B, H, W, C = x.shape
    assert H % 2 == W % 2 == 0, f"height and width must be even, not {H} and {W}"
    y = widen(x[:, ::2, ::2]) + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]
    return (y / 4).astype(x.dtype, copy=False), None


def downsample_average_backward(dy, cache):
    """dy (B,H,W,C) -> dx (B,2H,2W,C): each of the four pixels gets a quarter."""
    return upsample_nearest(dy / 4)[0]
