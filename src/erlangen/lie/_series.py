"""Scalar functions of logarithms and exponentials, smooth where their textbook formula is 0/0.

Each is a polynomial near the singularity and the formula elsewhere. ``torch.where`` differentiates both branches, so
each branch is given a harmless argument where the other is used: no NaN, in the value or in any derivative. The switch
is far out (an argument of about 1, not sqrt(eps)), because in the formula the digits are lost long before the
division fails: (θ − sin θ)/θ³ has none left in float32 at θ = 1e-4, and its derivatives lose more. The polynomials are
long enough for float64 at the switch, so there is no seam.

Even functions of an angle θ take x = θ²: no square root of zero is differentiated.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def _bernoulli_numbers(count: int) -> list[Fraction]:
    """B_0 ... B_count, with B_1 = −1/2."""
    numbers: list[Fraction] = []
    for n in range(count + 1):
        rest = sum((math.comb(n + 1, k) * numbers[k] for k in range(n)), Fraction(0))
        numbers.append(Fraction(1) if n == 0 else -rest / (n + 1))
    return numbers


_TERMS = 12
# B_2n / (2n)!: the coefficients of (z/2) coth(z/2) in z², of radius 4π²
_COTH = [float(b / math.factorial(2 * n)) for n, b in enumerate(_bernoulli_numbers(2 * _TERMS)[::2])]
_COT_DEFECT = [abs(c) for c in _COTH[1:]]
_SIN = [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(10)]
_SIN_DEFECT = [(-1.0) ** n / math.factorial(2 * n + 3) for n in range(10)]
_ATAN = [(-1.0) ** n / (2 * n + 1) for n in range(10)]
_EXP = [1 / math.factorial(n + 1) for n in range(19)]


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result


def _branches(x: Tensor, near: Tensor, centre: float = 0.0, away: float = 1.0) -> tuple[Tensor, Tensor]:
    """The argument of the polynomial and that of the formula, each harmless where the other is used."""
    return torch.where(near, x, centre), torch.where(near, away, x)


def sin_ratio(x: Tensor) -> Tensor:
    """sin θ / θ, of x = θ² > −1 (sinh t / t of x = −t²)."""
    near = x < 1
    x_near, x_far = _branches(x, near)
    theta = x_far.sqrt()
    return torch.where(near, _polynomial(_SIN, x_near), theta.sin() / theta)


def cos_ratio(x: Tensor) -> Tensor:
    """(1 − cos θ)/θ², of x = θ² > −1."""
    return 0.5 * sin_ratio(x / 4).square()


def sin_defect(x: Tensor) -> Tensor:
    """(θ − sin θ)/θ³, of x = θ² >= 0."""
    near = x < 1
    x_near, x_far = _branches(x, near)
    theta = x_far.sqrt()
    return torch.where(near, _polynomial(_SIN_DEFECT, x_near), (theta - theta.sin()) / (theta * x_far))


def cot_defect(x: Tensor) -> Tensor:
    """(1 − (θ/2) cot(θ/2))/θ² = 1/12 + θ²/720 + ..., of x = θ² in [0, 4π²)."""
    near = x < 1
    x_near, x_far = _branches(x, near)
    half = x_far.sqrt() / 2
    return torch.where(near, _polynomial(_COT_DEFECT, x_near), (1 - half * half.cos() / half.sin()) / x_far)


def coth_half(x: Tensor) -> Tensor:
    """(z/2) coth(z/2), of x = z² >= 0."""
    near = x < 1
    x_near, x_far = _branches(x, near)
    half = x_far.sqrt() / 2
    return torch.where(near, _polynomial(_COTH, x_near), half / half.tanh())


def exp_ratio(z: Tensor) -> Tensor:
    """(e^z − 1)/z."""
    near = z.abs() < 1
    z_near, z_far = _branches(z, near)
    return torch.where(near, _polynomial(_EXP, z_near), z_far.expm1() / z_far)


def todd(z: Tensor) -> Tensor:
    """z/(e^z − 1)."""
    near = z.abs() < 1
    z_near, z_far = _branches(z, near)
    return torch.where(near, _polynomial(_COTH, z_near.square()) - z_near / 2, z_far / z_far.expm1())


def atan_ratio(x: Tensor) -> Tensor:
    """atan(t)/t, of x = t² > −0.02 (atanh(t)/t of x = −t²)."""
    near = x < 0.02
    x_near, x_far = _branches(x, near)
    t = x_far.sqrt()
    return torch.where(near, _polynomial(_ATAN, x_near), t.atan() / t)


def asinh_ratio(x: Tensor) -> Tensor:
    """asinh(t)/t, of x = t² >= 0, by asinh t = 2 atanh(t/(1 + sqrt(1 + t²))) where t is small."""
    near = x < 0.08
    x_near, x_far = _branches(x, near)
    denominator = 1 + (1 + x_near).sqrt()
    t = x_far.sqrt()
    return torch.where(near, 2 * _polynomial(_ATAN, -x_near / denominator.square()) / denominator, t.asinh() / t)


def log_from_one(value: Tensor, excess: Tensor) -> Tensor:
    """ln(value), given also ``excess`` = value − 1 computed without cancellation."""
    near = excess.abs() < 0.5
    return torch.where(near, torch.where(near, excess, 0.0).log1p(), torch.where(near, 1.0, value).log())


# --- functions of ζ = a + iθ, that is of the matrix a I + θ J ---------------------------------------------------------
# F(ζ) is returned by its parts: real part, imaginary part over θ, and (F(a) − real part)/θ², the last of which acts
# along the rotation's axis. All three are smooth functions of a and x = θ². Near zero they follow from Horner's scheme
# for F with the three carried along: with ζ = a + iθ,
#     real <- a real − x imag,   imag <- a imag + real,   axis <- a axis + imag     (multiplication by ζ)


def exp_ratio_complex(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(e^ζ − 1)/ζ for ζ = a + iθ, of a and x = θ² >= 0: value at θ = 0, imaginary part / θ, axis part."""
    a, x = torch.broadcast_tensors(a, x)
    near = a.square() + x < 1
    a_near, a_far = _branches(a, near, away=0.0)
    x_near, x_far = _branches(x, near)
    real, imag, axis = torch.full_like(a, _EXP[-1]), torch.zeros_like(a), torch.zeros_like(a)
    for c in reversed(_EXP[:-1]):
        real, imag, axis = a_near * real - x_near * imag + c, a_near * imag + real, a_near * axis + imag
    size, growth = a_far.square() + x_far, a_far.exp()
    sine, cosine_defect = growth * sin_ratio(x_far), growth * cos_ratio(x_far)
    imag_far = (a_far * sine - a_far.expm1() + x_far * cosine_defect) / size
    axis_far = (a_far * cosine_defect + exp_ratio(a_far) - sine) / size
    return exp_ratio(a), torch.where(near, imag, imag_far), torch.where(near, axis, axis_far)


