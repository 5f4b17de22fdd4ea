"""Cache-sized blocks of pixels or tokens, over worker threads: what the elementwise kernels share.

Each operation of NumPy is one pass over memory. On blocks that stay in a core's cache, that is
cheap.
"""
from ..backend import free_threads, parallel

# Numbers per block: 512 KiB in float32, so that three arrays of a block fit into a core's level 2
# cache of 2 MiB. Smaller blocks cost more in calls.
BLOCK = 1 << 17
SERIAL = 1 << 17            # for fewer numbers than this, waking a thread costs more than it saves


def over_blocks(function, B, N, C):
    """[function((images, rows)), ...] of slices that cut (B,N,C) into blocks of nearly equal size.

    A block is a part of one image, or several whole images where they are small.
    """
    threads = free_threads() if B * N * C >= SERIAL else 1
    rows = max(1, min(BLOCK, -(-B * N * C // threads)) // C)
    images = max(1, rows // max(1, N))
    rows = -(-N // max(1, -(-N // rows))) or 1
    blocks = [(slice(b, b + images), slice(n, min(n + rows, N)))
              for b in range(0, B, images) for n in range(0, N, rows)]
    if threads == 1:
        return [function(block) for block in blocks]
    shares = [blocks[start::4 * threads] for start in range(4 * threads)]
    done = parallel(lambda share: [function(block) for block in share], filter(None, shares))
    return [result for results in done for result in results]
