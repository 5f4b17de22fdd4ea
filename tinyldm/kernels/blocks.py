"""Cache-sized blocks of pixels or tokens, over worker threads: what the elementwise kernels share.

NumPy makes one pass over memory an operation; on blocks that stay in a cache that is cheap. Here is
also the memory that kernels use again and again.
"""
from ..backend import free_threads, parallel

BLOCK = 1 << 18             # numbers a block: a MiB in float32. Smaller ones cost more in calls
SERIAL = 1 << 17            # fewer numbers than this are not worth waking a thread for


def over_blocks(function, B, N, C):
    """[function((images, rows)), ...]: slices that cut (B,N,C) into blocks, small images whole."""
    threads = free_threads() if B * N * C >= SERIAL else 1
    rows = max(1, min(BLOCK, -(-B * N * C // threads)) // C)
    images = max(1, rows // max(1, N))
    blocks = [(slice(b, b + images), slice(n, min(n + rows, N)))
              for b in range(0, B, images) for n in range(0, N, rows)]
    if threads == 1:
        return [function(block) for block in blocks]
    shares = [blocks[start::4 * threads] for start in range(4 * threads)]
    done = parallel(lambda share: [function(block) for block in share], filter(None, shares))
    return [result for results in done for result in results]