def _todd_near(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts of ζ/(e^ζ − 1) by its series in ζ² = (a² − x) + 2 a i θ."""
    square, double = a.square(), 2 * a
    real, imag, axis = torch.full_like(a, _COTH[-1]), torch.zeros_like(a), torch.zeros_like(a)
    for c in reversed(_COTH[:-1]):
        real, imag, axis = (
            (square - x) * real - double * x * imag + c,
            (square - x) * imag + double * real,
            square * axis + real + double * imag,
        )
    return real - a / 2, imag - 0.5, axis


def todd_complex(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """ζ/(e^ζ − 1) for ζ = a + iθ, of a and x = θ²: real part, imaginary part / θ.

    x may be negative: then the eigenvalues a ± sqrt(−x) are real, and the two numbers are the mean of the function at
    them and its divided difference. Smooth where an eigenvalue is zero or both are equal.
    """
    near = a.square() + x.abs() < 1
    split = ~near & (x < -0.25)
    regular = ~near & ~split
    real_near, imag_near, _ = _todd_near(torch.where(near, a, 0.0), torch.where(near, x, 0.0))

    a_r, x_r = torch.where(regular, a, 0.0), torch.where(regular, x, 1.0)
    sine, cosine = sin_ratio(x_r), 1 - x_r * cos_ratio(x_r)
    size = 4 * (a_r / 2).sinh().square() + x_r * sin_ratio(x_r / 4).square()  # e^-a |e^ζ − 1|²
    fall = cosine - (-a_r).exp()
    real_regular, imag_regular = (a_r * fall + x_r * sine) / size, (fall - a_r * sine) / size

    a_s, root = torch.where(split, a, 0.0), torch.where(split, -x, 1.0).sqrt()
    upper, lower = todd(a_s + root), todd(a_s - root)
    real_split, imag_split = (upper + lower) / 2, (upper - lower) / (2 * root)
    return (
        torch.where(near, real_near, torch.where(split, real_split, real_regular)),
        torch.where(near, imag_near, torch.where(split, imag_split, imag_regular)),
    )


def todd_axis(a: Tensor, x: Tensor) -> Tensor:
    """The axis part of ζ/(e^ζ − 1), of a and x = θ² >= 0: (value at θ = 0 minus real part)/θ².

    Away from zero by (sin h/h)[(α coth α − 1) sin h/h + (sin h/h − cos h)]/(4 (sinh² α + sin² h)), with α = a/2 and
    h = θ/2, which has no cancellation: both terms are positive.
    """
    near = a.square() + x < 1
    _, _, axis_near = _todd_near(torch.where(near, a, 0.0), torch.where(near, x, 0.0))
    a, x = torch.where(near, 0.0, a), torch.where(near, 1.0, x)
    sine = sin_ratio(x / 4)
    cosine = 1 - x / 4 * cos_ratio(x / 4)
    terms = (coth_half(a.square()) - 1) * sine + (sine - cosine)
    axis_far = sine * terms / (4 * (a / 2).sinh().square() + x * sine.square())
    return torch.where(near, axis_near, axis_far)
