"""The error function, which NumPy does not have. The exact GELU in activation.py uses it.

    erf(x) = 2/sqrt(pi) * integral of exp(-s^2) ds from 0 to x

Source: W. J. Cody 1969, "Rational Chebyshev approximations for the error function", Mathematics of
Computation 23(107), pp. 631-637, with the coefficients of his program CALERF (1990).
Each of three ranges of |x| has its own ratio of polynomials. In the outer two, the ratio
approximates erfc = 1 - erf divided by exp(-x^2).
"""

from ..backend import get_xp, widen

# Highest power first. Near 0: erf(x) = x * ratio(x^2).
SMALL = ((1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
          3.77485237685302021e2, 3.20937758913846947e3),
         (1.0, 2.36012909523441209e1, 2.44024637934444173e2,
          1.28261652607737228e3, 2.84423683343917062e3))
# 0.46875 to 4: erfc(x) = exp(-x^2) * ratio(x).
MIDDLE = ((2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0,
           6.61191906371416295e1, 2.98635138197400131e2, 8.81952221241769090e2,
           1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3),
          (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
           1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3,
           3.43936767414372164e3, 1.23033935480374942e3))
# Above 4: erfc(x) = exp(-x^2) / x * (1/sqrt(pi) - ratio(1/x^2) / x^2).
LARGE = ((1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1,
          1.25781726111229246e-1, 1.60837851487422766e-2, 6.58749161529837803e-4),
         (1.0, 2.56852019228982242e0, 1.87295284992346725e0,
          5.27905102951428412e-1, 6.05183413124413191e-2, 2.33520497626869185e-3))
ONE_OVER_SQRT_PI = 5.6418958354775628695e-1
ONE_FROM = 6.0                          # erfc(6) = 2e-17: from here erf is 1 in float64


def erf(x):
    """The error function of each element: x (...) -> (...), within 1e-15 (2e-7 in float32)."""
    xp = get_xp(x)
    wide = widen(x)                                             # float16 would overflow
    size = xp.minimum(abs(wide), ONE_FROM)
    # Compute all three ranges for every x, clipped to the range, then choose.
    small = xp.minimum(size, 0.46875)
    small = small * _ratio(SMALL, small * small)
    middle = xp.clip(size, 0.46875, 4.0)
    middle = 1 - xp.exp(-middle * middle) * _ratio(MIDDLE, middle)
    large = xp.maximum(size, 4.0)
    inverse = 1 / (large * large)
    tail = (ONE_OVER_SQRT_PI - inverse * _ratio(LARGE, inverse)) / large
    large = 1 - xp.exp(-large * large) * tail
    y = xp.where(size <= 0.46875, small, xp.where(size <= 4, middle, large))
    return xp.copysign(y, wide).astype(x.dtype)


def _ratio(coefficients, x):
    """The quotient of two polynomials, each by Horner's rule."""
    numerator, denominator = ((c[0] * x + c[1]) for c in coefficients)
    for n, d in zip(coefficients[0][2:], coefficients[1][2:], strict=True):
        numerator = numerator * x + n
        denominator = denominator * x + d
    return numerator / denominator
